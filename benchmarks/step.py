"""One training step of CLIP: the plain dense computation beside this project's, and LoRA's, in time, memory and result.

    python -m benchmarks.step                                        # ViT-B/16, 47 classes, 4 images, float32
    python -m benchmarks.step --classes 200 --precision bf16
    python -m benchmarks.step --classes 1000 --batch_size 32 --only fast

Weights are random (their values do not matter for the cost), images are noise, prompts are real class names: DTD's
47, else the first of ImageNet's. Both sides draw the same supports, at density 5e-5 and T = 5. The steps alternate in
one process; peak memory is measured in a process of its own for each side. The plain side always computes in float32.
"""

import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import utils
from benchmarks.plain import DenseSO, encode_image, encode_text
from benchmarks.timing import alternately
from clip.layouts import PackedPrompts
from clip.model import CLIP, Architecture
from clip.tokenizer import ClipTokenizer
from common import Parser, one_line_errors
from experiment import Experiment
from methods.adapters import lora
from methods.choice import Blocks, select_matrices
from optimizers import SO, attach
from run_utils import peak_memory_mb
from settings import Settings

DTD = (
    "banded blotchy braided bubbly bumpy chequered cobwebbed cracked crosshatched crystalline dotted fibrous flecked "
    "freckled frilly gauzy grid grooved honeycombed interlaced knitted lacelike lined marbled matted meshed paisley "
    "perforated pitted pleated polka-dotted porous potholed scaly smeared spiralled sprinkled stained stratified "
    "striped studded swirly veined waffled woven wrinkled zigzagged"
).split(" ")
TEXT = dict(context_length=77, vocab_size=49408, text_layers=12)
ARCHITECTURES = {
    "ViT-B/32": Architecture(512, 224, 768, 12, 32, text_width=512, **TEXT),
    "ViT-B/16": Architecture(512, 224, 768, 12, 16, text_width=512, **TEXT),
    "ViT-L/14": Architecture(768, 224, 1024, 24, 14, text_width=768, **TEXT),
}


def class_names(count: int) -> list[str]:
    if count == len(DTD):
        return DTD
    lines = (Path(__file__).parent.parent / "datasets" / "imagenet_classes.txt").read_text().splitlines()
    return [line.split(" ", 1)[1] for line in lines[:count]]


@dataclass
class Side:
    """One way to do a training step, on its own copy of the model."""

    params: list[nn.Parameter]
    optimizer: DenseSO | torch.optim.Optimizer
    encode_images: Callable[[], Tensor]
    encode_prompts: Callable[[], Tensor]
    labels: Tensor

    def loss(self, *embeddings: Tensor) -> Tensor:
        """Return the loss of embeddings of the images [B, E] and of the prompts [C, E]."""
        image, text = (F.normalize(embedding.float(), dim=-1) for embedding in embeddings)
        return F.cross_entropy(100 * image @ text.T, self.labels)

    def update(self) -> Tensor:
        """Do one step and return its loss, for which a GPU is not waited."""
        loss = self.loss(self.encode_images(), self.encode_prompts())
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def step(self) -> float:
        """Do one step and return its loss."""
        return self.update().item()


def tokens_of(args: Namespace) -> Tensor:
    return utils.tokenize_classes(ClipTokenizer(TEXT["context_length"]), class_names(args.classes), "a photo of a {}.")


def prompts_of(name: str, args: Namespace) -> PackedPrompts:
    """Return the prompts of a side. Dropout makes a common beginning differ, so LoRA shares none."""
    return PackedPrompts(tokens_of(args), share_prefix=name != "lora")


def side(name: str, args: Namespace, prompts: PackedPrompts | None = None) -> Side:
    """Return one of SIDES: plain, fast (SO on this project's path) or LoRA on the same path, which is CLIP-LoRA's step:
    AdamW on rank 2 at q, k and v, dropout 0.25."""
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = CLIP(ARCHITECTURES[args.backbone])
    if device.type != "cpu":
        model.to(device)
    params = list(select_matrices(model, Blocks()).values())
    generator = torch.Generator().manual_seed(1)
    R = model.arch.resolution
    images = torch.randn(args.batch_size, 3, R, R, generator=generator).to(device)
    labels = torch.randint(args.classes, (args.batch_size,), generator=generator).to(device)
    if name == "plain":
        optimizer = DenseSO(params, lr=2e-4, density_ratio=5e-5, T=5)
        tokens = tokens_of(args).to(device)
        encoders = partial(encode_image, model, images), partial(encode_text, model, tokens)
        return Side(params, optimizer, *encoders, labels)
    if name == "fast":
        optimizer = SO(params, lr=2e-4, density_ratio=5e-5, T=5)
        attach(model, optimizer)
    else:
        hparams = lora.Hparams().settled(shots=1, images=1)
        adaptation = lora.prepare(Experiment(Settings(method="lora", seed=0), hparams, None, model, None, ""))
        optimizer = adaptation.optimizer

    def encode(encoder: Callable, batch: Tensor | PackedPrompts) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            return encoder(batch)

    prompts = prompts or prompts_of(name, args)
    encoders = partial(encode, model.encode_image, images), partial(encode, model.encode_text, prompts)
    return Side(params, optimizer, *encoders, labels)


SIDES = ("plain", "fast", "lora")


def measure_memory(args: Namespace) -> None:
    """Print the peak above the model with its data, over three steps of one side."""
    device = torch.device(args.device)
    step = side(args.only, args).step
    before = peak_memory_mb(device)
    seconds, _ = alternately({"step": step}, 2, device.type)
    extra = peak_memory_mb(device) - before
    print(f"{args.only:6} peak {extra:.0f} MB above {before:.0f} MB, step {min(seconds['step']):.2f} s")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--backbone", default="ViT-B/16", choices=ARCHITECTURES)
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--classes", type=int, default=47)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, after one that is not")
    parser.add_argument("--only", choices=SIDES, help="one side, its memory and time, without comparison")
    args = parser.parse_args(argv)
    if args.only:
        return measure_memory(args)
    sides = {name: side(name, args) for name in SIDES}
    steps = {name: side.step for name, side in sides.items()}
    seconds, losses = alternately(steps, args.steps, torch.device(args.device).type)
    for name, times in seconds.items():
        each = " ".join(f"{s:.2f}" for s in times)
        print(f"{name:6} median {median(times):.3f} s   ({each})   losses {losses[name]}")
    for name in ("plain", "lora"):
        print(f"median of {name} / median of fast: {median(seconds[name]) / median(seconds['fast']):.2f}")
    largest = max(
        float((a - b).abs().max())
        for a, b in zip(*([p.detach() for p in sides[name].params] for name in ("plain", "fast")), strict=True)
    )
    print(f"largest difference of a weight after {args.steps + 1} steps: {largest:.2e}")
    del sides, steps
    for name in SIDES:
        command = [sys.executable, "-m", "benchmarks.step", "--only", name, *(argv or sys.argv[1:])]
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())


if __name__ == "__main__":
    with one_line_errors():
        main()
