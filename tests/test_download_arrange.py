"""Unpacking hostile archives, and arranging what users put into a dataset's folder."""

import io
import os
import shutil
import stat
import tarfile
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from support.fabricate import FOLDERS, SPLIT_FILES, fabricate
from support.runs import error_of
from support.server import PAGE, files_in, original, tar_of, zip_of

import datasets
from datasets.acquire.archives import unpack
from datasets.splits import imagenet_classes

ESCAPES = ["../evil", "a/../../evil", "/evil", "\\evil", "..\\evil", "C:\\evil", "C:evil", "//host/share/evil"]
SPLIT = SPLIT_FILES["stanford_cars"]


def tar_with(*members: tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    """Return a tar of these members after a harmless one; regular files have five bytes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for member in (tarfile.TarInfo("images/a.jpg"), *members):
            if member.isreg():
                member.size = 5
            archive.addfile(member, io.BytesIO(b"bytes") if member.isreg() else None)
    return buffer.getvalue()


def member(name: str, kind: bytes = tarfile.REGTYPE, link: str = "") -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, link
    return info


def zip_with(name: str, mode: int = 0) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        info = zipfile.ZipInfo("x")
        info.filename, info.external_attr = name, mode << 16  # the constructor would clean the name
        archive.writestr(info, b"/etc" if mode else b"bytes")
    return buffer.getvalue()


def rejected(tmp_path, content: bytes) -> str:
    """Return the one-line error of unpacking `content`, which must leave nothing outside its folder."""
    shutil.rmtree(tmp_path / "below", ignore_errors=True)
    path, folder = tmp_path / "bad.archive", tmp_path / "below" / "folder"
    path.write_bytes(content)
    folder.mkdir(parents=True)
    message = error_of(datasets.DatasetError, unpack, path, folder)
    assert {entry.name for entry in tmp_path.iterdir()} == {"bad.archive", "below"}
    assert os.listdir(tmp_path / "below") == ["folder"]
    assert not [path for path in folder.rglob("*") if path.name == "evil"]
    assert str(path) in message
    return message


@pytest.mark.parametrize("name", ESCAPES)
def test_members_and_links_that_leave_the_folder_are_rejected(tmp_path, name):
    """A symbolic link starts at its own folder, a hard one at the archive's top."""
    above = f"../{name}" if name.lstrip("a/").startswith("..") else name
    symbolic = member("images/link", tarfile.SYMTYPE, above)
    hard = member("images/link", tarfile.LNKTYPE, name)
    for content in (zip_with(name), *(tar_with(info) for info in (member(name), symbolic, hard))):
        assert "would leave the target folder" in rejected(tmp_path, content)


def test_a_link_does_not_redirect_the_members_behind_it(tmp_path):
    content = tar_with(member("images/link", tarfile.SYMTYPE, "../.."), member("images/link/below.txt"))
    assert "would leave" in rejected(tmp_path, content)
    assert (tmp_path / "below" / "folder" / "images" / "link" / "below.txt").is_file()


def test_links_in_zips_devices_and_passwords_are_rejected(tmp_path):
    assert "is a link" in rejected(tmp_path, zip_with("images/link", stat.S_IFLNK | 0o777))
    for kind in (tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE):
        assert "is a device file" in rejected(tmp_path, tar_with(member("images/null", kind)))
    content = bytearray(zip_with("images/a.jpg"))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1  # the flag "encrypted"
    assert "unpack it by hand" in rejected(tmp_path, bytes(content))


def test_links_inside_become_copies(tmp_path):
    """Also if the link comes before its file."""
    path = tmp_path / "good.tar"
    path.write_bytes(
        tar_with(
            member("images/c.jpg", tarfile.SYMTYPE, "../other/b.jpg"),
            member("other/b.jpg"),
            member("images/d.jpg", tarfile.LNKTYPE, "other/b.jpg"),
        )
    )
    unpack(path, tmp_path / "out")
    for name in ("c.jpg", "d.jpg"):
        assert (tmp_path / "out" / "images" / name).read_bytes() == b"bytes"
        assert not (tmp_path / "out" / "images" / name).is_symlink()
    shutil.rmtree(tmp_path / "out")
    path.unlink()
    assert "names no file" in rejected(tmp_path, tar_with(member("images/e.jpg", tarfile.SYMTYPE, "nothing.jpg")))


def test_a_bad_member_leaves_no_dataset_behind(world, data_root, run_download, tmp_path):
    world.has_split("eurosat", original("eurosat", tmp_path / "original")[1])
    world.has_archive("eurosat", tar_with(member("2750/a.jpg"), member("../../evil")))
    code, _, err = run_download("eurosat")
    assert code == 2 and "'../../evil' would leave the target folder" in err
    assert files_in(data_root / "eurosat") == {"EuroSAT.zip", SPLIT_FILES["eurosat"]}
    assert not (data_root / "evil").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("imagenet", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "ILSVRC2012_devkit_t12.tar.gz"]),
        ("stanford_cars", ["jessicali9530/stanford-cars-dataset", "cars_train.tgz"]),
        ("sun397", ["OpenDataLab/SUN397", "SUN397.tar.gz", "404"]),
        ("ucf101", ["https://drive.google.com/"]),
    ],
)
def test_manual_steps_name_mirrors_folder_and_command(data_root, world, run_download, name, words):
    code, _, err = run_download(name)
    assert code == 2 and all(word in err for word in words)
    assert f"\n       {data_root / FOLDERS[name]['coop'][0]}\n" in err
    assert f"python -m datasets.download {name} --root_path {data_root}\n" in err


