"""The picture of an audit: how its errors fall, and where they stop."""

from __future__ import annotations

from pathlib import Path

from scoresde.auditing.figure import Audit
from scoresde.files import write_whole
from scoresde.report import log_ticks

__all__ = ["draw"]

_CURVES = {
    "limit on the Gaussian": ("Gaussian", "#1b4f8f", "-", "o"),
    "limit on the mixture in 2 dimensions": ("mixture, 2 dimensions", "#c0392b", "-", "s"),
    "limit on the mixture in 3072 dimensions": ("mixture, 3072 dimensions", "#8e5ea2", "-", "^"),
    "on a grid to sigma = 0": ("Gaussian, to sigma = 0", "#1b4f8f", "--", "o"),
    "rounding of float32": ("float32 from float64", "0.45", ":", "."),
}


def draw(audit: Audit, path: Path) -> bool:
    """Draw it as a PNG; False where matplotlib is not installed, or nothing is to be drawn."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(6.8, 4.6))
    axis, low, high = figure.add_subplot(), [], []
    for name, (label, color, line, marker) in _CURVES.items():
        found = next((f for f in audit.figures if f.name == name and f.data), None)
        if found is None:
            continue
        points = [(n, e) for n, e in zip(found.data["steps"], found.data["errors"], strict=True) if 0 < e < 1e30]
        if not points:
            continue
        x, y = zip(*points, strict=True)
        axis.plot(x, y, line, color=color, marker=marker, markersize=4.5, linewidth=1.4, label=label)
        low += [min(x), min(y)]
        high += [max(x), max(y)]
    if not low:
        return False
    axis.set(xscale="log", yscale="log", xlabel="steps", ylabel="error, in units of the data")
    order = next((f for f in audit.figures if f.name == "order on the Gaussian" and f.value), None)
    claimed = "" if order is None else f": order {order.value:.2f} measured"
    axis.set_title(f"{audit.name.partition('(')[0]}{claimed}", fontsize=11, loc="left")
    ticks = log_ticks(*axis.get_xlim())
    axis.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axis.minorticks_off()
    axis.grid(color="0.92", linewidth=0.8)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.tight_layout()
    write_whole(path, lambda file: figure.savefig(file, format="png", dpi=120))
    return True
