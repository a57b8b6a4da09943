"""GLUE-RTE for BERT/: files, the Hub, the draws and the token ids."""

import sys
from collections import Counter

import huggingface_hub
import pandas
import pytest
import torch
from support.bert import rte_files, tiny_bert
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
    labels = [int(row % 3 == 0) for row in range(200)]
    rows = rte.draw(pairs(labels), 16, 7, "balanced")
    assert Counter(labels[row] for row in rows) == {0: 16, 1: 16} and len(set(rows)) == 32
    assert rows == rte.draw(pairs(labels), 16, 7, "balanced") != rte.draw(pairs(labels), 16, 8, "balanced")
    assert set(rte.draw(pairs(labels), 4, 7, "balanced")) < set(rows)
    # The order is that of the same shuffle: whatever the released protocol takes and fits comes first.
    shuffled = rte.draw(pairs(labels), 100, 7, "released")
    of_ones = [row for row in shuffled if labels[row] == 1][:16]
    assert [row for row in rows if labels[row] == 1] == of_ones
    with pytest.raises(rte.UserError, match=r"--shots 68 .*133 entailment, 67 not_entailment"):
        rte.draw(pairs(labels), 68, 7, "balanced")


def test_quotes_line_ends_and_odd_characters_are_kept(tmp_path):
    text = HEADER + '0\t"He said\u2028it" ran.\t"A cat\tentailment\r\n1\tb "" c\tNA\tnot_entailment\n'
    (tmp_path / "x.tsv").write_bytes(text.encode())
    assert rte.read_tsv(tmp_path / "x.tsv") == [
        ('"He said\u2028it" ran.', '"A cat', 0),
        ('b "" c', "NA", 1),
    ]


def test_rows_that_lack_a_field_are_left_out_with_a_note(tmp_path, capsys):
    (tmp_path / "x.tsv").write_text(HEADER + "0\ta\tb\tentailment\n1\tlost\n\n2\tc\t\tnot_entailment\n")
    assert rte.read_tsv(tmp_path / "x.tsv") == [("a", "b", 0), ("c", "", 1)]
    assert "1 rows lack a field" in capsys.readouterr().err


@pytest.mark.parametrize(
    "content, message",
    [
        (b"index\tsentence1\tlabel\n", "column sentence2"),
        (b"", "column label, sentence1, sentence2"),
        (HEADER.encode(), "holds no pairs"),
        ((HEADER + "0\ta\tb\tentails\n").encode(), "line 2: the label is 'entails'"),
        ((HEADER + "0\ta\tb\tc\tentailment\n").encode(), "line 2: more fields"),
        (HEADER.encode() + b"0\t\xff\tb\tentailment\n", "damaged"),
        ((HEADER + "0\t" + "a" * 200_000 + "\tb\tentailment\n").encode(), "damaged"),
    ],
)
def test_damaged_files_are_named(tmp_path, content, message):
    (tmp_path / "x.tsv").write_bytes(content)
    with pytest.raises(rte.UserError, match=message) as caught:
        rte.read_tsv(tmp_path / "x.tsv")
    assert "x.tsv" in str(caught.value)


def test_both_files_are_read_and_a_missing_one_is_named(tmp_path):
    data = rte.load(str(rte_files(tmp_path / "RTE")))
    assert (len(data.train), len(data.validation)) == (40, 24)
    assert any('"' in pair.premise for pair in data.train)
    (tmp_path / "RTE" / "dev.tsv").unlink()
    with pytest.raises(rte.UserError, match=r"dev\.tsv"):
        rte.load(str(tmp_path / "RTE"))


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in place of the Hub, with the made-up pairs as parquet files; returns it."""
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
    with pytest.raises(rte.UserError) as caught:
        rte.load(None)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


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


def encoded(folder, data, segments):
    return rte.Encoded(data, AutoTokenizer.from_pretrained(folder), segments, torch.device("cpu"))


def test_pairs_are_padded_cut_and_marked_as_segments(tmp_path):
    folder = tiny_bert(tmp_path / "tiny")
    data = [rte.Pair("the cat sat", "dogs ran .", 1), rte.Pair("cat " * 300, "a dog", 0)]
    ids = encoded(folder, data, True)
    vocabulary = {word: number for number, word in enumerate((folder / "vocab.txt").read_text().splitlines())}
    words = "[CLS] the cat sat [SEP] dog ##s ran . [SEP]".split()
    assert ids.inputs["input_ids"].shape == (2, 128)
    assert ids.inputs["input_ids"][0, :11].tolist() == [*(vocabulary[word] for word in words), vocabulary["[PAD]"]]
    assert ids.inputs["token_type_ids"][0, :11].tolist() == [0] * 5 + [1] * 5 + [0]
    assert ids.lengths.tolist() == [10, 128] and ids.labels.tolist() == [1, 0]
    assert ids.inputs["input_ids"][1, -4:].tolist() == [vocabulary[word] for word in "[SEP] a dog [SEP]".split()]
    assert not encoded(folder, data, False).inputs["token_type_ids"].any()
    inputs, labels = ids.batch(torch.tensor([0]))
    assert {name: tuple(values.shape) for name, values in inputs.items()} == dict.fromkeys(inputs, (1, 10))
    assert labels.tolist() == [1]


def test_cutting_a_batch_to_its_longest_pair_changes_no_logit(tmp_path):
    folder = tiny_bert(tmp_path / "tiny")
    data = rte.load(str(rte_files(tmp_path / "RTE"))).validation
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(folder, num_labels=2).double().eval()
    ids = encoded(folder, data, True)
    rows = ids.lengths.argsort()[:8]
    with torch.no_grad():
        cut = model(**ids.batch(rows)[0]).logits
        whole = model(**{name: values[rows] for name, values in ids.inputs.items()}).logits
    assert ids.lengths[rows].max() < 40
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-9)
