"""Stored image files to uint8 pixels: decoding, crops, augmentation."""
