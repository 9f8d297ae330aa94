"""Names of torch beside those of plain tensors.

torch's shape type becomes the tuple that it is, devices and dtypes become their text. Sparse,
quantised and other tensors are kept as `Unsupported` until their field is known.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from h5traces.format.values import TorchValue
from h5traces.sources.pickle.calls import Shim, Unsupported, brief, check_args, type_name
from h5traces.sources.pickle.shims import STORAGE_NAMES, check_shape
from h5traces.sources.pickle.source import reject

if TYPE_CHECKING:
    from collections.abc import Callable

    from h5traces.sources.pickle.calls import Meter

_DENSE = "save it again after to_dense()"
_ARRAY = "save it again as an array of numbers"
# Functions that rebuild tensors which are not plain arrays.
_UNSUPPORTED = {
    "_rebuild_sparse_tensor": Unsupported("a sparse tensor", _DENSE),
    "_rebuild_sparse_csr_tensor": Unsupported("a sparse tensor", _DENSE),
    "_rebuild_qtensor": Unsupported("a quantised tensor", "save it again after dequantize()"),
    "_rebuild_nested_tensor": Unsupported(
        "a nested tensor", "save the list of its tensors: unbind()"
    ),
    "_rebuild_meta_tensor_no_storage": Unsupported(
        "a tensor without values (device 'meta')", "save it from a model whose weights are loaded"
    ),
    "_rebuild_device_tensor_from_numpy": Unsupported(
        "a tensor of another device", "save it again after cpu()"
    ),
    "_rebuild_device_tensor_from_cpu_tensor": Unsupported(
        "a tensor of another device", "save it again after cpu()"
    ),
    "_rebuild_wrapper_subclass": Unsupported("a tensor of a subclass", _ARRAY),
}
# Arguments of these functions: schemes and layouts.
_ARGUMENTS = (
    *("per_tensor_affine", "per_channel_affine", "per_tensor_symmetric", "per_channel_symmetric"),
    *("sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc", "strided", "jagged"),
)
_OTHER_DTYPES = ("complex32", "quint8", "qint8", "qint32", "quint4x2", "quint2x4")


def _size(_meter: Meter, args: tuple[Any, ...]) -> tuple[int, ...]:
    check_args("torch.Size", args, 1)
    return check_shape(tuple(args[0]) if type(args[0]) is list else args[0])


def _device(_meter: Meter, args: tuple[Any, ...]) -> str:
    check_args("torch.device", args, 1, 2)
    kind, index = (*args, None)[:2]
    if type(kind) is not str or not (index is None or type(index) is int):
        reject(f"torch.device is called with {brief(kind)} and {brief(index)}")
    return kind if index is None else f"{kind}:{index}"


def _layout(_meter: Meter, args: tuple[Any, ...]) -> str:
    check_args("_get_layout", args, 1)
    return brief(args[0])


def _always(value: Unsupported) -> Callable[[Meter, tuple[Any, ...]], Unsupported]:
    return lambda _meter, _args: value


def _of_subclass(meter: Meter, args: tuple[Any, ...]) -> TorchValue | Unsupported:
    """A tensor of one of torch's own subclasses, as a plain tensor."""
    check_args("_rebuild_from_type_v2", args, 4)
    function, _kind, inner, state = args
    if type(function) is not Shim or function.call is None or type(inner) is not tuple:
        reject(f"_rebuild_from_type_v2 is called with {type_name(function)}")
    if not (state is None or (type(state) in (dict, tuple) and len(state) <= 2)):
        reject(f"a tensor carries {type_name(state)} for its attributes")
    found: TorchValue | Unsupported = function.call(meter, inner)
    return found


def _with_state(meter: Meter, args: tuple[Any, ...]) -> Any:
    check_args("_rebuild_parameter_with_state", args, 4)
    if type(args[0]) not in (TorchValue, Unsupported):
        reject(f"a parameter holds {type_name(args[0])}, expected a tensor")
    return args[0]


TORCH_NAMES: dict[tuple[str, str], Shim] = {
    ("torch", "Size"): Shim("torch.Size", _size),
    ("torch", "device"): Shim("torch.device", _device),
    ("torch.serialization", "_get_layout"): Shim("torch.serialization._get_layout", _layout),
    ("torch._tensor", "_rebuild_from_type_v2"): Shim(
        "torch._tensor._rebuild_from_type_v2", _of_subclass
    ),
    ("torch._utils", "_rebuild_parameter_with_state"): Shim(
        "torch._utils._rebuild_parameter_with_state", _with_state
    ),
    **{
        ("torch._utils", name): Shim(f"torch._utils.{name}", _always(value))
        for name, value in _UNSUPPORTED.items()
    },
    **{("torch", name): Shim(f"torch.{name}") for name in _ARGUMENTS},
    # Never called: the classes that `_of_subclass` passes on.
    **{
        (module, name): Shim(f"{module}.{name}")
        for module, name in (
            ("torch", "Tensor"),
            ("torch._tensor", "Tensor"),
            ("torch.nn.parameter", "Parameter"),
            ("torch.nn.parameter", "Buffer"),
        )
    },
    **{("torch", name): Shim(f"torch.{name}", dtype=name) for name in _OTHER_DTYPES},
}
# Persistent ids name the types of storages.
TORCH_NAMES |= STORAGE_NAMES
