"""Says whether datasets are ready, and if not, what is missing or wrong and the remedy.

python -m datasets.doctor dtd eurosat --root_path $DATA
python -m datasets.doctor all --root_path $DATA --all         # every image is decoded, not a sample
python -m datasets.doctor folder --root_path my_pictures      # one's own folder or manifest

Exit code 0: all that was asked for is ready; 2: something has problems; 130: interrupted. A dataset with other images
than the published ones works, so it is ready, but with a warning: its results do not compare. Nothing is changed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import os
import random
import shlex
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from multiprocessing.pool import ThreadPool
from pathlib import Path

from PIL import ExifTags, Image
from tqdm import tqdm

from ..fewshot import val_shots
from ..folder import FolderTask, image_endings, read_folder
from ..images import default_workers
from ..specs import SPECS, Found, departure, names_sha256, search
from ..splits import IMAGE_EXTENSIONS, Split, imagenet_classes, list_imagenet_part, read_split
from ..task import DatasetError, Item, Task, enumerated, has_16_bits, is_transparent, missing_images, printable
from .sources import SOURCES

PER_CLASS = 3  # images of each class that are decoded without --all
USUAL_SHOTS = 16  # the most that papers report
EXAMPLES = 5  # files that a problem names without --all


def main(argv: Sequence[str] | None = None) -> int:
    """Examines the named datasets below --root_path and returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m datasets.doctor", description=__doc__.partition("\n")[0])
    choices = (*SPECS, "folder", "all")
    parser.add_argument("names", nargs="+", choices=choices, metavar="NAME", help=f"of: {', '.join(choices)}")
    parser.add_argument(
        "--root_path", required=True, type=Path, help="the folder that holds the datasets; for folder, your own"
    )
    parser.add_argument("--all", action="store_true", help="decode every image, and name every damaged one")
    arguments = parser.parse_args(argv)
    names = tuple(SPECS) if "all" in arguments.names else tuple(dict.fromkeys(arguments.names))
    if "folder" in arguments.names and len(arguments.names) > 1:
        parser.error("folder stands alone: its --root_path is your own folder, not the one that holds the datasets")
    root = arguments.root_path.expanduser()
    try:
        reports = [examine(name, root, arguments.all) for name in names]
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    ill = [report.name for report in reports if report.problems]
    print(f"{len(reports) - len(ill)} of {len(reports)} ready" + (f"; not ready: {', '.join(ill)}" if ill else ""))
    return 2 if ill else 0


class Report:
    """Prints what is found about one dataset, a line each, and counts problems and warnings.

    A problem keeps `main.py` from using the dataset, a warning keeps its results from being compared.
    """

    def __init__(self, name: str, everything: bool):
        self.name, self.everything = name, everything
        self.problems = self.warnings = 0
        print(name)

    def fact(self, topic: str, text: object) -> None:
        print(printable(f"  {topic}: {text}"))

    def warning(self, text: str) -> None:
        self.warnings += 1
        self.fact("warning", text)

    def problem(self, text: str, examples: Sequence[str] = ()) -> None:
        """One problem in a line; the first of the examples, or with --all every one, follow on lines of their own."""
        self.problems += 1
        self.fact("problem", text)
        shown = examples if self.everything else examples[:EXAMPLES]
        for example in shown:
            print(printable(f"    {example}"))
        if len(shown) < len(examples):
            print(f"    and {len(examples) - len(shown)} more; --all names them")

    def close(self) -> None:
        if self.problems:
            state = f"{self.problems} problem{'s' * (self.problems > 1)}"
        else:
            state = "ready" + (f", {self.warnings} warning{'s' * (self.warnings > 1)}" if self.warnings else "")
        print(f"{self.name}: {state}\n")


