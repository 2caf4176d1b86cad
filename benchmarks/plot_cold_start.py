"""Draw what ``cold_start.py`` measured: one bar a side, from the start to 64 tokens.

    python -m pip install --group benchmarks
    PYTHONPATH=.:spaces python benchmarks/plot_cold_start.py RESULT.json OUT.svg

Bars are medians, the line at a bar's end reaches from the quickest run to the slowest.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib import pyplot as plt

MILESTONES: Final = {"ready": "#2f8f5b", "first token": "#c2782b", "64 tokens": "#3b6ea8"}
_LONG: Final = 10.0
"""Seconds above which the others can only be seen on a logarithmic scale."""


def draw(result: dict[str, Any], out: Path) -> None:
    """Write the picture; the same result gives the same bytes."""
    mpl.rcParams.update({"svg.hashsalt": "cold start", "font.family": "sans-serif"})
    sides = result["sides"][::-1]
    figure, axes = plt.subplots(figsize=(9.6, 1.4 + 0.5 * len(sides)), layout="constrained")
    for place, side in enumerate(sides):
        begun = 0.0
        for milestone, colour in MILESTONES.items():
            end = statistics.median(run[milestone] for run in side["runs"])
            label = milestone if place == 0 else None
            axes.barh(place, end - begun, left=begun, color=colour, height=0.6, label=label)
            begun = end
        last = [run["64 tokens"] for run in side["runs"]]
        axes.plot([min(last), max(last)], [place, place], color="#1d2733", linewidth=1)
        axes.text(max(last), place, f"  {begun:.2f} s", va="center", color="#48566a")
    axes.set_yticks(range(len(sides)), [side["name"] for side in sides])
    longest = max(run["64 tokens"] for side in sides for run in side["runs"])
    axes.set_xlim(0 if longest < _LONG else 0.1, longest * 1.25)
    axes.set_xscale("linear" if longest < _LONG else "log")
    axes.xaxis.set_major_formatter("{x:g}")
    gpu, model = result["machine"]["gpus"][0]["name"], result["model"]["name"]
    axes.set_xlabel(f"seconds from the start of the first process ({gpu}, {model})")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(loc="lower right", frameon=False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    source, target = sys.argv[1:]
    draw(json.loads(Path(source).read_text("utf-8")), Path(target))
