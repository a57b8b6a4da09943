"""CLIP's byte-level BPE tokenizer: text to token ids, and back.

The merge list `bpe_simple_vocab_16e6.txt.gz` is OpenAI's (MIT licence, see LICENSE).
"""

import gzip
import html
from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from pathlib import Path

import ftfy
import regex
import torch
from torch import Tensor

CONTEXT_LENGTH = 77
START, END = "<|startoftext|>", "<|endoftext|>"
MERGES = 49152 - 256 - 2  # the file holds more; CLIP uses these
WORD_END = "</w>"

# The two special tokens, English contractions, runs of letters, single digits, runs of other symbols.
PIECES = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE
)


def _byte_symbols() -> dict[int, str]:
    """One printable character per byte: Latin-1's printable ones stand for themselves, the other 68 bytes
    (blanks and controls) for the code points from 256 up. The order is that of the vocabulary."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    symbols = {byte: chr(byte) for byte in printable}
    symbols.update({byte: chr(256 + i) for i, byte in enumerate(others)})
    return symbols


def _clean(text: str) -> str:
    text = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    return regex.sub(r"\s+", " ", text).strip().lower()


class Tokenizer:
    """Byte-pair encoding over printable stand-ins for UTF-8 bytes; a word's last symbol carries `</w>`."""

    def __init__(self, merge_file: Path):
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
        """Token ids of `text`, without start and end tokens and without a length limit."""
        return [i for piece in PIECES.findall(_clean(text)) for i in self._encode_piece(piece)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids, up to the lower-casing and blanks that encoding does not keep."""
        bytes_of = {symbol: byte for byte, symbol in self.byte_symbols.items()}
        text = "".join(self.symbols[i] for i in ids).replace(WORD_END, " ")
        return bytes(b for c in text for b in ([bytes_of[c]] if c in bytes_of else c.encode())).decode(
            "utf-8", errors="replace"
        )

    def _encode_piece(self, piece: str) -> list[int]:
        if piece not in self.cache:
            self.cache[piece] = [self.ids[symbol] for symbol in self._merge(piece)]
        return self.cache[piece]

    def _merge(self, piece: str) -> list[str]:
        """Joins the adjacent pair of the lowest rank, everywhere it occurs, until no pair has a rank."""
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
    """The one tokenizer of all CLIP models, built on first use."""
    return Tokenizer(Path(__file__).parent / "bpe_simple_vocab_16e6.txt.gz")


def tokenize(texts: str | Sequence[str], context_length: int = CONTEXT_LENGTH, truncate: bool = False) -> Tensor:
    """Token ids of one or several texts.

    Returns an int64 tensor [number of texts, context_length]: start token, content, end token, then zeros.
    A text with more than context_length - 2 tokens raises ValueError, or with `truncate` is cut so that its
    last id is the end token.
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
