"""Train the tiny CLIP that ships with this project, from random weights, on generated images.

    pip install -r requirements-all.txt
    python scripts/train_tiny_clip.py --out clip/tiny.safetensors

The images are printed characters (0-9, A-Z, a-z) of many fonts, bent, squeezed, blurred, coloured and lowered in
resolution; the captions name the character in varied words. No handwritten digit is ever seen: the digits dataset stays
unseen for the experiments. Same seed, same machine, same thread count, same packages, same code: same weights. The
shipped weights (seed 0) are older than the packing of prompts in `clip/layouts.py`, which rounds differently. The
default 2,500 steps took 13 minutes on two cores of an Intel Xeon with AMX, shared with other work.
"""

import importlib.util
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clip
from clip.model import CLIP, Architecture
from clip.preprocess import MEAN, STD
from clip.weights import save_weights
from common import Parser, UserError, one_line_errors, progress

ARCHITECTURE = Architecture(
    embed_dim=64,
    resolution=32,
    vision_width=128,
    vision_layers=4,
    patch_size=8,
    context_length=77,
    vocab_size=49408,
    text_width=64,
    text_layers=2,
)
FAMILIES = (  # a package and its files of one family
    ("matplotlib", "mpl-data/fonts/ttf/DejaVuS*[!y].ttf"),  # all but DejaVu...Display
    ("matplotlib", "mpl-data/fonts/ttf/STIXGeneral*.ttf"),
    *((f"font_{name}", "files/*.ttf") for name in ("amatic_sc", "caladea", "fredoka_one")),
    ("font_hanken_grotesk", "files/*.otf"),
    *((f"font_{name}", "files/*.ttf") for name in ("intuitive", "manrope", "roboto")),
    *((f"font_{name}", "files/*.ttf") for name in ("source_sans_pro", "source_serif_pro")),
)
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
CHARACTERS = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
WORDINGS = (
    *("a photo of a {}.", "a photo of the {}.", "a picture of a {}.", "an image of the {}", "a drawing of a {}."),
    *("a blurry photo of a {}.", "a printed {}.", "itap of a {}.", "this is a {}", "the {}, written large", "{}"),
)
START_SCALE, END_SCALE = math.log(1 / 0.07), math.log(100)  # logarithm of the factor on the cosines
GLYPH, SIDE = 48, 32  # side of a rendered glyph and of a training image, in pixels


def names_of(character: str) -> tuple[str, ...]:
    """Return the words for this character in captions."""
    if character.isdigit():
        word = DIGITS[int(character)]
        return (word, word, word, f"digit {word}", f"number {word}", character, f"digit {character}")
    case = "capital" if character.isupper() else "small"
    return (f"{case} {character}", f"{case} letter {character}", f"letter {character}")


