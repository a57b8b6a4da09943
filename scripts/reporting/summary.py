"""The first screen: which method is best, by how much, at what cost. And where a method is worse than no training."""

import math
from dataclasses import dataclass, field

import pandas as pd

from common import counted
from scripts.reporting.comparison import CONFIDENCE, SIGNED, differences
from scripts.reporting.results import Results
from scripts.reporting.sheets import (
    MISSING,
    Cell,
    Sheet,
    accuracies,
    in_words,
    number,
    one_device,
    places,
    spread,
    usual_shots,
)

SHOWN, OTHERS = 12, 4  # rows of the ranking, and other places with a sentence


@dataclass
class Ranking:
    """The configurations at one place and number of shots, the most accurate first.

    `rows` has a row for each: configuration, accuracy (mean, per cent), gain over the unchanged model, ahead (of the
    best), low and high (interval of that, or nan), seconds, memory (MiB), weights. `answers` are sentences.
    """

    title: str
    rows: pd.DataFrame
    sheet: Sheet
    answers: list[str] = field(default_factory=list)


def ranking(results: Results) -> Ranking | None:
    """Return the ranking at the first of the places that tables show, with a sentence on each of the others; None if
    nothing was trained and tested on all classes, or no configuration on all datasets of an average."""
    runs = results.tested[results.tested.classes == "all"]
    found = [place for place in places(runs, once=True) if _complete(*place[1:])] if len(runs) else []
    if not found:
        return None
    title, part, columns = found[0]
    shots, own = _complete(part, columns)
    ranked = _ranking(results, part[part.shots == shots], own, title, shots)
    ranked.answers += [_elsewhere(title, *_complete(part, columns)) for title, part, columns in found[1 : 1 + OTHERS]]
    return ranked


def _complete(runs: pd.DataFrame, columns: list[str]) -> tuple[int, dict[str, pd.Series]] | None:
    """Return the number of shots that most configurations were run with on all datasets, and the accuracies of these by
    configuration, for each seed; None if there are none."""
    cells = runs.groupby(["configuration", "shots"], sort=False)
    whole = cells.filter(lambda own: set(own.tested_on) == set(columns))
    if whole.empty:
        return None
    shots = usual_shots(whole)
    at = whole[whole.shots == shots]
    return shots, {label: accuracies(own, columns) for label, own in at.groupby("configuration", sort=False)}


def _elsewhere(title: str, shots: int, found: dict[str, pd.Series]) -> str:
    """Return in a sentence which configuration is best at another place."""
    best = max(found, key=lambda label: found[label].mean())
    return f"On {title}, {in_words(shots)}: {best}, {found[best].mean():.2f} %."


def _ranking(results: Results, runs: pd.DataFrame, found: dict[str, pd.Series], title: str, shots: int) -> Ranking:
    order = sorted(found, key=lambda label: -found[label].mean())
    costs, device = one_device(runs)
    rows, cells = [], []
    for label in order:
        own, cost = runs[runs.configuration == label], costs[costs.configuration == label]
        zero_shot = pd.to_numeric(own.zero_shot_accuracy).groupby(own.tested_on).mean().mean()
        row = {"configuration": label, "accuracy": found[label].mean(), "gain": found[label].mean() - zero_shot}
        row |= _behind(results, order[0], label, shots, title) if label != order[0] else {}
        for name, column in (
            ("seconds", "train_seconds"),
            ("memory", "peak_memory_mb"),
            ("weights", "trainable_weights"),
        ):
            values = pd.to_numeric(cost[column]) if column in cost else pd.Series(dtype=float)
            row[name] = values.groupby(cost.tested_on).mean().mean() if len(values) else math.nan
        rows.append(row)
    table = pd.DataFrame(rows, columns=["configuration", "accuracy", "gain", "ahead", "low", "high", *NUMBERS])
    for row in table.itertuples(index=False):
        interval = "" if pd.isna(row.low) else f" ± {(row.high - row.low) / 2:.2f}"
        cells.append(
            [
                Cell(row.configuration),
                spread(found[row.configuration]),
                number(row.gain, SIGNED),
                number(row.ahead, f"{SIGNED}{interval}"),
                *(number(getattr(row, name), shown) for name, shown in NUMBERS.items()),
            ]
        )
    notes = [
        f"{title[:1].upper()}{title[1:]}, {in_words(shots)}. Behind the best: the mean paired difference with half its "
        f"{CONFIDENCE:.0%} interval, if there are several pairs of runs. Cost: on {_the(device)}.",
    ]
    if len(cells) > SHOWN:
        notes.append(f"The first {SHOWN} of {len(cells)}; all are under Accuracy.")
    header = ["method", "accuracy, %", "over zero-shot", "behind the best", "training", "memory", "trained weights"]
    sheet = Sheet("Ranking", header, cells[:SHOWN], notes)
    return Ranking(title, table, sheet, _answers(table, title, shots, device))