@pytest.fixture
def cars(world, data_root, run_download, tmp_path):
    """A dataset's folder with only the split, the images elsewhere, and a check that the dataset is made from these."""
    images = fabricate("stanford_cars", tmp_path / "elsewhere", per_class=4)
    folder = data_root / "stanford_cars"
    folder.mkdir(parents=True)
    (images / SPLIT).rename(folder / SPLIT)

    def assert_ready():
        code, _, err = run_download("stanford_cars")
        assert code == 0, err
        task = datasets.build("stanford_cars", data_root, shots=1, seed=1)
        for item in (*task.train, *task.val, *task.test):
            task.read(item)
        assert run_download("stanford_cars")[0] == 0 and not world.requests

    return folder, images, assert_ready


@pytest.mark.parametrize(
    "place",
    ["{part}/{part}", "archive/{part}/{part}", "a/b/{part}", "{part}/{part}/{part}", "../StanfordCars/archive/{part}"],
)
def test_cars_nested_or_in_another_folder_than_the_split(cars, place):
    folder, images, assert_ready = cars
    for part in ("cars_train", "cars_test"):
        shutil.copytree(images / part, folder / place.format(part=part))
    assert_ready()
    assert files_in(folder) == {SPLIT, "cars_train", "cars_test"}  # no empty folders remain


def test_nested_cars_with_another_file_and_an_interruption(cars):
    folder, images, assert_ready = cars
    shutil.copytree(images / "cars_test", folder / "cars_test")
    shutil.copytree(images / "cars_train", folder / "cars_train.aside" / "cars_train")  # interrupted after a first step
    (folder / "cars_train.aside" / "about.md").write_text("the user's")
    assert_ready()
    assert (folder / "cars_train.aside" / "about.md").is_file()


def test_cars_from_renamed_archives_of_any_kind(cars, tmp_path):
    folder, images, assert_ready = cars
    for part, pack, name in (("cars_train", tar_of, "one"), ("cars_test", zip_of, "downloads/two.zip")):
        single = tmp_path / part
        shutil.copytree(images / part, single / part)
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(pack(single))
    (folder / "unrelated.zip").write_bytes(zip_with("readme.md"))
    assert_ready()
    assert files_in(folder) == {SPLIT, "cars_train", "cars_test", "one", "downloads", "unrelated.zip"}


def test_cars_from_kaggles_archive_in_the_other_folder(cars, data_root):
    """One zip with both parts, each nested twice, in the folder of the released code."""
    folder, images, assert_ready = cars
    folder.rename(data_root / "StanfordCars")
    for part in ("cars_train", "cars_test"):
        (images / "nested" / part).mkdir(parents=True)
        (images / part).rename(images / "nested" / part / part)
    (data_root / "StanfordCars" / "archive.zip").write_bytes(zip_of(images / "nested"))
    assert_ready()
    assert not (data_root / "stanford_cars").exists()


def test_space_is_checked_before_the_users_archive_is_unpacked(world, run_download, cars):
    folder, images, _ = cars
    (folder / "cars.zip").write_bytes(zip_of(images))
    usage = shutil.disk_usage(folder)
    for free, ready in ((1.9e9, False), (2.1e9, True)):
        world.monkeypatch.setattr(shutil, "disk_usage", lambda path, free=free: usage._replace(free=free))
        code, _, err = run_download("stanford_cars")
        assert (code == 0) == ready == ("needs about 2.0 GB" not in err)
        assert (folder / "cars_train").exists() == ready


