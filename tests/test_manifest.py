"""Manifests of your own images: dialects of CSV, JSON, class names, parts, and what is rejected with file and row."""

import gzip
import json

import pandas as pd
import pytest
from support.fabricate import error_of_build, picture

import datasets
from datasets import manifest as manifests
from datasets.task import DatasetError, Item


def read_manifest(path):
    return manifests.read_manifest(path)[0]


def manifest(tmp_path, text: str | bytes, name: str = "manifest.csv"):
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


PARTS = "a.jpg,cat,train\nb.jpg,dog,train\nc.jpg,cat,test\n"
CAT_DOG = {"train": [("a.jpg", 0), ("b.jpg", 1)], "val": [], "test": [("c.jpg", 0)]}


@pytest.mark.parametrize(
    "text",
    [
        "path,class_name,part\n" + PARTS,
        "\ufeffpath,class_name,part\n" + PARTS,
        ("path,class_name,part\n" + PARTS).replace(",", ";"),
        ("path,class_name,part\n" + PARTS).replace(",", "\t"),
        ("path,class_name,part\n" + PARTS).replace("\n", "\r\n"),
        ("path,class_name,part\n" + PARTS).replace(",", ", "),
        "Path,Class Name,Part\n" + PARTS,
        "path,class,part\n" + PARTS + "\n\n",
        "path,class_name,part\n" + PARTS + ",,\n",
        "part,path,label,class_name\ntrain,a.jpg,0,cat\nTRAINING,b.jpg, 1 ,dog\n Test ,./c.jpg,0,cat\n",
        'class_name, path, part\ncat, "a.jpg", train\ndog, b.jpg, train\ncat,c.jpg,test\n',
        'path,class_name,part\n"a.jpg","cat","train"\nb.jpg,dog,train\n"c.jpg", cat ,test\n',
    ],
)
def test_csv_dialects(text, tmp_path):
    path = manifest(tmp_path, text)
    split = read_manifest(path)
    assert split.class_names == ("cat", "dog")
    assert {part: [(i.path, i.label) for i in getattr(split, part)] for part in CAT_DOG} == CAT_DOG
    assert all(datasets.build("folder", root, 1, 1).image_root == tmp_path for root in (path, tmp_path))


def test_quoted_fields_hold_anything(tmp_path):
    text = 'path,class_name,part\n"a,1.jpg","say ""cat""",train\n"new\nline.jpg",dog,train\n'
    text += '" b.jpg",dog,test\nc\u2028.jpg,dog,test\n'
    split = read_manifest(manifest(tmp_path, text))
    assert [item.path for item in (*split.train, *split.test)] == ["a,1.jpg", "new\nline.jpg", " b.jpg", "c\u2028.jpg"]
    assert split.class_names == ("dog", 'say "cat"')


def test_labels_decide_the_order_and_names_come_from_columns_or_beside(tmp_path):
    rows = "z.jpg,1,train\ny.jpg,0,train\nx.jpg,1,test\n"
    path = manifest(tmp_path, "path,label,part\n" + rows)
    manifest(tmp_path, "zebra\nant", "classnames.txt")
    split = read_manifest(path)
    assert split.class_names == ("zebra", "ant") and split.train == (Item("z.jpg", 1), Item("y.jpg", 0))
    manifest(tmp_path, "zebra\nant\nbee", "classnames.txt")
    message = error_of_build("folder", path, 1, 1)
    assert str(path) in message and f"{tmp_path / 'classnames.txt'} has 3 lines for the 2 labels" in message
    named = "path,label,class_name,part\nz.jpg,1,ant,train\ny.jpg,0,zebra,train\nx.jpg,1,ant,test\n"
    assert read_manifest(manifest(tmp_path, named)) == split


