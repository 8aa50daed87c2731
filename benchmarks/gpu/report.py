"""What was found, as tables in Markdown."""

from collections.abc import Mapping
from typing import Any

Found = Mapping[str, Any]


def machine_line(facts: Found) -> str:
    """The device and the versions."""
    words = [f"{facts['name']}, Python {facts['python']}, torch {facts['torch']}"]
    if "cuda" in facts:
        words.append(f"{facts['gigabytes']:.0f} GB, CUDA {facts['cuda']}, NCCL {facts['nccl']}")
        words.append(f"bf16 products {facts['peak'] / 1e12:,.0f} TFLOPs/s ({facts['peak_is']})")
    return "; ".join(words)


def check_lines(name: str, found: Found) -> str:
    """A check: passed or not, and what it compared."""
    if found["problem"] is not None:
        return f"| {name} | **FAILED** | {found['problem']} | | {found['seconds']:.1f} |"
    value = found["value"]
    rows = []
    for line in value["lines"]:
        verdict = "passed" if line["passed"] else "**FAILED**"
        rows.append(f"| {name}: {line['what']} | {verdict} | {line['error']:.1e} | {line['bound']:.0e} | |")
    rows[-1] = f"{rows[-1][:-2]} {found['seconds']:.1f} |"
    return "\n".join([*rows, *(f"| {name} | note | {note} | | |" for note in value["notes"])])


CHECK_HEAD = "| check | | error | bound | s |\n|---|---|---|---|---|"


def step_table(name: str, found: Found, peak: float | None) -> str:
    """The steps of a model. MFU is the share of the device's bf16 products that the step's own FLOPs take."""
    if found["problem"] is not None:
        return f"{name}: **FAILED**: {found['problem']}"
    value = found["value"]
    rows = [
        f"| {name}, {value['pairs']:,} pairs, bf16 | s (least to most) | pairs/s | TFLOPs | MFU | GB | first, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for way, figures in value["ways"].items():
        seconds, flops = figures["seconds"], figures["flops"]
        spread = f"{seconds:.4f} ({figures['least']:.4f} to {figures['most']:.4f})"
        share = "" if not (flops and peak) else f"{flops / seconds / peak:.1%}"
        told = "" if not flops else f"{flops / 1e12:.2f}"
        memory = (figures["kept"] + figures["peak"]) / 1e9
        held = f"{memory:.1f}" if memory else ""
        rate = value["pairs"] / seconds
        rows.append(f"| {way} | {spread} | {rate:,.0f} | {told} | {share} | {held} | {figures['first']:.1f} |")
    return "\n".join([*rows, *(f"\n{note}" for note in value["notes"])])


def loss_table(found: Mapping[int, Found]) -> str:
    """Milliseconds and gigabytes of each loss, a column a number of pairs."""
    sizes = list(found)
    problems = [
        f"loss of {size:,} pairs: **FAILED**: {found[size]['problem']}" for size in sizes if found[size]["problem"]
    ]
    done = {size: found[size]["value"] for size in sizes if found[size]["problem"] is None}
    if not done:
        return "\n".join(problems)
    rows = [
        f"| loss, 512 dimensions: ms; GB | {' | '.join(f'{size:,}' for size in done)} |",
        "|---" * (len(done) + 1) + "|",
    ]
    for name in next(iter(done.values()))["ways"]:
        rows.append(f"| {name} | {' | '.join(_loss_cell(value['ways'][name]) for value in done.values())} |")
    notes = {note: None for value in done.values() for note in value["notes"]}
    return "\n".join([*rows, *problems, *(f"\n{note}" for note in notes)])


def _loss_cell(figures: Found) -> str:
    if "words" in figures:
        return str(figures["words"])
    return f"{1e3 * figures['seconds']:,.1f}; {figures['peak'] / 1e9:.2f}"
