"""A device that no machine has: tensors that say they are elsewhere, compute where they are, and refuse what a card would refuse.

Under `Pretend()` a tensor moves there by `.to(DEVICE)` or by being made there. An operator that is given one tensor from there and one that was left
on the CPU raises, as CUDA's operators do; numbers without an axis and the indices of a tensor may be mixed with others there as here. Nothing leaves
the device but by `.to`, `.cpu`, `.item`, `.tolist` or `copy_`.
"""
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("pretend")
DEVICE = torch.device("pretend:0")
MOVES = ("aten::copy_", "aten::_to_copy", "aten::to")                        # operators that are there to mix devices
INDEXES = ("aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_")     # second argument: indices


class Elsewhere(torch.Tensor):
    """A tensor that is on the pretended device, and the one that holds its numbers."""
    @staticmethod
    def __new__(cls, here: torch.Tensor) -> "Elsewhere":
        return torch.Tensor._make_wrapper_subclass(cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
                                                   layout=here.layout, device=DEVICE)

    def __init__(self, here: torch.Tensor): self.here = here
    def tolist(self) -> Any: return self.here.tolist()
    def numpy(self, **how: Any) -> None: raise TypeError("can't convert a tensor of another device to numpy; use Tensor.cpu() first")
    def __array__(self, *args: Any) -> None: self.numpy()
    def __repr__(self) -> str: return f"Elsewhere({self.here})"

    @classmethod
    def __torch_dispatch__(cls, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return computed(operator, args, kwargs or {})


def is_away(x: Any) -> bool: return isinstance(x, Elsewhere)
def here(x: Any) -> Any: return x.here if is_away(x) else torch.device("cpu") if isinstance(x, torch.device) else x
def away(x: Any) -> Any: return Elsewhere(x) if isinstance(x, torch.Tensor) and not is_away(x) else x


def left_behind(name: str, args: tuple, kwargs: dict) -> list[torch.Tensor]:
    """The tensors that a card would refuse beside one that lies on it."""
    if name in MOVES: return []
    if name in INDEXES and is_away(args[0]): args = (args[0], *args[2:])
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    return [x for x in tensors if not is_away(x) and x.dim()] if any(map(is_away, tensors)) else []


def computed(operator: Any, args: tuple, kwargs: dict) -> Any:
    """An operator's result, on the device that it belongs to; raises where the arguments are on two."""
    name, schema = operator._schema.name, operator._schema.arguments
    asked = next((x for x in (kwargs.get("device"), *args) if isinstance(x, torch.device)), None)
    if left := left_behind(name, args, kwargs): raise RuntimeError(f"{name}: a tensor {tuple(left[0].shape)} was left on the CPU")
    result = operator(*tree_map(here, args), **tree_map(here, kwargs | ({"pin_memory": False} if "pin_memory" in kwargs else {})))
    if name == "aten::_local_scalar_dense": return result
    if schema and schema[0].alias_info is not None and schema[0].alias_info.is_write and isinstance(result, torch.Tensor): return args[0]
    there = asked.type == DEVICE.type if asked is not None else any(map(is_away, tree_leaves((args, kwargs))))
    return tree_map(away, result) if there else result


class _Operators(TorchDispatchMode):
    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return computed(operator, args, kwargs or {})


class _Factories(TorchFunctionMode):
    "Tensors from lists are made past the operators."
    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = dict(kwargs or {})
        if function not in (torch.tensor, torch.as_tensor): return function(*args, **kwargs)
        device = kwargs.pop("device", None)
        made = function(*args, **kwargs)
        return made if device is None else made.to(device)


class Pretend:
    """Within this context the pretended device is there; without gradients."""
    def __enter__(self) -> torch.device:
        self.modes = [torch.no_grad(), _Factories(), _Operators()]
        for mode in self.modes: mode.__enter__()
        return DEVICE

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes): mode.__exit__(*error)
