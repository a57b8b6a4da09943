"""The image features of a test pass: time of the whole forward pass beside that of its matrix products alone.

    python -m benchmarks.features
    python -m benchmarks.features --precision bf16 --backbone ViT-L/14

The products and the attention of one pass are recorded with their tensors, and then done again with nothing between
them. A pass cannot be faster than that; the rest is layer norms, activations, sums and casts. Weights are random, and
images noise. Both alternate in one process; printed are medians.
"""

from argparse import Namespace
from collections.abc import Callable, Sequence
from functools import partial
from statistics import median

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from benchmarks.step import ARCHITECTURES
from benchmarks.timing import alternately
from clip.model import CLIP
from common import Parser, one_line_errors

ATTENTION_ON_A_CPU = {  # the counter knows only those of GPUs
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)
}
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product")


class Products(TorchDispatchMode):
    """Records the matrix products and attentions that are done while it is entered."""

    def __init__(self):
        super().__init__()
        self.calls: list[Callable] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in PRODUCTS or name.startswith(PRODUCTS[-1]):
            self.calls.append(partial(func, *args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))

    def again(self) -> None:
        for call in self.calls:
            call()


def compare(args: Namespace) -> None:
    torch.manual_seed(0)
    device = torch.device(args.device)
    model = CLIP(ARCHITECTURES[args.backbone]).to(device).requires_grad_(False)
    images = torch.randn(args.batch_size, 3, model.arch.resolution, model.arch.resolution, device=device)

    def encode() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
            model.encode_image(images)

    with torch.no_grad():
        with Products() as products:
            encode()
        seconds, _ = alternately({"pass": encode, "products": products.again}, args.times, device.type)
        with FlopCounterMode(display=False, custom_mapping=ATTENTION_ON_A_CPU) as counted:
            encode()
    whole, alone = median(seconds["pass"]), median(seconds["products"])
    flop = counted.get_total_flops()
    print(
        f"{args.backbone}, {args.precision}, {args.batch_size} images, {device.type}, {torch.get_num_threads()} threads"
    )
    print(f"a pass {whole:.3f} s, {args.batch_size / whole:.1f} images a second, {flop / whole / 1e9:.0f} GFLOP/s")
    print(f"its {len(products.calls)} products {alone:.3f} s, {flop / alone / 1e9:.0f} GFLOP/s")
    print(f"ratio {alone / whole:.2f}")


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="python -m benchmarks.features", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=ARCHITECTURES, default="ViT-B/16")
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--times", type=int, default=7)
    compare(parser.parse_args(argv))


if __name__ == "__main__":
    with one_line_errors():
        main()
