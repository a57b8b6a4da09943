"""CLIP as it is, with the prompts alone (Radford et al. 2021): nothing is trained."""

from clip import CLIP

from .adaptation import Adaptation

HYPERPARAMETERS = ()


def prepare(model: CLIP, settings) -> Adaptation:
    model.requires_grad_(False)
    return Adaptation(model, {})
