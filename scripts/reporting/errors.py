"""What the runs' predictions show: calibration, accuracy per class, confused classes, and images of the worst errors.

Everything here is for one dataset after the number of shots that most configurations were run with on it.
"""

import base64
import io
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

import main as program
import metrics
from arguments import Config
from common import UserError, progress
from config_files import flags_of, read_config
from datasets import Item, Task
from scripts.reporting.results import Results
from scripts.reporting.sheets import Cell, Sheet, in_words, number, places, spread, usual_shots
from settings import Settings

BINS = 15
ZERO_SHOT = "zero-shot"  # the unchanged model's curve
BEST = 8  # configurations with their own curve or column
CLASSES = 120  # more classes have no whole table
PAIRS, IMAGES, HEIGHT = 8, 4, 72  # confused pairs, images of each, and their height in pixels
NEEDED = ["path", "label", "predicted", "probability", "zero_shot_predicted", "zero_shot_probability"]


@dataclass
class Curve:
    """Images, mean confidence and accuracy (per cent) in each bin, over all seeds; see `metrics.reliability`."""

    images: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray


@dataclass
class Pair:
    """Two classes that the best configuration confuses: images of class `label` taken for class `predicted`.

    `names` are those of the two; `errors`, and the images `tested` of the first class, are counted over all seeds.
    `images` are those of the most confident such errors: a data URI and a caption each.
    """

    label: int
    predicted: int
    names: tuple[str, str]
    errors: int
    tested: int
    images: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Errors:
    """What is known of one dataset's predictions. `best` is the configuration that `pairs` are of."""

    title: str
    shots: int
    best: str
    calibration: Sheet
    classes: Sheet
    pairs: list[Pair]
    curves: dict[str, Curve]


def read_errors(results: Results, folder: Path) -> tuple[list[Errors], list[str]]:
    """Return what the predictions of the runs in `folder` show, by dataset, and notes on what cannot be read."""
    found, notes = [], []
    tested = results.tested[results.tested.classes == "all"]
    for title, runs, columns in places(tested) if len(tested) else []:
        if len(columns) > 1:
            continue
        at = runs[runs.shots == usual_shots(runs)]
        tables = {}
        for run_id in progress(at.run_id, f"predictions on {title}", "run"):
            try:
                table = _read_predictions(folder / run_id)
            except (ValueError, OSError):
                notes.append(f"{folder / run_id}: the predictions are damaged and left out.")
                continue
            if table is not None:
                tables[run_id] = table
        at = at[at.run_id.isin(tables)]
        if len(at):
            errors, own_notes = _errors(results, folder, title, at, tables)
            found.append(errors)
            notes += own_notes
    return found, notes


def _read_predictions(folder: Path) -> pd.DataFrame | None:
    """Return a run's predictions; None if it has none, as older runs. Raise ValueError or OSError for damaged ones."""
    for name in ("predictions.csv", "predictions.csv.gz"):
        if (folder / name).exists():
            return pd.read_csv(folder / name, keep_default_na=False, usecols=NEEDED)
    return None


def _errors(
    results: Results, folder: Path, title: str, runs: pd.DataFrame, tables: dict[str, pd.DataFrame]
) -> tuple[Errors, list[str]]:
    means = runs.groupby("configuration").test_accuracy.mean()
    ranked = sorted(results.labels(runs), key=lambda label: -means[label])
    trained = [label for label in ranked if results.settings.method[label] != "zero_shot"] or ranked
    of_label = {
        label: pd.concat([tables[run_id] for run_id in runs.run_id[runs.configuration == label]]) for label in ranked
    }
    curves = {label: _curve(of_label[label]) for label in trained[:BEST]}
    curves[ZERO_SHOT] = _curve(of_label[ranked[0]], "zero_shot_")
    best = trained[0]
    best_runs = runs.run_id[runs.configuration == best]
    names = _class_names(folder / best_runs.iloc[0], of_label[best])
    pairs = _pairs(of_label[best], names)
    notes = _add_images(pairs, of_label[best], folder / best_runs.iloc[0])
    shots = int(runs.shots.max())
    classes = _class_sheet(title, shots, of_label, trained[:BEST], names)
    return Errors(title, shots, best, calibration_sheet(results, title, runs), classes, pairs, curves), notes


def _curve(table: pd.DataFrame, of: str = "") -> Curve:
    correct = (table[f"{of}predicted"] == table.label).to_numpy()
    return Curve(*metrics.reliability(table[f"{of}probability"].to_numpy(float), correct, BINS))


def _class_names(folder: Path, table: pd.DataFrame) -> list[str]:
    """Return the names of all classes, or their labels where classes.csv is missing."""
    count = int(table[["label", "predicted"]].to_numpy().max()) + 1
    try:
        names = pd.read_csv(folder / "classes.csv", keep_default_na=False).class_name.astype(str).tolist()
    except (OSError, ValueError, AttributeError):
        names = []
    return names if len(names) >= count else [str(label) for label in range(count)]


# --- calibration

MEASURES = {"nll": "NLL, nats", "brier": "Brier", "ece": "ECE, %"}


