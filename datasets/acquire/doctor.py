"""Check whether datasets are ready; if not, print what is missing or wrong, and the remedy. Nothing is changed.

python -m datasets.doctor dtd eurosat --root_path $DATA
python -m datasets.doctor all --root_path $DATA --all         # decodes every image, not only a sample
python -m datasets.doctor folder --root_path my_images        # your own folder or manifest

Exit code 0: all datasets are ready; 2: some have problems; 130: interrupted. A dataset with other images than the
published ones works, so it is ready, but with a warning: its results cannot be compared.
"""

import contextlib
import io
import os
import random
import shlex
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import fields
from multiprocessing.pool import ThreadPool
from pathlib import Path

from PIL import Image

from common import Parser, counted, file_sha256, one_line_errors, printable, progress

from ..decoding import MAX_MEGAPIXELS, USUAL, Reading, has_16_bits, image_endings, is_transparent, opened, orientation
from ..fewshot import val_shots
from ..folder import ONLY_IMAGES, FolderTask, OwnImages, read_folder, summary
from ..images import default_workers
from ..specs import RELEASED_TEMPLATES, SPECS, Found, departure, names_sha256, search
from ..splits import IMAGE_EXTENSIONS, Split, folder_items, imagenet_classes, list_imagenet_part, read_split
from ..task import DatasetError, Item, Task, enumerated, note_untested
from .sources import SOURCES

PER_CLASS = 3  # images of each class that are decoded without --all
USUAL_SHOTS = 16  # the largest number that papers report
EXAMPLES = 5  # files that a problem names without --all


def main(argv: Sequence[str] | None = None) -> int:
    """Examine the named datasets below --root_path and return the exit code, 0 or 2."""
    with one_line_errors():
        parser = Parser(prog="python -m datasets.doctor", description=__doc__)
        choices = (*SPECS, "folder", "all")
        parser.add_argument("names", nargs="+", choices=choices, metavar="NAME", help=f"some of {', '.join(choices)}")
        parser.add_argument(
            "--root_path", required=True, type=Path, help="the folder with all datasets; for folder, your own images"
        )
        text = f"largest image that is read, in million pixels [{MAX_MEGAPIXELS}]"
        parser.add_argument("--max_megapixels", type=int, default=MAX_MEGAPIXELS, metavar="N", help=text)
        text = "your images of more than 8 bits a channel: the level that is white"
        parser.add_argument("--white_level", type=float, metavar="LEVEL", help=text)
        for f in fields(OwnImages):
            kind = {"action": "store_true"} if f.type == "bool" or f.type is bool else {"metavar": "PATH"}
            parser.add_argument(f"--{f.name}", help="for folder, as main.py has it", **kind)
        parser.add_argument("--all", action="store_true", help="decode every image, and name every damaged one")
        arguments = parser.parse_args(argv)
        names = tuple(SPECS) if "all" in arguments.names else tuple(dict.fromkeys(arguments.names))
        if "folder" in arguments.names and len(arguments.names) > 1:
            parser.error("folder must be the only name: its --root_path is your own folder, not that of all datasets")
        root = arguments.root_path.expanduser()
        reading = Reading(arguments.max_megapixels, arguments.white_level)
        own = OwnImages(**{f.name: getattr(arguments, f.name) for f in fields(OwnImages)})
        reports = [examine(name, root, arguments.all, reading, own) for name in names]
        failed = [report.name for report in reports if report.problems]
        ready = f"{len(reports) - len(failed)} of {len(reports)} ready"
        print(ready + (f"; not ready: {', '.join(failed)}" if failed else ""))
        return 2 if failed else 0