NUMBERS = {"seconds": "{:,.1f} s", "memory": "{:,.0f} MiB", "weights": "{:,.0f}"}  # costs, and how they are shown


def _behind(results: Results, best: str, label: str, shots: int, title: str) -> dict[str, float]:
    """Return the mean paired difference of a configuration to the best one, and its interval."""
    rows = differences(results, label, best)
    rows = rows[rows.shots == shots]
    place = title.replace("average of", "mean of")
    own = rows[rows.data_set == place]
    if own.empty:
        return {"ahead": math.nan, "low": math.nan, "high": math.nan}
    return {"ahead": own.difference.iloc[0], "low": own.low.iloc[0], "high": own.high.iloc[0]}


def _answers(table: pd.DataFrame, title: str, shots: int, device: str) -> list[str]:
    """Return in sentences which configuration is best, by how much, and at what cost."""
    best = table.iloc[0]
    where = (
        f"{in_words(shots)} on {title}" if not title.startswith("average") else f"{in_words(shots)}, {title} datasets"
    )
    answers = [f"{best.configuration} is best after {where}: {best.accuracy:.2f} %, {_over(best.gain)} zero-shot."]
    if len(table) > 1:
        answers.append(_lead(table.iloc[1]))
    cost = [NUMBERS[name].format(best[name]) for name in ("seconds", "memory") if not pd.isna(best[name])]
    if cost:
        weights = counted(int(best.weights), "weight") if best.weights > 0 else "no weights"
        answers.append(f"It trains {weights}: {' and '.join(cost)} on {_the(device)}.")
    others = table[1:][~(table[1:].gain <= 0)]  # the unchanged model costs nothing, and is no answer
    close = others[(others.high >= 0) & (others.seconds < best.seconds / 2)]
    if len(close):
        cheap = close.loc[close.seconds.idxmin()]
        answers.append(
            f"{cheap.configuration} is not clearly worse ({cheap.accuracy:.2f} %) and takes "
            f"{NUMBERS['seconds'].format(cheap.seconds)}."
        )
    return answers


def _the(device: str) -> str:
    return "the CPU" if device == "cpu" else device


def _over(gain: float) -> str:
    if pd.isna(gain):
        return "not compared with"
    return f"{abs(gain):.2f} points {'above' if gain >= 0 else 'below'}"


def _lead(second: pd.Series) -> str:
    """Return in a sentence how far the best configuration is ahead of the second."""
    if pd.isna(second.ahead):
        return f"Second: {second.configuration}, {second.accuracy:.2f} %, not run with the same images."
    lead = f"Lead over {second.configuration}: {-second.ahead:.2f} points"
    if pd.isna(second.low):
        return f"{lead}, from one pair of runs, which says nothing of chance."
    if second.high - second.low < 1e-9:
        return f"{lead}, the same in all pairs of runs, which says nothing of chance."
    clear = "a clear difference" if second.high < 0 else "no clear difference"
    return f"{lead} ({CONFIDENCE:.0%} interval {SIGNED.format(-second.high)} to {SIGNED.format(-second.low)}: {clear})."


# --- below zero-shot


def below_zero_shot_sheet(results: Results) -> Sheet | None:
    """Return the datasets on which the mean accuracy over seeds is below that of the unchanged model in the same runs,
    for each configuration that has some, by number of shots; None if none has."""
    runs = results.tested[(results.tested.method != "zero_shot") & results.tested.zero_shot_accuracy.notna()]
    runs = runs.assign(gain=runs.test_accuracy - runs.zero_shot_accuracy.astype(float))
    shots, rows = sorted(runs.shots.unique()), []
    for label in results.labels(runs):
        cells = [_below(runs[(runs.configuration == label) & (runs.shots == n)]) for n in shots]
        if any(cell.value for cell in cells):
            rows.append([Cell(label), *cells])
    notes = ["Datasets on which training made the model worse, with the difference in percentage points, over seeds."]
    return Sheet("Below zero-shot", ["method", *map(in_words, shots)], rows, notes) if rows else None


def _below(runs: pd.DataFrame) -> Cell:
    """Return the datasets on which the mean gain of one configuration's runs is negative."""
    if runs.empty:
        return Cell(MISSING)
    gains = runs.groupby("short_name", sort=False).gain.mean()
    below = gains[gains < 0].sort_values()
    named = ", ".join(f"{name} {SIGNED.format(gain)}" for name, gain in below.items())
    return Cell(f"{len(below)} of {len(gains)}" + (f": {named}" if named else ""), len(below))
