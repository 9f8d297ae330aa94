"""What a file is, by its content: a table of signatures, and a look inside containers.

Names are not looked at: batches are renamed freely, and ``.pkl``, ``.pt`` and ``.bin`` say little.
"""

from __future__ import annotations

import bz2
import lzma
import os
import re
import stat
import struct
import zlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import zstandard

from h5traces.errors import ConversionError
from h5traces.format import layout
from h5traces.meaning.options import A_MAPPING
from h5traces.sources.zip_entries import ZipDirectory
from h5traces.storage.files import open_regular

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

_HEAD_NBYTES: Final = 4096
# Of a compressed file, to know what is inside; and of one block of it, at most: bzip2's.
_PACKED_NBYTES: Final = 1 << 16
_BLOCK_NBYTES: Final = 1_200_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Kind:
    """What a file or folder is.

    Attributes
    ----------
    id
        Key of `KINDS`, such as ``torch``.
    what
        The same for messages, after "is": ``a file of torch.save``.
    remedy
        What to do with it where nothing reads it.
    is_ours
        Whether h5traces writes such files: an archive, scales or features.
    compression
        The compressor around it, such as ``gzip``; None if there is none.
    """

    id: str
    what: str
    remedy: str
    is_ours: bool = False
    compression: str | None = None

    def __str__(self) -> str:
        return f"{self.what}, compressed by {self.compression}" if self.compression else self.what


_MAPPING: Final = f"say which name holds which field in {A_MAPPING}"
_SAVE: Final = "load it with the program that wrote it, and save its samples in another format"
_UNPACK: Final = "unpack it and convert what it holds"

KINDS: Final[dict[str, Kind]] = {
    each.id: each
    for each in (
        # Of h5traces itself.
        Kind(
            id="archive",
            what="an archive of h5traces",
            remedy="h5traces.open reads it, and h5traces.repack makes a new one of it",
            is_ours=True,
        ),
        Kind(
            id="scales",
            what="a file of scales that h5traces wrote, not an archive",
            remedy="pass it where an archive is written, as its scales",
            is_ours=True,
        ),
        Kind(
            id="features",
            what="a file of features that h5traces wrote, not an archive",
            remedy="read it with h5py",
            is_ours=True,
        ),
        # That hold samples.
        Kind(id="pickle", what="a pickle", remedy=_SAVE),
        Kind(id="torch", what="a file of torch.save", remedy=_SAVE),
        Kind(
            id="torch-old",
            what="a file of torch.save in its format before 1.6",
            remedy=_SAVE,
        ),
        Kind(id="safetensors", what="a safetensors file", remedy=_MAPPING),
        Kind(id="npz", what="a file of numpy.savez", remedy=_MAPPING),
        Kind(id="npy", what="a file of numpy.save", remedy=_MAPPING),
        Kind(id="hdf5", what="HDF5, but no archive of h5traces", remedy=_MAPPING),
        Kind(id="parquet", what="a Parquet file", remedy=_MAPPING),
        Kind(id="arrow", what="an Arrow or Feather file", remedy=_MAPPING),
        Kind(id="jsonl", what="a file of JSON lines", remedy=_MAPPING),
        Kind(id="json", what="a JSON file", remedy=_MAPPING),
        Kind(id="csv", what="a table of text", remedy="'h5traces label' reads tables of labels"),
        Kind(id="datasets-folder", what="a folder saved by datasets", remedy=_MAPPING),
        # That hold none, or not as they are.
        Kind(id="torchscript", what="a TorchScript model", remedy="it holds no traces"),
        Kind(id="zip", what="a zip file", remedy=_UNPACK),
        Kind(id="tar", what="a tar file", remedy=_UNPACK),
        Kind(id="image", what="an image", remedy="it holds no traces; pass it over"),
        Kind(id="pdf", what="a PDF document", remedy="it holds no traces; pass it over"),
        Kind(id="7z", what="a 7z file", remedy=_UNPACK),
        Kind(id="rar", what="a RAR file", remedy=_UNPACK),
        Kind(id="office", what="an office document", remedy="save its table as CSV"),
        Kind(id="sqlite", what="a SQLite database", remedy=_SAVE),
        Kind(
            id="git-lfs",
            what="a pointer of Git LFS, not the file itself",
            remedy="fetch the file: git lfs pull",
        ),
        Kind(
            id="git-annex",
            what="a pointer of git-annex, not the file itself",
            remedy="fetch the file: git annex get",
        ),
        Kind(
            id="html",
            what="a web page, saved in place of the file",
            remedy="open the address in a browser: it asks to sign in, or names an error; then "
            "download the file itself",
        ),
        Kind(
            id="xml",
            what="an XML document; storage servers answer so where a download fails",
            remedy="read what it says, then download the file itself",
        ),
        Kind(
            id="empty",
            what="empty (0 bytes)",
            remedy="its writer has not written yet, or the disk was full; look at the run that "
            "made it",
        ),
        Kind(id="gzip", what="a gzip file of unknown content", remedy="decompress it with gunzip"),
        Kind(id="bz2", what="a bzip2 file of unknown content", remedy="decompress it with bunzip2"),
        Kind(id="xz", what="an xz file of unknown content", remedy="decompress it with unxz"),
        Kind(id="lzma", what="an lzma file of unknown content", remedy="decompress it with unlzma"),
        Kind(id="zstd", what="a zstd file of unknown content", remedy="decompress it with unzstd"),
        Kind(id="lz4", what="an lz4 file", remedy="decompress it with unlz4"),
        Kind(
            id="zlib",
            what="a zlib stream of unknown content",
            remedy="decompress it with Python: zlib.decompress",
        ),
        Kind(id="text", what="text", remedy=_SAVE),
        Kind(id="folder", what="a folder", remedy="name the files in it"),
        Kind(
            id="unknown",
            what="of an unknown kind",
            remedy=f"for raw numbers, say their type, shape and axes in {A_MAPPING}; else {_SAVE}",
        ),
    )
}

