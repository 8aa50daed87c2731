"""Single flipped bits in each of a run's own files in turn, which resume, eval, export and report then read.

    python -P -m benchmarks.robustness.bit_flips [FOLDER] [--flips 500] [--seed 0]

A tiny run with everything that a run may hold (bad samples, a queue, averages, an evaluation with examples) and two
checkpoints. Rows of the table are files; a flip counts by the worst that any reader made of it:

    refused      one line that names the file, or a line that a checkpoint was passed over or a torn line left out
    no effect    what is read is what was written (a white space, a part that this reader does not read)
    unseen       something else is read, and nobody says so
    traceback    anything but one line

Counts of finished files stay in FOLDER, and a script that was stopped goes on there.
"""

import argparse
import hashlib
import json
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from data.loading.substitution import SubstitutionLog
from eval.report import write_report
from eval.run_record import RunRecord, read_run
from launch.export import export_model
from launch.model_source import load_model
from launch.recipe import load_recipe, settled
from launch.resume import find_start
from tests.launch.tiny import train_here, write_tiny, write_tiny_recipe
from vlm.checkpoint.format import Checkpoint
from vlm.distributed.world import World
from vlm.errors import UserError
from vlm.sealed import sealed_json
from vlm.training.owner import OwnerRecord
from vlm.training.run_directory import RunDirectory

OUTCOMES = ("no effect", "refused", "unseen", "traceback")
GROUPS = ("weights", "exp_avg", "exp_avg_sq", "ema", "teacher", "memory")
_LAST: list[RunRecord] = []
Reader = Callable[[Path], tuple[Any, str]]


