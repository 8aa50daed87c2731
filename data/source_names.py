"""Names of sources within a run, and where they stand in its recipe."""

_DOCUMENTS = "documents/"


def document_source(name: str) -> str:
    """The name of a source of documents: no source of pairs has such a one."""
    return f"{_DOCUMENTS}{name}"


def recipe_key(source: str) -> str:
    """The key of a source in a recipe."""
    if source.startswith(_DOCUMENTS):
        return f"data.documents.sources.{source.removeprefix(_DOCUMENTS)}"
    return f"data.sources.{source}"
