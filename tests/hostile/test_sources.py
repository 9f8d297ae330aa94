"""Files of torch.save, safetensors and numpy made to run code or to exhaust memory, disk or time.

Every attack must end in an error of ours within a second and 300 MB, import nothing and write
nothing.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from test_pickles import call, item, named, text

from h5traces.errors import H5TracesError
from h5traces.sources.opening import open_source

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

MAX_SECONDS = 10  # of a processor; what takes longer hangs
MAX_EXTRA_NBYTES = 300 << 20
LARGEST_SHORT = 8192
MILLION = 1_000_000


def read(path: Path) -> list[Any]:
    """Every sample of a file, whose numbers are looked at."""
    with open_source(path) as source:
        return [repr(each)[:100] for each in source]


# --- torch.save -----------------------------------------------------------------------------------


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as file:
        for name, data in entries.items():
            file.writestr(name, data)
    return buffer.getvalue()


def torch_zip(value: bytes, storage: bytes = bytes(64), **entries: bytes) -> bytes:
    """A file of torch.save with that pickled value in its only item."""
    found = {"a/data.pkl": item(value), "a/version": b"3\n", "a/data/0": storage}
    return zipped(found | {f"a/{name}": data for name, data in entries.items()})


def storage(kind: str = "FloatStorage", key: str = "0", numel: int = 16) -> bytes:
    """A persistent id of a storage."""
    number = b"\x8a\x09" + numel.to_bytes(9, "little")
    return b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + number + b"tQ"


def tensor(
    shape: bytes, strides: bytes, pid: bytes | None = None, offset: bytes = b"K\x00"
) -> bytes:
    return call(
        named("torch._utils", "_rebuild_tensor_v2"),
        *(pid or storage(), offset, shape, strides, b"\x89", b"N"),
    )


def sizes(*values: int) -> bytes:
    numbers = b"".join(b"\x8a\x09" + each.to_bytes(9, "little") for each in values)
    return b"(" + numbers + b"t"


def with_directory(data: bytes, *, count: int | None = None, nbytes: int | None = None) -> bytes:
    """A zip file whose end says something else of its directory."""
    found, end = bytearray(data), data.rindex(b"PK\x05\x06")
    if count is not None:
        found[end + 8 : end + 12] = struct.pack("<2H", count, count)
    if nbytes is not None:
        found[end + 12 : end + 16] = struct.pack("<I", nbytes)
    return bytes(found)


def bomb(nbytes: int, numel: int | None = None) -> bytes:
    """An entry that inflates to zeros, as storage of a tensor."""
    pid = storage("ByteStorage", numel=nbytes if numel is None else numel)
    found = {"a/data.pkl": item(tensor(sizes(64), sizes(1), pid)), "a/data/0": bytes(nbytes)}
    return zipped(found, zipfile.ZIP_DEFLATED)


def lying_bomb() -> bytes:
    """An entry that inflates to more than it declares."""
    return bomb(80_000_000, 64).replace(struct.pack("<I", 80_000_000), struct.pack("<I", 64))


def old(value: bytes, keys: bytes = b"\x80\x02].", data: bytes = b"") -> bytes:
    head = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03."
    system = b"\x80\x02}" + text("little_endian") + b"\x88s."
    return head + system + item(value) + keys + data


def legacy_storage(numel: int, key: str = "0") -> bytes:
    number = b"\x8a\x09" + numel.to_bytes(9, "little")
    described = text("storage") + named("torch", "FloatStorage") + text(key) + text("cpu")
    return b"(" + described + number + b"NtQ"


SYSTEM = call(named("os", "system"), text("touch executed.txt"))
ATTACKS_ON_TORCH: dict[str, Callable[[], bytes]] = {
    "os.system": lambda: torch_zip(SYSTEM),
    "os.system, old": lambda: old(SYSTEM),
    "load inside": lambda: torch_zip(call(named("torch", "load"), text("x"))),
    "subclass that calls": lambda: torch_zip(
        call(named("torch._tensor", "_rebuild_from_type_v2"), named("os", "system"), b"N)N")
    ),
    "entry missing": lambda: torch_zip(tensor(sizes(4), sizes(1), storage(key="7"))),
    "path as key": lambda: torch_zip(
        tensor(sizes(4), sizes(1), storage(key="../../../../etc/passwd"))
    ),
    "beyond the storage": lambda: torch_zip(tensor(sizes(17), sizes(1))),
    "offset beyond": lambda: torch_zip(
        tensor(sizes(4), sizes(1), offset=b"\x8a\x09" + (1 << 61).to_bytes(9, "little"))
    ),
    "storage beyond its entry": lambda: torch_zip(
        tensor(sizes(1 << 40), sizes(1), storage(numel=1 << 40))
    ),
    "expanded to terabytes": lambda: torch_zip(tensor(sizes(1 << 20, 1 << 20), sizes(0, 0))),
    "expanded and misaligned": lambda: old(
        tensor(sizes(1 << 20, 1 << 20), sizes(0, 0), legacy_storage(1)),
        b"\x80\x02]" + text("0") + b"a.",
        (1).to_bytes(8, "little") + bytes(4),
    ),
    "shape of 2**200 elements": lambda: torch_zip(tensor(sizes(*[1 << 60] * 4), sizes(0, 0, 0, 0))),
    "many axes": lambda: torch_zip(tensor(sizes(*[1] * 100), sizes(*[1] * 100))),
    "deflated zeros": lambda: bomb(100_000_000),
    "more than declared": lying_bomb,
    "deflated pickle": lambda: zipped(
        {"a/data.pkl": item(b"B" + struct.pack("<I", 90 << 20) + bytes(90 << 20))},
        zipfile.ZIP_DEFLATED,
    ),
    "huge directory": lambda: with_directory(torch_zip(b"N"), nbytes=0x7FFFFFFF),
    "directory elsewhere": lambda: with_directory(torch_zip(b"N"), nbytes=5),
    "more entries": lambda: with_directory(torch_zip(b"N"), count=60_000),
    "no end": lambda: torch_zip(b"N")[:-30],
    "byte order": lambda: torch_zip(tensor(sizes(4), sizes(1)), byteorder=b"x" * 5000),
    "checksum": lambda: torch_zip(tensor(sizes(4), sizes(1)), b"A" * 64).replace(
        b"A" * 64, b"B" * 64
    ),
    "pid is a number": lambda: torch_zip(b"K\x01Q"),
    "pid of another type": lambda: torch_zip(
        b"(" + text("storage") + named("numpy", "ndarray") + text("0") + text("cpu") + b"K\x01tQ"
    ),
    "old, storage of terabytes": lambda: old(
        tensor(sizes(1 << 40), sizes(1), legacy_storage(1 << 40)),
        b"\x80\x02]" + text("0") + b"a.",
        (1 << 40).to_bytes(8, "little"),
    ),
    "old, other keys": lambda: old(tensor(sizes(1), sizes(1), legacy_storage(1))),
    "old, keys are not a list": lambda: old(b"N", b"\x80\x02K\x01."),
    "old, two types": lambda: old(
        b"(" + legacy_storage(1) + legacy_storage(2) + b"t", b"\x80\x02].", b""
    ),
    "old, without end": lambda: old(b"N", b""),
}


# --- safetensors ----------------------------------------------------------------------------------


def safetensors(
    tensors: dict[str, tuple[str, list[int], int]], more: dict[str, Any] | None = None
) -> bytes:
    """A file of tensors, by dtype, shape and bytes."""
    header: dict[str, Any] = dict(more or {})
    end = 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + nbytes]}
        end += nbytes
    return with_header(json.dumps(header).encode(), bytes(end))


def with_header(header: bytes, data: bytes = b"", nbytes: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if nbytes is None else nbytes) + header + data


def entry(begin: int, end: int, shape: list[int]) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


def header_of(entries: dict[str, Any], data: bytes = b"") -> bytes:
    return with_header(json.dumps(entries).encode(), data)


ATTACKS_ON_SAFETENSORS: dict[str, Callable[[], bytes]] = {
    "overlap": lambda: header_of(
        {"hidden_states": entry(0, 4000, [1, 10, 100]), "token_ids": entry(0, 4000, [1000])},
        bytes(4000),
    ),
    "a hundred thousand views": lambda: header_of(
        {f"t{i}": entry(0, 400_000, [100_000]) for i in range(100_000)}, bytes(400_000)
    ),
    "huge offsets": lambda: header_of({"hidden_states": entry(1 << 62, 1 << 63, [1 << 60])}),
    "negative offsets": lambda: header_of({"hidden_states": entry(-8, 0, [2])}),
    "shape of 2**200 elements": lambda: header_of({"hidden_states": entry(0, 4, [1 << 50] * 4)}),
    "empty and huge": lambda: header_of({"hidden_states": entry(0, 0, [1 << 62, 1 << 62, 0])}),
    "header of 90 MB": lambda: with_header(b'{"a":1}', bytes(9), 90_000_000),
    "header of 2**63": lambda: with_header(b"{}", b"", 1 << 63),
    "deep": lambda: with_header(b'{"a":' * MILLION),
    "deep lists": lambda: with_header(b'{"a":' + b"[" * MILLION),
    "many lists": lambda: with_header(b'{"a":[' + b"[]," * 9 * MILLION + b"[]]}"),
    "long number": lambda: with_header(b'{"a":' + b"9" * MILLION + b"}"),
    "many names": lambda: with_header(
        b"{" + b",".join(b'"%d":{}' % i for i in range(800_000)) + b"}"
    ),
    "one name twice": lambda: with_header(b'{"a":{},"a":{}}'),
    "metadata of numbers": lambda: header_of({"__metadata__": {"a": [1]}}),
    "names that backtrack": lambda: header_of(
        {"layer_" * 5000 + "1" * 5000 + "!": entry(0, 4, [1])}, bytes(4)
    ),
    "scales that do not fit": lambda: safetensors(
        {
            "hidden_states": ("F8_E4M3", [3, 2, 4], 24),
            "hidden_states_scales": ("F32", [1, 1, 1, 3], 12),
        }
    ),
}


# --- numpy ----------------------------------------------------------------------------------------


def npy(header: str, data: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\0" + struct.pack("<H", len(header)) + header.encode() + data


def literal(descr: str = "'<f4'", shape: str = "(2, 2, 2)") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}"


ATTACKS_ON_NUMPY: dict[str, Callable[[], bytes]] = {
    "objects": lambda: npy(literal("'|O'"), pickle.dumps(1)),
    "objects in npz": lambda: zipped({"hidden_states.npy": npy(literal("'|O'"), SYSTEM + b".")}),
    "code": lambda: npy("__import__('os').system('touch executed.txt')"),
    "deep": lambda: npy("(" * 9999),
    "long power": lambda: npy(literal(shape="(9**9**9**9,)")),
    "shape of terabytes": lambda: npy(literal(shape=f"({1 << 50}, 1, 1)"), bytes(32)),
    "empty and huge": lambda: npy(literal(shape=f"({1 << 62}, {1 << 62}, 0)")),
    "wide text": lambda: npy(literal("'<U999999999'", "(1,)"), bytes(32)),
    "deflated zeros": lambda: zipped(
        {"hidden_states.npy": npy(literal(shape="(100, 1000, 250)"), bytes(100_000_000))},
        zipfile.ZIP_DEFLATED,
    ),
    "fifty bombs": lambda: zipped(
        {
            f"layers.{i}.npy": npy(literal(shape="(1, 1, 250)"), zlib.compress(b""))
            for i in range(50)
        },
        zipfile.ZIP_DEFLATED,
    ),
    "paths": lambda: zipped({"../../evil.npy": npy(literal(), bytes(32)), "/tmp/evil.npy": b""}),
}
ATTACKS = {
    f"{kind}, {name}": build
    for kind, attacks in (
        ("torch", ATTACKS_ON_TORCH),
        ("safetensors", ATTACKS_ON_SAFETENSORS),
        ("numpy", ATTACKS_ON_NUMPY),
    )
    for name, build in attacks.items()
}


def short_attacks(kind: str) -> Iterator[bytes]:
    """The attacks on a kind that a fuzzer may begin with."""
    for name, build in ATTACKS.items():
        if name.startswith(kind) and len(data := build()) <= LARGEST_SHORT:
            yield data


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_end_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "source"
    path.write_bytes(ATTACKS[name]())
    start = time.process_time()
    with pytest.raises(H5TracesError) as caught:
        read(path)
    assert time.process_time() - start < MAX_SECONDS
    assert str(path) in str(caught.value)
    assert list(tmp_path.iterdir()) == [path]


def test_nothing_is_imported_and_memory_stays_low(tmp_path: Path) -> None:
    """All attacks one after the other in a fresh process."""
    script = """
        import json, resource, sys, time
        sys.path.insert(0, sys.argv[1])
        from pathlib import Path
        import test_sources

        unit = 1 if sys.platform == "darwin" else 1024
        peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        path = Path("source")
        # The readers are loaded on first use.
        for honest in (b"\\x93NUMPY", b"PK\\x03\\x04", test_sources.safetensors({}),
                       test_sources.torch_zip(b"N"), test_sources.old(b"N")):
            path.write_bytes(honest)
            try:
                test_sources.read(path)
            except test_sources.H5TracesError:
                pass
        modules = set(sys.modules)
        files = Path(sys.argv[2])
        before, slowest = peak(), 0
        for each in sorted(files.iterdir()):
            start = time.process_time()
            try:
                test_sources.read(each)
            except test_sources.H5TracesError:
                pass
            else:
                raise SystemExit(each.name)
            slowest = max(slowest, time.process_time() - start)
        print(json.dumps({
            "total": peak() - before,
            "slowest": slowest,
            "modules": sorted(set(sys.modules) - modules),
            "all": [name for name in ("torch", "safetensors") if name in sys.modules],
        }))
    """
    files = tmp_path / "files"
    files.mkdir()
    for number, build in enumerate(ATTACKS.values()):
        (files / f"{number:03d}").write_bytes(build())
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), str(Path(__file__).parent), str(files)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert found["modules"] == []
    assert found["all"] == []
    assert found["total"] < MAX_EXTRA_NBYTES, found
    assert found["slowest"] < MAX_SECONDS, found
    assert not (tmp_path / "executed.txt").exists()
