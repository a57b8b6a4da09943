"""Download, verify, unpack and arrange datasets. You can interrupt it at any time and run it again.

python -m datasets.download dtd eurosat --root_path $DATA
python -m datasets.download all --root_path $DATA        # prints the steps that you must do by hand

The addresses in datasets/acquire/sources.yaml were collected from public code and issue reports, and never tried.
Exit code 0: all datasets are ready; 2: something is missing, and the output says what; 130: interrupted.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from filelock import FileLock

from common import DISK_FULL, Parser, UserError, counted, fail, note, one_line_errors
from fetching import fetch, has_checksum, is_web_page

from ..specs import SPECS, Layout, departure, locate
from ..splits import list_imagenet, read_json_split, read_split
from ..task import DatasetError, Task, check_images_exist
from .archives import check_space, is_archive, why_no_archive
from .arrange import archives_below, arrange_folder, holds, is_missing, unpacked
from .imagenet import arrange_imagenet
from .sources import SOURCES, SPLITS


def main(argv: Sequence[str] | None = None) -> int:
    """Make the named datasets ready below --root_path and return the exit code, 0 or 2."""
    with one_line_errors():
        parser = Parser(prog="python -m datasets.download", description=__doc__)
        parser.add_argument(
            "names", nargs="+", choices=(*SOURCES, "all"), metavar="NAME", help=f"all, or some of {', '.join(SOURCES)}"
        )
        parser.add_argument("--root_path", required=True, type=Path, help="the folder for all datasets")
        arguments = parser.parse_args(argv)
        root = arguments.root_path.expanduser()
        names = tuple(SOURCES) if "all" in arguments.names else tuple(dict.fromkeys(arguments.names))
        ready, failed = {}, {}
        for name in names:
            try:
                ready[name] = prepare(name, root)
            except (UserError, OSError) as error:
                failed[name] = _one_line(error)
        for name, state in ready.items():
            print(f"{name}: ready, {state}")
        for name, problem in failed.items():
            fail(f"{name}: {problem}")
        return 2 if failed else 0


def prepare(name: str, root: Path) -> str:
    """Make dataset `name` ready below `root` and return how many images are where.

    Files that exist, in any layout that `locate` knows, are used. If nothing is missing, nothing is written or
    downloaded. Raises DatasetError with what is missing and what to do.
    """
    with contextlib.suppress(DatasetError):
        return check(name, root)
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / f".{name}.lock"):
        problems = []
        for get in (_get_split, _get_images):  # each is tried even if the other fails
            try:
                get(name, root)
            except DatasetError as error:
                problems.append(str(error))
        if problems:
            raise DatasetError("; ".join(problems))
        return check(name, root)


def check(name: str, root: Path) -> str:
    """Return where dataset `name` is; raise DatasetError unless its split is readable and every image exists."""
    missing = _missing_parts(name, _layout(name, root), root)
    if missing:
        raise DatasetError(f"{missing[0]} is missing")
    found = locate(name, root)
    if name == "imagenet":
        return f"{len(list_imagenet(found.images).test):,} validation images in {found.images}"
    split = read_split(name, found)
    try:
        check_images_exist(Task(name, split.class_names, (), split.train, split.val, split.test, found.images))
    except DatasetError as error:
        raise DatasetError(
            f"{error} If it is, move {found.images} away and run again; copies with renamed images do not fit the split"
        ) from error
    return f"{counted(sum(split.sizes), 'image')} in {found.images}"


def _layout(name: str, root: Path) -> Layout:
    """Return the layout of which most exists; of equal ones, the first whose folder exists, or else CoOp's."""
    layouts = SPECS[name].layouts

    def rank(layout: Layout) -> tuple[int, bool]:
        return -len(_missing_parts(name, layout, root)), (root / layout.folder).is_dir()

    return max(layouts, key=rank)


def _missing_parts(name: str, layout: Layout, root: Path) -> list[Path]:
    """Return the folders of images that must exist and do not."""
    images = root / layout.folder / layout.images
    return [images / part for part in SOURCES[name].parts or (layout.holds,) if is_missing(images / part)]


def _get_images(name: str, root: Path) -> None:
    """Arrange what is in the dataset's folders; if that is not enough, download the images."""
    layout, source = _layout(name, root), SOURCES[name]
    folder = root / layout.folder
    if name == "imagenet":
        folder.mkdir(parents=True, exist_ok=True)
        arrange_imagenet(folder, folder / layout.images)
    else:
        _arrange(name, root, layout)
        if _missing_parts(name, layout, root) and source.archives:
            _download(name, folder)
            _arrange(name, root, layout)
    missing = _missing_parts(name, layout, root)
    if missing:
        _print_steps(name, root, folder)
        raise DatasetError(f"{missing[0]} is missing; do the steps above and run again")