def test_a_manifest_without_parts_is_divided_whatever_its_order_and_names(tmp_path, capsys):
    rows = [f"{name}/{i}.jpg,{label}" for label, name in enumerate(("cat", "dog")) for i in range(10)]
    manifest(tmp_path, "cat\ndog", "classnames.txt")
    first = read_manifest(manifest(tmp_path, "\n".join(["path,label", *rows]), "a.csv"))
    assert "a.csv" in capsys.readouterr().err
    assert [len(part) for part in (first.train, first.val, first.test)] == [10, 4, 6]
    manifest(tmp_path, "lion\nwolf", "classnames.txt")
    second = read_manifest(manifest(tmp_path, "\n".join(["path,label", *rows[::-1]]), "b.csv"))
    assert (first.train, first.val, first.test) == (second.train, second.val, second.test)


TABLE = "path,class_name,part\n"
BAD_CSV = {
    "empty": ("", ["first line", "path"]),
    "only a header": ("path,label\n", ["lists no images"]),
    "no header": (PARTS, ["first line", "a.jpg,cat,train"]),
    "column twice": ("path,class,class_name\na,b,c\n", ["first line"]),
    "no path column": ("label,class_name\n0,cat\n", ["first line", "path"]),
    "short row": (TABLE + PARTS + "d.jpg,cat\n", ["line 5", "2 fields instead of 3"]),
    "line after blank ones": (TABLE + "\n\n" + PARTS + "d.jpg,cat\n", ["line 7"]),
    "open quote": (TABLE + '"a.jpg,cat,train\n', ["valid CSV"]),
    "no path": (TABLE + PARTS + ",cat,test\n", ["line 5", "no path"]),
    "no class": ("path,part\na.jpg,train\n", ["line 2", "no label and no class_name"]),
    "some without class": (TABLE + PARTS + "d.jpg,,test\n", ["line 5", "no class_name"]),
    "some without label": ("path,label,class_name\na,0,cat\nb,,dog\n", ["line 3", "no label"]),
    "some without part": (TABLE + PARTS + "d.jpg,cat,\n", ["line 5", "no part"]),
    "unknown part": (TABLE + PARTS + "d.jpg,cat,holdout\n", ["line 5", "'holdout'", "train, val or test"]),
    "text and numbers": ("path,label\na.jpg,cat\nb.jpg,1\n", ["line 2", "'cat'", "class_name"]),
    "fraction as label": ("path,label\na.jpg,0.5\n", ["line 2", "'0.5'"]),
    "negative label": ("path,label\na.jpg,-1\n", ["line 2", "'-1'"]),
    "two names": ("path,label,class_name\na,0,cat\nb,0,dog\n", ["line 3", "label 0", "'dog'", "'cat'"]),
    "two labels": ("path,label,class_name\na,0,cat\nb,1,cat\n", ["same prompt"]),
    "no names": ("path,label\na,0\nb,1\n", ["no class names", "classnames.txt"]),
    "one class": (TABLE + "a,cat,train\nb,cat,test\n", ["one class ('cat')"]),
    "twins": (TABLE + PARTS + "d.jpg,Cat,test\n", ["'Cat'", "'cat'", "same prompt"]),
    "untrained class": (TABLE + PARTS + "d.jpg,eel,test\n", ["'eel'", "no image in train"]),
    "no test": (TABLE + "a,cat,train\nb,dog,train\n", ["no image in test"]),
    "one image": ("path,class_name\na,cat\nb,cat\nc,dog\n", ["'dog'", "one image"]),
    "twice": (TABLE + PARTS + "a.jpg,cat,test\n", ["line 5", "'a.jpg'", "listed before"]),
    "twice, in another spelling": (TABLE + PARTS + ".//a.jpg,cat,test\n", ["line 5", "'a.jpg'", "listed before"]),
    "backslashes": (TABLE + PARTS + "cat\\d.jpg,cat,test\n", ["line 5", "forward slashes"]),
    "is_train": ("path,class,is_train\na.jpg,cat,1\nb.jpg,dog,0\n", ["is_train", "part"]),
    "COCO": (json.dumps({"info": {}, "images": [], "annotations": []}), ["COCO"]),
    "drive": (TABLE + PARTS + "C:/pets/d.jpg,cat,test\n", ["line 5", "--image_root"]),
    "absolute": (TABLE + PARTS + "/pets/d.jpg,cat,test\n", ["line 5", "--image_root"]),
    "outside": (TABLE + PARTS + "cat/../../d.jpg,cat,test\n", ["line 5", "--image_root"]),
    "several kinds": (
        TABLE + "a,cat,train\nb,dog,extra\nc,cat,other\nhttp://x/d,cat,test\n",
        ["line 3", "2 rows", "line 5"],
    ),
    "two paths": ("image,file,class\na,a,cat\n", ["image and file", "path"]),
    "two classes": ("path,species,breed\na,cat,tom\n", ["species and breed"]),
    "label and name as text": ("path,label,class_name\na,cat,tom\n", ["label", "text"]),
    "several classes in one": (
        "path,label\na,cat\nb,dog\nc,cat|dog\nd,cat\ne,dog\nf,cat|dog\n",
        ["cat|dog", "several"],
    ),
    "gzip": (gzip.compress(b"path,label"), ["gzip"]),
    "Excel": (b"PK\3\4", ["Excel"]),
    "Parquet": (b"PAR1", ["Parquet"]),
    "web address": (TABLE + PARTS + "https://x.org/d.jpg,cat,test\n", ["line 5", "web address"]),
    "Latin-1": ("path,class_name\na,Käse\n".encode("latin-1"), ["UTF-8"]),
}


