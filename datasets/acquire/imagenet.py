"""ImageNet from its archives: a tar of 1000 tars, a flat tar of validation images, the devkit with their classes."""

import re
import shutil
import tarfile
from pathlib import Path

from common import progress

from ..task import DatasetError
from .archives import check_space, explained, member_names, unpack_tar
from .arrange import archives_below, arrange_folder, is_missing, put, unpacked, walk

_CLASS_TAR = re.compile(r"(n\d{8})\.tar")
_VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})\.JPEG")
_GROUND_TRUTH = "ILSVRC2012_validation_ground_truth.txt"


def arrange_imagenet(folder: Path, images: Path) -> None:
    """Move the train and val images in `folder`, from folders or ILSVRC archives, into class folders of `images`.

    Parts that are in place are not touched, and archives are recognised by their members. Raises DatasetError if the
    validation images need the devkit and it is missing.
    """
    train, val = images / "train", images / "val"
    archives = {_kind(archive): archive for archive in archives_below(folder) if tarfile.is_tarfile(archive)}
    if is_missing(train):
        arrange_folder(folder, train, ("train",))
    if is_missing(train) and "train" in archives:
        _unpack_classes(archives["train"], train)
    if is_missing(val):
        arrange_folder(folder, val, ("val",))
    if is_missing(val) and "val" in archives:
        wnids = _validation_wnids(folder, archives.get("devkit"))
        check_space("imagenet", images, archives["val"].stat().st_size / 1e9)
        with unpacked(archives["val"], images) as tree:
            _sort(tree, tree / "val", wnids)
            put(tree / "val", val)
        print(f"images arranged in {val}; {archives['val']} is no longer needed and may be deleted")
    elif val.is_dir() and any(_VAL_IMAGE.fullmatch(path.name) for path in val.iterdir()):
        _sort(val, val, _validation_wnids(folder, archives.get("devkit")))
        print(f"images sorted in {val}")


def _kind(archive: Path) -> str | None:
    """Return which of the ILSVRC archives this is, from the names of its members."""
    for name in member_names(archive):
        last = name.rpartition("/")[2]
        if _CLASS_TAR.fullmatch(last):
            return "train"
        if _VAL_IMAGE.fullmatch(last):
            return "val"
        if last == _GROUND_TRUTH:
            return "devkit"
    return None


def _unpack_classes(archive: Path, train: Path) -> None:
    """Unpack the tar of class tars without writing the inner tars to disk; `train` appears when it is complete."""
    check_space("imagenet", train, archive.stat().st_size / 1e9)
    tree = train.with_name(".unpacking")
    shutil.rmtree(tree, ignore_errors=True)
    try:
        with explained(archive), tarfile.open(archive) as outer:
            for member in progress(outer, f"unpack {archive.name}", "class", total=1000):
                if wnid := _CLASS_TAR.fullmatch(member.name.rpartition("/")[2]):
                    with tarfile.open(fileobj=outer.extractfile(member)) as inner:
                        unpack_tar(inner, archive, tree / wnid[1])
        put(tree, train)
    finally:
        shutil.rmtree(tree, ignore_errors=True)
    print(f"images arranged in {train}; {archive} is no longer needed and may be deleted")


def _validation_wnids(folder: Path, devkit: Path | None) -> list[str]:
    """Return the WordNet id of each validation image, from the devkit's archive or its unpacked folder in `folder`."""
    if devkit is not None:
        with unpacked(devkit, folder) as tree:
            return _read_devkit(tree)
    wnids = _read_devkit(folder)
    if not wnids:
        raise DatasetError(
            f"imagenet: the validation images are not sorted, and the devkit with their classes is missing; put "
            f"ILSVRC2012_devkit_t12.tar.gz into {folder} and run again"
        )
    return wnids


def _read_devkit(tree: Path) -> list[str]:
    """Return the WordNet id of each validation image from the devkit in `tree`; an empty list if there is none.

    The ground-truth file has one ILSVRC id per image, in the order of the files; meta.mat maps ILSVRC ids to WordNet's.
    ILSVRC ids are not in WordNet's order; those above 1000 are synsets with children.
    """
    from scipy.io import loadmat

    for data, _, files in walk(tree):
        if _GROUND_TRUTH in files and "meta.mat" in files:
            try:
                synsets = loadmat(data / "meta.mat", squeeze_me=True)["synsets"]
                wnids = {int(synset[0]): str(synset[1]) for synset in synsets}  # ILSVRC2012_ID and WNID come first
                return [wnids[int(line)] for line in (data / _GROUND_TRUTH).read_text().split()]
            except (LookupError, ValueError, TypeError, NotImplementedError) as error:
                raise DatasetError(
                    f"imagenet: meta.mat or {_GROUND_TRUTH} in {data} is not the original ({error}); download "
                    "ILSVRC2012_devkit_t12.tar.gz again"
                ) from error
    return []


def _sort(source: Path, target: Path, wnids: list[str]) -> None:
    """Move the validation images below `source` to target/<wnid>/. Each name has its number, so this can be resumed."""
    images = [(match, path) for path in source.rglob("*.JPEG") if (match := _VAL_IMAGE.fullmatch(path.name))]
    for match, path in progress(images, "sort val", "image"):
        number = int(match[1])
        if not 1 <= number <= len(wnids):
            raise DatasetError(f"{path}: the devkit has {len(wnids)} validation images; download the original devkit")
        place = target / wnids[number - 1] / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        path.rename(place)
