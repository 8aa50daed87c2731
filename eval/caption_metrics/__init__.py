"""How near captions are to reference captions of the same images, in the figures of the COCO caption evaluation."""