def calibration_sheet(results: Results, title: str, runs: pd.DataFrame) -> Sheet:
    """Return accuracy, macro accuracy and calibration of the configurations, of those with temperature scaling also a
    row after it, and of the unchanged model."""
    shown = ("test_accuracy", "macro_accuracy", *MEASURES)
    have = [name for name in shown if name in runs]
    rows = []
    for label in results.labels(runs):
        own = runs[runs.configuration == label]
        rows.append([Cell(label), *(_measure(own, name) for name in have)])
        if "scaled_nll" in own and own.scaled_nll.notna().any():
            scaled = [name if name.endswith("accuracy") else f"scaled_{name}" for name in have]
            rows.append([Cell(f"{label}, temperature-scaled"), *(_measure(own, name) for name in scaled)])
    zero_shot = ["zero_shot_accuracy", *(f"zero_shot_{name}" for name in have[1:])]
    rows.append([Cell(f"{ZERO_SHOT}, all runs"), *(_measure(runs, name) for name in zero_shot)])
    headings = {"test_accuracy": "accuracy, %", "macro_accuracy": "macro accuracy, %", **MEASURES}
    notes = [
        "Mean ± standard deviation over seeds. Macro: mean over classes. NLL, Brier score (0 to 2) and expected "
        "calibration error (bins of equal width) are better when smaller. A temperature is fitted on val images."
    ]
    return Sheet(f"Calibration on {title}", ["method", *(headings[name] for name in have)], rows, notes)


def _measure(runs: pd.DataFrame, name: str) -> Cell:
    """Return mean and standard deviation of a measure; a single value where all runs have the same."""
    if name not in runs:
        return number(None)
    values = pd.to_numeric(runs[name]).dropna()
    return spread(values if values.round(9).nunique() > 1 else values[:1])


# --- classes


def _class_sheet(
    title: str, shots: int, of_label: dict[str, pd.DataFrame], labels: list[str], names: list[str]
) -> Sheet:
    """Return the accuracy on each class; of more than CLASSES classes, the worst of the best configuration."""
    accuracies = {
        label: metrics.class_accuracies(table.label.to_numpy(), table.predicted.to_numpy(), len(names))
        for label, table in of_label.items()
        if label in labels
    }
    table = of_label[labels[0]]
    zero_shot = metrics.class_accuracies(table.label.to_numpy(), table.zero_shot_predicted.to_numpy(), len(names))
    images = np.bincount(table.drop_duplicates("path").label, minlength=len(names))
    order = [label for label in np.argsort(accuracies[labels[0]], kind="stable") if images[label]]
    rows = [
        [Cell(names[c]), number(images[c], "{}"), number(zero_shot[c], "{:.1f}")]
        + [number(accuracies[label][c], "{:.1f}") for label in labels]
        for c in order[:CLASSES]
    ]
    notes = [f"Per cent, over seeds; the classes on which {labels[0]} is worst come first."]
    if len(order) > CLASSES:
        notes.append(f"The first {CLASSES} of {len(order)} classes; each run's classes.csv has all.")
    header = ["class", "test images", "zero-shot", *labels]
    return Sheet(f"Accuracy per class on {title}, {in_words(shots)}", header, rows, notes)


def _pairs(table: pd.DataFrame, names: list[str]) -> list[Pair]:
    confused = metrics.confusions(table.label.to_numpy(), table.predicted.to_numpy())[:PAIRS]
    images = np.bincount(table.label, minlength=len(names))
    return [
        Pair(label, other, (names[label], names[other]), errors, int(images[label]))
        for label, other, errors in confused
    ]


# --- images


def _add_images(pairs: list[Pair], table: pd.DataFrame, folder: Path) -> list[str]:
    """Give each pair its most confident errors as small images; return a note if they cannot be read here."""
    if not pairs:
        return []
    try:
        task = _task(folder)
        errors = table[table.label != table.predicted].sort_values("probability", ascending=False, kind="stable")
        for pair in pairs:
            own = errors[(errors.label == pair.label) & (errors.predicted == pair.predicted)]
            for row in own.drop_duplicates("path")[:IMAGES].itertuples():
                image = _data_uri(task.read(Item(row.path, row.label)))
                pair.images.append((image, f"{row.path}: {pair.names[1]} with {row.probability:.0%}"))
    except (UserError, FileNotFoundError) as error:
        return [f"No images of errors in {folder.name}: {error}"]
    return []


def _task(folder: Path) -> Task:
    """Return the task that a run was tested on, as its config.yaml says. Raise UserError if its images are not here."""
    values = read_config(folder / "config.yaml")
    settings = Settings(**{name: values[name] for name in flags_of(Settings) if name in values})
    untrained = replace(settings, eval_only=True, split=None)  # only the test images are read
    return program.read_data(Config(untrained, None, {}))


def _data_uri(image: Image.Image) -> str:
    """Return a small copy of an image as text for a page."""
    size = max(1, round(image.width * HEIGHT / image.height)), HEIGHT
    small = image.resize(size, Image.Resampling.NEAREST if image.height < HEIGHT else Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"
