"""The tokenizer: known ids, and open_clip's tokenizer on thousands of odd strings."""

# ruff: noqa: RUF001 (letters that look alike are the point)

import random
import re

import open_clip
import pytest
import torch

import clip
from clip.tokenizer import tokenizer

START, END = 49406, 49407
VECTORS = {
    "a photo of a cat.": [320, 1125, 539, 320, 2368, 269],
    "": [],
    " \n\t ": [],
    "hello   world": [3306, 1002],
    "a photo of a 2012 Audi TTS Coupe.": [320, 1125, 539, 320, 273, 271, 272, 273, 10277, 11570, 16773, 269],
    "a photo of a colt's foot.": [320, 1125, 539, 320, 19726, 568, 4738, 269],
    "a photo of a F-16A/B.": [320, 1125, 539, 320, 325, 268, 272, 277, 320, 270, 321, 269],
    "a photo of a polka-dotted.": [320, 1125, 539, 320, 29476, 268, 47950, 269],
    "a photo of a Annual Crop Land.": [320, 1125, 539, 320, 2906, 9955, 973, 269],
    "a photo of a abyssinian.": [320, 1125, 539, 320, 16342, 690, 36638, 269],
    "AT&amp;amp;T": [536, 261, 339],  # unescaped twice
    "caf\u00c3\u00a9": [15304],  # UTF-8 read as Latin-1: ftfy repairs it
    "caf\u00e9": [15304],
    "don\u2019t": [847, 713],
    "a<|startoftext|>a <|ENDOFTEXT|> photo": [320, START, 320, END, 1125],
}


@pytest.mark.parametrize("text", VECTORS)
def test_known_ids(text):
    tokens = clip.tokenize(text)
    expected = [START, *VECTORS[text], END]
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [expected + [0] * (77 - len(expected))]


def test_a_list_gives_rows_in_order():
    texts = list(VECTORS)
    assert torch.equal(clip.tokenize(texts), torch.cat([clip.tokenize(text) for text in texts]))
    assert clip.tokenize([]).shape == (0, 77)


def odd_texts(count: int) -> list[str]:
    """Return seeded strings with everything that cleaning and splitting treat specially."""
    rng = random.Random(0)
    pieces = """the photo cats DOG's don't we'RE I'll they'd you've I'M 's 't naïve Ångström straße İstanbul ﬁne ǅ ſ K
        12 2012 3.14 ½ ² Ⅷ ٣ १२ #tag @me e-mail a_b <b> </w> &amp; &amp;lt; &#39; &#x1F600; &nbsp; &copy &bogus;
        <|endoftext endoftext|> <|cat|> ... !!! ?! -- — “quoted” ‘s ’t
        猫の写真 漢字 한국어 русский ελληνικά עברית العربية हिन्दी ไทย 👍🏽 👩‍👩‍👧 🇩🇪 😀 é e\u0301 \u0301 \ufb01 \u200b
        \ufeff \u00ad Ã© â€™ supercalifragilisticexpialidocious antidisestablishmentarianism""".split()
    pieces += [" <|startoftext|>", " <|endoftext|>", " <|ENDofTEXT|>"]
    blanks = [" ", "", "", "  ", "\t", "\n", "\r\n", "\u00a0", "\u3000", "\u2028", "\x0b", "\x85"]
    ranges = [(0, 127), (0, 255), (0x100, 0x24F), (0x300, 0x36F), (0x2000, 0x206F), (0x4E00, 0x9FFF)]
    ranges += [(0x1F300, 0x1F6FF), (0xE000, 0xF8FF), (0x1D400, 0x1D7FF)]

    def piece():
        if rng.random() < 0.6:
            return rng.choice(pieces)
        low, high = rng.choice(ranges)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))

    return ["".join(piece() + rng.choice(blanks) for _ in range(rng.choice([1, 2, 4, 8, 40]))) for _ in range(count)]


def with_open_clips_specials(text: str) -> str:
    """Write the special tokens as open_clip does."""
    text = re.sub(r"<\|startoftext\|>", "<start_of_text>", text, flags=re.IGNORECASE)
    return re.sub(r"<\|endoftext\|>", "<end_of_text>", text, flags=re.IGNORECASE)


def test_equals_open_clip():
    ours, theirs = tokenizer(), open_clip.tokenizer.SimpleTokenizer()
    texts = odd_texts(800)
    for text in texts:
        ids = ours.encode(text)
        assert ids == theirs.encode(with_open_clips_specials(text)), repr(text)
        assert with_open_clips_specials(ours.decode(ids)) == theirs.decode(ids), repr(text)
    translated = [with_open_clips_specials(text) for text in texts]
    assert torch.equal(clip.tokenize(texts, truncate=True), theirs(translated))
    lengths = (clip.tokenize(texts, truncate=True) != 0).sum(dim=1)
    assert lengths.min() < 10 and (lengths == 77).sum() > 50  # both short and cut texts are among them
    used = {i for text in texts for i in ours.encode(text)}
    assert {START, END} <= used and len(used) > 1000
    assert ours.ids == {
        {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}.get(s, s): i
        for s, i in theirs.encoder.items()
    }
    assert len(ours.symbols) == 49408 and ours.symbols[0] == "!"


def test_long_texts():
    fits = clip.tokenize("cat " * 75)
    assert fits.tolist() == [[START, *[2368] * 75, END]]
    with pytest.raises(ValueError, match=r"'cat cat .*has 78 tokens.*77"):
        clip.tokenize(["a dog", "cat " * 76])
    assert torch.equal(clip.tokenize("cat " * 500, truncate=True), fits)
    assert clip.tokenize("x" * 100_000, truncate=True)[0, -1] == END


def test_context_length():
    assert clip.tokenize("cat cat", context_length=5).tolist() == [[START, 2368, 2368, END, 0]]
    assert clip.tokenize("cat cat cat", context_length=5).tolist() == [[START, 2368, 2368, 2368, END]]
    assert clip.tokenize("cat dog cat cat", context_length=4, truncate=True).tolist() == [[START, 2368, 1929, END]]
    with pytest.raises(ValueError):
        clip.tokenize("cat cat cat cat", context_length=5)


def test_decoding_gives_the_cleaned_text():
    texts = ["a photo of a cat", "猫 の 写真 👍🏽 ½ naïve", "colt 's foot", "f - 1 6 a / b .", "!"]
    for text in texts:
        assert tokenizer().decode(tokenizer().encode(text)).rstrip() == text
    ids = clip.tokenize("A  Photo &amp; more")[0, :6].tolist()
    assert tokenizer().decode(ids) == "<|startoftext|>a photo & more <|endoftext|>"
    assert tokenizer().decode([*range(256)])  # bytes that are no UTF-8 become replacement characters
    for text in VECTORS:  # decoded text has the same ids
        assert tokenizer().encode(tokenizer().decode(VECTORS[text])) == VECTORS[text]


def test_lone_surrogates_are_accepted():
    assert clip.tokenize("cat \ud83d").shape == (1, 77)
