"""The identity of stored bytes, cheap to ask for."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stamp:
    """Size in bytes (None: the store does not say) and version (ETag, generation or time of change; "" if untold).

    `checksum` is of the form "md5:hex" or "sha256:hex"; "md5?:hex" is S3's ETag, an MD5 unless the bucket is encrypted
    with a key of its own. It is no part of the identity.
    """

    size: int | None
    version: str
    checksum: str | None = field(default=None, compare=False)
