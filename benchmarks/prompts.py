"""CoOp's training step on packed prompts beside padded ones, in time, memory and result.

    python -m benchmarks.prompts                                  # ViT-B/16, 47 classes, 16 vectors
    python -m benchmarks.prompts --classes 1000 --only packed

The step is that of the text tower: features of all prompts, logits of 32 random image features, backward to the
vectors. Weights are random; prompts are real class names, DTD's 47 or the first of ImageNet's. The frozen image tower's
forward pass comes on top, equal on both sides. The steps alternate in one process. Memory is counted: the bytes that
autograd keeps for backward.
"""

from collections.abc import Callable, Sequence
from statistics import median

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import plain
from benchmarks.step import ARCHITECTURES, class_names
from benchmarks.timing import alternately
from clip.model import CLIP
from clip.preprocess import Preprocessing, test_transform
from common import Parser, one_line_errors
from datasets import Item, Task
from experiment import Experiment
from methods.prompts import coop
from settings import Settings

IMAGES = 32
SIDES = ("packed", "padded")


def kept_bytes(step: Callable[[], float]) -> int:
    """Return the bytes of distinct tensors that a step keeps for its backward pass, parameters left out."""
    kept = {}

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, torch.nn.Parameter) and not isinstance(tensor._base, torch.nn.Parameter):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sum(kept.values())


def sides(backbone: str, classes: int, n_ctx: int) -> dict[str, Callable[[], float]]:
    """Return a step of each side, up to the gradient of the same vectors, and its loss."""
    torch.manual_seed(0)
    model = CLIP(ARCHITECTURES[backbone])
    names = class_names(classes)
    task = Task("benchmark", tuple(names), ("{}",), tuple(Item(str(i), 0) for i in range(IMAGES)), (), (), None)
    hparams = coop.Hparams(n_ctx=n_ctx).settled(shots=1, images=IMAGES)
    settings = Settings(method="coop", backbone=backbone, device="cpu")
    experiment = Experiment(settings, hparams, task, model, test_transform(Preprocessing(model.arch.resolution)), "")
    adaptation = coop.prepare(experiment)
    ids, places = (torch.tensor(rows) for rows in zip(*(adaptation.prompt(name, 0) for name in names)))
    features = F.normalize(torch.randn(IMAGES, model.arch.embed_dim), dim=-1)
    labels = torch.randint(classes, (IMAGES,))

    def step(encode: Callable[[], Tensor]) -> float:
        loss = F.cross_entropy(100 * features @ F.normalize(encode(), dim=-1).T, labels)
        torch.autograd.grad(loss, adaptation.vectors)
        return loss.item()

    return {
        "packed": lambda: step(adaptation.encode_prompts),
        "padded": lambda: step(lambda: plain.encode_text(model, ids, places, adaptation.vectors)),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--backbone", default="ViT-B/16", choices=ARCHITECTURES)
    parser.add_argument("--classes", type=int, default=47)
    parser.add_argument("--n_ctx", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side, after one that is not")
    parser.add_argument("--only", choices=SIDES)
    args = parser.parse_args(argv)
    both = sides(args.backbone, args.classes, args.n_ctx)
    steps = {name: step for name, step in both.items() if args.only in (None, name)}
    kept = {name: kept_bytes(step) / 2**20 for name, step in steps.items()}
    seconds, losses = alternately(steps, args.steps)
    for name, times in seconds.items():
        print(
            f"{name}: {median(times):.2f} s a step, {kept[name]:.0f} MB kept for backward, loss {losses[name][-1]:.6f}"
        )
    if len(steps) == 2:
        ratios = median(seconds["padded"]) / median(seconds["packed"]), kept["padded"] / kept["packed"]
        print(f"padded / packed: {ratios[0]:.1f} in time, {ratios[1]:.1f} in memory")


if __name__ == "__main__":
    with one_line_errors():
        main()
