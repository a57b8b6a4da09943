"""CLIP as it is, with the prompts alone (Radford et al. 2021): nothing is trained."""

from clip import CLIP
from datasets import Task

from .adaptation import Adaptation

HYPERPARAMETERS = ()
DEFAULTS: dict = {}


def prepare(model: CLIP, task: Task, settings) -> Adaptation:
    model.requires_grad_(False)
    return Adaptation(model, {})
