"""The deflate libraries, and which of them does what.

isal's level 1 codes planes without matches three times as fast as zlib-ng and inflates them 1.3
times as fast; zlib-ng has the strategies that isal lacks and is the faster one at inflating runs.
Both release the GIL. Where both are missing the standard library's zlib takes their place, at 0.3
of the speed for hidden states and 0.7 for attentions.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from h5traces.storage.planes import Bytes

RAW_DEFLATE = -15

# zlib-ng inflates long runs, which are stored in so little of their size, up to 1.4 times as fast
# as isal; isal inflates hidden states 1.3 times, bfloat16-born ones 1.6 times and those in steps
# twice as fast, and attentions nearly as fast.
_MAX_SHARE_FOR_ZLIB_NG = 0.35


@dataclass(frozen=True)
class Engines:
    """The deflate libraries to work with; None stands for one that is not installed."""

    isal_zlib: Any
    igzip_lib: Any
    zlib_ng: Any

    @classmethod
    def installed(cls) -> Engines:
        """The libraries that can be imported."""
        names = ("isal.isal_zlib", "isal.igzip_lib", "zlib_ng.zlib_ng")
        return cls(*map(_import_or_none, names))

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """What inflating a damaged stream raises."""
        extra = (self.igzip_lib and self.igzip_lib.error, self.zlib_ng and self.zlib_ng.error)
        return (zlib.error, *filter(None, extra))

    def adler32(self, data: Bytes) -> int:
        """RFC 1950's checksum: 49 GB/s with zlib-ng, 16 with isal, 3.5 with zlib."""
        library = self.zlib_ng or self.isal_zlib or zlib
        return int(library.adler32(data))

    def inflater(self, stored_share: float) -> Any:
        """A fresh raw inflater with ``decompress(data, max_length)``, ``eof`` and ``unused_data``.

        Parameters
        ----------
        stored_share
            Stored bytes per raw byte.
        """
        if self.igzip_lib and (stored_share > _MAX_SHARE_FOR_ZLIB_NG or not self.zlib_ng):
            return self.igzip_lib.IgzipDecompressor(self.igzip_lib.DECOMP_DEFLATE)
        return (self.zlib_ng or zlib).decompressobj(RAW_DEFLATE)


def _import_or_none(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError:
        return None
