"""A detector of transformers that has learned nothing, and what the library itself sees with it."""

import io
from collections import Counter
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForObjectDetection,
    YolosConfig,
    YolosForObjectDetection,
    YolosImageProcessor,
)

from vlm.model.clean_configuration import quiet

CLASSES = {0: "dog", 1: "cat", 2: "cup"}


def save_tiny_detector(folder: Path) -> Path:
    """A YOLOS of one layer, which sees some of two or three classes in any picture."""
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    classes = {"id2label": CLASSES, "num_detection_tokens": 16}
    model = YolosForObjectDetection(YolosConfig(image_size=[32, 32], patch_size=8, **shape, **classes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(0, 0.5)
            if "bias" in name:
                parameter.zero_()
    with quiet():
        model.save_pretrained(folder)
        YolosImageProcessor(size={"shortest_edge": 32, "longest_edge": 64}).save_pretrained(folder)
    return folder


def seen_by_library(folder: Path, pictures: list[bytes], min_score: float = 0.5) -> list[dict[str, int]]:
    """For each picture by itself the number of objects of each class."""
    with quiet():
        processor = AutoImageProcessor.from_pretrained(folder)
        model = AutoModelForObjectDetection.from_pretrained(folder).eval()
    counts = []
    for stored in pictures:
        image = Image.open(io.BytesIO(stored)).convert("RGB")
        with torch.no_grad():
            outputs = model(pixel_values=processor(images=image, return_tensors="pt")["pixel_values"])
        (found,) = processor.post_process_object_detection(outputs, threshold=min_score)
        counts.append(dict(Counter(CLASSES[label] for label in found["labels"].tolist())))
    return counts
