"""The accuracy of saved weights on other images of your own: folders of class folders, or manifests, several at once.

    python scripts/evaluate.py --weights adapted/.../so.safetensors --data site_b site_c/table.csv --out table.csv

Of a folder or manifest with train, val and test the test images are taken, else all. Its classes must be among those of
the weights, by name; all classes of the weights are candidates. With --own_classes the model answers with the classes
of each folder instead, which heads cannot. A row of the table: data, images, classes, accuracy, zero_shot_accuracy,
macro_accuracy, nll, brier, ece (docs/results.md), weights.
"""

import argparse
import csv
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


import train
from clip.delta import checkpoint_metadata
from common import Parser, UserError, counted, note, one_line_errors, write_atomically
from datasets import Item, Task
from datasets.folder import read_to_test
from datasets.manifest import PARTS
from experiment import Experiment
from methods.loading import add_flags, load_adapted
from run_utils import make_reproducible, use_device

BINS = 15  # of ECE


def spoken(name: str) -> str:
    """Return a class name as prompts have it, in lower case: how classes are compared."""
    return " ".join(name.replace("_", " ").lower().split())


def relabelled(names: Sequence[str], items: Sequence[Item], classes: Sequence[str], data: str) -> tuple[Item, ...]:
    """Return items with the labels that their classes have among `classes`. Raise UserError if one is not there."""
    known = {spoken(name): label for label, name in enumerate(classes)}
    unknown = [names[label] for label in sorted({item.label for item in items}) if spoken(names[label]) not in known]
    if unknown:
        raise UserError(
            f"{data}: the weights do not know the class {unknown[0]!r} (they know {', '.join(classes[:5])}"
            f"{', ...' if len(classes) > 5 else ''}); rename the folder, or use --own_classes"
        )
    return tuple(Item(item.path, known[spoken(names[item.label])]) for item in items)


def note_trained_on(weights: Path, data: str, task: Task) -> None:
    """Say on stderr that images of the folder that the weights were trained on are tested."""
    about = checkpoint_metadata(weights)
    trained = json.loads(about["settings"])
    if trained["dataset"] != "folder" or about["test_sha256"] == task.test_sha256:
        return
    root, tested = (Path(path).expanduser().resolve() for path in (trained["root_path"], data))
    inside = tested.relative_to(root).parts if root in tested.parents else ()
    if tested == root or {PARTS.get(part.lower()) for part in inside} & {"train", "val"}:
        note(
            f"{data}: the weights were trained on some of these images, and all of them are tested; main.py "
            "--eval_only tests only the run's test images"
        )


def evaluated(args: argparse.Namespace, data: str) -> dict:
    """Return the row of the table for a folder or manifest."""
    names, items, image_root = read_to_test(Path(data).expanduser())
    adaptation = load_adapted(
        Path(args.weights),
        args.backbone,
        args.arch,
        names if args.own_classes else None,
        device=args.device,
        workers=args.workers,
    )
    classes = adaptation.experiment.task.class_names
    if not args.own_classes:
        items = relabelled(names, items, classes, data)
    task = replace(adaptation.experiment.task, test=tuple(items), image_root=image_root)
    note_trained_on(Path(args.weights), data, task)
    adaptation.experiment = replace(adaptation.experiment, task=task)
    adapted = train.predict(adaptation.experiment, adaptation)
    settings = adaptation.experiment.settings
    zero_shot = train.zero_shot(
        Experiment.load(settings, adaptation.experiment.hparams, task)
    )  # a method changed the other
    print(
        f"{data}: {settings.method} {adapted.accuracy:.2f} %, zero-shot "
        f"{zero_shot.accuracy:.2f} % ({counted(len(items), 'image')}, {counted(len(classes), 'class')})"
    )
    found = {"data": data, "images": len(items), "classes": len(classes), "accuracy": adapted.accuracy}
    return found | {"zero_shot_accuracy": zero_shot.accuracy} | adapted.metrics(BINS) | {"weights": args.weights}


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="evaluate.py", description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--data", required=True, nargs="+", metavar="PATH", help="folders and manifests")
    parser.add_argument("--out", metavar="FILE.csv", help="a table with a row for each")
    parser.add_argument("--own_classes", action="store_true", help="answer with the classes of each folder")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> list[dict]:
    """Evaluate, write the table, and return its rows. A mistake of the user ends in one line, exit code 2."""
    with one_line_errors():
        args = parse(argv)
        make_reproducible(0)
        use_device(args.device)
        rows = [evaluated(args, data) for data in args.data]
        if args.out:
            text = io.StringIO(newline="")
            writer = csv.DictWriter(text, rows[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            write_atomically(Path(args.out), text.getvalue())
        return rows


if __name__ == "__main__":
    main()
