"""GLUE-RTE for BERT/: files, the Hub, the draws and the token ids."""

import sys
from collections import Counter

import huggingface_hub
import pandas
import pytest
import torch
from support.bert import rte_files, tiny_bert
from support.runs import error_of
from transformers import AutoTokenizer, BertForSequenceClassification

from BERT import rte

# The 32 rows of the published script among RTE's 2,490 training pairs.
RELEASED = (
    "1913 795 1455 1390 1359 242 1872 1357 2446 1456 1412 2464 2203 1436 463 2216 2163 761 897 2279 1196 147 1175 2421 "
    "1295 638 2208 1752 487 1237 1844 45"
)
HEADER = "index\tsentence1\tsentence2\tlabel\n"


def pairs(labels):
    return [rte.Pair(f"premise {row}", f"hypothesis {row}", label) for row, label in enumerate(labels)]


def test_the_released_protocol_draws_the_published_rows():
    rows = rte.draw(pairs([0] * 1249 + [1] * 1241), 16, 42, "released")
    assert rows == [int(row) for row in RELEASED.split()]


def test_balanced_draws_take_each_label_alike_and_nest():
    data = pairs([int(row % 3 == 0) for row in range(200)])
    rows = rte.draw(data, 16, 7, "balanced")
    assert Counter(data[row].label for row in rows) == {0: 16, 1: 16} and len(set(rows)) == 32
    assert rows == rte.draw(data, 16, 7, "balanced") != rte.draw(data, 16, 8, "balanced")
    assert set(rte.draw(data, 4, 7, "balanced")) < set(rows)
    # Both protocols shuffle alike: each label's pairs are the first of that label in the released order.
    shuffled = rte.draw(data, 100, 7, "released")
    for label in (0, 1):
        first = [row for row in shuffled if data[row].label == label][:16]
        assert [row for row in rows if data[row].label == label] == first
    with pytest.raises(rte.UserError, match=r"--shots 68 .*133 entailment, 67 not_entailment"):
        rte.draw(data, 68, 7, "balanced")


def test_quotes_line_ends_and_odd_characters_are_kept(tmp_path):
    rows = '0\t"He said\u2028it" ran.\t"A cat\tentailment\r\n1\tb "" c\tNA\tnot_entailment\n'
    rows += "\n3\td\t\tentailment\n"
    (tmp_path / "x.tsv").write_bytes((HEADER + rows).encode())
    expected = [('"He said\u2028it" ran.', '"A cat', 0), ('b "" c', "NA", 1), ("d", "", 0)]
    assert rte.read_tsv(tmp_path / "x.tsv") == expected


@pytest.mark.parametrize(
    "content, named",
    [
        (b"index\tsentence1\tlabel\n", "column sentence2"),
        (b"", "column label, sentence1, sentence2"),
        (HEADER.encode(), "no pairs"),
        ((HEADER + "0\ta\tb\tentails\n").encode(), "line 2: .*'entails'"),
        ((HEADER + "0\ta\tb\tc\tentailment\n").encode(), "line 2: not 4 fields"),
        ((HEADER + "0\ta\tb\n").encode(), "line 2: not 4 fields"),
        (HEADER.encode() + b"0\t\xff\tb\tentailment\n", "utf-8"),
        ((HEADER + "0\t" + "a" * 200_000 + "\tb\tentailment\n").encode(), "field larger than field limit"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, named):
    (tmp_path / "x.tsv").write_bytes(content)
    with pytest.raises(rte.UserError, match=rf"x\.tsv.*{named}"):
        rte.read_tsv(tmp_path / "x.tsv")


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the Hub, with the made-up pairs as parquet files."""
    data = rte.load(str(rte_files(tmp_path / "RTE")))
    (tmp_path / "hub" / "rte").mkdir(parents=True)
    for name, part in zip(rte.HUB_FILES, data):
        table = pandas.DataFrame(part, columns=["sentence1", "sentence2", "label"]).assign(idx=range(len(part)))
        table.to_parquet(tmp_path / "hub" / name)

    def download(repository, name, repo_type):
        assert (repository, repo_type) == ("nyu-mll/glue", "dataset")
        return str(tmp_path / "hub" / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return tmp_path / "hub" / "rte"


def test_the_hubs_files_hold_the_same_pairs_in_the_same_order(hub, tmp_path):
    data = rte.load(None)
    assert data == rte.load(str(tmp_path / "RTE")) and {type(pair.label) for pair in data.train} == {int}


@pytest.mark.parametrize("damage", ["no parquet", "half a file", "no column", "test labels", "no pairs"])
def test_damaged_files_of_the_hub_are_named(hub, damage):
    path = hub / "validation-00000-of-00001.parquet"
    table = pandas.read_parquet(path)
    if damage == "no parquet":
        path.write_text("<html>try later</html>")
    elif damage == "half a file":
        path.write_bytes(path.read_bytes()[:900])
    elif damage == "no column":
        table.drop(columns="sentence2").to_parquet(path)
    elif damage == "test labels":
        table.assign(label=-1).to_parquet(path)
    else:
        table[:0].to_parquet(path)
    assert str(path) in error_of(rte.UserError, rte.load, None)


def test_a_hub_that_cannot_be_reached_is_one_line_with_the_remedy(monkeypatch):
    def download(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    with pytest.raises(rte.UserError, match=r"^RTE .*ConnectionError: no route\).*--data_dir[^\n]*$"):
        rte.load(None)


@pytest.mark.parametrize("package", ["huggingface_hub", "pyarrow"])
def test_missing_packages_are_named_with_the_remedy(hub, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(rte.UserError, match=rf"{package} cannot be imported .*pip install -r .*\.txt"):
        rte.load(None)


def encoded(folder, data, segments=True):
    return rte.Encoded(data, AutoTokenizer.from_pretrained(folder), segments, "cpu")


def test_pairs_are_padded_cut_and_marked_as_segments(tmp_path):
    folder = tiny_bert(tmp_path / "tiny")
    data = [rte.Pair("the cat sat", "dogs ran .", 1), rte.Pair("cat " * 300, "a dog", 0)]
    ids = encoded(folder, data)
    words = (folder / "vocab.txt").read_text().splitlines()
    assert ids.inputs["input_ids"].shape == (2, 128)
    short, long = ([words[number] for number in row] for row in ids.inputs["input_ids"].tolist())
    assert short[:11] == ["[CLS]", "the", "cat", "sat", "[SEP]", "dog", "##s", "ran", ".", "[SEP]", "[PAD]"]
    assert long[-5:] == ["cat", "[SEP]", "a", "dog", "[SEP]"]
    assert ids.inputs["token_type_ids"][0, :11].tolist() == [0] * 5 + [1] * 5 + [0]
    assert ids.lengths.tolist() == [10, 128] and ids.labels.tolist() == [1, 0]
    assert not encoded(folder, data, segments=False).inputs["token_type_ids"].any()
    inputs, labels = ids.batch(torch.tensor([0]))
    assert {values.shape for values in inputs.values()} == {(1, 10)} and labels.tolist() == [1]


def test_cutting_a_batch_to_its_longest_pair_changes_no_logit(tmp_path):
    folder = tiny_bert(tmp_path / "tiny")
    data = rte.load(str(rte_files(tmp_path / "RTE"))).validation
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2).double().eval()
    ids = encoded(folder, data)
    rows = ids.lengths.argsort()[:8]
    assert ids.lengths[rows].max() < 40
    with torch.no_grad():
        cut = model(**ids.batch(rows)[0]).logits
        whole = model(**{name: values[rows] for name, values in ids.inputs.items()}).logits
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-9)
