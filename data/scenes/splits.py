"""The scenes and captions of each split, planned without rendering, each from its own stream."""

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Final

from data.scenes.captions import Caption, caption, describe
from data.scenes.layout import MAX_OBJECTS, counting_scene, sample_scene, single_scene
from data.scenes.scene import Scene
from data.scenes.vocabulary import COLOURS, SHAPES

ZEROSHOT_PER_CLASS: Final = 25
NUM_RETRIEVAL: Final = 1000
RETRIEVAL_CAPTIONS: Final = 3
COUNTING_PER_NUMBER: Final = 100
ZEROSHOT_TEMPLATES: Final = (
    "a {}",
    "one {}",
    "there is a {}",
    "a picture of a {}",
    "an image of a {}",
    "a drawing of a {}",
    "a small {}",
    "a large {}",
)


@dataclass(frozen=True)
class Plan:
    """One sample before it is rendered; `rng` goes on to give the surfaces their tints."""

    key: str
    scene: Scene
    captions: tuple[Caption, ...]
    rng: Random
    label: int | None = None


def stream(seed: int, split: str, index: int) -> Random:
    """The random numbers of one sample: the same on any machine and in any process, different for any other sample."""
    return Random(f"scenes/{seed}/{split}/{index}")


def key_of(split: str, index: int) -> str:
    """The name of a sample, different over all splits."""
    return f"scenes-{split}-{index:07d}"


def mixed(seed: int, split: str, start: int, stop: int) -> Iterator[Plan]:
    """Samples `start` to `stop` of a split with all kinds of scenes and captions."""
    for index in range(start, stop):
        rng = stream(seed, split, index)
        scene = sample_scene(rng)
        yield Plan(key_of(split, index), scene, tuple(caption(scene, rng)), rng)


def zeroshot(seed: int, split: str, start: int, stop: int) -> Iterator[Plan]:
    """Single objects; the label is the place in `class_names`, and classes follow each other in turn."""
    kinds = [(shape, colour) for shape in SHAPES for colour in COLOURS]
    for index in range(start, stop):
        rng = stream(seed, split, index)
        label = index % len(kinds)
        scene = single_scene(rng, *kinds[label])
        yield Plan(key_of(split, index), scene, tuple(caption(scene, rng)), rng, label)


def counting(seed: int, split: str, start: int, stop: int) -> Iterator[Plan]:
    """Scattered equal objects, as often one as ten; the label is their number less one."""
    for index in range(start, stop):
        rng = stream(seed, split, index)
        label = index % MAX_OBJECTS
        scene = counting_scene(rng, label + 1)
        yield Plan(key_of(split, index), scene, tuple(describe(scene, rng, 2)), rng, label)


def retrieval(seed: int, split: str, start: int, stop: int) -> Iterator[Plan]:
    """Scenes whose every caption is true of that scene alone among all before it and after it."""
    register = _Register()
    candidate = 0
    for index in range(stop):
        while True:
            rng = stream(seed, split, candidate)
            candidate += 1
            scene = sample_scene(rng)
            captions = tuple(describe(scene, rng, RETRIEVAL_CAPTIONS))
            if register.admits(scene, captions):
                break
        register.add(scene, captions)
        if index >= start:
            yield Plan(key_of(split, index), scene, captions, rng)


class _Register:
    """The scenes of a set and their captions, found by the kinds that they hold."""

    def __init__(self) -> None:
        self._entries: defaultdict[str, list[tuple[Scene, tuple[Caption, ...]]]] = defaultdict(list)

    def admits(self, scene: Scene, captions: tuple[Caption, ...]) -> bool:
        """Whether no caption here is true of a scene there, nor the other way round."""
        rivals = (entry for group in scene.groups for entry in self._entries[group.kind])
        return not any(
            any(caption.claim.holds(other) for caption in captions)
            or any(caption.claim.holds(scene) for caption in others)
            for other, others in rivals
        )

    def add(self, scene: Scene, captions: tuple[Caption, ...]) -> None:
        """Take in a scene; its captions name every kind in it, so a rival shares at least one."""
        for group in scene.groups:
            self._entries[group.kind].append((scene, captions))


@dataclass(frozen=True)
class Split:
    """The plan of one split; a fixed size or, with None, what the user asks for."""

    plan: Callable[[int, str, int, int], Iterator[Plan]]
    size: int | None = None


SPLITS: Final = {
    "train": Split(mixed),
    "val": Split(mixed),
    "zeroshot": Split(zeroshot, ZEROSHOT_PER_CLASS * len(SHAPES) * len(COLOURS)),
    "retrieval": Split(retrieval, NUM_RETRIEVAL),
    "counting": Split(counting, COUNTING_PER_NUMBER * MAX_OBJECTS),
}
