"""A tiny random BERT with its vocabulary, and RTE files of made-up pairs, for the tests of BERT/."""

import csv
import random

import torch
from transformers import BertConfig, BertModel

WORDS = "a the cat dog sat ran on under mat tree house was seen nobody said that it rained in spring \" . , '".split()
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "##s", "##ed"]
LAYERS, WIDTH = 2, 16
SMALL = ["--model", "tiny", "--data_dir", "RTE", "--shots", "4", "--device", "cpu"]


def small_bert(folder, **options):
    """Write the tiny BERT and RTE's files, as the flags in SMALL name them."""
    tiny_bert(folder / "tiny", **options)
    rte_files(folder / "RTE")


def tiny_bert(folder, dropout=0.1, model_class=BertModel):
    """Write config, random weights and vocabulary of a BERT with 2 blocks of width 16. Return the folder."""
    config = BertConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=128,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        initializer_range=0.2,
    )
    state = torch.random.get_rng_state()
    torch.manual_seed(0)
    model_class(config).save_pretrained(folder)
    torch.random.set_rng_state(state)
    (folder / "vocab.txt").write_text("\n".join(VOCABULARY) + "\n")
    return folder


def rte_files(folder, train=40, dev=24):
    """Write train.tsv and dev.tsv with random labels. Some sentences have bare quotes. Return the folder."""
    folder.mkdir()
    generator = random.Random(0)
    for name, count in (("train", train), ("dev", dev)):
        with open(folder / f"{name}.tsv", "w", encoding="utf-8", newline="") as file:
            file.write("index\tsentence1\tsentence2\tlabel\n")
            for index in range(count):
                premise, hypothesis = (" ".join(generator.choices(WORDS, k=k)) for k in (generator.randint(4, 30), 5))
                label = "entailment" if generator.random() < 0.5 else "not_entailment"
                file.write(f"{index}\t{premise}\t{hypothesis}\t{label}\n")
    return folder


def read_table(path):
    """Return the rows of a CSV file as dicts."""
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))