class Report:
    """The printed findings about one dataset, one line each, and the numbers of problems and warnings.

    With a problem, `main.py` cannot use the dataset; with a warning, results cannot be compared with published ones.
    """

    def __init__(self, name: str, everything: bool, reading: Reading):
        self.name, self.everything, self.reading = name, everything, reading
        self.problems = self.warnings = 0
        print(name)

    def fact(self, topic: str, text: object) -> None:
        print(printable(f"  {topic}: {text}"))

    def warning(self, text: str) -> None:
        self.warnings += 1
        self.fact("warning", text)

    def problem(self, text: str, examples: Sequence[str] = ()) -> None:
        """Print and count a problem; the first examples, or with --all every one, follow on separate lines."""
        self.problems += 1
        self.fact("problem", text)
        shown = examples if self.everything else examples[:EXAMPLES]
        for example in shown:
            print(printable(f"    {example}"))
        if len(shown) < len(examples):
            print(f"    and {len(examples) - len(shown)} more; --all names all of them")

    def close(self) -> None:
        if self.problems:
            state = f"{self.problems} problem{'s' * (self.problems > 1)}"
        else:
            state = "ready" + (f", {self.warnings} warning{'s' * (self.warnings > 1)}" if self.warnings else "")
        print(f"{self.name}: {state}\n")


def examine(
    name: str, root: Path, everything: bool = False, reading: Reading = USUAL, own: OwnImages = ONLY_IMAGES
) -> Report:
    """Print the findings about dataset `name` below `root`; with `everything`, every image is decoded."""
    report = Report(name, everything, reading)
    try:
        if name == "folder":
            _examine_folder(root, own, report)
        else:
            _examine_published(name, root, report)
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
        report.fact("note", f"{copy} is another copy, which is not used; remove one of the two")
    split = _read_imagenet(found, report, command) if name == "imagenet" else _read(name, found, report, command)
    if split:
        _compare(name, found, split, report, command)
        _examine_shots(name, split, report)
    if found.images:
        if split:
            items = (*split.train, *split.val, *split.test)
        else:
            items = _images_below(found.images, IMAGE_EXTENSIONS)
            report.fact(
                "note", f"{counted(len(items), 'image')} found; without a split it is unknown which should be there"
            )
        remedy = f"move {found.images} away and {command}"
        _examine_images(Task(name, (), (), (), (), items, found.images, reading=report.reading), report, remedy)


def _read_imagenet(found: Found, report: Report, command: str) -> Split | None:
    """Return all images of both parts; report and return None if one of them is incomplete."""
    if found.images is None:
        return None
    wnids, names = imagenet_classes()
    parts = []
    for part in ("train", "val"):
        try:
            parts.append(folder_items(f"{part}/", wnids, list_imagenet_part(found.images / part)))
        except DatasetError as error:
            report.problem(f"{error}; {command}, which arranges the files or says what to do")
    return Split(names, parts[0], (), parts[1]) if len(parts) == 2 else None


def _read(name: str, found: Found, report: Report, command: str) -> Split | None:
    """Return the split; None if it is missing, which `search` reports, or unusable, which is reported here."""
    source = _source(name, found)
    if source is None:
        return None
    try:
        split = read_split(name, found)
    except DatasetError as error:
        report.problem(f"{error}; to download it again, move {source} away and {command}")
        return None
    names = names_sha256(split.class_names)
    others = [other for other in SPECS if SPECS[other].names_sha256 == names]
    if others and name not in others:
        report.problem(f"{source} has the class names of {others[0]}, another dataset; move it away and {command}")
        return None
    return split


def _source(name: str, found: Found) -> Path | None:
    """Return the place of the split: a JSON file, folders of images, or FGVC Aircraft's folder of text files."""
    spec = SPECS[name]
    if spec.split_file:
        return found.split
    return found.images if name == "imagenet" or spec.is_test_only else found.folder


