"""The one way in which a sample can fail without ending a run."""


class BadSampleError(Exception):
    """A sample that cannot be used; its text is the reason that the ledger gives."""
