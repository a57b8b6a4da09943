"""What classifiers on the features of an unchanged CLIP share."""

from collections.abc import Iterable

from torch import Tensor

from experiment import Experiment

from ..adaptation import Adaptation
from ..saving import Tensors

FORMAT = "clip-head-1"


class Head(Adaptation):
    """Tensors of its own that make logits of frozen features. A subclass fills them in `build`, or by training.

    Tensors that require a gradient are trained. All except integers count as weights that the method adds to CLIP.
    Those in `varying` have a row for each training image.
    """

    trains_images = trains_text = False

    def __init__(self, experiment: Experiment, tensors: dict[str, Tensor], varying: Iterable[str] = ()):
        experiment.model.requires_grad_(False)
        trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        saved = Tensors(FORMAT, tensors, experiment.task.class_names, varying)
        super().__init__(experiment, trained, saved=saved)
