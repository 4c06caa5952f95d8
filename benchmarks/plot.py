"""A run as one picture: how long until the first token, how evenly the rest came, how much in all, and for
whom.

Distributions are drawn as "share of values below", one line a level, on a logarithmic axis: unlike a
histogram it has no bins to choose, shows the tail, and lets several levels lie over each other. matplotlib's
objects are used directly, without pyplot, so that nothing global is touched and no display is needed.
"""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

from benchmarks.metrics import by_adapter, summarize
from benchmarks.records import Level
from benchmarks.report import adapter_title

INK, FAINT, GRID = "#1f2430", "#6b7280", "#e5e7eb"
COLOURS = ("#2563eb", "#ea580c", "#059669", "#9333ea", "#dc2626", "#0891b2", "#ca8a04", "#4b5563")
MAX_BARS = 24


def write_plot(path: Path, levels: Sequence[Level], title: str, subtitle: str) -> None:
    """Draw all levels; the adapters are those of the last one."""
    layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.05)
    figure = Figure(figsize=(12.5, 8.6), dpi=130, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(f"{title}\n", x=0.015, ha="left", fontsize=16, fontweight="bold", color=INK)
    figure.text(0.0155, 0.945, subtitle, fontsize=9.5, color=FAINT, va="top")
    axes = figure.subplots(2, 2)
    for axis in axes.flat:
        _style(axis)
    _distribution(axes[0][0], "Time to first token", levels, [[s.ttft for s in lv.good] for lv in levels])
    gaps = [[gap for shot in level.good for gap in shot.gaps] for level in levels]
    _distribution(axes[0][1], "Inter-token latency", levels, gaps)
    _throughput(axes[1][0], levels)
    _adapters(axes[1][1], levels[-1])
    figure.savefig(path)


def _style(axis: Axes) -> None:
    for side in ("top", "right", "left"):
        axis.spines[side].set_visible(False)
    axis.spines["bottom"].set_color(GRID)
    axis.tick_params(colors=FAINT, length=0, labelsize=9)
    axis.grid(color=GRID, linewidth=0.8)
    axis.set_axisbelow(True)


def _heading(axis: Axes, text: str, note: str) -> None:
    axis.set_title(text, loc="left", fontsize=11.5, fontweight="bold", color=INK, pad=18)
    axis.text(0, 1.025, note, transform=axis.transAxes, fontsize=9, color=FAINT)


def _distribution(
    axis: Axes, name: str, levels: Sequence[Level], values: Sequence[Sequence[float | None]]
) -> None:
    """Share of the values below x, with a dot at the median and at the 99th percentile."""
    drawn = False
    for i, (level, raw) in enumerate(zip(levels, values, strict=True)):
        # Events of one read have gap 0, which a logarithmic axis cannot show: they pile up at its left edge.
        ordered = sorted(max(value * 1e3, 1e-2) for value in raw if value is not None)
        if not ordered:
            continue
        drawn = True
        shares = [(place + 1) / len(ordered) for place in range(len(ordered))]
        colour = COLOURS[i % len(COLOURS)]
        axis.step(ordered, shares, where="post", color=colour, linewidth=1.8, label=level.title)
        for share in (0.5, 0.99):
            at = ordered[min(len(ordered) - 1, int(share * len(ordered)))]
            axis.plot(
                [at], [share], "o", color=colour, markersize=4.5, markeredgecolor="white", clip_on=False
            )
    _heading(axis, name, "share of values below, ms; dots at p50 and p99")
    axis.set_ylim(0, 1.01)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    if not drawn:
        _empty(axis, "nothing to show")
        return
    axis.set_xscale("log")
    axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.xaxis.set_minor_locator(NullLocator())
    axis.legend(frameon=False, fontsize=9, labelcolor=INK, loc="lower right")


def _throughput(axis: Axes, levels: Sequence[Level]) -> None:
    """Output tokens per second over the levels, in the order they ran."""
    rates = [summarize(level.shots, level.wall).output_tokens_per_s for level in levels]
    places = range(len(levels))
    is_rate = levels[0].kind == "rate"
    _heading(axis, "Throughput", f"output tokens/s over {'requests/s' if is_rate else 'concurrent requests'}")
    if len(levels) == 1:
        axis.bar([0], rates, width=0.25, color=COLOURS[0])
        axis.set_xlim(-1, 1)
    else:
        axis.plot(
            places, rates, color=COLOURS[0], linewidth=2, marker="o", markersize=6, markeredgecolor="white"
        )
    for place, rate in zip(places, rates, strict=True):
        axis.annotate(
            f"{rate:.1f}" if rate < 1000 else f"{rate:,.0f}",
            (place, rate),
            xytext=(0, 9),
            textcoords="offset points",
            ha="center",
            fontsize=9.5,
            fontweight="bold",
            color=INK,
        )
    axis.set_xticks(list(places), [f"{level.value:g}" for level in levels])
    axis.set_ylim(0, max([rate for rate in rates if rate == rate], default=0) * 1.18 or 1)
    axis.grid(visible=False, axis="x")


def _adapters(axis: Axes, level: Level) -> None:
    """Median and p99 of the time to first token for each adapter, the busiest first."""
    groups = sorted(by_adapter(level).items(), key=lambda item: -item[1].requests)[:MAX_BARS]
    _heading(
        axis, f"Adapters at {level.title}", "time to first token, ms: bar p50, mark p99; requests in brackets"
    )
    names = [f"{adapter_title(name)} ({summary.requests})" for name, summary in groups]
    medians = [summary.ttft.p50 * 1e3 if summary.ttft.count else 0.0 for _, summary in groups]
    tails = [summary.ttft.p99 * 1e3 if summary.ttft.count else 0.0 for _, summary in groups]
    places = list(range(len(groups)))
    axis.barh(places, medians, height=min(0.62, 0.16 * max(1, len(groups))), color=COLOURS[2])
    axis.plot(tails, places, "|", color=INK, markersize=11 if len(groups) < 12 else 7, markeredgewidth=2)
    axis.set_yticks(places, names, fontsize=9 if len(groups) <= 12 else 7)
    axis.set_ylim(len(groups) - 0.4, -0.6)
    axis.set_xlim(0, max(tails, default=0) * 1.08 or 1)
    axis.grid(visible=False, axis="y")


def _empty(axis: Axes, text: str) -> None:
    axis.text(0.5, 0.5, text, transform=axis.transAxes, ha="center", color=FAINT)
