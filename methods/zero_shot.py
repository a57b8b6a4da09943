"""CLIP as it is, with only the prompts (Radford et al. 2021). Nothing is trained: main.py evaluates the model."""

from dataclasses import dataclass

from settings import Hparams as Base


@dataclass(frozen=True)
class Hparams(Base):
    """No settings."""


prepare = None