# Kinds by the first bytes; a longer signature stands before a shorter one that begins alike.
_SIGNATURES: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),
    (layout.HDF5_SIGNATURE, "hdf5"),
    (b"\x93NUMPY", "npy"),
    (b"PAR1", "parquet"),
    (b"ARROW1", "arrow"),
    (b"FEA1", "arrow"),
    (b"SQLite format 3\0", "sqlite"),
    (b"version https://git-lfs.github.com/spec/", "git-lfs"),
    (b"/annex/objects/", "git-annex"),
    (b"\x89PNG\r\n\x1a\n", "image"),
    (b"\xff\xd8\xff", "image"),
    (b"GIF8", "image"),
    (b"%PDF-", "pdf"),
    (b"7z\xbc\xaf\x27\x1c", "7z"),
    (b"Rar!\x1a\x07", "rar"),
)
_COMPRESSED: Final[tuple[tuple[bytes, str], ...]] = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bz2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"\x5d\0\0", "lzma"),
)
_TORCH_OLD: Final = re.compile(
    rb"\x80[\x01-\x05](?:\x95.{8})?\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19\.", re.DOTALL
)
# An Arrow stream: a continuation, the length of the schema, and a flatbuffer.
_ARROW_STREAM: Final = re.compile(rb"\xff\xff\xff\xff[^\0].[\0-\x10]\0", re.DOTALL)
_HTML: Final = re.compile(
    rb"\s*(?:<!--.*?-->\s*)*<(?:!doctype html|html|head|body)", re.I | re.DOTALL
)
_XML: Final = re.compile(rb"\s*<(?:\?xml|Error>)")
# What a pickle that is not text begins with: a protocol, or a list, dict, tuple or global.
_BINARY_PICKLE: Final = re.compile(
    rb"\x80[\0-\x0f]|[\]})][qr(.]|\([\]})(KMJXUGNIFLSVTldt]|c[\w.]+\n\w+\n"
)
# What a pickle of protocol 0, which is text, begins with: a mark, a constant or a global.
_TEXT_PICKLE: Final = re.compile(
    rb"\((?:[ldt](?:p\d|[.(])|[(VSIFLNXc\]}])|c[\w.]+\n\w+\n|[IFL]-?[\d.]+L?\n[.p]|[SVP][^\n]*\n[.p]|N\."
)
_SAFETENSORS_HEADER_NBYTES: Final = 100_000_000
_JSON: Final = re.compile(rb"\{\s*[\"}]|\[\s*[\[{\"\-0-9tfn\]]")
_TABLE_LINE: Final = re.compile(rb"[^\n\t,;]+(?:[\t,;][^\n\t,;]*)+")


