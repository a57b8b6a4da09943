"""What a step of SO costs on one model of each family of open_clip's, beside ViT-B/16, with random weights.

    OMP_NUM_THREADS=1 python -m benchmarks.backbones --steps 3

Prints a row per model: CPU seconds of a step with 2 images and 10 classes (density 5e-5, both towers, float32), that of
ViT-B/16 measured alternately, their ratio, and the tokens that the text tower computes. Needs open_clip.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from clip import CLIP
from clip.configs import open_clip_card
from clip.sources import open_clip_config
from clip.weights import build_model
from methods.choice import Blocks, select_matrices
from optimizers import SO, attach

REFERENCE = "ViT-B-16"
MODELS = ("ViT-L-14", "ViT-L-14-CLIPA", "RN50", "ViT-B-16-SigLIP", "ViT-B-16-SigLIP2", "EVA02-B-16", "PE-Core-B-16")
MODELS += ("convnext_base", "ViTamin-B", "MobileCLIP-B", "MobileCLIP-S1")


def random_model(name: str) -> CLIP:
    """Return open_clip's model of this name with random weights."""
    import open_clip

    config = open_clip_config(name)
    kind = open_clip.CustomTextCLIP if config.pop("custom_text", False) else open_clip.CLIP
    weights = {key.removeprefix("text."): value for key, value in kind(**config).state_dict().items()}
    return build_model(weights, name, card=open_clip_card(config, {}, name))


def step_of(model: CLIP, classes: int, images: int) -> tuple[Callable[[], None], int]:
    """Return a training step of SO, and how many tokens its prompts are."""
    optimizer = SO(select_matrices(model, Blocks()).values(), lr=1e-6, density_ratio=5e-5)
    attach(model, optimizer)
    tokens = torch.zeros(classes, model.tokenize.context_length, dtype=torch.int64)
    ends = torch.arange(classes) % 3 + 6  # prompts of 7 to 9 tokens with 5 in common, as "a photo of a NAME."
    tokens[:, :5] = torch.arange(1, 6)
    for row, end in zip(tokens, ends):
        row[5:end], row[end] = torch.randint(100, 900, (end - 5,)), 998
    prompts = model.prompts(tokens)
    batch = torch.randn(images, 3, model.preprocessing.size, model.preprocessing.size)
    labels = torch.arange(images)

    def step() -> None:
        image, text = F.normalize(model.encode_image(batch)), F.normalize(model.encode_text(prompts))
        F.cross_entropy(100 * image @ text.T, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, prompts.ids.numel()


def cpu_seconds(step: Callable[[], None]) -> float:
    start = time.process_time()
    step()
    return time.process_time() - start


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of each model, after one that is not")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--models", nargs="+", default=MODELS)
    args = parser.parse_args(argv)
    torch.manual_seed(0)
    reference, tokens = step_of(random_model(REFERENCE), args.classes, args.images)
    print(f"{'model':20} seconds  {REFERENCE}  ratio  text tokens\n{REFERENCE:20} {'':24} {tokens}")
    for name in args.models:
        step, tokens = step_of(random_model(name), args.classes, args.images)
        times: list[tuple[float, float]] = []
        for _ in range(args.steps + 1):
            times.append((cpu_seconds(step), cpu_seconds(reference)))
        own, other = (statistics.median(column) for column in zip(*times[1:]))
        print(f"{name:20} {own:7.2f}  {other:8.2f}  {own / other:5.2f}  {tokens:11}", flush=True)


if __name__ == "__main__":
    main()
