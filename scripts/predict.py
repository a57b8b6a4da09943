"""What an adapted model says of images: a row for each, with the five most probable classes.

    python scripts/predict.py --weights adapted/.../so.safetensors --images photos --out predictions.csv
    python scripts/predict.py --weights adapted/.../so.safetensors --images a.jpg b.jpg --html page.html

The weight file says which model, method, classes and prompts it belongs to. Images are read like your own images in
training: upright, without transparency. Columns of the table: path, class, probability, then class_2, probability_2 and
so on. The softmax's probabilities are as overconfident as the model.
"""

import argparse
import base64
import csv
import html
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image

from common import Parser, UserError, counted, note, one_line_errors, write_atomically
from datasets import Item
from datasets.classnames import check_names
from datasets.decoding import image_endings, read_upright_image
from datasets.parts import is_hidden
from datasets.splits import read_text
from methods.adaptation import Adaptation
from methods.loading import add_flags, load_adapted
from predictions import IMAGES_AT_ONCE
from run_utils import make_reproducible, use_device

BEST = 5  # classes of each image
THUMBNAIL = 160  # pixels of the longer side


@dataclass(frozen=True)
class Answer:
    """What the model says of an image: its most probable classes with their probabilities, the best first."""

    path: str
    best: list[tuple[str, float]]


def images_in(paths: Sequence[str]) -> list[str]:
    """Return the image files among `paths` and in the folders among them, sorted within each folder.

    Raise UserError if one does not exist, or if there is no image.
    """
    found, left_out = [], 0
    for given in paths:
        path = Path(given)
        if path.is_file():
            found.append(str(path))
            continue
        if not path.is_dir():
            raise UserError(f"--images {given} does not exist")
        files = [file for file in sorted(path.rglob("*")) if file.is_file() and not _is_hidden(file.relative_to(path))]
        images = [str(file) for file in files if file.name.lower().endswith(image_endings())]
        left_out += len(files) - len(images)
        found += images
    if left_out:
        note(f"{counted(left_out, 'file')} in the folders left out: the name does not end like an image")
    if not found:
        raise UserError(f"--images {' '.join(paths)}: no images there")
    return found


def _is_hidden(path: Path) -> bool:
    return any(is_hidden(part) for part in path.parts)


def names_in(file: str) -> tuple[str, ...]:
    """Return the class names in a file of one line each."""
    path = Path(file)
    if not path.is_file():
        raise UserError(f"--classnames {file} is not a file")
    return check_names([line.strip() for line in read_text(path).splitlines() if line.strip()], file)


@torch.no_grad()
def answers(adaptation: Adaptation, paths: Sequence[str]) -> Iterator[Answer]:
    """Yield what the adapted model says of these images. Raise DatasetError for an image that cannot be read."""
    experiment = adaptation.experiment
    features = experiment.image_features([Item(path, 0) for path in paths], "images")
    names, classifier, number = experiment.task.class_names, adaptation.text_classifier(), 0
    for part in features.split(IMAGES_AT_ONCE):
        logits = adaptation.logits(part.to(experiment.device), classifier)
        if not logits.isfinite().all():
            raise UserError("the model's logits are not finite numbers; are the weights intact?")
        labels = logits.argsort(dim=-1, descending=True, stable=True)[:, :BEST]
        weights = (logits - logits.amax(dim=-1, keepdim=True)).exp()
        total = weights.sum(dim=-1, keepdim=True).double()  # as in predictions.csv, to the last digit
        for row, values in zip(labels.tolist(), (weights.gather(1, labels) / total).tolist()):
            yield Answer(paths[number], [(names[label], value) for label, value in zip(row, values)])
            number += 1


def table(found: Sequence[Answer]) -> str:
    """Return the answers as CSV."""
    ranks = range(2, len(found[0].best) + 1)
    head = ["path", "class", "probability", *(f"{name}_{rank}" for rank in ranks for name in ("class", "probability"))]
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(head)
    for answer in found:
        fields = [field for name, value in answer.best for field in (name, f"{value:.6g}")]
        writer.writerow([answer.path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace"), *fields])
    return text.getvalue()


PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>Predictions</title>
<style>body{font:16px sans-serif;margin:1em}div{display:flex;flex-wrap:wrap;gap:1em}figure{margin:0;width:170px}
img{max-width:100%}figcaption{overflow-wrap:anywhere}small{color:#555}</style>
<h1>Predictions</h1><p>ABOUT</p><div>
FIGURES
</div></html>
"""


def page(found: Sequence[Answer], about: str) -> str:
    """Return one HTML page of small copies of the images with their answers. It loads nothing."""
    figures = []
    for answer in found:
        (first, probability), *others = answer.best
        more = "".join(f"<br><small>{html.escape(name)} {100 * value:.1f} %</small>" for name, value in others[:2])
        name = html.escape(answer.path.encode("utf-8", "surrogateescape").decode("utf-8", "replace"))
        figures.append(
            f'<figure><img alt="" src="{_thumbnail(answer.path)}"><figcaption><b>{html.escape(first)}</b> '
            f"{100 * probability:.1f} %{more}<br><small>{name}</small></figcaption></figure>"
        )
    return PAGE.replace("ABOUT", html.escape(about)).replace("FIGURES", "\n".join(figures))


def _thumbnail(path: str) -> str:
    image, buffer = read_upright_image(path), io.BytesIO()
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.BICUBIC)
    image.save(buffer, "JPEG", quality=80)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="predict.py", description=__doc__.splitlines()[0])
    add_flags(parser)
    parser.add_argument("--images", required=True, nargs="+", metavar="PATH", help="image files, and folders of them")
    parser.add_argument("--out", metavar="FILE.csv", help="the table")
    parser.add_argument("--html", metavar="FILE.html", help="a page of the images with their answers")
    parser.add_argument("--classnames", metavar="FILE", help="other classes, a name in each line")
    args = parser.parse_args(argv)
    if not args.out and not args.html:
        parser.error("name a file to write: --out or --html")
    return args


def main(argv: Sequence[str] | None = None) -> list[Answer]:
    """Write what the model says of the images, and return it. A mistake of the user ends in one line, exit code 2."""
    with one_line_errors():
        return write(parse(argv))


def write(args: argparse.Namespace) -> list[Answer]:
    paths = images_in(args.images)
    class_names = names_in(args.classnames) if args.classnames else None
    make_reproducible(0)
    use_device(args.device)
    adaptation = load_adapted(
        Path(args.weights), args.backbone, args.arch, class_names, device=args.device, workers=args.workers
    )
    found = list(answers(adaptation, paths))
    settings, classes = adaptation.experiment.settings, adaptation.experiment.task.class_names
    about = f"{settings.method}, {settings.backbone}, {counted(len(classes), 'class')}, {counted(len(found), 'image')}"
    if args.out:
        write_atomically(Path(args.out), table(found))
    if args.html:
        write_atomically(Path(args.html), page(found, about))
    print(f"{about}: {', '.join(file for file in (args.out, args.html) if file)}")
    return found


if __name__ == "__main__":
    main()
