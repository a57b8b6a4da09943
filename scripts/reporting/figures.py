"""The figures: each is a grid of panels, drawn as one image for files and panel by panel for the page."""

import html
import io
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import NullLocator

from scripts.reporting.errors import BEST, BINS, ZERO_SHOT, Curve, Errors
from scripts.reporting.results import Results
from scripts.reporting.sheets import accuracies, in_words, places

# Okabe and Ito's colours that show on white and on black; markers and dashes say the same without colour. A colour has
# the same marker again only after 56 configurations.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#8A8A8A")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
DASHES = ("-", "--", "-.", (0, (1, 1)))
INK = "#123456"  # colour of text and axes, which the page replaces by its own
TRAINING_POINTS = 100  # longer training curves are averaged to so many; whole, they would make megabytes
WIDEST = 4  # panels side by side
FEWEST = 5  # images of a bin whose accuracy is shown

Style = dict[str, str | tuple]
Points = dict[str, list[tuple[float, pd.Series]]]  # by configuration: x, and accuracies, one for each seed


@dataclass
class Grid:
    """A figure: its file name, title and caption, its panels by title, and its lines' styles by configuration."""

    name: str
    title: str
    caption: str
    panels: dict[str, Callable[[Axes], None]]
    styles: dict[str, Style]


def grids(results: Results, folder: Path) -> tuple[list[Grid], list[str]]:
    """Return all figures of the runs that were trained, and notes on curves that cannot be read."""
    runs, styles = results.tested, _styles(results)
    curves, notes = _read_curves(runs, folder)
    with_curve = runs[runs.run_id.isin(curves)]
    found = [_against_shots(runs, styles)]
    found += [_against_cost(runs, *about, styles) for about in COSTS if about[0] in runs]
    found += [_curves(at, shots, curves, styles) for shots, at in with_curve.groupby("shots")]
    return [grid for grid in found if grid.panels], notes


def _styles(results: Results) -> dict[str, Style]:
    """Return the look of each configuration, the same in all figures."""
    names = ("color", "marker", "linestyle")
    looks = zip(results.labels(results.tested), zip(cycle(COLOURS), cycle(MARKERS), cycle(DASHES)))
    return {label: dict(zip(names, look)) for label, look in looks}


def _only(styles: dict[str, Style], labels: Iterable[str]) -> dict[str, Style]:
    present = set(labels)
    return {label: style for label, style in styles.items() if label in present}


def _draw_points(ax: Axes, points: Points, styles: dict[str, Style]) -> None:
    """Draw means and standard deviations over seeds."""
    for label, at in points.items():
        means = [values.mean() for _, values in at]
        deviations = [values.std() if len(values) > 1 else 0.0 for _, values in at]
        ax.errorbar([x for x, _ in at], means, yerr=deviations, capsize=2, **styles[label])
    ax.set_ylabel("test accuracy, %")


# --- accuracy against shots


def _against_shots(runs: pd.DataFrame, styles: dict[str, Style]) -> Grid:
    shots = sorted(runs.shots.unique())
    panels = {}
    for title, part, columns in places(runs):
        points = defaultdict(list)
        for (label, n), own in part.groupby(["configuration", "shots"], sort=False):
            values = accuracies(own, columns)
            if values is not None:
                points[label].append((n, values))
        if points:
            panels[title] = partial(_draw_against_shots, points=points, shots=shots, styles=styles)
    caption = "Mean and standard deviation over seeds. An average is shown if no dataset is missing."
    used = _only(styles, runs.configuration)
    return Grid("accuracy_against_shots", "Test accuracy against shots", caption, panels, used)


def _draw_against_shots(ax: Axes, points: Points, shots: list[int], styles: dict[str, Style]) -> None:
    aside = {label: 2 ** (0.06 * (i - (len(points) - 1) / 2)) for i, label in enumerate(points)}
    beside = {label: [(n * aside[label], values) for n, values in at] for label, at in points.items()}
    _draw_points(ax, beside, styles)  # side by side, or error bars would hide each other
    ax.set_xscale("log", base=2)
    ax.set_xticks(shots, [str(n) for n in shots])
    ax.xaxis.set_minor_locator(NullLocator())
    ax.set_xlim(shots[0] / 1.4, shots[-1] * 1.4)
    ax.set_xlabel("shots")


# --- accuracy against what it costs

