"""The counting set (Paiss et al., "Teaching CLIP to Count to Ten", 2023): captions whose number a detector agrees with.

Captions with exactly one spelled number; detections whose most frequent class has as many objects; small numbers, which
are far more frequent, made rarer. Whole samples are written, with their number.
"""