GOOD = {"train": [["a.jpg", 0, "cat"], ["b.jpg", 1, "dog"]], "test": [["c.jpg", 0, "cat"]]}
ROW = {"path": "a.jpg", "class_name": "cat"}
BAD_JSON = {
    "no JSON": ("{", ["not JSON", "line 1"]),
    "web page": ("<html>", ["not JSON"]),
    "lines": ('{"path": "a"}\n{"path": "b"\n', ["not JSON", "line 2"]),
    "number": ("7", ["a list of objects"]),
    "huge number": ("[" + "1" * 5000 + "]", ["not JSON"]),
    "deep": ("[" * 100_000, ["not JSON"]),
    "empty list": ("[]", ["lists no images"]),
    "empty object": ("{}", ["lists no images"]),
    "list of texts": ('["a.jpg"]', ["row 1", "expected the fields"]),
    "path no text": (json.dumps([ROW | {"path": [3]}]), ["row 1", "no path"]),
    "true as label": (json.dumps([ROW | {"label": True}]), ["row 1", "label True"]),
    "number as name": (json.dumps([{"path": "a", "label": 0, "class_name": 5}]), ["row 1", "class_name 5"]),
    "list as name": (json.dumps([{"path": "a", "class_name": ["x"]}]), ["row 1", "class_name"]),
    "list as part": (json.dumps([ROW | {"part": ["train"]}]), ["row 1", "part"]),
    "NUL": (json.dumps([ROW | {"path": "a\0.jpg"}]), ["row 1", "--image_root"]),
    "half a character": (json.dumps([ROW | {"path": "\ud800.jpg"}]), ["row 1", "--image_root"]),
    "coop: parts no lists": (json.dumps(GOOD | {"val": 3}), ["a list of objects"]),
    "coop: short row": (json.dumps(GOOD | {"val": [["d.jpg", 0]]}), ["val row 1", "[path, label, class name]"]),
    "coop: other part": (json.dumps(GOOD | {"meta": [["d.jpg", 0, "cat"]]}), ["meta row 1", "'meta'"]),
    "coop: in two parts": (json.dumps(GOOD | {"val": [["c.jpg", 0, "cat"]]}), ["val row 1", "listed before"]),
    "coop: outside": (json.dumps(GOOD | {"val": [["../c.jpg", 0, "cat"]]}), ["val row 1", "--image_root"]),
    "coop: no test": (json.dumps(GOOD | {"test": []}), ["no image in test"]),
}


BAD = [("manifest.csv", *case) for case in BAD_CSV.values()]
BAD += [("manifest.json", *case) for case in BAD_JSON.values()]