def _compare(name: str, found: Found, split: Split, report: Report, command: str) -> None:
    """Compare the split with the published one: its bytes, its numbers, its class names."""
    unlike = departure(name, split.class_names, split.sizes)
    same_names, source = names_sha256(split.class_names) == SPECS[name].names_sha256, _source(name, found)
    same_numbers = (len(split.class_names), split.sizes) == (SPECS[name].classes, SPECS[name].sizes)
    if found.split:
        known = SOURCES[name]
        if file_sha256(found.split) == known.split_sha256:
            state = "the checksum reported for the published file" if known.split_reported else "the published file"
        elif known.split_reported:
            state = "the published checksum is not known for certain"
        elif unlike:
            state = "not the published file"
        else:
            state = "other bytes than the published file, but the same classes and numbers"
        report.fact("split", f"{found.split} ({state})")
    counts = f"{counted(len(split.class_names), 'class')}, {'/'.join(map(str, split.sizes))} train/val/test images"
    report.fact("numbers", counts + (", as published" if same_numbers else ""))
    if same_names:
        report.fact("class names", "as published")
    if unlike:
        report.warning(f"{unlike}; if you do not want this, move {source} away and {command}")
    if found.split:
        listings = Counter(item.path for item in (*split.train, *split.val, *split.test))
        twice = [path for path, count in listings.items() if count > 1]
        if twice:
            report.warning(f"{counted(len(twice), 'image')} listed more than once in one part: {twice[0]}")


def _examine_shots(name: str, split: Split, report: Report) -> None:
    """Print how many shots the smallest classes allow."""
    if name in SPECS and SPECS[name].is_test_only:
        report.fact("shots", "none, this dataset is only for testing")
        return
    pooled = name == "imagenet"  # validation images come from the same folders
    needed = USUAL_SHOTS + (val_shots(USUAL_SHOTS) if pooled else 0)
    counts = Counter(item.label for item in split.train)
    small = sorted((counts[label], label) for label in range(len(split.class_names)) if counts[label] < needed)
    if not small:
        report.fact("shots", f"{USUAL_SHOTS} and more")
        return
    fewest = small[0][0]
    most = max(s for s in range(fewest + 1) if s + val_shots(s) <= fewest) if pooled else fewest
    listed = [f"{split.class_names[label]} {count}" for count, label in small]
    report.fact("shots", f"up to {most} without repeats; classes with fewer than {needed} images: {enumerated(listed)}")
    if most == 0:
        report.problem(f"too few training images ({listed[0]}); two are needed, for training and validation")


def _images_below(root: Path, endings: tuple[str, ...]) -> tuple[Item, ...]:
    """Return all images below `root`, which are examined if there is no split; labels are numbers of their folders."""
    items: list[Item] = []
    for label, (folder, _, names) in enumerate(os.walk(root)):
        images = sorted(name for name in names if name.lower().endswith(endings))
        items += [Item((Path(folder).relative_to(root) / name).as_posix(), label) for name in images]
    return tuple(items)


# --- your own images


def _examine_folder(root: Path, own: OwnImages, report: Report) -> None:
    notes, split, image_root = io.StringIO(), None, root
    try:
        with contextlib.redirect_stderr(notes):
            split, image_root = read_folder(root, own)
            note_untested(root, split.class_names, split.test)
    except DatasetError as error:
        report.problem(str(error))
    for line in notes.getvalue().splitlines():
        report.fact("note", line.removeprefix("note: "))
    if split:
        report.fact(
            "numbers",
            f"{counted(len(split.class_names), 'class')}, {'/'.join(map(str, split.sizes))} train/val/test images",
        )
        report.fact("classes", summary(split, RELEASED_TEMPLATES))
        _examine_shots("folder", split, report)
    if split or root.is_dir():
        items = (*split.train, *split.val, *split.test) if split else _images_below(root, image_endings())
        task = FolderTask("folder", (), (), (), (), items, image_root, reading=report.reading)
        _examine_images(task, report, "replace them, or remove them from the folder or the manifest")


# --- images


