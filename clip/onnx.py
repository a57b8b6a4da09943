"""Writes both towers of a CLIP as ONNX files, for programs without torch."""

import json
import logging
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import new_folder

from .conventions import describe
from .files import WeightsError
from .layouts import PaddedPrompts, split_heads
from .model import CLIP

INSTALL = "pip install onnx onnxscript"


class CausalPrompts(PaddedPrompts):
    """Padded prompts in which each token sees those before it. Unlike `PackedPrompts` they have shapes that do not
    depend on the tokens, as a graph needs."""

    def attend(self, qkv: Tensor, heads: int) -> Tensor:
        q, k, v = (split_heads(x, heads) for x in qkv.chunk(3, dim=-1))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)

    def attend_used(self, q: Tensor, kv: Tensor, heads: int) -> Tensor:
        sees = (self.positions <= self.ends[:, None])[:, None, None]  # [B, 1, 1, T]
        q, k, v = (split_heads(x, heads) for x in (q.unsqueeze(1), *kv.chunk(2, dim=-1)))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=sees).transpose(1, 2).flatten(1)


class TextTower(nn.Module):
    """`CLIP.encode_text` of padded token ids as a forward pass."""

    def __init__(self, model: CLIP):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        conventions = self.model.arch.conventions
        prompts = CausalPrompts if conventions.causal else PaddedPrompts
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
    towers = {"image": (model.visual, torch.zeros(2, 3, size, size), "pixels")}
    towers["text"] = TextTower(model), torch.zeros(2, context, dtype=torch.int64), "tokens"
    with new_folder(folder) as part:
        for name, (tower, example, input_name) in towers.items():
            _save(tower.eval(), example, input_name, part / f"{name}.onnx", f"the {name} tower of {describe(model)}")
        about = asdict(model.preprocessing) | {"logit_factor": float(model.logit_factor)}
        (part / "preprocessing.json").write_text(json.dumps(about, indent=2) + "\n")


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
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # lines of this program, with the paths of this machine
        program.save(path)
    except torch.onnx.OnnxExporterError as error:
        reason = " ".join(str(error.__cause__ or error).split())[:200]
        raise WeightsError(f"PyTorch cannot write {what} as ONNX ({reason}); use another --to") from error
    finally:
        logger.setLevel(level)