MEMORY = " Memory is torch's on a GPU and the whole process's on a CPU: compare only on one device."
COSTS = (  # column of the records, label of the axis, file name, addition to the caption
    ("changed_weights", "changed weights", "accuracy_against_changed_weights", ""),
    ("peak_memory_mb", "peak memory, MiB", "accuracy_against_memory", MEMORY),
)


def _against_cost(runs: pd.DataFrame, cost: str, axis: str, name: str, more: str, styles: dict[str, Style]) -> Grid:
    """Return a figure with a point for each configuration; for the datasets of a suite it is their average."""
    panels, shown = {}, set()
    for title, part, columns in places(runs.dropna(subset=cost), once=True):
        for shots, at in part.groupby("shots"):
            points = {}
            for label, own in at.groupby("configuration"):
                values = accuracies(own, columns)
                if values is not None:
                    points[label] = [(own.groupby("tested_on")[cost].mean().mean(), values)]
            if points:
                shown |= points.keys()
                panel = partial(_draw_against_cost, points=points, axis=axis, styles=styles)
                panels[f"{title}, {in_words(shots)}"] = panel
    title = f"Test accuracy against {axis.split(',')[0]}"
    return Grid(name, title, f"Mean and standard deviation over seeds.{more}", panels, _only(styles, shown))


def _draw_against_cost(ax: Axes, points: Points, axis: str, styles: dict[str, Style]) -> None:
    _draw_points(ax, points, {label: style | {"linestyle": "none"} for label, style in styles.items()})
    costs = [cost for ((cost, _),) in points.values() if cost > 0]
    if costs and max(costs) / min(costs) > 20 and len(costs) < len(points):
        ax.set_xscale("symlog", linthresh=10 ** np.floor(np.log10(min(costs))))
    elif costs and max(costs) / min(costs) > 20:
        ax.set_xscale("log")
    else:
        ax.locator_params(axis="x", nbins=4)
    ax.margins(x=0.15, y=0.15)
    ax.set_xlabel(axis)


# --- training and test curves