def examine(name: str, root: Path, everything: bool = False) -> Report:
    """Print all that is found about dataset `name` below `root`; with `everything` each of its images is decoded."""
    report = Report(name, everything)
    try:
        (_examine_folder if name == "folder" else _examine_published)(name, root, report)
    except OSError as error:
        report.problem(f"{error.filename or root}: {error.strerror}; change its permissions, or check the disk")
    report.close()
    return report


# --- published datasets


def _examine_published(name: str, root: Path, report: Report) -> None:
    command = f"run python -m datasets.download {name} --root_path {shlex.quote(str(root))}"
    found = search(name, root)
    for problem in found.problems:
        report.problem(f"{problem}; or {command}")
    if found.images:
        report.fact("layout", f"images in {found.images}")
    for copy in found.copies:
        report.fact("note", f"{copy} is another copy, which is not used; remove one of them")
    split = _read_imagenet(found, report, command) if name == "imagenet" else _read(name, found, report, command)
    if split:
        _compare(name, found, split, report, command)
        _examine_shots(name, split, report)
    if found.images:
        if split:
            items = (*split.train, *split.val, *split.test)
        else:
            items = _images_below(found.images, IMAGE_EXTENSIONS)
            report.fact("note", f"without a split nothing tells which images belong there; {len(items)} are")
        remedy = f"move {found.images} away and {command}"
        _examine_images(Task(name, (), (), (), (), items, found.images), report, remedy)


def _read_imagenet(found: Found, report: Report, command: str) -> Split | None:
    """All images of both parts, or None if one of them is not as it should be."""
    if found.images is None:
        return None
    wnids, names = imagenet_classes()
    parts = []
    for part in ("train", "val"):
        try:
            listed = enumerate(zip(wnids, list_imagenet_part(found.images / part)))
            parts.append(
                tuple(Item(f"{part}/{wnid}/{image}", label) for label, (wnid, images) in listed for image in images)
            )
        except DatasetError as error:
            report.problem(f"{error}; {command}, which arranges what lies there or says what is to be done")
    return Split(names, parts[0], (), parts[1]) if len(parts) == 2 else None


def _read(name: str, found: Found, report: Report, command: str) -> Split | None:
    """The split, or None if it is not there, as `search` has said, or cannot be used, which is reported."""
    source = _source(name, found)
    if source is None:
        return None
    try:
        split = read_split(name, found)
    except DatasetError as error:
        report.problem(f"{error}; to get it again, move {source} away and {command}")
        return None
    names = names_sha256(split.class_names)
    others = [other for other in SPECS if SPECS[other].names_sha256 == names]
    if others and name not in others:
        report.problem(f"{source} has the class names of {others[0]}, another dataset; move it away and {command}")
        return None
    return split


def _source(name: str, found: Found) -> Path | None:
    """Where the split is read from: a JSON file, folders of images, or FGVC Aircraft's folder of text files."""
    spec = SPECS[name]
    if spec.split_file:
        return found.split
    return found.images if name == "imagenet" or spec.is_test_only else found.folder


def _compare(name: str, found: Found, split: Split, report: Report, command: str) -> None:
    """Compare the split with the published one: its bytes, its numbers, its class names."""
    sizes = (len(split.train), len(split.val), len(split.test))
    unlike = departure(name, split.class_names, sizes)
    same_names, source = names_sha256(split.class_names) == SPECS[name].names_sha256, _source(name, found)
    same_numbers = (len(split.class_names), sizes) == (SPECS[name].classes, SPECS[name].sizes)
    if found.split:
        known = SOURCES[name].split
        if _sha256(found.split.read_bytes()) == known.sha256:
            state = "the checksum reported for the published file" if known.reported else "the published file"
        elif known.reported:
            state = "checksum not known for certain"
        elif unlike:
            state = "not the published file"
        else:
            state = "other bytes than the copy that is known, but its classes and numbers"
        report.fact("split", f"{found.split} ({state})")
    counts = f"{len(split.class_names)} classes, {'/'.join(map(str, sizes))} train/val/test images"
    report.fact("numbers", counts + (", as published" if same_numbers else ""))
    if same_names:
        report.fact("class names", "as published")
    if unlike:
        report.warning(f"there are {unlike}; if that is not meant, move {source} away and {command}")
    if found.split:
        listings = Counter(item.path for item in (*split.train, *split.val, *split.test))
        twice = [path for path, count in listings.items() if count > 1]
        if twice:
            report.warning(f"{len(twice)} images are listed more than once in one part: {twice[0]}")


