"""What a training step keeps for backward, by count: with and without --checkpoint_blocks.

    python -m benchmarks.memory                                                # ViT-B/16, 47 classes, 32 images
    python -m benchmarks.memory --backbone ViT-L/14@336px --classes 1000 --precision bf16

Nothing is computed: the step runs on fake tensors, which have shapes and no content, and every tensor that autograd
saves is counted once, unless it is a weight. To that come the weights, with bf16 copies of the towers' matrices, one
block's activations while it is computed again, and temporaries.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.step import ARCHITECTURES, class_names
from clip.model import CLIP, Architecture
from common import Parser, one_line_errors
from methods.choice import Blocks, select_matrices
from optimizers import SO, attach

LARGE = Architecture(768, 336, 1024, 24, 14, context_length=77, vocab_size=49408, text_width=768, text_layers=12)
BACKBONES = ARCHITECTURES | {"ViT-L/14@336px": LARGE}
MIB = 2**20


def saved_bytes(forward: Callable[[], Tensor], weights: set[int]) -> int:
    """Return the size of the storages that autograd saves in `forward`, without those in `weights`."""
    kept = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        output = forward()
    assert output.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


def step_bytes(arch: Architecture, classes: int, images: int, precision: str, checkpoints: bool) -> dict[str, int]:
    """Return what SO's step at density 5e-5 keeps of each tower, and the size of the weights, in bytes."""
    model = CLIP(arch)
    optimizer = SO(select_matrices(model, Blocks()).values(), density_ratio=5e-5)
    attach(model, optimizer)
    optimizer.draw_supports()  # now, because fake tensors have no content
    if checkpoints:
        model.visual.transformer.checkpoint_blocks()
        model.transformer.checkpoint_blocks()
    prompts = model.prompts(model.tokenize([f"a photo of a {name}." for name in class_names(classes)]))
    sizes = {}
    with FakeTensorMode(allow_non_fake_inputs=True) as fake:
        weights = {fake.from_tensor(p).untyped_storage()._cdata for p in model.parameters()}
        pixels = torch.empty(images, 3, arch.resolution, arch.resolution)
        for name, encode, inputs in (("images", model.encode_image, pixels), ("text", model.encode_text, prompts)):

            def forward(encode: Callable = encode, inputs: object = inputs) -> Tensor:
                with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                    return encode(inputs).float()

            sizes[name] = saved_bytes(forward, weights)
    return sizes | {"weights": sum(p.numel() * p.element_size() for p in model.parameters())}


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(prog="benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--backbone", choices=BACKBONES, default="ViT-B/16")
    parser.add_argument("--classes", type=int, default=47)
    parser.add_argument("--batch_size", type=int, default=32)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    with one_line_errors():
        args = parser.parse_args(argv)
    print(f"{args.backbone}, {args.classes} classes, {args.batch_size} images, {args.precision}; MiB, by count")
    print("| kept for backward | images | text | weights |\n| --- | --- | --- | --- |")
    for checkpoints in (False, True):
        sizes = step_bytes(BACKBONES[args.backbone], args.classes, args.batch_size, args.precision, checkpoints)
        name = "only the blocks' inputs" if checkpoints else "everything"
        print(f"| {name} | " + " | ".join(f"{size / MIB:,.0f}" for size in sizes.values()) + " |")


if __name__ == "__main__":
    main()
