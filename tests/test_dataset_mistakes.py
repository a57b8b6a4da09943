"""Mistakes in the data: each ends in a DatasetError of one line that names the file or folder."""

import json

import pytest
from support.fabricate import FOLDERS, SPLIT_FILES, error_of_build, fabricate
from support.runs import error_of

from datasets.splits import read_json_split
from datasets.task import DatasetError, Item


def test_missing_folders_and_split_file(tmp_path):
    assert str(tmp_path / "nowhere") in error_of_build("dtd", tmp_path / "nowhere", 1, 1)
    message = error_of_build("dtd", tmp_path, 1, 1)
    assert all(folder in message for folder in (str(tmp_path), "dtd", "DTD", "dtd/dtd"))
    (tmp_path / "dtd").mkdir()
    assert str(tmp_path / "dtd" / "images") in error_of_build("dtd", tmp_path, 1, 1)
    (tmp_path / "dtd" / "images").mkdir()
    message = error_of_build("dtd", tmp_path, 1, 1)
    assert "split_zhou_DescribableTextures.json" in message and "DATASETS.md" in message
    assert str(tmp_path / "dtd") in message


def test_every_missing_split_file_is_called_by_its_name(tmp_path):
    for name, file in SPLIT_FILES.items():
        (tmp_path / FOLDERS[name]["coop"][1]).mkdir(parents=True)
        assert file in error_of_build(name, tmp_path, 1, 1)


GOOD = {
    "train": [["a/1.jpg", 0, "a"], ["b/1.jpg", 1, "b"]],
    "val": [["a/2.jpg", 0, "a"]],
    "test": [["b/2.jpg", 1, "b"]],
}


def test_a_good_split_passes(tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(GOOD))
    split = read_json_split(path)
    assert split.class_names == ("a", "b")
    assert split.train == (Item("a/1.jpg", 0), Item("b/1.jpg", 1))
    assert split.test == (Item("b/2.jpg", 1),)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"train": []}, "'train'"),
        ({"val": None}, "'val'"),
        ({"test": {"a": 1}}, "'test'"),
        ({"test": [["b/2.jpg", 1]]}, "test row 0"),
        ({"test": [["b/2.jpg", 1, "b"], ["b/3.jpg", "1", "b"]]}, "test row 1"),
        ({"test": [["b/2.jpg", True, "b"]]}, "test row 0"),
        ({"test": [["b/2.jpg", 1.0, "b"]]}, "test row 0"),
        ({"test": [[7, 1, "b"]]}, "test row 0"),
        ({"test": [["b/2.jpg", 1, None]]}, "test row 0"),
        ({"test": ["abc"]}, "test row 0"),
        ({"test": [["/etc/b.jpg", 1, "b"]]}, "'/etc/b.jpg'"),
        ({"test": [["C:/b.jpg", 1, "b"]]}, "'C:/b.jpg'"),
        ({"test": [["b/../../c.jpg", 1, "b"]]}, "'b/../../c.jpg'"),
        ({"test": [["..\\c.jpg", 1, "b"]]}, "c.jpg"),
        ({"test": [["", 1, "b"]]}, "''"),
        ({"test": [["b\0.jpg", 1, "b"]]}, "'b\\x00.jpg'"),
        ({"test": [["b/2.jpg", 1, "other"]]}, "label 1"),
        ({"test": [["c/2.jpg", 2, "c"]]}, "label 2"),
        ({"train": [["a/1.jpg", 0, "a"], ["b/1.jpg", 2, "b"]], "test": [["b/2.jpg", 2, "b"]]}, "label"),
        ({"train": [["a/1.jpg", -1, "a"]], "val": [["a/2.jpg", -1, "a"]]}, "label"),
        ({"test": [["b/2.jpg", 1, "b"], ["a/1.jpg", 0, "a"]]}, "'a/1.jpg' in two parts"),
        ({"val": [["b/1.jpg", 1, "b"]]}, "'b/1.jpg' in two parts"),
        ({"val": [["b/2.jpg", 1, "b"]]}, "'b/2.jpg' in two parts"),
    ],
)
def test_a_malformed_split_is_rejected_with_file_and_row(change, complaint, tmp_path):
    path = tmp_path / "split.json"
    path.write_text(json.dumps(GOOD | change))
    message = error_of(DatasetError, read_json_split, path)
    assert str(path) in message and complaint in message


def test_a_file_that_is_not_a_split_is_rejected_by_name(tmp_path):
    path = tmp_path / SPLIT_FILES["dtd"]
    for content in (b"<html>\nQuota exceeded</html>", b"", b"[1, 2]", b'{"train": ', b"\xff\xfe{}"):
        path.write_bytes(content)
        assert str(path) in error_of(DatasetError, read_json_split, path)


@pytest.mark.parametrize(
    ("file", "content", "complaint"),
    [
        ("variants.txt", None, "variants.txt"),
        ("images_variant_val.txt", None, "images_variant_val.txt"),
        ("images_variant_test.txt", "", "images_variant_test.txt"),
        ("images_variant_test.txt", "0000001 Type-0/A 0\n0000002 Concorde\n", "line 2"),
        ("images_variant_test.txt", "0000001\n", "line 1"),
        ("images_variant_test.txt", "../secret Type-0/A 0\n", "line 1"),
        ("images_variant_train.txt", "0000001 Type-0/A 0\n", "images_variant_train.txt"),
        ("images_variant_test.txt", "0000001 Type-0/A 0\n", "'0000001.jpg' in two parts"),
    ],
)
def test_malformed_fgvc_files_are_rejected_by_name(file, content, complaint, tmp_path):
    fabricate("fgvc", tmp_path, per_class=4)
    path = tmp_path / "fgvc_aircraft" / file
    if content is None:
        path.unlink()
    else:
        path.write_text(content)
    message = error_of_build("fgvc", tmp_path, 1, 1)
    assert complaint in message and str(path.parent) in message
