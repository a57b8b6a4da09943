"""Arithmetic of adapted models: what several runs on the same CLIP changed is added, subtracted, scaled or merged.

    python scripts/deltas.py compare base.safetensors new.safetensors
    python scripts/deltas.py add base.safetensors new.safetensors --out both.safetensors
    python scripts/deltas.py subtract both.safetensors new.safetensors --out rest.safetensors
    python scripts/deltas.py scale so.safetensors --by 0.5 --out half.safetensors
    python scripts/deltas.py interpolate so.safetensors --at 0.5 --out half.safetensors     # WiSE-FT
    python scripts/deltas.py interpolate one.safetensors other.safetensors --at 0.3 --out between.safetensors
    python scripts/deltas.py merge one.safetensors other.safetensors --out merged.safetensors --whole clip.safetensors

The files are those of `main.py --save_path`: SO's deltas, and matrices of LoRA, DoRA and AdaLoRA, which are merged into
the weights first. `add` sums the differences from the unchanged model; `merge` takes their mean where several files
change the same entry. --out is a delta for `methods.merge_file`, `compare` and the other operations; it belongs to no
run, so `main.py --eval_only` does not take it. --whole writes the whole CLIP, for `main.py --method zero_shot
--backbone FILE` and other programs.
"""

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clip
from clip.arithmetic import combine, entries, interpolate, overlap
from clip.delta import apply_changes, checkpoint_metadata, difference, save_delta
from clip.weights import save_weights
from common import Parser, UserError, one_line_errors
from methods import merge_file

OPERATIONS = {"compare": 2, "add": 2, "subtract": 2, "scale": 1, "interpolate": 1, "merge": 2}  # fewest files


def main(argv: Sequence[str] | None = None) -> None:
    """Do one operation. A mistake of the user ends in one line and exit code 2."""
    with one_line_errors():
        args = parse(argv)
        model = load_base(args)
        base = {name: tensor for name, tensor in model.state_dict().items() if tensor.is_floating_point()}
        deltas = [difference(base, merge_file(copy.deepcopy(model), path)) for path in args.files]
        for path, delta in zip(args.files, deltas):
            print(f"{path}: changes {entries(delta):,} weights of {len(delta)} tensors")
        for (one, first), (other, second) in combinations(zip(args.files, deltas), 2):
            print(f"{one} and {other}: {described(overlap(base, first, second))}")
        if args.operation == "compare":
            return
        result = calculated(args, base, deltas)
        if args.out:
            save_delta(result, args.out, clip.weights_sha256(model), about(args))
        if args.whole:
            apply_changes(model, result)
            args.whole.parent.mkdir(parents=True, exist_ok=True)
            save_weights(model, args.whole)
        written = ", ".join(str(path) for path in (args.out, args.whole) if path)
        print(f"{args.operation}: changes {entries(result):,} weights: {written}")


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Return what is asked for. Raise UserError for files, factors and outputs that do not go together."""
    parser = Parser(prog="deltas.py", description=__doc__.splitlines()[0])
    parser.add_argument("operation", choices=OPERATIONS)
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE", help="adapted weights")
    parser.add_argument("--by", type=float, help="scale: the factor on the difference from the unchanged model")
    parser.add_argument(
        "--at", type=float, help="interpolate: 0 is the unchanged model, or the first of two; 1 the last"
    )
    parser.add_argument("--out", type=Path, metavar="FILE.safetensors", help="the result as a delta")
    parser.add_argument("--whole", type=Path, metavar="FILE.safetensors", help="the result as a whole CLIP")
    parser.add_argument("--backbone", help="the unchanged model, if it is not where it was for the runs")
    parser.add_argument("--arch", help="as in main.py, for a --backbone FILE")
    args = parser.parse_args(argv)
    fewest, most = OPERATIONS[args.operation], {"scale": 1, "interpolate": 2, "subtract": 2}.get(args.operation)
    if len(args.files) < fewest or (most and len(args.files) > most):
        raise UserError(f"{args.operation} takes {fewest if most == fewest else f'{fewest} or more'} files")
    for flag, operation in (("by", "scale"), ("at", "interpolate")):
        if (getattr(args, flag) is not None) != (args.operation == operation):
            raise UserError(f"--{flag} is the factor of {operation}, which needs it, and of nothing else")
    if (args.operation != "compare") != bool(args.out or args.whole):
        raise UserError("name a file to write with --out or --whole, except for compare, which writes none")
    return args


def load_base(args: argparse.Namespace) -> clip.CLIP:
    """Return the unchanged model that the files belong to; `merge_file` checks that it is that one."""
    backbone, arch = args.backbone, args.arch
    if backbone is None:
        metadata = checkpoint_metadata(args.files[0])
        if "backbone" not in metadata:
            raise UserError(f"{args.files[0]} does not name the model it belongs to, or is missing; give --backbone")
        backbone = metadata["backbone"]
        arch = arch or json.loads(metadata.get("settings", "{}")).get("arch") or metadata.get("arch")
    return clip.load(backbone, arch=arch)[0].requires_grad_(False)


def described(found: dict[str, float]) -> str:
    """Return in words how two deltas overlap."""
    return (
        f"{found['common']:,} weights in common ({100 * found['of_smaller']:.3g} % of the smaller delta's), "
        f"{100 * found['same_sign']:.3g} % of them in the same direction; cosine {found['cosine']:.3g}"
    )


def calculated(args: argparse.Namespace, base: dict, deltas: list[dict]) -> dict:
    """Return the delta that the operation makes of the others."""
    if args.operation == "interpolate":
        return interpolate(base, deltas[0] if len(deltas) > 1 else {}, deltas[-1], args.at)
    factors = {"subtract": [1, -1], "scale": [args.by]}.get(args.operation, [1] * len(deltas))
    return combine(base, deltas, factors, mean=args.operation == "merge")


def about(args: argparse.Namespace) -> dict[str, str]:
    """Return the metadata of the result: the operation, its files, and what all of these say."""
    said = [checkpoint_metadata(path) for path in args.files]
    sources = [
        {"file": path.name} | {name: each[name] for name in ("run_id", "operation", "sources") if name in each}
        for path, each in zip(args.files, said)
    ]
    values = {"operation": args.operation, "sources": json.dumps(sources)}
    values |= {flag: str(getattr(args, flag)) for flag in ("by", "at") if getattr(args, flag) is not None}
    arch = args.arch or (None if args.backbone else json.loads(said[0].get("settings", "{}")).get("arch"))
    values |= {"backbone": args.backbone or said[0]["backbone"]} | ({"arch": arch} if arch else {})
    common = {name for name in ("class_names", "templates") if len({each.get(name) for each in said}) == 1}
    return values | {name: said[0][name] for name in sorted(common) if name in said[0]}


if __name__ == "__main__":
    main()
