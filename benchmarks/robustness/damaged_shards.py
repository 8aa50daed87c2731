"""Shards whose headers are damaged or lie, and flipped bits in our own files beside them: tracebacks, and silence.

    python -P -m benchmarks.robustness.damaged_shards [--headers 3000] [--bits 500] [--seed 0] [--work WORK] [--again]

A header with a wrong checksum must be told, or change nothing; of one that lies under a right checksum we must say that
something is wrong, or read the very samples that Python's tarfile reads. Indexing and sequential mode read each shard.
"""

import argparse
import io
import logging
import random
import sys
import tarfile
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from benchmarks.result_cache import ResultCache, machine
from data.shards.cache import CacheConfig, ShardCache
from data.shards.folder_index import FolderIndex
from data.shards.indexing import index_file
from data.shards.manifest import NAME, TEXTS, parse_manifest, parse_texts
from data.shards.sidecar import SUFFIX, parse_index
from data.shards.stamp import Stamp
from data.shards.streaming import stream_samples
from data.shards.tar import Problem, key_and_suffix, read_extent
from vlm.errors import UserError

_PART = 500
_HOSTILE_SIZES = (
    b"\xff" * 12,
    b"\x80" + b"\x7f" * 11,
    b"77777777777\0",
    b"-0000000010\0",
    b"0" * 12,
    b"0000_00010\0\0",
)
_KINDS = (*(bytes([code]) for code in b"0123456789LKSxgXVMDN"), b"\0", b"\xff")
_FIELDS = {
    "name": (0, 100),
    "size": (124, 136),
    "kind": (156, 157),
    "link": (157, 257),
    "magic": (257, 265),
    "rest": (265, 512),
}
Pair = tuple[bytes, bytes]


class Read(NamedTuple):
    """The pairs of picture and text that were read of a shard, and whether anything was said to be wrong."""

    pairs: tuple[Pair, ...]
    told: bool


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--headers", type=int, default=3_000, help="how many damaged headers")
    parser.add_argument("--bits", type=int, default=500, help="how many flipped bits in each of our files")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "damaged-shards")
    parser.add_argument("--again", action="store_true", help="do not use what an earlier call measured")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    results = ResultCache(asked.work, f"seed-{asked.seed}", asked.again)
    counts: Counter[str] = Counter()
    for part in range(0, asked.headers, _PART):
        size = min(_PART, asked.headers - part)
        counts.update(results(f"headers {part}+{size}", partial(_headers, asked, part, size)))
    print(f"{machine()}; {sys.argv[0]} --headers {asked.headers} --bits {asked.bits} --seed {asked.seed}\n")
    print("| what was done to a header | files | told | unchanged | accepted in silence | wrong pairs | tracebacks |")
    print("|---|---|---|---|---|---|---|")
    for way in [*WAYS, "all"]:
        row = [counts[f"{way}/{name}"] for name in ("files", "told", "same", "silent", "wrong", "traceback")]
        print(f"| {way} | {' | '.join(f'{value:,}' for value in row)} |")
    flips = results(f"bits {asked.bits}", lambda: _flips(asked.work, asked.bits, asked.seed))
    print("\n| file | flipped bits | refused | accepted | tracebacks |\n|---|---|---|---|---|")
    for name, row in flips.items():
        print(f"| `{name}` | {' | '.join(f'{value:,}' for value in row)} |")


