"""The operations of a function, recorded and done again on the same memory, as a CUDA graph does."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only


class Recorded(TorchDispatchMode):
    """Records operations while it is entered. Numbers stay what they were, and tensors from outside where they were."""

    def __init__(self):
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations.append((func, args, kwargs or {}, result))
        return result

    def replay(self) -> dict[int, Tensor]:
        """Do all operations again. Return the new results by the id of the recorded ones."""
        new: dict[int, Tensor] = {}
        for func, args, kwargs, result in self.operations:
            args, kwargs = tree_map_only(Tensor, lambda tensor: new.get(id(tensor), tensor), (args, kwargs))
            again = func(*args, **kwargs)
            new.update({id(one): other for one, other in zip(tree_leaves(result), tree_leaves(again))})
        return new