def _examine_shots(name: str, split: Split, report: Report) -> None:
    """Say how many shots the smallest classes allow."""
    if name in SPECS and SPECS[name].is_test_only:
        report.fact("shots", "none, it is there to test on")
        return
    pooled = name == "imagenet"  # validation images come from the same folders
    needed = USUAL_SHOTS + (val_shots(USUAL_SHOTS) if pooled else 0)
    counts = Counter(item.label for item in split.train)
    small = sorted((counts[label], label) for label in range(len(split.class_names)) if counts[label] < needed)
    if not small:
        report.fact("shots", f"{USUAL_SHOTS} and more")
        return
    fewest = small[0][0]
    most = _most_pooled_shots(fewest) if pooled else fewest
    listed = [f"{split.class_names[label]} {count}" for count, label in small]
    report.fact("shots", f"up to {most} without repeats; classes with fewer than {needed} images: {enumerated(listed)}")
    if most == 0:
        report.problem(f"too few training images, in {listed[0]}; two are needed, to train and validate")


def _most_pooled_shots(images: int) -> int:
    """The most shots for which as many images suffice to train and to validate."""
    return next(shots for shots in range(images, -1, -1) if shots + val_shots(shots) <= images)


def _images_below(root: Path, endings: tuple[str, ...]) -> tuple[Item, ...]:
    """All images below `root`, to be examined for want of a split, with the number of their folder as label."""
    items: list[Item] = []
    for label, (folder, _, names) in enumerate(os.walk(root)):
        images = sorted(name for name in names if name.lower().endswith(endings))
        items += [Item((Path(folder).relative_to(root) / name).as_posix(), label) for name in images]
    return tuple(items)


# --- one's own images


def _examine_folder(name: str, root: Path, report: Report) -> None:
    notes, split, image_root = io.StringIO(), None, root
    try:
        with contextlib.redirect_stderr(notes):
            split, image_root = read_folder(root)
    except DatasetError as error:
        report.problem(str(error))
    for line in notes.getvalue().splitlines():
        report.fact("note", line.removeprefix("note: "))
    if split:
        sizes = (len(split.train), len(split.val), len(split.test))
        report.fact("numbers", f"{len(split.class_names)} classes, {'/'.join(map(str, sizes))} train/val/test images")
        _examine_shots(name, split, report)
    if split or root.is_dir():
        items = (*split.train, *split.val, *split.test) if split else _images_below(root, image_endings())
        task = FolderTask(name, (), (), (), (), items, image_root)
        _examine_images(task, report, "put the right files there, or take them out of the folder or the manifest")


# --- images


def _examine_images(task: Task, report: Report, remedy: str) -> None:
    """Look for missing, empty and damaged images among the test items of `task`, which stand for all of its images."""
    items = list({item.path: item for item in task.test}.values())
    missing, unlisted = missing_images(task.image_root, items)
    for folder, reason in unlisted.items():
        report.problem(f"folder {task.image_root / folder} cannot be listed ({reason}); change its permissions")
    lost = [path for path in missing if path.rpartition("/")[0] not in unlisted]
    if lost:
        report.problem(f"images missing: {len(lost)} of {len(items)}{_clue(task.image_root, lost)}; {remedy}", lost)
    gone = set(missing)
    there = [item for item in items if item.path not in gone]
    empty, broken = _weigh(task.image_root, there)
    if broken:
        reasons = [f"{path} ({reason})" for path, reason in broken.items()]
        report.problem(f"images that cannot be opened: {len(broken)} of {len(items)}; {remedy}", reasons)
    if empty:
        report.problem(f"images of 0 bytes: {len(empty)} of {len(items)}; {remedy}", empty)
    if not missing and not broken:
        report.fact("images", f"all {len(items)} are there")
    bad = {*empty, *broken}
    whole = [item for item in there if item.path not in bad]
    chosen = whole if report.everything else _sample(whole)
    complaints, kinds = _decode(task, chosen)
    seen = f"{len(chosen)} of {len(items)}" + ("" if report.everything else " (a sample; --all decodes every one)")
    if complaints:
        report.problem(f"damaged images: {len(complaints)} among {seen}; {remedy}", complaints)
    elif chosen:
        report.fact("decoded", f"{seen}, all whole")
    for kind, count in kinds.items():
        report.fact("note", f"of the images decoded {count} {kind}")