def identify(path: str | os.PathLike[str]) -> Kind:
    """What a file or folder is.

    Raises
    ------
    FileNotFoundError, PermissionError
        It does not exist, or cannot be read.
    ConversionError
        It is a pipe or a device.
    """
    path = Path(path)
    if stat.S_ISDIR(path.stat().st_mode):
        return KINDS[_kind_of_folder(path)]
    with os.fdopen(open_regular(path, ConversionError), "rb") as file:
        head = file.read(_PACKED_NBYTES)
        kind = _kind_of(head)
        if kind.id in _UNPACKERS:
            # Its first block is longer than what was read.
            kind = _kind_of(head + file.read(_BLOCK_NBYTES))
        if kind.compression is not None:
            return kind
        if kind.id == "hdf5":
            return KINDS[_kind_of_hdf5(file)]
        if kind.id == "zip":
            return KINDS[_kind_of_zip(file, path)]
    return kind


def _kind_of(head: bytes) -> Kind:
    """The kind of a file that begins so."""
    # Before compressors: the length of a header may look like one.
    if _is_safetensors(head):
        return KINDS["safetensors"]
    compression = next((name for magic, name in _COMPRESSED if head.startswith(magic)), None)
    if compression is None and _is_zlib(head):
        compression = "zlib"
    if compression is None:
        return KINDS[_plain_kind(head)]
    inner = _unpacked_head(compression, head)
    if not inner and compression == "lzma":
        # A weak signature: numbers may begin so.
        return KINDS[_plain_kind(head)]
    found = _plain_kind(inner) if inner else "unknown"
    if found == "zip":
        found = _kind_by_names([_first_name(inner)])
    if found in ("unknown", "empty"):
        return KINDS[compression]
    return replace(KINDS[found], compression=compression)


def _plain_kind(head: bytes) -> str:
    """The kind of uncompressed content."""
    if not head:
        return "empty"
    for magic, found in _SIGNATURES:
        if head.startswith(magic):
            return found
    if _TORCH_OLD.match(head):
        return "torch-old"
    if _is_safetensors(head):
        return "safetensors"
    if _ARROW_STREAM.match(head):
        return "arrow"
    if head[257:262] == b"ustar":
        return "tar"
    # HDF5 allows a block of the user's own before its superblock.
    if any(head[at : at + 8] == layout.HDF5_SIGNATURE for at in (512, 1024, 2048, 4096, 8192)):
        return "hdf5"
    text = _as_text(head[:_HEAD_NBYTES])
    if text is not None:
        return _kind_of_text(text, is_whole=len(head) < _HEAD_NBYTES)
    return "pickle" if _BINARY_PICKLE.match(head) else "unknown"


def _is_safetensors(head: bytes) -> bool:
    nbytes = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= nbytes <= _SAFETENSORS_HEADER_NBYTES


def _as_text(head: bytes) -> bytes | None:
    """The head without a byte order mark, if it is text."""
    try:
        # Bytes of a character that is cut off at the end are text, too.
        head.decode("utf-8") if len(head) < _HEAD_NBYTES else head[:-4].decode("utf-8", "strict")
    except UnicodeDecodeError as error:
        if len(head) < _HEAD_NBYTES or error.start < len(head) - 8:
            return None
    if re.search(rb"[\0-\x08\x0e-\x1a\x1c-\x1f\x7f]", head):
        return None
    return head.removeprefix(b"\xef\xbb\xbf")


def _kind_of_text(text: bytes, *, is_whole: bool) -> str:
    if _HTML.match(text):
        return "html"
    if _XML.match(text):
        return "xml"
    if _TEXT_PICKLE.match(text):
        return "pickle"
    stripped = text.lstrip()
    if not stripped:
        return "text"
    if _JSON.match(stripped):
        lines = [line for line in stripped.split(b"\n") if line.strip()]
        # An object a line, the second of which begins like the first; a first line that is longer
        # than what was read may be either.
        if stripped[:1] == b"{" and lines[0].rstrip().endswith(b"}"):
            return "jsonl" if len(lines) > 1 and lines[1].startswith(b"{") else "json"
        return "json" if len(lines) > 1 or is_whole or stripped[:1] == b"[" else "jsonl"
    return "csv" if _TABLE_LINE.match(text) and text.count(b"\n") else "text"


