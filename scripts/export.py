"""Writes an adapted CLIP for other programs.

    python scripts/export.py --weights adapted/.../so.safetensors --to openai --out clip.pt
    python scripts/export.py --weights adapted/.../lora.safetensors --to open_clip --out folder
    python scripts/export.py --weights adapted/.../so.safetensors --to huggingface --out folder
    python scripts/export.py --weights adapted/.../so.safetensors --to onnx --out folder
    python scripts/export.py --weights adapted/.../lora.safetensors --to peft --out folder

openai: a file for OpenAI's `clip.load`. open_clip: a folder for `create_model_and_transforms("local-dir:folder")`.
huggingface: a folder for transformers' `CLIPModel.from_pretrained` and `CLIPImageProcessor`. onnx: a folder with a file
for each tower (`clip/onnx.py`). peft: LoRA's matrices alone, a folder for `PeftModel.from_pretrained` on a CLIPModel
with the unchanged weights. All weights are float32. Class names and prompts are in the weight file:
`clip.delta.checkpoint_metadata`. A head is no part of CLIP, and rejected.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import clip
from clip.delta import checkpoint_metadata
from clip.export import save_huggingface, save_open_clip, save_openai
from clip.onnx import save_onnx
from common import Parser, UserError, one_line_errors
from methods import merge_file
from methods.adapters.peft_files import save_peft

WHOLE = {"openai": save_openai, "open_clip": save_open_clip, "huggingface": save_huggingface, "onnx": save_onnx}


def main(argv: Sequence[str] | None = None) -> None:
    """Write the export. A mistake of the user ends in one line and exit code 2."""
    parser = Parser(prog="export.py", description=__doc__.splitlines()[0])
    parser.add_argument("--weights", required=True, type=Path, metavar="FILE", help="what a run with --save_path saved")
    parser.add_argument("--to", required=True, choices=(*WHOLE, "peft"), help="the program that is to read it")
    parser.add_argument("--out", required=True, type=Path, help="a file for openai, else a folder; must not exist")
    parser.add_argument("--backbone", help="the unchanged model, if it is not where it was for the run")
    parser.add_argument("--arch", help="as in main.py, for a --backbone FILE")
    with one_line_errors():
        args = parser.parse_args(argv)
        if args.out.exists():
            raise UserError(f"--out {args.out} exists; remove it, or name another")
        if not args.weights.is_file():
            raise UserError(f"--weights {args.weights} is not a file; main.py --save_path writes one")
        metadata = checkpoint_metadata(args.weights)
        if "backbone" not in metadata and args.backbone is None:
            raise UserError(f"{args.weights} does not name the model it belongs to; give --backbone")
        arch = args.arch or (None if args.backbone else json.loads(metadata.get("settings", "{}")).get("arch"))
        model, _ = clip.load(args.backbone or metadata["backbone"], arch=arch or metadata.get("arch"))
        if args.to == "peft":
            save_peft(model, args.weights, args.out)
        else:
            WHOLE[args.to](merge_file(model, args.weights).requires_grad_(False), args.out)
        print(f"{args.weights} as {args.to}: {args.out}")


if __name__ == "__main__":
    main()