@pytest.mark.parametrize(("name", "text", "words"), BAD, ids=[*BAD_CSV, *BAD_JSON])
def test_bad_manifests(name, text, words, tmp_path):
    path = manifest(tmp_path, text, name)
    message = error_of_build("folder", tmp_path, 1, 1)
    assert str(path) in message and all(word in message for word in words), message
    assert not any(word in message for word in ("download", "published", "split file", "--split")), message


def test_json_manifests_may_have_a_byte_order_mark_and_need_no_val(tmp_path):
    split = read_manifest(manifest(tmp_path, "\ufeff" + json.dumps(GOOD), "x.json"))
    assert split.class_names == ("cat", "dog") and split.val == () and split.test == (Item("c.jpg", 0),)


@pytest.mark.parametrize("link", ["symlink_to", "hardlink_to"])
def test_one_file_with_two_names_is_rejected(link, tmp_path):
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        picture(0, 0).save(tmp_path / name)
    getattr(tmp_path / "d.jpg", link)(tmp_path / "a.jpg")
    text = "path,class_name,part\na.jpg,cat,train\nb.jpg,dog,train\nc.jpg,cat,test\nd.jpg,dog,test\n"
    with pytest.raises(DatasetError, match=r"line 5: 'd.jpg' is listed before as 'a.jpg'"):
        read_manifest(manifest(tmp_path, text))


# --- tables as people have them

ROWS = [("a.jpg", "cat", "train"), ("b.jpg", "dog", "train"), ("c.jpg", "cat", "test")]


def frame(*names: str) -> pd.DataFrame:
    return pd.DataFrame(ROWS, columns=names)


BY_PART = list(frame("path", "class", "split").groupby("split"))
FILES = {
    "pandas with its index": ("x.csv", lambda p: frame("filename", "label", "split").to_csv(p)),
    "TSV": ("labels.tsv", lambda p: frame("Image Path", "Class-Name", "Set").to_csv(p, sep="\t", index=False)),
    "bars": ("x.txt", lambda p: frame("img", "category", "subset").to_csv(p, sep="|", index=False)),
    "Excel's Unicode text": (
        "x.txt",
        lambda p: frame("File_Name", "Species", "Partition").to_csv(p, sep="\t", encoding="utf-16"),
    ),
    "JSON lines": ("x.jsonl", lambda p: frame("file_name", "label", "split").to_json(p, orient="records", lines=True)),
    "JSON lines called JSON": (
        "x.json",
        lambda p: frame("image", "label", "phase").to_json(p, orient="records", lines=True),
    ),
    "JSON by columns": ("x.json", lambda p: frame("path", "class", "part").to_json(p)),
    "JSON, split": ("x.json", lambda p: frame("path", "breed", "part").to_json(p, orient="split")),
    "JSON by parts": (
        "x.json",
        lambda p: p.write_text(json.dumps({part: rows.to_dict("records") for part, rows in BY_PART})),
    ),
    "more columns": (
        "x.csv",
        lambda p: frame("path", "class", "part").assign(width=3, note="a,b").to_csv(p, index=False),
    ),
    "numbers of pandas": (
        "x.csv",
        lambda p: frame("id", "class_name", "split").assign(target=[1.0, 5.0, 1.0]).to_csv(p, index=False),
    ),
}


@pytest.mark.parametrize(("name", "write"), FILES.values(), ids=FILES)
def test_usual_tables(name, write, tmp_path):
    for file in ("a.jpg", "b.jpg", "c.jpg"):
        (tmp_path / file).touch()
    write(tmp_path / name)
    split = read_manifest(tmp_path / name)
    assert split.class_names == ("cat", "dog")
    assert {part: [(i.path, i.label) for i in getattr(split, part)] for part in CAT_DOG} == CAT_DOG