def _is_zlib(head: bytes) -> bool:
    """Whether a zlib stream begins here: two bytes are not enough to tell, so some is inflated."""
    if len(head) < 8 or head[0] != 0x78 or int.from_bytes(head[:2], "big") % 31:
        return False
    return bool(_unpacked_head("zlib", head))


def _unpacked_head(compression: str, head: bytes) -> bytes:
    """The first bytes inside a compressed file; nothing if they cannot be unpacked."""
    unpack = _UNPACKERS.get(compression)
    found = b""
    if unpack is None:
        return found
    try:
        step = unpack()
        # In small pieces: a wrong checksum takes nothing from what is before it, and none
        # expands to much.
        at = 0
        while at < len(head) and len(found) < _HEAD_NBYTES:
            nbytes = 16 if at < _HEAD_NBYTES else 256
            found += step(head[at : at + nbytes], _HEAD_NBYTES - len(found))
            at += nbytes
    except (zlib.error, OSError, EOFError, ValueError, lzma.LZMAError, zstandard.ZstdError):
        pass
    return found


def _zstd() -> Callable[[bytes, int], bytes]:
    # A header may ask for a window of gigabytes.
    step = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW_NBYTES).decompressobj()
    return lambda part, _: step.decompress(part)


_MAX_WINDOW_NBYTES: Final = 128 << 20
_UNPACKERS: Final[dict[str, Callable[[], Callable[[bytes, int], bytes]]]] = {
    "gzip": lambda: zlib.decompressobj(31).decompress,
    "zlib": lambda: zlib.decompressobj().decompress,
    "bz2": lambda: bz2.BZ2Decompressor().decompress,
    "xz": lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, _MAX_WINDOW_NBYTES).decompress,
    "lzma": lambda: lzma.LZMADecompressor(lzma.FORMAT_ALONE, _MAX_WINDOW_NBYTES).decompress,
    "zstd": _zstd,
}


# --- a look inside -------------------------------------------------------------------------------

# In an HDF5 superblock of version 2 or 3, where the header of the root is; that holds attributes.
_ROOT_ADDRESS: Final = struct.Struct("<36xQ")
_ROOT_NBYTES: Final = 64 << 10
# Name, type, extent and value of the attribute 'format'.
_FORMAT: Final = re.compile(rb"format\0.{12}(h5traces[a-z-]*)\0?", re.DOTALL)
_OURS: Final = {
    layout.FORMAT_NAME: "archive",
    layout.SCALES_FORMAT: "scales",
    layout.FEATURES_FORMAT: "features",
}


def _kind_of_hdf5(file: Any) -> str:
    """Which HDF5 file this is, found without HDF5: that is slow, and unsafe in this process."""
    file.seek(0)
    head = file.read(_ROOT_ADDRESS.size)
    if len(head) == _ROOT_ADDRESS.size and head[8] in (2, 3):
        try:
            file.seek(_ROOT_ADDRESS.unpack(head)[0])
        except (OSError, OverflowError, ValueError):
            return "hdf5"
        found = _FORMAT.search(file.read(_ROOT_NBYTES))
        if found is not None:
            return _OURS.get(found[1].decode(), "hdf5")
    return "hdf5"


def _kind_of_zip(file: Any, path: Path) -> str:
    try:
        number = file.fileno()
        nbytes = os.fstat(number).st_size
        names = list(ZipDirectory(lambda at, n: os.pread(number, n, at), nbytes, str(path)))
    except ConversionError:
        # Its reader says what is wrong with it.
        file.seek(0)
        names = [_first_name(file.read(_HEAD_NBYTES))]
    return _kind_by_names(names)


def _first_name(head: bytes) -> str:
    """The name of a zip file's first entry."""
    if len(head) < 30:
        return ""
    nbytes = int.from_bytes(head[26:28], "little")
    return head[30 : 30 + nbytes].decode("utf-8", "replace")


def _kind_by_names(names: Iterable[str]) -> str:
    names = list(names)
    inner = {name.partition("/")[2] for name in names}
    if "constants.pkl" in inner or any(each.startswith("code/") for each in inner):
        return "torchscript"
    if "data.pkl" in inner:
        return "torch"
    if "[Content_Types].xml" in names:
        return "office"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    return "zip"


def _kind_of_folder(path: Path) -> str:
    if (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file():
        return "datasets-folder"
    return "folder"
