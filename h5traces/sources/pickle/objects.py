"""Objects of which the arrays are wanted, not the class: outputs of transformers, caches.

An output of a forward pass or of ``generate`` becomes the dict that it is, and TransformerLens'
``ActivationCache`` its ``cache_dict``. Other objects inside, such as key-value caches and models,
become `Unsupported` values, which are left out; nothing of them is imported or called.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from h5traces.sources.pickle.calls import Pending, Shim, Unsupported, type_name
from h5traces.sources.pickle.source import reject

if TYPE_CHECKING:
    from h5traces.sources.pickle.calls import Meter

_REMEDY: Final = "save what is plain of it"
_CACHES: Final = frozenset(
    (
        ("transformer_lens.ActivationCache", "ActivationCache"),
        ("transformer_lens.activation_cache", "ActivationCache"),
    )
)


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
