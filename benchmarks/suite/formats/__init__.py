"""All formats under test, by name, in the order of the report."""

from __future__ import annotations

from functools import cache

from suite.formats.arrays import NumpyCompressed, SafeTensors, TorchSave, Zarr
from suite.formats.base import Format
from suite.formats.h5traces_archive import ReadByStockHdf5, archives
from suite.formats.hdf5 import STOCK, STOCK_WHOLE, blosc2, stock, stock_whole, zstd
from suite.formats.pickles import GZIP_PICKLE, GzipPickle, PlainPickle

__all__ = ["GZIP_PICKLE", "STOCK", "STOCK_WHOLE", "Format", "all_formats", "by_name"]


@cache
def all_formats() -> dict[str, Format]:
    """Every format, installed or not."""
    formats = (
        *archives(),
        ReadByStockHdf5(),
        PlainPickle(),
        GzipPickle(),
        NumpyCompressed(),
        TorchSave(),
        SafeTensors(),
        stock(),
        stock_whole(),
        zstd(),
        blosc2(),
        Zarr(),
    )
    return {each.name: each for each in formats}


def by_name(name: str) -> Format:
    """One format."""
    return all_formats()[name]
