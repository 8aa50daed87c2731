"""The tables of the comparison of losses, in Markdown."""

import statistics
from collections.abc import Mapping, Sequence

Times = Mapping[str, Sequence[float]]


def spread(times: Sequence[float]) -> str:
    """Median, and the least and most, in seconds."""
    return f"{statistics.median(times):.2f} ({min(times):.2f} to {max(times):.2f})"


def time_table(lines: Sequence[tuple[str, str, str, Times]]) -> str:
    """Ours beside the peer's."""
    rows = ["| 16,384 pairs, 512 dimensions | vlm, s | open_clip, s | ratio of medians |", "|---|---|---|---|"]
    for title, ours, peer, times in lines:
        ratio = statistics.median(times[peer]) / statistics.median(times[ours])
        rows.append(f"| {title} | {spread(times[ours])} | {spread(times[peer])} | {ratio:.2f} |")
    return "\n".join(rows)


def variants_table(rows: Mapping[str, Times]) -> str:
    """Each option's time over that of the plain loss."""
    lines = ["| 16,384 pairs | s | of plain |", "|---|---|---|"]
    for product, times in rows.items():
        plain = statistics.median(times[f"clip {product}"])
        for name, found in times.items():
            lines.append(f"| {name} | {spread(found)} | {statistics.median(found) / plain:.2f} |")
    return "\n".join(lines)


def memory_table(rows: Mapping[str, Mapping[int, float]], sizes: Sequence[int]) -> str:
    """MB above the inputs, by number of pairs."""
    head = " | ".join(f"{size:,}" for size in sizes)
    lines = [f"| peak MB | {head} |", "|---" * (len(sizes) + 1) + "|"]
    for name, found in rows.items():
        cells = " | ".join(f"{found[size]:,.0f}" if size in found else "" for size in sizes)
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def precision_table(rows: Mapping[tuple[str, str, float], Mapping[str, float]]) -> str:
    """Relative errors against float64."""
    lines = [
        "| 2,048 pairs | features | scale | value | gradient of images | of texts | of the scale |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, kind, scale), found in rows.items():
        cells = " | ".join(f"{found[key]:.1e}" for key in ("value", "image", "text", "scale"))
        lines.append(f"| {name} | {kind} | {scale:g} | {cells} |")
    return "\n".join(lines)