def _clue(root: Path, missing: Sequence[str]) -> str:
    """What explains why images are missing, if it can be seen."""
    folders = sorted({path.rpartition("/")[0] for path in missing})
    for folder in ["", *folders]:
        nested = root / folder / (root / folder).name
        if nested.is_dir():
            return f"; those of {root / folder} lie one folder too deep, in {nested}"
    if not any(root.iterdir()):
        return f"; {root} is empty"
    folder, _, name = missing[0].rpartition("/")
    if (root / folder).is_dir():
        for entry in sorted(os.listdir(root / folder)):
            if entry.lower() == name.lower():
                return f"; file names differ in upper and lower case ({entry} lies there)"
    return ""


def _weigh(root: Path, items: Iterable[Item]) -> tuple[list[str], dict[str, str]]:
    """The paths of files without content, and of those that are none, such as links to nothing, with the reason."""
    empty, broken = [], {}
    for item in _progress(items, "sizes"):
        try:
            if os.stat(root / item.path).st_size == 0:
                empty.append(item.path)
        except OSError as error:
            broken[item.path] = error.strerror
    return empty, broken


def _sample(items: Iterable[Item]) -> list[Item]:
    """The same few images of each class every time."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    rng = random.Random(0)
    return [item for group in groups.values() for item in rng.sample(group, min(PER_CLASS, len(group)))]


def _decode(task: Task, items: Sequence[Item]) -> tuple[list[str], Counter[str]]:
    """Why images cannot be decoded; and of one's own images how many are of which unusual kind."""

    def look(item: Item) -> tuple[str | None, list[str]]:
        try:
            task.read(item)
        except DatasetError as error:
            return str(error), []
        return None, _kinds(task.image_root / item.path) if isinstance(task, FolderTask) else []

    complaints, counts = [], Counter()
    with ThreadPool(default_workers() + 1) as pool:
        for complaint, kinds in _progress(pool.imap(look, items, chunksize=16), "decoding", len(items)):
            complaints += [complaint] if complaint else []
            counts.update(kinds)
    return complaints, counts


def _kinds(path: Path) -> list[str]:
    """What a readable image of one's own has that it is changed for."""
    with Image.open(path) as image:
        kinds = {
            "are turned as their EXIF data say": image.getexif().get(ExifTags.Base.Orientation, 1) != 1,
            "are transparent and laid on white": is_transparent(image),
            "have 16 bits a channel, scaled to 8": has_16_bits(image),
            "have several pictures, of which the first counts": _has_several_pictures(image),
        }
    return [kind for kind, is_so in kinds.items() if is_so]


def _has_several_pictures(image: Image.Image) -> bool:
    try:
        return getattr(image, "n_frames", 1) > 1
    except Exception:  # damaged pages raise nearly anything; the first, which counts, was read before
        return True


def _progress(iterable: Iterable, label: str, total: int | None = None) -> tqdm:
    """A bar, or in a log a line every half minute."""
    interval = 0.1 if sys.stderr.isatty() else 30
    return tqdm(iterable, desc=label, total=total, leave=False, unit="image", mininterval=interval, delay=interval)


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