def test_empty_folders_and_an_archive_in_a_folder_with_the_name_of_the_image_folder(
    world, data_root, run_download, tmp_path
):
    """Folders made by hand are not images; their content is moved aside, and they are removed if they are empty."""
    archive, split = original("dtd", tmp_path / "dtd")
    world.has_split("dtd", split)
    (data_root / "dtd" / "images").mkdir(parents=True)
    (data_root / "dtd" / "dtd.tgz").write_bytes(archive)
    assert run_download("dtd")[0] == 0
    assert not (data_root / "dtd" / "images.aside").exists()

    archive, _ = original("imagenet_a", tmp_path / "imagenet_a")
    (data_root / "imagenet-a").mkdir()
    (data_root / "imagenet-a" / "imagenet-a.tar").write_bytes(archive)
    for _ in range(2):
        code, out, err = run_download("imagenet_a")
        assert code == 0 and f"2 images in {data_root / 'imagenet-a'}" in out, err
    assert (data_root / "imagenet-a.aside" / "imagenet-a.tar").read_bytes() == archive


def test_cars_that_are_incomplete_or_renamed_are_rejected(run_download, cars):
    folder, images, _ = cars
    shutil.copytree(images / "cars_train", folder / "cars_train")
    (folder / "cars_train.tgz").write_bytes(PAGE)
    (folder / "cars_test.zip").write_bytes(b"PK\x03\x04 cut off")
    code, _, err = run_download("stanford_cars")
    assert code == 2 and f"{folder / 'cars_test'} is missing" in err
    assert (
        f"{folder / 'cars_train.tgz'} is a web page" in err and f"{folder / 'cars_test.zip'} is not a readable" in err
    )
    shutil.copytree(images / "cars_test", folder / "cars_test")
    assert run_download("stanford_cars")[0] == 0
    for part in ("cars_train", "cars_test"):
        for image in (folder / part).iterdir():
            image.rename(image.with_name(f"Audi {image.name}"))
    code, _, err = run_download("stanford_cars")
    assert code == 2 and "and 11 more of stanford_cars cannot be found" in err and "renamed images" in err


@pytest.mark.parametrize("folder", ["sun397", "SUN397"])
def test_sun397_from_the_users_archive(world, data_root, run_download, tmp_path, folder):
    archive, split = original("sun397", tmp_path / "original")
    (data_root / folder).mkdir(parents=True)
    (data_root / folder / "SUN397.tar.gz").write_bytes(archive)
    path = world.has_split("sun397", split)
    code, _, err = run_download("sun397")
    assert code == 0, err
    assert world.requests == [(path, None)]
    assert (data_root / folder / "SUN397" / "a").is_dir() and (data_root / folder / "SUN397.tar.gz").is_file()
    assert datasets.build("sun397", data_root, shots=1, seed=1).image_root == data_root / folder / "SUN397"


# --- ImageNet. A class's number in the development kit is not its label, and the images have another order again.


@pytest.fixture
def ilsvrc(few_imagenet_classes, tmp_path):
    """ImageNet's archives with few classes; image 1, 2, ... of val has the classes `order`."""
    wnids, _ = imagenet_classes()
    ids = np.random.default_rng(0).permutation(len(wnids)) + 1  # of each wnid
    order = np.random.default_rng(1).permutation(len(wnids)).tolist()
    folder = tmp_path / "ilsvrc"
    for part in ("train", "val", "devkit"):
        (folder / part).mkdir(parents=True)
    for number, label in enumerate(order, start=1):
        (folder / "val" / f"ILSVRC2012_val_{number:08d}.JPEG").write_bytes(jpeg(label))
    for label, wnid in enumerate(wnids):
        write_train_folder(folder / "classes" / wnid, label)
        (folder / "train" / f"{wnid}.tar").write_bytes(tar_of(folder / "classes" / wnid, mode="w"))
    data = folder / "devkit" / "ILSVRC2012_devkit_t12" / "data"
    data.mkdir(parents=True)
    rows = [(float(number), wnid, "a word", "a gloss", 0.0) for number, wnid in zip(ids, wnids)]
    rows += [(float(number), f"n9{number:07d}", "a word", "a gloss", 3.0) for number in range(1001, 1011)]  # parents
    fields = [(name, "O") for name in ("ILSVRC2012_ID", "WNID", "words", "gloss", "num_children")]
    savemat(data / "meta.mat", {"synsets": np.array(sorted(rows), dtype=fields)})
    truth = "".join(f"{ids[label]}\n" for label in order)
    (data / "ILSVRC2012_validation_ground_truth.txt").write_text(truth)
    train, val = (tar_of(folder / part, mode="w") for part in ("train", "val"))
    return SimpleNamespace(train=train, val=val, devkit=tar_of(folder / "devkit"), wnids=wnids, order=order)


def jpeg(label: int) -> bytes:
    """Return an image whose width identifies its class."""
    buffer = io.BytesIO()
    Image.new("L", (1 + label, 1)).save(buffer, "JPEG")
    return buffer.getvalue()


def write_train_folder(folder, label: int) -> None:
    folder.mkdir(parents=True)
    for number in range(2):
        (folder / f"{folder.name}_{number}.JPEG").write_bytes(jpeg(label))


