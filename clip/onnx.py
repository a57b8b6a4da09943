"""Writes both towers of a CLIP as ONNX files, for programs without torch."""

import json
import logging
import os
import shutil
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .files import WeightsError
from .layouts import PaddedPrompts, split_heads
from .model import CLIP

INSTALL = "pip install onnx onnxscript"


class CausalPrompts(PaddedPrompts):
    """Padded prompts in which each token sees those before it, as operations that do not depend on the tokens."""

    def __init__(self, tokens: Tensor, ends: Tensor):
        self.ids, self.ends = tokens, ends
        self.positions = torch.arange(tokens.shape[1], device=tokens.device)
        self.rows = torch.arange(tokens.shape[0], device=tokens.device)
        self.vector_places = torch.empty(0, dtype=torch.int64)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        sees = self.positions <= self.positions[:, None]
        q, k, v = (split_heads(x, heads) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2).flatten(2)

    def attend_used(self, q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        sees = (self.positions <= self.ends[:, None])[:, None, None]  # [B, 1, 1, T]
        q, k, v = (split_heads(x, heads) for x in (q.unsqueeze(1), k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2).flatten(1)


class PlainPrompts(CausalPrompts):
    """Padded prompts in which each token sees all others."""

    attend, attend_used = PaddedPrompts.attend, PaddedPrompts.attend_used


class ImageTower(nn.Module):
    """`CLIP.encode_image` as a forward pass."""

    def __init__(self, model: CLIP):
        super().__init__()
        self.model = model

    def forward(self, pixels: Tensor) -> Tensor:
        return self.model.encode_image(pixels)


class TextTower(ImageTower):
    """`CLIP.encode_text` of padded token ids."""

    def forward(self, tokens: Tensor) -> Tensor:
        conventions = self.model.arch.conventions
        prompts = CausalPrompts if conventions.causal else PlainPrompts
        return self.model.encode_text(prompts(tokens, conventions.ends(tokens)))


def save_onnx(model: CLIP, folder: Path) -> None:
    """Write a folder with image.onnx, text.onnx and preprocessing.json. The batch may have any size.

    image.onnx maps `pixels` [B, 3, R, R], float32, preprocessed, to `features` [B, E], not normalised; text.onnx does
    the same with `tokens` [B, context], int64. preprocessing.json says how images are prepared and the factor of the
    cosines in the logits. Raise WeightsError if onnx is missing or cannot express a tower, with nothing written.
    """
    try:
        import onnx  # noqa: F401, optional
        import onnxscript  # noqa: F401, optional
    except ModuleNotFoundError as error:
        raise WeightsError(f"ONNX files need {error.name}: {INSTALL}") from None
    size, context = model.preprocessing.size, model.arch.context_length
    towers = {"image": (ImageTower(model), torch.zeros(2, 3, size, size), "pixels")}
    towers["text"] = TextTower(model), torch.zeros(2, context, dtype=torch.int64), "tokens"
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        for name, (tower, example, input_name) in towers.items():
            _save(tower.eval(), example, input_name, partial / f"{name}.onnx", f"{model.origin}: its {name} tower")
        about = asdict(model.preprocessing) | {"logit_factor": float(model.logit_factor)}
        (partial / "preprocessing.json").write_text(json.dumps(about, indent=2) + "\n")
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise


@torch.no_grad()
def _save(tower: nn.Module, example: Tensor, input_name: str, path: Path, what: str) -> None:
    """Write one tower, traced with `example` of any batch size. `what` names it in messages."""
    logger, batch = logging.getLogger("torch.onnx"), {0: torch.export.Dim("batch")}
    level = logger.level
    logger.setLevel(logging.ERROR)  # it warns of every version of an operator
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                tower,
                (example,),
                dynamo=True,
                dynamic_shapes=(batch,),
                input_names=[input_name],
                output_names=["features"],
                verbose=False,
            )
        program.save(path)
    except torch.onnx.OnnxExporterError as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(f"{what} cannot be written as ONNX: {reason}; use another --to") from None
    finally:
        logger.setLevel(level)
