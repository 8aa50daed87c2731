"""Making shards from tables, COCO captions and image folders."""
