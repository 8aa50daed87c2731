"""Webdataset shards: built, read, decoded, captioned; and the scenes that are rendered by default."""