def whole_shards() -> list[bytes]:
    """One shard in each of the three formats, some of whose names need an extended header."""
    shards = []
    for form in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stored = io.BytesIO()
        with tarfile.open(fileobj=stored, mode="w", format=form) as tar:
            for number in range(6):
                key = f"{number:06d}" if form == tarfile.USTAR_FORMAT or number % 2 else f"é{'x' * 150}/{number:06d}"
                for suffix, content in (("jpg", b"\xff\xd8%d" % number * 150), ("txt", b"caption number %d" % number)):
                    info = tarfile.TarInfo(f"{key}.{suffix}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
        shards.append(stored.getvalue())
    return shards


def _headers(asked: argparse.Namespace, start: int, count: int) -> Counter[str]:
    counts: Counter[str] = Counter()
    shards, ways = whole_shards(), list(WAYS.items())
    path = asked.work / "shard.tar"
    for number in range(start, start + count):
        rng = random.Random(f"{asked.seed} {number}")
        way, (damage, is_lie) = ways[number % len(ways)]
        whole = rng.choice(shards)
        path.write_bytes(whole)
        original = by_tarfile(path)
        path.write_bytes(damage(bytearray(whole), rng))
        verdicts = [_verdict(read, path, original, is_lie) for read in (by_index, by_stream)]
        worst = next(name for name in ("traceback", "wrong", "silent", "told", "same") if name in verdicts)
        for where in (way, "all"):
            counts[f"{where}/files"] += 1
            counts[f"{where}/{worst}"] += 1
    return counts


def _verdict(read: Callable[[Path], Read], path: Path, original: tuple[Pair, ...], is_lie: bool) -> str:
    try:
        found = read(path)
    except UserError:
        return "told"
    except Exception as error:
        print(f"{read.__name__}: {error!r}", file=sys.stderr)
        return "traceback"
    right = {original, by_tarfile(path)} if is_lie else {original}
    if not set(found.pairs) <= {pair for pairs in right for pair in pairs}:
        return "wrong"
    if found.told:
        return "told"
    return "same" if found.pairs in right else "silent"


def by_index(path: Path) -> Read:
    """As a run with an index reads it."""
    index = index_file(path, path.name, Stamp(None, ""), "shards")
    pairs, told = [], bool(index.header.problems)
    with path.open("rb") as file:
        for row in range(len(index)):
            parts = {part: read_extent(file.fileno(), extent) for part, extent in index.extents(row).items()}
            told |= "txt" not in parts  # it is replaced, and named in the ledger
            if "txt" in parts:
                pairs.append((parts["image"], parts["txt"]))
    return Read(tuple(pairs), told)


def by_stream(path: Path) -> Read:
    """As sequential mode reads it."""
    pairs, told = [], False
    with path.open("rb") as file:
        for found in stream_samples(file, path.name):
            if isinstance(found, Problem) or not {"jpg", "txt"} <= found.members.keys():
                told = True
            else:
                pairs.append((found.members["jpg"], found.members["txt"]))
    return Read(tuple(pairs), told)


def by_tarfile(path: Path) -> tuple[Pair, ...]:
    """The pairs that Python's own module finds, as far as it comes."""
    samples: dict[str, dict[str, bytes]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                named = key_and_suffix(member.name)
                file = tar.extractfile(member) if member.isreg() and not member.issparse() else None
                if named is not None and file is not None and member.size < 1 << 20:
                    samples.setdefault(named[0], {}).setdefault(named[1], file.read())
    except Exception:
        pass
    return tuple((parts["jpg"], parts["txt"]) for parts in samples.values() if {"jpg", "txt"} <= parts.keys())


def _header_at(stored: bytearray, rng: random.Random) -> int:
    """The place at which one of the headers begins."""
    return rng.choice([at for at in range(0, len(stored), 512) if stored[at + 257 : at + 262] == b"ustar"])


def _signed(stored: bytearray, at: int) -> bytes:
    """The shard, the checksum of this header made right."""
    stored[at + 148 : at + 156] = b" " * 8
    stored[at + 148 : at + 156] = b"%06o\0 " % sum(stored[at : at + 512])
    return bytes(stored)


def _one_bit(stored: bytearray, rng: random.Random) -> bytes:
    stored[_header_at(stored, rng) + rng.randrange(512)] ^= 1 << rng.randrange(8)
    return bytes(stored)


def _one_byte(stored: bytearray, rng: random.Random) -> bytes:
    at = _header_at(stored, rng) + rng.randrange(512)
    stored[at] = (stored[at] + rng.randrange(1, 256)) % 256
    return bytes(stored)


def _noise(stored: bytearray, rng: random.Random) -> bytes:
    at, size = _header_at(stored, rng) + rng.randrange(448), rng.randrange(2, 64)
    stored[at : at + size] = rng.randbytes(size)
    return bytes(stored)


def _block(stored: bytearray, rng: random.Random) -> bytes:
    at = _header_at(stored, rng)
    block = bytes(stored[at : at + 512])
    stored[at : at + 512] = rng.choice((b"", block * 2, bytes(512), bytes(512) + block))
    return bytes(stored)


def _cut(stored: bytearray, rng: random.Random) -> bytes:
    at = _header_at(stored, rng) + rng.choice((0, rng.randrange(512)))
    at = min(at, len(stored) - 12_288)  # filled up nearer to its end, it is byte for byte a shard of fewer samples
    return bytes(stored[:at]) + (bytes(len(stored) - at) if rng.random() < 0.5 else b"")


def _field(stored: bytearray, rng: random.Random) -> bytes:
    at = _header_at(stored, rng)
    start, stop = _FIELDS[rng.choice(list(_FIELDS))]
    where = at + rng.randrange(start, stop)
    stored[where] = rng.choice((0, 47, 46, 255, rng.randrange(256)))
    return _signed(stored, at)


def _size(stored: bytearray, rng: random.Random) -> bytes:
    at = _header_at(stored, rng)
    near = b"%011o\0" % max(0, int(stored[at + 124 : at + 135], 8) + rng.choice((-512, -1, 1, 511, 512, 513, 5_000)))
    stored[at + 124 : at + 136] = rng.choice((*_HOSTILE_SIZES, near, near))
    return _signed(stored, at)


def _kind(stored: bytearray, rng: random.Random) -> bytes:
    at = _header_at(stored, rng)
    stored[at + 156 : at + 157] = rng.choice(_KINDS)
    return _signed(stored, at)


def _extension(stored: bytearray, rng: random.Random) -> bytes:
    """An extended header that lies, put before a member."""
    at = _header_at(stored, rng)
    size = rng.choice(("0", "1", "513", "-1", "9" * 17, "9" * 40, "x"))
    records = rng.choice(
        (
            f"{len(size) + 9} size={size}\n",
            "14 path=a.jpg\n",
            "99999 path=a\n",
            "22 GNU.sparse.major=1\n19 GNU.sparse.name=x\n",
            "0 =\n",
            "\xff\xfe" * 9,
        )
    ).encode("latin-1")
    info = tarfile.TarInfo("p")
    info.size, info.type = len(records), rng.choice((b"x", b"g", b"L", b"K", b"X", b"S"))
    stored[at:at] = info.tobuf(tarfile.USTAR_FORMAT) + records + bytes(-len(records) % 512)
    return bytes(stored)


WAYS: dict[str, tuple[Callable[[bytearray, random.Random], bytes], bool]] = {
    "one bit": (_one_bit, False),
    "one byte": (_one_byte, False),
    "up to 64 random bytes": (_noise, False),
    "lost, doubled, zeroed": (_block, False),
    "cut off there, or filled up": (_cut, False),
    "any byte, checksum right": (_field, True),
    "size, checksum right": (_size, True),
    "kind, checksum right": (_kind, True),
    "an extended header before it": (_extension, True),
}


def _flips(work: Path, bits: int, seed: int) -> dict[str, list[int]]:
    """Of each of our files: bits flipped, refused, accepted, tracebacks."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        shard = Path(folder) / "a.tar"
        shard.write_bytes(whole_shards()[1])
        index = FolderIndex(ShardCache(CacheConfig(folder=f"{folder}/cache")), "shards")
        index.load_or_build([str(shard)])
        files = {name: (Path(folder) / name).read_bytes() for name in (NAME, TEXTS, f"a.tar{SUFFIX}")}
    readers = {NAME: parse_manifest, TEXTS: parse_texts, f"a.tar{SUFFIX}": parse_index}
    return {name: _flip(files[name], readers[name], bits, random.Random(seed)) for name in files}


def _flip(stored: bytes, read: Callable[[bytes, str], object], bits: int, rng: random.Random) -> list[int]:
    counts: Counter[str] = Counter()
    places = rng.sample(range(8 * len(stored)), min(bits, 8 * len(stored)))
    for bit in places:
        damaged = bytearray(stored)
        damaged[bit // 8] ^= 1 << bit % 8
        try:
            counts["refused" if read(bytes(damaged), "file") is None else "accepted"] += 1
        except UserError:
            counts["refused"] += 1
        except Exception as error:
            print(f"{read.__name__}: {error!r}", file=sys.stderr)
            counts["traceback"] += 1
    return [len(places), counts["refused"], counts["accepted"], counts["traceback"]]


if __name__ == "__main__":
    main()