def _read_curves(runs: pd.DataFrame, folder: Path) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Return the curve of each run that has one, by run_id, and notes on those that are damaged."""
    curves, notes = {}, []
    for run_id in runs.run_id:
        path = folder / str(run_id) / "curve.csv"
        try:
            curve = pd.read_csv(path)
            curves[run_id] = curve[["iteration", "train_accuracy"]].join(curve.filter(["test_accuracy"])).astype(float)
        except FileNotFoundError:
            continue
        except (ValueError, KeyError):
            notes.append(f"{path} is damaged and its curve left out.")
    return curves, notes


def _curves(runs: pd.DataFrame, shots: int, curves: dict[str, pd.DataFrame], styles: dict[str, Style]) -> Grid:
    panels = {
        title: partial(_draw_curves, runs=part, curves=curves, styles=styles)
        for title, part, columns in places(runs)
        if len(columns) == 1
    }
    caption = (
        f"A line is a run. Thin: training accuracy, on augmented images, averaged to at most {TRAINING_POINTS} "
        "points. Thick, with markers: test accuracy, of runs with --eval_every."
    )
    title = f"Training and test curves, {in_words(shots)}"
    return Grid(f"curves_{shots}shot", title, caption, panels, _only(styles, runs.configuration))


def _draw_curves(ax: Axes, runs: pd.DataFrame, curves: dict[str, pd.DataFrame], styles: dict[str, Style]) -> None:
    for run in runs.itertuples():
        curve, style = curves[run.run_id], styles[run.configuration]
        part = np.arange(len(curve)) * min(len(curve), TRAINING_POINTS) // len(curve)
        training = curve.groupby(part)[["iteration", "train_accuracy"]].mean()
        ax.plot(training.iteration, training.train_accuracy, linewidth=0.6, alpha=0.7, **style | {"marker": ""})
        if "test_accuracy" in curve:
            test = curve.dropna(subset="test_accuracy")
            ax.plot(test.iteration, test.test_accuracy, linewidth=1.4, markersize=2.5, **style)
    ax.locator_params(axis="x", nbins=4)
    ax.set_xlabel("iteration")
    ax.set_ylabel("accuracy, %")


# --- reliability


def reliability(results: Results, errors: Sequence[Errors]) -> list[Grid]:
    """Return the figure of the reliability curves, or nothing if no run has predictions."""
    styles = _styles(results) | {ZERO_SHOT: {"color": COLOURS[-1], "marker": "x", "linestyle": ":"}}
    panels = {
        f"{one.title}, {in_words(one.shots)}": partial(_draw_reliability, curves=one.curves, styles=styles)
        for one in errors
    }
    caption = (
        f"Accuracy against confidence in {BINS} bins of equal width, over all seeds, of the {BEST} best methods. "
        f"Bins of fewer than {FEWEST} images are left out. On the grey line the two are equal; below it a model is too "
        "sure."
    )
    shown = [label for one in errors for label in one.curves]
    return [Grid("reliability", "Reliability", caption, panels, _only(styles, shown))] if panels else []


def _draw_reliability(ax: Axes, curves: dict[str, Curve], styles: dict[str, Style]) -> None:
    ax.plot([0, 100], [0, 100], color="#8A8A8A", linewidth=0.8)
    for label, curve in curves.items():
        full = curve.images >= FEWEST
        ax.plot(curve.confidence[full], curve.accuracy[full], **styles[label])
    ax.set_xlabel("confidence, %")
    ax.set_ylabel("accuracy, %")


# --- images


def _settings(ink: str) -> dict:
    names = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    return dict.fromkeys(names, ink) | {
        "font.size": 10,
        "axes.titlesize": 10,
        "axes.grid": True,
        "grid.alpha": 0.15,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "lines.markersize": 5,
        "lines.linewidth": 1.4,
        "svg.fonttype": "none",  # text stays text
    }


def image(grid: Grid, kind: str) -> bytes:
    """Return the whole figure on white; `kind` is png or svg. The same grid gives the same bytes."""
    with matplotlib.rc_context(_settings("black") | {"svg.hashsalt": grid.name}):
        columns = min(WIDEST, len(grid.panels))
        rows = -(-len(grid.panels) // columns)
        wide = max(columns * 3.9, 6)
        across = max(1, int(wide / (0.5 + 0.08 * max(map(len, grid.styles)))))
        legend_height = 0.22 * -(-len(grid.styles) // across)
        figure = Figure(figsize=(wide, rows * 3.1 + legend_height), layout="constrained")
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for ax, (title, draw) in zip(axes, grid.panels.items()):
            draw(ax)
            ax.set_title(_plain(title))
        for ax in axes[len(grid.panels) :]:
            ax.remove()
        figure.legend(handles=_handles(grid), loc="outside lower center", ncols=across, frameon=False)
        return _saved(figure, kind)


def inline(grid: Grid) -> tuple[str, list[str]]:
    """Return the legend and the panels as SVG elements of a page, in its text colour; they scale with the page."""
    with matplotlib.rc_context(_settings(INK)):
        panels = []
        for title, draw in grid.panels.items():
            figure = Figure(figsize=(5.2, 3.7), layout="constrained")
            ax = figure.subplots()
            draw(ax)
            ax.set_title(_plain(title))
            panels.append(_element(figure, f"{grid.title}: {title}", f"{grid.name} {title}"))
        figure = Figure(figsize=(0.6 + 0.083 * max(map(len, grid.styles)), 0.22 * len(grid.styles)))
        figure.legend(handles=_handles(grid), loc="center left", frameon=False, borderpad=0, borderaxespad=0)
        return _element(figure, f"Legend: {', '.join(grid.styles)}", f"{grid.name} legend"), panels


def _handles(grid: Grid) -> list[Line2D]:
    return [Line2D([], [], label=_plain(label), **style) for label, style in grid.styles.items()]


def _plain(words: str) -> str:
    """Return words in which a dollar sign does not begin a formula."""
    return words.replace("$", r"\$")


def _saved(figure: Figure, kind: str, **options) -> bytes:
    buffer = io.BytesIO()
    undated = {"Date": None} if kind == "svg" else {"Software": None}
    figure.savefig(buffer, format=kind, dpi=200, metadata=undated, **options)
    return buffer.getvalue()


def _element(figure: Figure, description: str, salt: str) -> str:
    """Return a figure as an <svg> for a page with other figures: without header, metadata, fixed size and unused ids.

    The ids that stay differ from those of other figures by `salt`.
    """
    with matplotlib.rc_context({"svg.hashsalt": salt}):
        svg = _saved(figure, "svg", transparent=True).decode("utf-8")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg[svg.index("<svg") :], flags=re.DOTALL)
    head, _, body = svg.partition(">")
    view = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', head)
    body = re.sub(r'<g id="[^"]*"', "<g", body).replace("xlink:href", "href").replace(INK, "currentColor")
    label = html.escape(description)
    return f'<svg viewBox="{view[0][9:-1]}" style="width:{view[1]}pt" role="img" aria-label="{label}">{body.strip()}'
