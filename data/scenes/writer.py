"""Writing of scenes as webdataset shards: all of them or nothing, and the same bytes from any number of processes."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Final

from data.pools.local import LocalPool
from data.scenes.render import encode, render
from data.scenes.splits import SPLITS, ZEROSHOT_TEMPLATES, Plan
from data.scenes.vocabulary import class_names
from vlm.aside import folder_aside
from vlm.errors import UserError
from vlm.paths import new_folder

MIN_IMAGE_SIZE: Final = 32
SETTINGS_FILE: Final = "scenes.json"
CLASSES_FILE: Final = "zeroshot-classes.json"


@dataclass(frozen=True)
class ScenesSummary:
    """The result of writing: the shards and the number of samples of each split."""

    directory: Path
    shards: dict[str, tuple[Path, ...]]
    num_samples: dict[str, int]
    classes: Path


@dataclass(frozen=True)
class RenderJob:
    """One shard: samples `start` to `stop` of a split."""

    path: Path
    split: str
    start: int
    stop: int
    seed: int
    image_size: int


@dataclass(frozen=True)
class ScenesOptions:
    """The options on which the bytes of the scenes depend; library versions come on top."""

    train: int
    val: int
    seed: int
    image_size: int
    shard_size: int

    def __post_init__(self) -> None:
        """Refuse impossible values."""
        lowest = {"train": 1, "val": 1, "seed": 0, "image_size": MIN_IMAGE_SIZE, "shard_size": 1}
        for name, value in asdict(self).items():
            at_least(name, value, lowest[name])

    def jobs(self, directory: Path) -> list[RenderJob]:
        """Every shard of every split; a held-out set of fixed size is one shard."""
        jobs = []
        for name, split in SPLITS.items():
            size = split.size or {"train": self.train, "val": self.val}[name]
            step = size if split.size else self.shard_size
            for number, start in enumerate(range(0, size, step)):
                path = directory / f"{name}-{number:06d}.tar"
                jobs.append(RenderJob(path, name, start, min(start + step, size), self.seed, self.image_size))
        return jobs


def at_least(name: str, value: int, lowest: int) -> int:
    """`value`, or a UserError that names it where it is too small."""
    if value < lowest:
        raise UserError(f"scenes: {name} must be at least {lowest}, found {value}")
    return value


def write_scenes(  # noqa: PLR0913 - the options of the command line, by keyword
    directory: Path,
    *,
    train: int,
    val: int,
    seed: int = 0,
    image_size: int = 64,
    shard_size: int = 1000,
    workers: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> ScenesSummary:
    """Render `train` + `val` scenes and the held-out sets into `directory`, which appears only when all is written.

    `workers` processes (default: one a core); `progress` is called with the number of samples in each finished shard.
    Raises UserError where the directory holds anything, cannot be written, or a value is impossible.
    """
    options = ScenesOptions(train, val, seed, image_size, shard_size)
    workers = None if workers is None else at_least("workers", workers, 1)
    directory = new_folder(directory, "scenes")
    try:
        with folder_aside(directory) as folder:
            jobs = options.jobs(folder)
            with LocalPool(workers) as pool:
                for written in pool.as_done(write_shard, jobs):
                    if progress is not None:
                        progress(written)
            classes = {"classes": class_names(), "templates": ZEROSHOT_TEMPLATES}
            (folder / CLASSES_FILE).write_text(json.dumps(classes, indent=1) + "\n")
            (folder / SETTINGS_FILE).write_text(json.dumps(_manifest(options, jobs), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{directory}: cannot be written ({error.strerror or error})") from error
    return _summary(directory, jobs)


def write_shard(job: RenderJob) -> int:
    """Render one shard; returns how many samples it holds."""
    from webdataset.writer import TarWriter  # pulls in torch, which a process that only plans or tests can do without

    with job.path.open("wb") as stream, TarWriter(stream, mtime=0, user="", group="", encoder=False) as tar:
        for plan in SPLITS[job.split].plan(job.seed, job.split, job.start, job.stop):
            tar.write(sample_of(plan, job.image_size))
    return job.stop - job.start


def sample_of(plan: Plan, image_size: int) -> dict[str, str | bytes]:
    """The members of one sample: image, first caption, ground truth and, where there are classes, the label."""
    truth = json.dumps(_truth(plan, image_size)).encode()
    caption = plan.captions[0].text if plan.captions else ""
    image = encode(render(plan.scene, plan.rng, image_size))
    sample: dict[str, str | bytes] = {"__key__": plan.key, "jpg": image, "txt": caption.encode(), "json": truth}
    if plan.label is not None:
        sample["cls"] = str(plan.label).encode()
    return sample


def _truth(plan: Plan, image_size: int) -> dict[str, object]:
    """Captions and what is known of the image; boxes and centres in pixels."""
    scene = plan.scene
    first, *others = scene.groups
    counts = {group.kind: len(group.objects) for group in scene.groups}
    relation = {"subject": first.kind, "relation": scene.relation, "object": others[0].kind} if scene.relation else None
    objects = [
        {
            "shape": thing.shape,
            "colour": thing.colour,
            "size": thing.size,
            "box": [round(edge * image_size, 2) for edge in thing.box],
            "centre": [round(thing.x * image_size, 2), round(thing.y * image_size, 2)],
        }
        for thing in scene.objects
    ]
    return {
        "captions": [caption.text for caption in plan.captions],
        "objects": objects,
        "counts": counts,
        "count": len(objects),
        "background": scene.background,
        "relation": relation,
    }


def _manifest(options: ScenesOptions, jobs: list[RenderJob]) -> dict[str, object]:
    versions = {"pillow": version("pillow"), "webdataset": version("webdataset")}
    return {**asdict(options), "samples": _num_samples(jobs), "shards": [job.path.name for job in jobs], **versions}


def _num_samples(jobs: list[RenderJob]) -> dict[str, int]:
    return {name: sum(job.stop - job.start for job in jobs if job.split == name) for name in SPLITS}


def _summary(directory: Path, jobs: list[RenderJob]) -> ScenesSummary:
    shards = {name: tuple(directory / job.path.name for job in jobs if job.split == name) for name in SPLITS}
    return ScenesSummary(directory, shards, _num_samples(jobs), directory / CLASSES_FILE)
