"""What `benchmarks.peers` has measured, as a picture: a bar for each server and load, a dot for each run.

python -m benchmarks.peers_plot peers.json peers.svg
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from benchmarks.plot import COLOURS, FAINT, GRID, INK

_MEASURES = (
    ("output_tokens_per_s", "Output tokens a second, prompts included"),
    ("first_token_s", "Time to first token, seconds"),
)

Runs = dict[str, dict[str, list[float]]]
"""By load, by server: a number for each run."""


def runs_of(figures: Sequence[dict[str, object]], measure: str) -> Runs:
    """In the order in which loads and servers come first."""
    found: Runs = {}
    for figure in figures:
        of_load = found.setdefault(str(figure["load"]), {})
        of_load.setdefault(str(figure["server"]), []).append(float(str(figure[measure])))
    return found


def write_peers_plot(path: Path, result: dict[str, object]) -> None:
    """Draw a result of `benchmarks.peers`."""
    figures = result["figures"]
    assert isinstance(figures, list)
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12)
    picture = Figure(figsize=(11, 7.5), layout=layout, facecolor="white")
    FigureCanvasSVG(picture)
    servers = list(dict.fromkeys(str(figure["server"]) for figure in figures))
    for axis, (measure, title) in zip(picture.subplots(2, 1), _MEASURES, strict=True):
        _draw(axis, runs_of(figures, measure), servers)
        axis.set_title(title, loc="left", fontsize=11.5, fontweight="bold", color=INK)
    picture.axes[0].legend(frameon=False, fontsize=9, labelcolor=INK)
    # The same picture of the same numbers: no date, no drawn ids.
    picture.savefig(path, metadata={"Date": None})


def _draw(axis: Axes, runs: Runs, servers: Sequence[str]) -> None:
    width = 0.8 / len(servers)
    for place, of_server in enumerate(runs.values()):
        for number, server in enumerate(servers):
            values = of_server.get(server, [])
            if not values:
                continue
            x = place + (number - (len(servers) - 1) / 2) * width
            label = server if place == _first_place(runs, server) else None
            axis.bar(x, statistics.median(values), width * 0.92, color=COLOURS[number], label=label)
            axis.plot([x] * len(values), values, ".", color=INK, markersize=4)
    axis.set_xticks(range(len(runs)), list(runs), fontsize=9, color=FAINT)
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.tick_params(colors=FAINT, length=0, labelsize=9)
    axis.grid(axis="y", color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _first_place(runs: Runs, server: str) -> int:
    return next(place for place, of_server in enumerate(runs.values()) if server in of_server)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers_plot", description="Draw a comparison.")
    parser.add_argument("result", type=Path, metavar="PEERS.json")
    parser.add_argument("picture", type=Path, metavar="PICTURE.svg")
    flags = parser.parse_args(argv)
    write_peers_plot(flags.picture, json.loads(flags.result.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