def main() -> None:
    """Flip what was not flipped yet, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("runs/bit_flips"))
    parser.add_argument("--flips", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    run = small_run(folder)
    print(f"| file, {arguments.flips} flips each | bytes | " + " | ".join(OUTCOMES) + " |\n|---|" + "---|" * 5)
    for path in files_of(run):
        name = str(path.relative_to(run))
        kept = folder / f"{name.replace('/', '-')}-{arguments.flips}-{arguments.seed}.json"
        if not kept.is_file():
            found = flipped(run, path, arguments.flips, random.Random(f"{arguments.seed} {name}"))
            kept.write_text(json.dumps(found))
        counts = json.loads(kept.read_text())
        cells = " | ".join(str(counts.get(outcome, 0)) for outcome in OUTCOMES)
        print(f"| `{name}` | {path.stat().st_size:,} | {cells} |", flush=True)


def small_run(folder: Path) -> Path:
    """The run, made once; beside it the record of an owner that has ended."""
    run = folder / "run"
    if not (folder / "done").is_file():
        shutil.rmtree(run, ignore_errors=True)
        write_tiny(folder / "data")
        changes: dict[str, Any] = {
            "ema": {"decay": 0.9},
            "objective": {"clip": 1.0, "individual_temperature": 0.5},
            "providers": {"queue": {"size": 16}},
            "evaluate": {"photos": {"kind": "retrieval", "shards": "train-0*.tar"}},
            "data": {"max_bad_share": 1.0},
        }
        train_here(write_tiny_recipe(folder / "data", run, **changes))
        owner = OwnerRecord.of_this_process(run).model_copy(update={"began": 1})
        (run / "owner.json").write_text(sealed_json(json.loads(owner.model_dump_json())))
        (folder / "done").touch()
    return run


def files_of(run: Path) -> list[Path]:
    """One file of each kind that a run writes and later reads."""
    newest = run / "checkpoints/step-00000012"
    return [
        run / "recipe.yaml",
        run / "run.json",
        run / "owner.json",
        run / "examples/photos/examples.json",
        next((run / "substitutions").glob("*/*.jsonl")),
        run / "metrics.jsonl",
        run / "ledger.jsonl",
        run / "history.jsonl",
        run / "samples/rank-0.jsonl",
        newest / "manifest.json",
        *(newest / f"{group}-00000.safetensors" for group in ("weights", "exp_avg", "memory", "own")),
    ]


def flipped(run: Path, path: Path, flips: int, draws: random.Random) -> Counter[str]:
    """The number of flips by the worst outcome that any reader made of them."""
    owner, whole = (run / "owner.json").read_bytes(), path.read_bytes()
    readers = [reader for reader in (resumed, evaluated, exported, reported) if reader in readers_of(path)]
    right = {reader.__name__: reader(run)[0] for reader in readers}
    (run / "owner.json").write_bytes(owner)
    counts: Counter[str] = Counter()
    for _ in range(flips):
        content, bit = bytearray(whole), draws.randrange(8 * len(whole))
        content[bit // 8] ^= 1 << bit % 8
        path.write_bytes(content)
        found = [outcome(reader, run, path, right[reader.__name__]) for reader in readers]
        counts[max(found, key=OUTCOMES.index)] += 1
        if path.name != "owner.json":
            (run / "owner.json").write_bytes(owner)
        path.write_bytes(whole)
    return counts


def readers_of(path: Path) -> tuple[Reader, ...]:
    """Those who read the file at all."""
    if "checkpoints" in path.parts:
        return (resumed, evaluated, exported)
    if path.name in ("run.json", "examples.json"):
        return (reported,)
    return (resumed,) if path.name not in ("recipe.yaml", "metrics.jsonl", "ledger.jsonl") else (resumed, reported)


def outcome(reader: Reader, run: Path, path: Path, right: Any) -> str:
    """The outcome of one reader of the run as it is now."""
    try:
        found, said = reader(run)
    except UserError as error:
        return "refused" if path.name in str(error) and "\n" not in str(error) else "traceback"
    except Exception as error:
        print(f"{reader.__name__} of {path}: {error!r}", flush=True)
        return "traceback"
    if path.name in said:
        return "refused"
    return "no effect" if found == right else "unseen"


def resumed(run: Path) -> tuple[Any, str]:
    """All that a resumed run takes up, and what it says of it."""
    recipe = settled(load_recipe(str(run / "recipe.yaml")))
    directory = RunDirectory(run, World())
    try:
        start = find_start(directory, recipe, "auto", allow_changes=False)
        assert start.checkpoint is not None
        log = SubstitutionLog(run / "substitutions", "nobody")
        said = [*start.notices, *directory.truncate_after(start.step)]
        found = (recipe, state_of(start.checkpoint), log.state(0), directory.metrics(), directory.num_skips())
    finally:
        directory.release()
    return found, " ".join(said)


def state_of(checkpoint: Checkpoint) -> tuple[Any, str]:
    """A checkpoint's manifest and all its tensors, as a hash."""
    digest = hashlib.sha256()
    for group in GROUPS:
        for name, tensor in sorted(checkpoint.tensors(group).items()):
            digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    for piece in checkpoint.by_rank("own"):
        for name, tensor in sorted(piece.items()):
            digest.update(name.encode() + tensor.numpy().tobytes())
    return checkpoint.manifest, digest.hexdigest()


def evaluated(run: Path) -> tuple[Any, str]:
    """The model that an evaluation measures."""
    return weights_of(load_model(str(run)).state_dict()), ""


def exported(run: Path) -> tuple[Any, str]:
    """The model that an export writes."""
    folder = run.parent / "exported"
    shutil.rmtree(folder, ignore_errors=True)
    export_model(str(run), "open_clip", folder, ())
    return hashlib.sha256(next(folder.glob("*.safetensors")).read_bytes()).hexdigest(), ""


def weights_of(tensors: dict[str, torch.Tensor]) -> str:
    """A hash of tensors by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def reported(run: Path) -> tuple[Any, str]:
    """The content of a report; the page itself is written where that differs from the last one read."""
    record = read_run(run)
    if [record] != _LAST:
        write_report([run], run.parent / "report.html")
        _LAST[:] = [record]
    return record, ""


if __name__ == "__main__":
    main()