@pytest.mark.parametrize("form", ["{}", "./{}", "sub/../{}", " {} ", "ROOT/{}", "{}\\", "WITHOUT ENDING"])
def test_paths_in_other_forms(form, tmp_path):
    folder = tmp_path / "images"
    (folder / "cats").mkdir(parents=True)
    names = ["cats/a.jpg", "b.jpg", "cats/c.png"]
    for name in names:
        (folder / name).touch()
    written = [form.format(name).replace("ROOT", str(folder)) for name in names]
    if form == "{}\\":
        written = [name.replace("/", "\\") for name in names]
    elif form == "WITHOUT ENDING":
        written = [name.rpartition(".")[0] for name in names]
    text = "image_id,label,part\n" + "".join(
        f'"{path}",{label},{part}\n' for path, (_, label, part) in zip(written, ROWS)
    )
    for file, root in ((manifest(folder, text), None), (manifest(tmp_path, text, "t.csv"), folder)):
        split, image_root = manifests.read_manifest(file, root)
        assert image_root == folder and [i.path for i in (*split.train, *split.test)] == names
    split, image_root = manifests.read_manifest(tmp_path / "t.csv")  # found in the only folder that has them
    assert image_root == (tmp_path if form.startswith("ROOT") else folder)


@pytest.mark.parametrize("manifests_folder, form", [("meta", "../{}"), ("meta/csv", "../../images/{}")])
def test_paths_that_lead_up_from_the_manifest(manifests_folder, form, tmp_path, capsys):
    folder = tmp_path / ("images" if "images" in form else ".")
    for name in ("a.jpg", "b.jpg", "c.jpg"):
        folder.mkdir(exist_ok=True)
        (folder / name).touch()
    (tmp_path / manifests_folder).mkdir(parents=True)
    text = "path,label,part\n" + "".join(f"{form.format(name)},{label},{part}\n" for name, label, part in ROWS)
    file = manifest(tmp_path / manifests_folder, text)
    split, image_root = manifests.read_manifest(file)
    assert image_root == tmp_path and split.train[0].path == form.format("a.jpg").replace("../", "")
    assert manifests.read_manifest(file, folder)[0].train[0].path == "a.jpg"
    with pytest.raises(DatasetError, match="--image_root"):
        manifests.read_manifest(file, tmp_path / manifests_folder)


def test_what_fits_two_files_is_asked_for(tmp_path):
    for name in ("one/a.jpg", "two/a.jpg", "three/a.png", "three/a.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    text = "path,label\na.jpg,cat\n"
    with pytest.raises(DatasetError, match="--image_root"):
        read_manifest(manifest(tmp_path, text))
    with pytest.raises(DatasetError, match=r"a\.(png|jpg) or a\."):
        manifests.read_manifest(manifest(tmp_path, "path,label\na,cat\n"), tmp_path / "three")


@pytest.mark.parametrize("labels", [(1, 2), (1, 5), (0, 7)])
def test_gaps_between_labels_are_closed(labels, tmp_path, capsys):
    rows = [(f"{label}{i}.jpg", label, f"name {label}") for label in labels for i in range(4)]
    pd.DataFrame(rows, columns=["path", "label", "class_name"]).to_csv(tmp_path / "x.csv")
    split = read_manifest(tmp_path / "x.csv")
    assert split.class_names == tuple(f"name {label}" for label in labels)
    assert {item.label for item in split.train} == {0, 1} and str(labels[1]) in capsys.readouterr().err


def test_rows_that_repeat_count_once(tmp_path, capsys):
    split = read_manifest(manifest(tmp_path, "path,class_name,part\n" + PARTS + PARTS))
    assert len(split.train) == 2 and "3 rows" in capsys.readouterr().err


def test_a_table_of_hugging_face_beside_images_is_found(tmp_path):
    for number, (name, _, _) in enumerate(ROWS):
        picture(number, number).save(tmp_path / name)
    rows = [json.dumps({"file_name": name, "label": label, "split": part}) for name, label, part in ROWS]
    manifest(tmp_path, "\n".join(rows), "metadata.jsonl")
    assert datasets.build("folder", tmp_path, 1, 1).class_names == ("cat", "dog")