def render_glyphs() -> tuple[Tensor, Tensor, Tensor]:
    """Return every character of every font, thin and thickened: masks [N, 48, 48] in 0..255, character and family.

    Raise UserError if the fonts are not installed.
    """
    masks, characters, families = [], [], []
    for family, (package, pattern) in enumerate(FAMILIES):
        spec = importlib.util.find_spec(package)
        if spec is None:
            raise UserError(f"the fonts need the package {package}; pip install -r requirements-all.txt")
        folder = Path(spec.submodule_search_locations[0])
        for file in sorted(folder.glob(pattern)):
            font = ImageFont.truetype(str(file), size=64)
            for index, character in enumerate(CHARACTERS):
                for stroke in (0, 2, 5):
                    canvas = Image.new("L", (160, 160))
                    ImageDraw.Draw(canvas).text((40, 30), character, fill=255, font=font, stroke_width=stroke)
                    glyph = canvas.crop(canvas.getbbox())
                    scale = 0.85 * GLYPH / max(glyph.size)
                    size = [max(3, round(side * scale)) for side in glyph.size]
                    mask = Image.new("L", (GLYPH, GLYPH))
                    mask.paste(glyph.resize(size), [(GLYPH - side) // 2 for side in size])
                    masks.append(torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(GLYPH, GLYPH))
                    characters.append(index)
                    families.append(family)
    return torch.stack(masks), torch.tensor(characters), torch.tensor(families)


class Images:
    """Random batches of images and captions; all randomness is from one generator."""

    def __init__(self, generator: torch.Generator):
        self.generator = generator
        self.masks, self.characters, families = render_glyphs()
        # Each family has the same weight, however many faces it has; digits have as much as letters.
        weight = 1 / families.bincount()[families].double()
        digit = self.characters < 10
        self.weight = torch.where(digit, weight / weight[digit].sum(), weight / weight[~digit].sum())
        texts = [[wording.format(n) for wording in WORDINGS for n in names_of(c)] for c in CHARACTERS]
        self.captions = [clip.tokenize(captions) for captions in texts]

    def uniform(self, low: float, high: float, *size: int) -> Tensor:
        return torch.rand(*size, generator=self.generator) * (high - low) + low

    def batch(self, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Return images [size, 3, 32, 32], normalised for CLIP, captions [size, 77], character indices [size]."""
        picks = torch.multinomial(self.weight, size, replacement=True, generator=self.generator)
        ink = self._distort(self.masks[picks].float().unsqueeze(1) / 255)
        ink = self._lower_resolution(ink)
        images = self._colour(ink)
        images = (images - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
        characters = self.characters[picks]
        choices = torch.rand(size, generator=self.generator)
        captions = [self.captions[c][int(r * len(self.captions[c]))] for c, r in zip(characters, choices)]
        return images, torch.stack(captions), characters

    def _distort(self, ink: Tensor) -> Tensor:
        """Apply a random affine map and a smooth random displacement; the glyph's box fills 55-98 % of a side."""
        n = len(ink)
        angle, shear = self.uniform(-0.3, 0.3, n), self.uniform(-0.4, 0.4, n)
        grow_x, grow_y = self.uniform(0.65, 1.15, n), self.uniform(0.75, 1.15, n)
        shift = self.uniform(-0.12, 0.12, n, 2)
        cos, sin = angle.cos(), angle.sin()
        rows = [
            torch.stack([cos / grow_x, (shear * cos - sin) / grow_x, shift[:, 0]], dim=1),
            torch.stack([sin / grow_y, (shear * sin + cos) / grow_y, shift[:, 1]], dim=1),
        ]
        grid = F.affine_grid(torch.stack(rows, dim=1), (n, 1, SIDE, SIDE), align_corners=False)
        knots = torch.randn(n, 2, 4, 4, generator=self.generator) * self.uniform(0.0, 0.14, n, 1, 1, 1)
        bend = F.interpolate(knots, size=(SIDE, SIDE), mode="bicubic", align_corners=True)
        return F.grid_sample(ink, grid + bend.permute(0, 2, 3, 1), align_corners=False)

    def _lower_resolution(self, ink: Tensor) -> Tensor:
        """Average to between 8 and 32 pixels a side and enlarge again, with another size for each quarter."""
        sizes = [8, 8, *(int(s) for s in torch.randint(8, SIDE + 1, (2,), generator=self.generator))]
        parts = [
            F.interpolate(F.adaptive_avg_pool2d(part, side), size=(SIDE, SIDE), mode="bicubic", align_corners=False)
            for part, side in zip(ink.chunk(4), sizes)
        ]
        contrast = self.uniform(1.0, 2.0, len(ink), 1, 1, 1)
        return (torch.cat(parts) * contrast).clamp(0, 1)

    def _colour(self, ink: Tensor) -> Tensor:
        """Colour three quarters light grey on dark grey, the rest in two random colours; add a little noise to all."""
        n = len(ink)
        front = self.uniform(0.6, 1.0, n, 1, 1, 1).expand(n, 3, 1, 1)
        back = self.uniform(0.0, 0.2, n, 1, 1, 1).expand(n, 3, 1, 1)
        coloured = self.uniform(0, 1, n, 1, 1, 1) < 0.25
        front = torch.where(coloured, self.uniform(0, 1, n, 3, 1, 1), front)
        back = torch.where(coloured, self.uniform(0, 1, n, 3, 1, 1), back)
        images = back + (front - back) * ink
        noise = torch.randn(images.shape, generator=self.generator) * self.uniform(0.0, 0.08, n, 1, 1, 1)
        return (images + noise).clamp(0, 1)


def contrastive_loss(model: CLIP, images: Tensor, captions: Tensor, characters: Tensor) -> Tensor:
    """Return CLIP's symmetric cross-entropy. A batch has every character several times: all pairs that show the same
    character share the target equally."""
    image = F.normalize(model.encode_image(images).float(), dim=-1)
    text = F.normalize(model.encode_text(captions).float(), dim=-1)
    logits = model.logit_scale.exp() * image @ text.T
    same = (characters[:, None] == characters[None, :]).float()
    target = same / same.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train(steps: int, batch_size: int, lr: float, seed: int, device: str) -> CLIP:
    """Return the model after that many steps."""
    torch.manual_seed(seed)  # the initial weights; the images have a separate generator
    model = CLIP(ARCHITECTURE).to(device).train()
    batches = Images(torch.Generator().manual_seed(seed))
    model.logit_scale.requires_grad_(False)
    matrices = [p for name, p in model.named_parameters() if p.ndim >= 2 and "embedding" not in name]
    others = [p for name, p in model.named_parameters() if p.requires_grad and (p.ndim < 2 or "embedding" in name)]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    bar = progress(range(steps), "tiny CLIP", "step", leave=True)
    for step in bar:
        # OpenAI's models learned a scale of 100, which few-shot training takes as a constant. Here, with many images of
        # one character in a batch, a learned scale would stay low: a schedule raises it instead.
        model.logit_scale.data.copy_(torch.tensor(START_SCALE).lerp(torch.tensor(END_SCALE), step / steps))
        images, captions, characters = (tensor.to(device) for tensor in batches.batch(batch_size))
        with torch.autocast(device, torch.bfloat16):
            loss = contrastive_loss(model, images, captions, characters)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", scale=f"{model.logit_scale.exp():.0f}")
    return model


def main(argv: Sequence[str] | None = None) -> None:
    """Train, and write the weight file."""
    parser = Parser(prog="train_tiny_clip.py", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file to write, .safetensors")
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    with one_line_errors():
        args = parser.parse_args(argv)
        model = train(args.steps, args.batch_size, args.lr, args.seed, args.device)
        save_weights(model, args.out, half=True)
        print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    main()