def assert_imagenet_is_ready(data_root, run_download, images):
    code, out, err = run_download("imagenet")
    assert code == 0 and "12 validation images" in out, err
    task = datasets.build("imagenet", data_root, shots=1, seed=1)
    assert task.image_root == images
    for item in (*task.train, *task.val, *task.test):
        with Image.open(images / item.path) as image:
            assert image.width == 1 + item.label
    assert not list(images.glob(".unpacking"))


def test_imagenet_from_its_archives_with_any_name(world, data_root, run_download, ilsvrc):
    folder = data_root / "imagenet"
    (folder / "downloads").mkdir(parents=True)
    for name, content in (("train.tar", ilsvrc.train), ("downloads/b", ilsvrc.val), ("kit.tgz", ilsvrc.devkit)):
        (folder / name).write_bytes(content)
    assert_imagenet_is_ready(data_root, run_download, folder / "images")
    assert files_in(folder) == {"images", "downloads", "train.tar", "kit.tgz"}
    assert files_in(folder / "images") == {"train", "val"}
    assert not world.requests


def test_imagenet_from_a_nested_train_folder_and_a_flat_val_folder(world, data_root, run_download, ilsvrc, tmp_path):
    """As in Kaggle's copy, with annotations of the same name beside it; sorting resumes after an interruption."""
    kaggle = data_root / "imagenet" / "ILSVRC"
    for label, wnid in enumerate(ilsvrc.wnids):
        write_train_folder(kaggle / "Data" / "CLS-LOC" / "train" / wnid, label)
    for part in ("train", "val"):
        (kaggle / "Annotations" / "CLS-LOC" / part).mkdir(parents=True)
        (kaggle / "Annotations" / "CLS-LOC" / part / "a.xml").write_text("<box/>")
    (tmp_path / "val.tar").write_bytes(ilsvrc.val)
    unpack(tmp_path / "val.tar", kaggle / "Data" / "CLS-LOC" / "val")

    code, _, err = run_download("imagenet")
    val = data_root / "imagenet" / "images" / "val"
    assert code == 2 and "ILSVRC2012_devkit_t12.tar.gz" in err and str(data_root / "imagenet") in err
    assert len(list(val.iterdir())) == 12 and (data_root / "imagenet" / "images" / "train").is_dir()

    first, place = val / "ILSVRC2012_val_00000001.JPEG", val / ilsvrc.wnids[ilsvrc.order[0]]
    place.mkdir()
    first.rename(place / first.name)  # an interrupted run stopped here
    (tmp_path / "kit.tgz").write_bytes(ilsvrc.devkit)
    unpack(tmp_path / "kit.tgz", data_root / "imagenet")  # the kit may be unpacked already
    assert_imagenet_is_ready(data_root, run_download, data_root / "imagenet" / "images")
    assert (kaggle / "Annotations" / "CLS-LOC" / "train" / "a.xml").is_file()


def test_imagenets_train_folder_in_place_and_val_from_its_archive(world, data_root, run_download, ilsvrc):
    """In torchvision's layout, without `images`."""
    images = data_root / "imagenet"
    for label, wnid in enumerate(ilsvrc.wnids):
        write_train_folder(images / "train" / wnid, label)
    (images / "val.tar").write_bytes(ilsvrc.val)
    (images / "kit.tgz").write_bytes(ilsvrc.devkit)
    assert_imagenet_is_ready(data_root, run_download, images)


def test_damaged_archives_of_imagenet(world, data_root, run_download, ilsvrc, tmp_path):
    folder = data_root / "imagenet"
    folder.mkdir(parents=True)
    (folder / "train.tar").write_bytes(ilsvrc.train[: len(ilsvrc.train) // 2])
    (folder / "val.tar").write_bytes(ilsvrc.val)
    (tmp_path / "kit.tgz").write_bytes(ilsvrc.devkit)
    unpack(tmp_path / "kit.tgz", folder)
    truth = folder / "ILSVRC2012_devkit_t12" / "data" / "ILSVRC2012_validation_ground_truth.txt"
    code, _, err = run_download("imagenet")
    assert code == 2 and f"archive {folder / 'train.tar'} is damaged" in err
    (folder / "train.tar").unlink()
    truth.write_text("1\n2\n3\n")
    code, _, err = run_download("imagenet")
    assert code == 2 and "the devkit has 3 validation images" in err
    for wrong in ("2000\n", "cat\n"):
        truth.write_text(wrong)
        assert "is not the original" in run_download("imagenet")[2]
    truth.with_name("meta.mat").write_bytes(b"not a mat file" * 100)
    assert "is not the original" in run_download("imagenet")[2]
    assert not list((folder / "images").glob("*")) and not list(folder.rglob(".unpacking"))
