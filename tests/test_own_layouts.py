"""Folders as people have them: parts and wrappers of other names, odd class names, copies, folders of programs."""

import json
import shutil
import unicodedata
import zlib
from pathlib import Path

import pytest
from support.fabricate import error_of_build, picture

import datasets
from datasets import OwnImages
from datasets.acquire import doctor
from datasets.folder import read_folder

OWN = ("--dataset", "folder", "--backbone", "tiny", "--method", "zero_shot")
CLASSES = ("forest", "sea")


def images(folder) -> None:
    """Write three images that no other folder has."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for number in range(3):
        picture(number, zlib.crc32(f"{folder}/{number}".encode()), (12, 12)).save(Path(folder) / f"{number}.png")


def tree(*folders: str) -> None:
    for folder in folders:
        images(folder)


def parts_of(root=".", **said) -> dict[str, set[str]]:
    """Return the folders that the images of each part lie in."""
    split, _ = read_folder(Path(root), OwnImages(**said))
    return {part: {item.path.rpartition("/")[0] for item in getattr(split, part)} for part in ("train", "test")}


@pytest.fixture(autouse=True)
def in_a_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


# --- parts


@pytest.mark.parametrize(
    "train, test",
    [
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("training_set", "test_set"),
        ("train_images", "test_images"),
        ("train_data", "validation_data"),
        ("Training", "Testing"),
        ("trainset", "testset"),
        ("images_train", "images_test"),
        ("animals-train", "animals-test"),
        ("archive/data/train", "archive/data/test"),
    ],
)
def test_parts_are_recognised(train, test):
    if "validation" in test:
        tree(*(f"test_data/{name}" for name in CLASSES))
    tree(*(f"{part}/{name}" for part in (train, test) for name in CLASSES))
    found = parts_of()
    inner = "archive/data/" if train.startswith("archive") else ""
    assert found["train"] == {f"{train}/{name}".removeprefix(inner) for name in CLASSES}
    assert not found["train"] & found["test"]
    assert read_folder(Path())[0].class_names == CLASSES


def test_images_without_classes_beside_the_parts_are_left_out(capsys):
    tree(*(f"seg_{part}/seg_{part}/{name}" for part in ("train", "test") for name in CLASSES), "seg_pred/seg_pred")
    assert parts_of()["test"] == {f"seg_test/seg_test/{name}" for name in CLASSES}
    assert "seg_pred" in capsys.readouterr().err


@pytest.mark.parametrize("beside", ["extra/forest", "cats", "holdout/sea"])
def test_what_is_not_sure_is_asked_for(beside):
    tree(*(f"{part}/{name}" for part in ("train", "test") for name in CLASSES), beside)
    assert "--train_dir" in error_of_build("folder", ".", 1, 1)
    said = {"train_dir": "train", "test_dir": "test"}
    assert parts_of(**said) == {part: {f"{part}/{name}" for name in CLASSES} for part in ("train", "test")}


@pytest.mark.parametrize("root", ["", "wrapper/"])
def test_a_set_without_test_part_names_the_flags_that_test_on_val(root):
    tree(*(f"{root}{part}/{name}" for part in ("train", "val") for name in CLASSES))
    flags = error_of_build("folder", ".", 1, 1).partition("with ")[2].partition(",")[0].split()
    assert flags[::2] == ["--root_path", "--train_dir", "--test_dir"]
    found = parts_of(flags[1], train_dir=flags[3], test_dir=flags[5])
    assert found == {"train": {f"train/{name}" for name in CLASSES}, "test": {f"val/{name}" for name in CLASSES}}


@pytest.mark.parametrize("flat, remedy", [("test", "--root_path train"), ("train", "train/labels.csv")])
def test_a_part_without_class_folders(flat, remedy):
    tree(*(f"{part}/{name}" for part in ("train", "test") if part != flat for name in CLASSES), flat)
    Path(flat, "labels.csv").write_text("id,breed\n")
    message = error_of_build("folder", ".", 1, 1)
    assert message.startswith(f"{flat} has images") and remedy in message


@pytest.mark.parametrize(
    "said, named",
    [
        ({"train_dir": "a"}, "--test_dir"),
        ({"train_dir": "a", "test_dir": "nowhere"}, "nowhere"),
        ({"train_dir": "a", "test_dir": "a"}, "twice"),
        ({"train_dir": "a", "test_dir": ".."}, "below"),
        ({"image_root": "a"}, "--image_root"),
        ({"classnames": "none.txt"}, "none.txt"),
    ],
)
def test_flags_that_cannot_work(said, named):
    tree("a/forest", "a/sea", "b/forest", "b/sea")
    with pytest.raises(datasets.DatasetError, match=named):
        read_folder(Path(), OwnImages(**said))


def test_folders_called_like_parts_may_be_classes():
    tree("train/one", "test/one", "validation/one")
    Path("classnames.txt").write_text("test test tube\ntrain railway train\nvalidation stamp\n")
    split, _ = read_folder(Path())
    assert split.class_names == ("test tube", "railway train", "stamp")


@pytest.mark.parametrize("parts", [("train", "test"), ("training", "validation"), ("Train", "val", "Test")])
def test_parts_inside_the_classes_are_rejected(parts):
    tree(*(f"{name}/{part}" for name in CLASSES for part in parts))
    assert f"forest/{min(parts)}" in error_of_build("folder", ".", 1, 1)


@pytest.mark.parametrize("domains", [("art", "photo"), ("amazon", "dslr", "webcam"), ("day", "night")])
def test_domains_over_classes_are_noticed(domains, capsys):
    tree(*(f"{domain}/{name}" for domain in domains for name in CLASSES))
    read_folder(Path())
    note = capsys.readouterr().err
    assert f"--root_path {domains[0]}" in note and f"--test_dir {domains[1]}" in note
    assert parts_of(train_dir=domains[0], test_dir=domains[1])["test"] == {f"{domains[1]}/{name}" for name in CLASSES}


# --- names


@pytest.mark.parametrize(
    "names, kind",
    [
        (("0", "1", "2"), "number"),
        (("001.Black_footed_Albatross", "002.Laysan_Albatross"), "number at its beginning"),
        (("n02085620-Chihuahua", "n02085782-Japanese_spaniel"), "WordNet"),
        (("class_1", "class_2"), "counter"),
        (("3f2a9c01", "77b0e1d4"), "an id"),
    ],
)
def test_names_that_make_poor_prompts_get_a_hint(names, kind, capsys):
    tree(*names)
    read_folder(Path())
    assert kind in capsys.readouterr().err
    good = [f"kind {chr(97 + number)}" for number in range(len(names))]
    Path("names.json").write_text(json.dumps(dict(zip(names, good))))
    Path("names.csv").write_text("folder,name\n" + "".join(f"{a},{b}\n" for a, b in zip(names, good)))
    Path("names.txt").write_text("".join(f"{a} {b}\n" for a, b in zip(names, good)))
    for file in ("names.json", "names.csv", "names.txt"):
        assert read_folder(Path(), OwnImages(classnames=file))[0].class_names == tuple(good)
    assert "look like" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    ['{"forest": "wood"}', '{"forest": "wood", "sea": "ocean", "sky": "air"}', '{"forest": "sea", "sea": "Sea"}', "[]"],
)
def test_wrong_files_of_names(content, run_main):
    tree("data/forest", "data/sea")
    Path("names.json").write_text(content)
    code, _, _, err = run_main(*OWN, "--root_path", "data", "--classnames", "names.json")
    assert code == 2 and "names.json" in err.splitlines()[-1]


@pytest.mark.parametrize("name", ["caf\u00e9", "\u00fcber", "\u1e69"])
def test_both_unicode_forms_of_a_name_are_one_class(name):
    composed, decomposed = (unicodedata.normalize(form, name) for form in ("NFC", "NFD"))
    tree(f"train/{composed}", f"test/{decomposed}", "train/tea", "test/tea")
    split, _ = read_folder(Path())
    assert set(split.class_names) == {composed, "tea"} and len({item.label for item in split.test}) == 2
    images(f"train/{decomposed}")
    assert ascii(decomposed) in error_of_build("folder", ".", 1, 1)


@pytest.mark.parametrize("other", ["Forest", "forest ", "for\u200best", "f_orest"])
def test_the_difference_between_similar_names_is_shown(other):
    tree("train/forest", "train/sea", f"test/{other}", "test/sea")
    assert ascii(other) in error_of_build("folder", ".", 1, 1)


# --- what is in a folder


def test_a_run_and_the_doctor_show_classes_counts_and_prompts(run_main, capsys):
    tree("photos/forest", "photos/sea")
    err = run_main(*OWN, "--root_path", "photos", "--template", "a map of {}.")[3]
    assert "forest 1/1/1" in err and "a map of forest." in err
    assert doctor.main(["folder", "--root_path", "photos"]) == 0
    assert "sea 1/1/1" in capsys.readouterr().out


@pytest.mark.parametrize("places", [("train/sea/0.png", "test/sea/x.png"), ("train/sea/0.png", "val/sea/0.png")])
def test_copies_in_two_parts(places, capsys, run_main):
    tree(*(f"{part}/{name}" for part in ("train", "val", "test") for name in CLASSES))
    shutil.copy(*places)
    assert doctor.main(["folder", "--root_path", "."]) == 0
    out = capsys.readouterr().out
    assert all(place in out for place in places)
    _, plain, _, err = run_main(*OWN, "--root_path", ".")
    assert "--drop_copies" in err
    _, dropped, _, _ = run_main(*OWN, "--root_path", ".", "--drop_copies")
    assert plain["run_id"] != dropped["run_id"]
    split, _ = read_folder(Path(), OwnImages(drop_copies=True))
    left = [item.path for item in (*split.train, *split.val, *split.test)]
    assert places[0] not in left and places[1] in left and len(left) == len([*Path().glob("*/*/*.png")]) - 1


@pytest.mark.parametrize("other", ["train/sea/y.png", "test/sea/0.png", "val/sea/deep/copy.PNG"])
def test_images_in_two_classes(other, capsys):
    tree(*(f"{part}/{name}" for part in ("train", "val", "test") for name in CLASSES))
    Path(other).parent.mkdir(exist_ok=True)
    shutil.copy("train/forest/0.png", other)
    read_folder(Path())
    assert "two classes" in capsys.readouterr().err
    split, _ = read_folder(Path(), OwnImages(drop_copies=True))
    assert not {"train/forest/0.png", other} & {item.path for item in (*split.train, *split.val, *split.test)}


def test_a_copied_part_leaves_nothing_to_train_on():
    tree("train/forest", "train/sea")
    shutil.copytree("train", "test")
    assert "--drop_copies" in error_of_build("folder", ".", 1, 1, own=OwnImages(drop_copies=True))


@pytest.mark.parametrize("names", [("results", "adapted", "cache"), ("runs-1", "my weights", "features")])
def test_what_the_program_wrote_is_no_class(names, run_main):
    tree(*CLASSES)
    results, weights, cache = names
    flags = ("--dataset", "folder", "--backbone", "tiny", "--root_path", ".", "--total_iters", 1, "--shots", 1)
    flags += ("--results_dir", results, "--save_path", weights, "--cache_dir", cache)
    assert run_main(*flags)[0] == 0
    code, record, _, _ = run_main(*flags, "--seed", 5)
    assert code == 0 and record["test_accuracy"] is not None and "5" in record["run_id"]
    assert read_folder(Path())[0].class_names == CLASSES
    Path("mistake").mkdir()
    assert "mistake" in error_of_build("folder", ".", 1, 1)
