"""Archives made at some tier, held against the exact ones of the same source."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from coding import assert_same_class, bits

import h5traces

TIERS = ("fine", "analysis", "compact", "native")
KINDS = ("hidden_states", "attentions", "attention_mean")


def without_footer(path: Path) -> Path:
    """A copy that HDF5 opened for writing, so that reading goes through HDF5."""
    # HDF5 keeps a file that an earlier test has not let go of.
    target = Path(tempfile.mkdtemp(dir=path.parent)) / f"{path.stem}-hdf5.h5"
    shutil.copy(path, target)
    with h5py.File(target, "a"):
        pass
    assert target.stat().st_size < path.stat().st_size
    return target


def sigma_of(path: Path, layer: str) -> np.ndarray:
    """What the bound of a layer is stated in, as h5py finds it."""
    with h5py.File(path) as file:
        found: np.ndarray = file[f"scales/hidden_states/{layer}/sigma"][:]
    return found


def assert_within_bounds(lossy: Path, exact: Path, *, lossy_dtype: str = "float16") -> set[str]:
    """Fail unless all values of all layers are within what their attributes promise.

    Returns
    -------
    set of str
        Encodings that were met, ``exact`` among them, each with its kind.
    """
    met: set[str] = set()
    some = h5traces.open(lossy, lossy_dtype=lossy_dtype)  # type: ignore[arg-type]
    every = h5traces.open(exact)
    assert len(some) == len(every)
    for trace, other in zip(some, every, strict=True):
        for path in trace._stored.objects:
            kind, _, name = path.partition("/")
            if kind in KINDS and name and name not in ("steps", "exceptions"):
                met.add(_assert_layer(trace, other, kind, name, lossy))
    return met


def _assert_layer(trace: Any, other: Any, kind: str, name: str, lossy: Path) -> str:
    attrs = trace._stored.attrs(f"{kind}/{name}")
    found = trace._stored.typed_layer(kind, name)
    encoding = attrs.get("encoding", "exact")
    if kind == "attention_mean" and f"{kind}/{name}" not in other._stored.objects:
        heads = other._stored.typed_layer("attentions", name).to_numpy().astype(np.float16)
        with np.errstate(invalid="ignore"):
            mean = heads.astype(np.float32).sum(0) / np.float32(len(heads))
        _assert_weights(found.values, mean, attrs)
        return f"{kind} {encoding}"
    expected = other._stored.typed_layer(kind, name)
    if isinstance(found, list):
        assert encoding in ("exact", "float16-rounded")
        pairs = [(one.values, two.values) for one, two in zip(found, expected, strict=True)]
    else:
        pairs = [(found.values, expected.values)]
    for values, source in pairs:
        assert values.shape == source.shape
        if encoding == "exact":
            assert values.dtype == source.dtype
            assert np.array_equal(bits(values), bits(source))
        elif encoding == "channel-steps":
            bound = attrs["max_error_sigma"] * sigma_of(lossy, name).astype(np.float64)
            assert_same_class(values, source)
            with np.errstate(invalid="ignore"):
                error = np.abs(values.astype("f8") - source.astype("f8"))
            assert (error <= bound)[np.isfinite(source)].all()
        elif encoding == "float16-rounded":
            normal = np.isfinite(source) & (np.abs(source.astype("f8")) >= 2.0**-14)
            wide = source[normal].astype("f8")
            error = np.abs(values[normal].astype("f8") - wide)
            assert (error <= np.abs(wide) * 2.0 ** -(attrs["mantissa_bits"] + 1)).all()
            assert np.array_equal(bits(values)[~normal], bits(source)[~normal])
        else:
            _assert_weights(values, source, attrs)
    return f"{kind} {encoding}"


def _assert_weights(values: np.ndarray, source: np.ndarray, attrs: dict[str, Any]) -> None:
    assert_same_class(values, source)
    if "encoding" not in attrs:
        assert np.array_equal(values, source.astype(values.dtype), equal_nan=True)
        return
    with np.errstate(invalid="ignore"):
        weights = (source >= 0) & (source <= 1)
    found, wanted = values[weights].astype("f8"), source[weights].astype("f8")
    limit = 0.5 / attrs["levels"] + 2.0**-23
    # Rounding to float16 comes on top of half a level.
    rounding = np.spacing(found.astype("f2")).astype("f8") if values.dtype == np.float16 else 0
    low = np.sqrt(np.maximum(found - rounding, 0))
    high = np.sqrt(found + rounding)
    assert (low - limit <= np.sqrt(wanted)).all()
    assert (high + limit >= np.sqrt(wanted)).all()
