"""One optimizer step on CLIP's trained matrices: SO beside dense SO, torch's Adam and fused Adam.

    python -m benchmarks.optimizer
    python -m benchmarks.optimizer --backbone ViT-L/14 --device cuda

All take ready gradients: SO the dense ones, as without `attach`, and "SO, attached" the values at its support, as they
arrive with it. The steps alternate in one process. Times are medians; draws of the support are included, a fifth of
the steps at T = 5.
"""

from collections.abc import Sequence
from statistics import median

import torch
from torch import nn

from benchmarks.plain import DenseSO
from benchmarks.step import ARCHITECTURES
from benchmarks.timing import alternately
from clip.model import CLIP
from common import Parser, one_line_errors
from methods.choice import Blocks, select_matrices
from optimizers import SO

DENSITIES = (5e-5, 5e-4, 2e-3)


def weights_of(backbone: str, device: str) -> list[nn.Parameter]:
    """Return random parameters with gradients, in the shapes of the matrices that SO trains."""
    with torch.device("meta"):
        model = CLIP(ARCHITECTURES[backbone])
    shapes = [p.shape for p in select_matrices(model, Blocks()).values()]
    torch.manual_seed(0)
    params = [nn.Parameter(0.02 * torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def attached_step(optimizer: SO, values: dict) -> None:
    optimizer.draw_supports()
    for p, gradient in values.items():
        optimizer.add_gradient(p, gradient)
    optimizer.step()


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--backbone", default="ViT-B/16", choices=ARCHITECTURES)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--steps", type=int, default=10)
    args = parser.parse_args(argv)
    params = weights_of(args.backbone, args.device)
    print(f"{args.backbone}: {len(params)} tensors, {sum(p.numel() for p in params):,} weights, {args.device}")
    steps = {
        "Adam": torch.optim.Adam(params, lr=1e-4).step,
        "Adam, fused": torch.optim.Adam(params, lr=1e-4, fused=True).step,
    }
    bare = [nn.Parameter(p.detach()) for p in params]  # without .grad, for the attached optimizers
    for density in DENSITIES:
        steps[f"dense SO {density:g}"] = DenseSO(params, 1e-4, density, T=5).step
        steps[f"SO {density:g}"] = SO(params, lr=1e-4, density_ratio=density, T=5).step
        attached = SO(bare, lr=1e-4, density_ratio=density, T=5)
        values = {p: torch.randn(max(1, int(p.numel() * density)), device=args.device) for p in bare}
        steps[f"SO, attached {density:g}"] = lambda optimizer=attached, values=values: attached_step(optimizer, values)
    seconds, _ = alternately(steps, args.steps, args.device)
    for name, times in seconds.items():
        reference = median(seconds["dense SO " + name.split()[-1]]) if name.startswith("SO") else None
        ratio = f"   {reference / median(times):6.1f} x faster than dense SO" if reference else ""
        print(f"{name:22} {1000 * median(times):9.2f} ms{ratio}")


if __name__ == "__main__":
    with one_line_errors():
        main()
