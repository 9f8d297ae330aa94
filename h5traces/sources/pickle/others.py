"""Shims of other picklers and of libraries: joblib, dill, transformers, TransformerLens.

An output of a forward pass or of ``generate`` becomes the dict that it is, and TransformerLens'
``ActivationCache`` its ``cache_dict``. Other objects inside, such as key-value caches and models,
become `Unsupported` values, which are left out; nothing of them is imported or called.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from h5traces.format.value_types import FACTORIES
from h5traces.sources.pickle.calls import (
    Pending,
    Shim,
    Unsupported,
    brief,
    check_args,
    type_name,
)
from h5traces.sources.pickle.plain import PLAIN_NAMES
from h5traces.sources.pickle.shims import (
    NAMES,
    NDARRAY,
    MlDtype,
    any_array,
    check_shape,
    finish_array,
)
from h5traces.sources.pickle.source import contradict, reject

if TYPE_CHECKING:
    from h5traces.sources.pickle.calls import Meter

_REMEDY: Final = "save what is plain of it"
_CACHES: Final = frozenset(
    (
        ("transformer_lens.ActivationCache", "ActivationCache"),
        ("transformer_lens.activation_cache", "ActivationCache"),
    )
)


# --- joblib --------------------------------------------------------------------------------------


def _wrapper(_meter: Meter, args: tuple[Any, ...]) -> Pending:
    check_args("NumpyArrayWrapper", args, 0)
    return Pending("array of joblib", _finish_wrapper)


def _finish_wrapper(meter: Meter, state: Any) -> Any:
    """An array whose bytes follow its description, after as many as align them."""
    if type(state) is not dict:
        reject(f"the state of an array of joblib is {type_name(state)}, expected a dict")
    if state.get("subclass") is not NDARRAY:
        reject(
            f"an array of joblib is of the class {type_name(state.get('subclass'))}, expected "
            f"numpy.ndarray; save np.asarray(...) of it"
        )
    shape, dtype, order = check_shape(state.get("shape")), state.get("dtype"), state.get("order")
    if order not in ("C", "F"):
        reject(f"an array of joblib has the order {brief(order)}, expected 'C' or 'F'")
    if not isinstance(dtype, (np.dtype, MlDtype)):
        reject(f"an array of joblib has {type_name(dtype)} for its dtype")
    plain = dtype.carrier if isinstance(dtype, MlDtype) else dtype
    if plain.kind == "O":
        array = meter.load_nested()
        if type(array) is not np.ndarray or array.shape != shape:
            contradict(f"an array of joblib of shape {shape} is followed by {type_name(array)}")
        return array
    if state.get("numpy_array_alignment_bytes") is not None:
        meter.read_raw(meter.read_raw(1)[0])
    data = meter.read_raw(math.prod(shape) * plain.itemsize)
    return any_array(meter, data, dtype, shape, order=order)


def _old_wrapper(_meter: Meter, _args: tuple[Any, ...]) -> Any:
    reject(
        "an array lies in another file, as joblib before 0.10 wrote; load the file with joblib, "
        "and dump it again"
    )


# --- dill ----------------------------------------------------------------------------------------


def _create_array(meter: Meter, args: tuple[Any, ...]) -> Any:
    check_args("_create_array", args, 3, 4)
    function, parts, state = args[:3]
    if function is not NAMES["numpy.core.multiarray", "_reconstruct"] or type(parts) is not tuple:
        reject(f"_create_array is called with {type_name(function)}, expected _reconstruct")
    if len(args) == 4 and args[3]:
        reject("an array of dill has further attributes; save np.asarray(...) of it")
    if not parts or parts[0] is not NDARRAY:
        reject("an array of dill is of another class than numpy.ndarray")
    return finish_array(meter, state)


def _load_type(_meter: Meter, args: tuple[Any, ...]) -> Shim:
    check_args("_load_type", args, 1)
    name = {"NoneType": "object"}.get(args[0], args[0]) if type(args[0]) is str else ""
    found = PLAIN_NAMES.get(("builtins", name))
    if found is None or name not in FACTORIES:
        reject(f"dill's _load_type names the class {brief(args[0])}, expected one of plain values")
    return found


def _named() -> dict[tuple[str, str], Shim]:
    wrapper = Shim("joblib.numpy_pickle.NumpyArrayWrapper", _wrapper)
    old = Shim("joblib.numpy_pickle.NDArrayWrapper", _old_wrapper)
    found = {
        ("joblib.numpy_pickle", "NumpyArrayWrapper"): wrapper,
        ("sklearn.externals.joblib.numpy_pickle", "NumpyArrayWrapper"): wrapper,
        **{
            (f"joblib.{module}", name): old
            for module in ("numpy_pickle", "numpy_pickle_compat")
            for name in ("NDArrayWrapper", "ZNDArrayWrapper")
        },
    }
    for module in ("dill._dill", "dill.dill"):
        found[module, "_create_array"] = Shim("dill._dill._create_array", _create_array)
        found[module, "_load_type"] = Shim("dill._dill._load_type", _load_type)
    return found


OTHER_NAMES: Final = _named()


# --- objects of libraries ------------------------------------------------------------------------


def object_shim(module: str, name: str) -> Shim | None:
    """What builds an object of which the arrays are wanted; None for other classes."""
    if module.startswith("transformers.") and "Output" in name:
        return Shim(f"{module}.{name}", _output)
    return Shim(f"{module}.{name}", _cache) if (module, name) in _CACHES else None


def skipped_shim(module: str, name: str) -> Shim:
    """What stands for an object inside of one, which is left out."""
    value = Unsupported(f"an object of the class {module[:80]}.{name[:80]}", _REMEDY)
    return Shim(f"{module}.{name}", lambda _meter, _args: value)


def _output(meter: Meter, _args: tuple[Any, ...]) -> dict[Any, Any]:
    """An empty dict: the pickle sets its items, and then attributes that say the same."""
    found: dict[Any, Any] = {}
    meter.begin_object(found)
    return found


def _cache(_meter: Meter, _args: tuple[Any, ...]) -> Pending:
    return Pending("cache", _finish_cache)


def _finish_cache(_meter: Meter, state: Any) -> dict[Any, Any]:
    found = state.get("cache_dict") if type(state) is dict else None
    if type(found) is not dict:
        reject(f"an ActivationCache holds {type_name(found)}, expected a dict of activations")
    return found
