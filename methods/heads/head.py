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
    Those in `varying` have a row for each training image; with `by_class` all have a row for each class.
    Without `of_classes` none belongs to a class, and other classes can be evaluated.
    """

    trains_images = trains_text = False

    def __init__(
        self,
        experiment: Experiment,
        tensors: dict[str, Tensor],
        varying: Iterable[str] = (),
        by_class: bool = False,
        of_classes: bool = True,
    ):
        experiment.model.requires_grad_(False)
        trained = {name: tensor for name, tensor in tensors.items() if tensor.requires_grad}
        class_names = experiment.task.class_names if of_classes else None
        saved = Tensors(FORMAT, tensors, class_names, varying, by_class)
        super().__init__(experiment, trained, saved=saved)