def _examine_images(task: Task, report: Report, remedy: str) -> None:
    """Look for missing, empty and damaged images among the test items of `task`, which are all images of a dataset."""
    items = list({item.path: item for item in task.test}.values())
    missing, barred, empty, whole = _weigh(task.image_root, items)
    if missing:
        clue = _clue(task.image_root, missing)
        report.problem(f"images missing: {len(missing)} of {len(items)}{clue}; {remedy}", missing)
    if barred:
        advice = f"correct their links or permissions, or {remedy}"
        report.problem(f"images that cannot be opened: {len(barred)} of {len(items)}; {advice}", barred)
    if empty:
        report.problem(f"images of 0 bytes: {len(empty)} of {len(items)}; {remedy}", empty)
    if not missing and not barred:
        report.fact("images", f"all {len(items)} exist")
    chosen = whole if report.everything else _sample(whole)
    complaints, kinds = _decode(task, chosen)
    seen = f"{len(chosen)} of {len(items)}" + ("" if report.everything else " (a sample; --all decodes all)")
    if complaints:
        report.problem(f"damaged images: {len(complaints)} among {seen}; {remedy}", complaints)
    elif chosen:
        report.fact("decoded", f"{seen}, none damaged")
    for kind, count in kinds.items():
        report.fact("note", f"of the decoded images, {count} {kind}")


def _clue(root: Path, missing: Sequence[str]) -> str:
    """Return a probable reason why images are missing, if there is one."""
    folders = sorted({path.rpartition("/")[0] for path in missing})
    for folder in ["", *folders]:
        nested = root / folder / (root / folder).name
        if nested.is_dir():
            return f"; those of {root / folder} are one folder too deep, in {nested}"
    if not any(root.iterdir()):
        return f"; {root} is empty"
    folder, _, name = missing[0].rpartition("/")
    if (root / folder).is_dir():
        for entry in sorted(os.listdir(root / folder)):
            if entry.lower() == name.lower():
                return f"; file names differ in upper and lower case ({entry} exists)"
    return ""


def _weigh(root: Path, items: Iterable[Item]) -> tuple[list[str], list[str], list[str], list[Item]]:
    """Return the paths of missing files, those that cannot be opened, with the reason, empty files, and all others."""
    missing, barred, empty, whole = [], [], [], []
    for item in progress(items, "sizes", "image", delay=1):
        path = root / item.path
        try:
            if os.stat(path).st_size:
                whole.append(item)
            else:
                empty.append(item.path)
        except OSError as error:
            if isinstance(error, FileNotFoundError) and not path.is_symlink():
                missing.append(item.path)
            else:
                barred.append(f"{item.path} ({error.strerror})")
    return missing, barred, empty, whole


def _sample(items: Iterable[Item]) -> list[Item]:
    """Return a few images of each class, always the same ones."""
    groups: dict[int, list[Item]] = {}
    for item in items:
        groups.setdefault(item.label, []).append(item)
    rng = random.Random(0)
    return [item for group in groups.values() for item in rng.sample(group, min(PER_CLASS, len(group)))]


def _decode(task: Task, items: Sequence[Item]) -> tuple[list[str], Counter[str]]:
    """Return why images cannot be decoded, and how many of your own images need which conversion."""

    def look(item: Item) -> tuple[str | None, list[str]]:
        try:
            task.read(item)
        except DatasetError as error:
            return str(error), []
        return None, _conversions(task.image_root / item.path, task.reading) if isinstance(task, FolderTask) else []

    complaints, counts = [], Counter()
    with ThreadPool(default_workers() + 1) as pool:
        looks = pool.imap(look, items, chunksize=16)
        for complaint, kinds in progress(looks, "decoding", "image", total=len(items), delay=1):
            complaints += [complaint] if complaint else []
            counts.update(kinds)
    return complaints, counts


def _conversions(path: Path, reading: Reading) -> list[str]:
    """Return which conversions a readable image of yours needs."""
    with opened(path, reading) as image:
        kinds = {
            "are turned as their EXIF data say": orientation(image) != 1,
            "are transparent and get a white background": is_transparent(image),
            "have 16 bits a channel, scaled to 8": has_16_bits(image),
            "are files with several images, of which only the first is used": _has_several_images(image),
        }
    return [kind for kind, is_so in kinds.items() if is_so]


def _has_several_images(image: Image.Image) -> bool:
    try:
        return getattr(image, "n_frames", 1) > 1
    except Exception:  # damaged pages raise nearly anything; the first, which is used, was read before
        return True
