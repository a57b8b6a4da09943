"""Methods of adaptation. README.md shows how one is added: a file, and a line here.

Each module has `Hparams`, the method's own settings with their published defaults, and `prepare(experiment)`, which
freezes everything but what it trains and returns an Adaptation.
"""

from . import zero_shot
from .adapters import adalora, dora, lora, relora
from .heads import gda, linear_probe, tip_adapter, tip_adapter_f
from .prompts import coop
from .weights import adam, prolip, so, so_ablation

METHODS = {
    "so": so,
    "adam": adam,
    "lora": lora,
    "relora": relora,
    "dora": dora,
    "adalora": adalora,
    "prolip": prolip,
    "linear_probe": linear_probe,
    "tip_adapter": tip_adapter,
    "tip_adapter_f": tip_adapter_f,
    "gda": gda,
    "coop": coop,
    "zero_shot": zero_shot,
    "so_ablation": so_ablation,
}
