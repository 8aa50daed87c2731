"""Names of sources within a run, and where they stand in its recipe."""

_DOCUMENTS = "documents/"


def document_source(name: str) -> str:
    """The name of a source of documents: no source of pairs has such a one."""
    return f"{_DOCUMENTS}{name}"


def is_of_documents(source: str) -> bool:
    """Whether a source is one of documents."""
    return source.startswith(_DOCUMENTS)


def recipe_key(source: str) -> str:
    """The key of a source in a recipe."""
    if is_of_documents(source):
        return f"data.documents.sources.{source.removeprefix(_DOCUMENTS)}"
    return f"data.sources.{source}"