def _arrange(name: str, root: Path, layout: Layout) -> None:
    """Move the missing parts to their place, from folders or else from archives in any of the dataset's folders."""
    places = dict.fromkeys(root / other.folder for other in SPECS[name].layouts if (root / other.folder).is_dir())

    def called(part: Path) -> tuple[str, ...]:
        return (part.name, SOURCES[name].called)

    for place in places:
        for part in _missing_parts(name, layout, root):
            arrange_folder(place, part, called(part))
    for archive in [archive for place in places for archive in archives_below(place)]:
        missing = _missing_parts(name, layout, root)
        names = tuple(word for part in missing for word in called(part) if word)
        if missing and holds(archive, names):
            check_space(name, root / layout.folder, SOURCES[name].gigabytes)
            with unpacked(archive, root / layout.folder, names) as tree:
                for part in missing:
                    arrange_folder(tree, part, called(part))
            print(f"{archive} is no longer needed and may be deleted")


def _download(name: str, folder: Path) -> None:
    """Download the first of the dataset's archives that is available; print a note on each that is not."""
    source = SOURCES[name]
    started = sum(path.stat().st_size for path in folder.glob("*.part")) / 1e9
    check_space(name, folder, max(source.gigabytes - started, 0) + source.gigabytes)
    for archive in source.archives:
        part = folder / f"{archive.file}.part"
        before = part.stat().st_size if part.exists() else 0
        target = folder / archive.file
        try:
            if archive.url.startswith("drive:"):
                fetch_from_drive(archive.url.removeprefix("drive:"), target)
            else:
                fetch(archive.url, target, archive.checksum, DatasetError)
            if not is_archive(target):
                raise DatasetError(why_no_archive(target))
            return
        except DatasetError as error:
            if part.exists() and part.stat().st_size > before:
                raise  # this download can be resumed; another source would start from zero
            note(f"{name}: {error}")


def fetch_from_drive(file_id: str, target: Path) -> None:
    """Download a file from Google Drive with gdown, which resumes too; `target` appears when the file is complete."""
    try:
        import gdown
    except ImportError:
        raise DatasetError(
            "downloads from Google Drive need the package gdown; pip install -r requirements.txt"
        ) from None
    address = f"https://drive.google.com/file/d/{file_id}/view"
    remedy = f"open it in a browser, now or tomorrow, download the file and put it at {target}"
    arriving = target.with_name(f"{target.name}.drive")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        gdown.download(id=file_id, output=str(arriving), resume=True, timeout=60)
    except (gdown.DownloadError, OSError) as error:  # OSError: requests' errors, and the disk's
        if getattr(error, "errno", None) in DISK_FULL:
            raise
        raise DatasetError(f"Google Drive did not send {address} ({_one_line(error)}); {remedy}") from error
    with open(arriving, "rb") as file:
        web_page = is_web_page(file.read(1024))
    if web_page:
        arriving.unlink()
        raise DatasetError(f"Google Drive sent a web page (a quota or a virus scan) for {address}; {remedy}")
    arriving.replace(target)


def _get_split(name: str, root: Path) -> None:
    """Download the split file from GitHub or else Google Drive, unless it is in one of the dataset's folders."""
    source, file = SOURCES[name], SPECS[name].split_file
    if file is None or any((root / layout.folder / file).is_file() for layout in SPECS[name].layouts):
        return
    target = root / _layout(name, root).folder / file
    new = target.with_name(f"{file}.new")
    new.unlink(missing_ok=True)
    for from_drive in (False, True):
        try:
            if from_drive:
                fetch_from_drive(source.split_drive, new)
            else:
                fetch(f"{SPLITS}/{file}", new, None if source.split_reported else source.split_sha256, DatasetError)
            _check_split(name, new)
            new.replace(target)
            print(f"split file in {target}")
            return
        except DatasetError as error:
            new.unlink(missing_ok=True)
            note(f"{name}: {str(error).replace(str(new), str(target))}")
    raise DatasetError(f"split file {target} could not be downloaded (see above); run again or put it there")


def _check_split(name: str, path: Path) -> None:
    """Raise DatasetError unless a split has the known checksum, or else the published classes and numbers."""
    if has_checksum(path, SOURCES[name].split_sha256):
        return
    split = read_json_split(path)
    unlike = departure(name, split.class_names, split.sizes)
    if unlike:
        raise DatasetError(f"{path} has {unlike}")
    note(f"the split of {name} has the published classes and numbers, but other bytes than the known copy")


def _print_steps(name: str, root: Path, folder: Path) -> None:
    """Print what the user can do by hand; the next run finds and arranges the files."""
    source = SOURCES[name]
    lines = [archive.url.replace("drive:", "https://drive.google.com/uc?id=") for archive in source.archives]
    print(
        f"\n{name} must be downloaded by hand:\n"
        f"  1. Download the images, about {source.gigabytes:g} GB (these addresses have not been tried):\n"
        + "".join(f"       {line}\n" for line in (*lines, *source.hints))
        + f"  2. Put the archives or the unpacked folders, with any name, into\n       {folder}\n"
        f"  3. Run again: python -m datasets.download {name} --root_path {root}\n",
        file=sys.stderr,
    )


def _one_line(error: Exception) -> str:
    """Return an error's message on one line, for a full disk with a remedy."""
    if getattr(error, "errno", None) in DISK_FULL:
        return f"no space left ({error.filename or 'disk full'}); free some space and run again to resume"
    return " ".join(str(error).split())
