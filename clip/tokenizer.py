"""CLIP's byte-level BPE tokenizer: text to token ids, and back. Those of other models, by `transformers`.

The merge list `bpe_simple_vocab_16e6.txt.gz` is OpenAI's (MIT licence, see LICENSE).
"""

import gzip
import html
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor

from .files import WeightsError

CONTEXT_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # the file holds more; CLIP uses these
WORD_END = "</w>"

# The two special tokens, English contractions, runs of letters, single digits, runs of other symbols.
PIECES = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


def _byte_symbols() -> dict[int, str]:
    """Return one printable character for each byte, in the order of the vocabulary.

    Latin-1's printable characters stand for themselves, the other 68 bytes (blanks and controls) are mapped to the code
    points from 256 up.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


class Tokenizer:
    """Byte-pair encoding of UTF-8 bytes, each written as a printable character; a word's last symbol ends in `</w>`."""

    def __init__(self, merge_file: Path):
        import ftfy  # these two take a while to import, and only the tokenizer needs them
        import regex

        self._fix, self._blanks, self._pieces = ftfy.fix_text, regex.compile(r"\s+"), regex.compile(PIECES, regex.I)
        lines = gzip.decompress(merge_file.read_bytes()).decode("utf-8").split("\n")
        merges = [tuple(line.split()) for line in lines[1 : MERGES + 1]]  # line 0 is a version header
        self.byte_symbols = _byte_symbols()
        singles = list(self.byte_symbols.values())
        vocabulary = [*singles, *(s + WORD_END for s in singles), *("".join(m) for m in merges), START, END]
        self.ids = {symbol: i for i, symbol in enumerate(vocabulary)}
        self.symbols = vocabulary
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.cache: dict[str, list[int]] = {START: [self.ids[START]], END: [self.ids[END]]}

    def encode(self, text: str) -> list[int]:
        """Return the token ids of `text`, without start and end tokens and without a length limit."""
        text = html.unescape(html.unescape(self._fix(text)))
        text = self._blanks.sub(" ", text).strip().lower()
        return [i for piece in self._pieces.findall(text) for i in self._encode_piece(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids; case and blanks are lost in encoding."""
        bytes_of = {symbol: byte for byte, symbol in self.byte_symbols.items()}
        text = "".join(self.symbols[i] for i in ids).replace(WORD_END, self.byte_symbols[ord(" ")])
        return bytes(bytes_of[symbol] for symbol in text).decode("utf-8", errors="replace")

    def _encode_piece(self, piece: str) -> list[int]:
        if piece not in self.cache:
            self.cache[piece] = [self.ids[symbol] for symbol in self._merge(piece)]
        return self.cache[piece]

    def _merge(self, piece: str) -> list[str]:
        """Join the adjacent pair of the lowest rank, everywhere it occurs, until no pair has a rank."""
        symbols = [self.byte_symbols[byte] for byte in piece.encode("utf-8")]
        symbols[-1] += WORD_END
        while len(symbols) > 1:
            best = min(pairwise(symbols), key=lambda pair: self.ranks.get(pair, MERGES))
            if best not in self.ranks:
                break
            merged, i = [], 0
            while i < len(symbols):
                if tuple(symbols[i : i + 2]) == best:
                    merged.append(symbols[i] + symbols[i + 1])
                    i += 2
                else:
                    merged.append(symbols[i])
                    i += 1
            symbols = merged
        return symbols


@lru_cache(maxsize=1)
def tokenizer() -> Tokenizer:
    """Return the tokenizer that all CLIP models share, built on first use."""
    return Tokenizer(Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz")


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False) -> Tensor:
    """Return the token ids of one or several texts: int64 [number of texts, context_length].

    Each row is start token, content, end token, then zeros. A text with more than context_length - 2 tokens raises
    ValueError; with `truncate` it is cut, and its last id is the end token.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    bpe = tokenizer()
    result = torch.zeros(len(texts), context_length, dtype=torch.int64)
    for row, text in zip(result, texts):
        ids = [bpe.ids[START], *bpe.encode(text), bpe.ids[END]]
        if len(ids) > context_length:
            if not truncate:
                raise ValueError(
                    f"the text {text!r} has {len(ids)} tokens, start and end included; CLIP takes {context_length}"
                )
            ids = [*ids[: context_length - 1], bpe.ids[END]]
        row[: len(ids)] = torch.tensor(ids)
    return result


@dataclass(frozen=True)
class OtherTokenizer:
    """A tokenizer of Hugging Face's `transformers`, for models with a vocabulary that is not CLIP's.

    `source` is a folder or a name on the Hub. `clean`: how open_clip cleans texts before, "lower", "whitespace" or
    "canonicalize"; empty: not at all. `strip_separator`: the separator's id becomes 0, as in CLIPA.
    """

    source: str
    context_length: int
    clean: str = ""
    strip_separator: bool = False

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return token ids, int64 [number of texts, context_length], padded. Raise ValueError for a text that is too
        long, WeightsError if the tokenizer is not to be had."""
        tokenizer = _of_transformers(self.source)
        cleaned = [_cleaned(text, self.clean) for text in texts]
        rows = tokenizer(cleaned, padding="max_length", max_length=self.context_length, truncation=False).input_ids
        for text, row in zip(texts, rows):
            if len(row) > self.context_length:
                raise ValueError(f"the text {text!r} has {len(row)} tokens; this model takes {self.context_length}")
        ids = torch.tensor(rows)
        return ids.masked_fill(ids == tokenizer.sep_token_id, 0) if self.strip_separator else ids


def _cleaned(text: str, how: str) -> str:
    if not how:
        return text
    from open_clip.tokenizer import get_clean_fn  # optional

    return get_clean_fn(how)(text)


@lru_cache(maxsize=2)
def _of_transformers(source: str):
    try:
        from transformers import AutoTokenizer  # optional
    except ImportError:
        raise WeightsError(
            f"the tokenizer {source} needs transformers: pip install transformers sentencepiece"
        ) from None
    try:
        return AutoTokenizer.from_pretrained(source)
    except Exception as error:  # no network, no such name, a package that it needs
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"the tokenizer {source} is not to be had ({reason}); download it on a machine with network, "
            "with the same HF_HOME"
        ) from error


@dataclass(frozen=True)
class ClipTokenizer:
    """CLIP's tokenizer for a model of this context length."""

    context_length: int = CONTEXT_LENGTH

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Return token ids, int64 [number of texts, context_length]. Raise ValueError for a text that is too long."""
        return tokenize(texts, self.context_length)
