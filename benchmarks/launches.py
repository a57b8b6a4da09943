"""How many kernels a training step launches: the operations that are no views, counted for SO and for LoRA.

    python -m benchmarks.launches
    python -m benchmarks.launches --backbone ViT-L/14 --precision fp32

Nothing is computed: the tensors are fake, so a count holds for any number of images and of classes. On a GPU each of
these operations is at least one launch, which costs about 5 microseconds however small it is. A fake step also shows
that nothing in it waits for the device: `.item()` and its like raise. The step counted is one without a draw.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.step import ARCHITECTURES, Side, prompts_of, side
from clip import layouts
from common import Parser, one_line_errors
from optimizers import SparseOptimizer

PARTS = ("image forward", "text forward", "loss", "backward", "optimizer")
SIDES = {"so": "fast", "lora": "lora"}
# What launches nothing beside the views: memory that is not filled, another shape, questions, the profiler's marks.
FREE = {"detach", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "device"}
FREE |= {"promote_types", "_local_scalar_dense", "_record_function_enter_new", "_record_function_exit"}


class Launches(TorchDispatchMode):
    """Counts operations that are no views, by the `part` of the step and by name."""

    def __init__(self):
        super().__init__()
        self.counts = {part: Counter() for part in PARTS}
        self.part = PARTS[0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if not func.is_view and name not in FREE:
            self.counts[self.part][name] += 1
        return func(*args, **(kwargs or {}))

    @property
    def totals(self) -> dict[str, int]:
        return {part: counter.total() for part, counter in self.counts.items()}


def fused_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
    """Attention as on a GPU, where it is one kernel in 16 bits too."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


def fake_step(own: Side, launches: Launches) -> None:
    """Do a step on fake tensors, which have no loss to return."""
    launches.part = "image forward"
    images = own.encode_images()
    launches.part = "text forward"
    prompts = own.encode_prompts()
    launches.part = "loss"
    loss = own.loss(images, prompts)
    own.optimizer.zero_grad()
    launches.part = "backward"
    loss.backward()
    launches.part = "optimizer"
    own.optimizer.step()


@contextmanager
def faked() -> Iterator[None]:
    """Make all new tensors fake. The supports, which are drawn on the CPU, are the first entries and cost nothing."""
    first = cache(torch.arange)
    with (
        FakeTensorMode(allow_non_fake_inputs=True),
        mock.patch.object(layouts, "_attention", fused_attention),
        mock.patch.object(SparseOptimizer, "draw_support", lambda numel, k, *_: first(k)),
    ):
        yield


def count(name: str, args: Namespace) -> Launches:
    """Return the launches of the third step of a side of benchmarks.step."""
    prompts = prompts_of(name, args)  # their layout depends on the tokens, which must be real
    with faked():
        own = side(name, args, prompts)
        for group in own.optimizer.param_groups:
            if "foreach" in group:
                group["foreach"] = True  # torch's default on a GPU
        for _ in range(2):
            fake_step(own, Launches())
        with Launches() as launches:
            fake_step(own, launches)
    return launches


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--backbone", default="ViT-B/16", choices=ARCHITECTURES)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--classes", type=int, default=47)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16"))
    parser.add_argument("--by_name", action="store_true", help="also which operations they are")
    args = parser.parse_args(argv)
    args.device = "cpu"
    counted = {name: count(own, args) for name, own in SIDES.items()}
    print(f"{args.backbone}, {args.precision}" + "".join(f"{name:>8}" for name in counted))
    for part in PARTS:
        print(f"{part:14}" + "".join(f"{launches.totals[part]:8,}" for launches in counted.values()))
    print(f"{'sum':14}" + "".join(f"{sum(launches.totals.values()):8,}" for launches in counted.values()))
    if args.by_name:
        for name, launches in counted.items():
            for part, counter in launches.counts.items():
                print(f"{name}, {part}: " + ", ".join(f"{n} {op}" for op, n in counter.most_common()))


if __name__ == "__main__":
    with one_line_errors():
        main()
