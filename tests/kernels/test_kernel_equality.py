"""Every compiled kernel gives what Python gives, on arbitrary bytes."""

from __future__ import annotations

import dataclasses
import functools
import os
import subprocess
import sys
import zlib
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import pytest
import xxhash
from hypothesis import given, settings
from hypothesis import strategies as st

from h5traces.format import dtypes
from h5traces.format.dtypes import FLOAT_TYPES, TypedArray, cast_for_storage, cast_values
from h5traces.format.native import NATIVE
from h5traces.precision import attention, channel_steps
from h5traces.precision.scales import ChannelScale
from h5traces.storage import arrays, deflate
from h5traces.storage.arrays import Storing, store_arrays
from h5traces.storage.hdf5 import indexes

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(NATIVE is None, reason="the kernels are not compiled")

PLAIN = dataclasses.replace(deflate.ENGINES, native=None)
KINDS = ("float16", "bfloat16", "float32")


def without(module: Any, call: Callable[[], Any]) -> Any:
    """What Python gives."""
    with mock.patch.object(module, "NATIVE", None):
        return call()


@st.composite
def payloads(draw: st.DrawFn) -> bytes:
    """Bytes with runs, repeats and noise, up to some hundred thousand."""
    parts = st.one_of(
        st.binary(max_size=200),
        st.builds(
            lambda byte, count: bytes([byte]) * count, st.integers(0, 255), st.integers(0, 900)
        ),
        st.builds(lambda text, count: text * count, st.binary(max_size=30), st.integers(0, 90)),
        st.builds(
            lambda seed, count, top: (
                np.random.default_rng(seed).integers(0, top, count).astype(np.uint8).tobytes()
            ),
            *(st.integers(0, 2**32), st.integers(0, 90_000), st.integers(1, 256)),
        ),
    )
    return b"".join(draw(st.lists(parts, max_size=5)))


def check_checksums(data: Any) -> None:
    """Those of a chunk: zlib compares Adler-32 of its content, xxhash that of its stored bytes."""
    ((stored, checksum, *_),) = NATIVE.store(((data, 1, b"", -1),))
    if stored is not None:
        assert checksum == xxhash.xxh3_64_intdigest(stored)
        assert zlib.decompress(stored) == data


@given(data=payloads(), start=st.integers(0, 40))
@settings(max_examples=200, deadline=None)
def test_checksums(data: bytes, start: int) -> None:
    check_checksums(memoryview(data)[min(start, len(data)) :])


def digest(head: bytes, data: bytes) -> bytes | None:
    """What the kernels find of `head` and `data`."""
    ((_, _, found, *_),) = NATIVE.store(((data, 0, head, -1),))
    return found


@given(data=payloads(), head=st.binary(max_size=600))
@settings(max_examples=200, deadline=None)
def test_digests(data: bytes, head: bytes) -> None:
    is_known = 0 < len(head) <= 512 and len(head) + len(data) > 240
    assert digest(head, data) == (xxhash.xxh3_128_digest(head + data) if is_known else None)
    assert NATIVE.lookup3([head, data[:5000]]) == [
        indexes.checksum(head),
        indexes.checksum(data[:5000]),
    ]


@pytest.mark.parametrize("nbytes", range(520))
def test_checksums_of_every_short_length(nbytes: int) -> None:
    data = np.random.default_rng(nbytes).bytes(nbytes)
    check_checksums(data)
    check_checksums(bytes(nbytes))
    assert NATIVE.lookup3([data]) == [indexes.checksum(data)]
    # Past the blocks of 1,024 bytes in which data are taken.
    more = data + bytes(1100)
    assert digest(b"float16[3]\n", more) == xxhash.xxh3_128_digest(b"float16[3]\n" + more)


@pytest.mark.parametrize("byte", [0, 255])
def test_checksums_of_megabytes(byte: int) -> None:
    check_checksums(bytes([byte]) * 3_000_001)
    check_checksums(np.random.default_rng(byte).bytes(3_000_001))


@given(data=payloads(), itemsize=st.integers(1, 20))
@settings(deadline=None)
def test_shuffles(data: bytes, itemsize: int) -> None:
    raw = np.frombuffer(data, np.uint8)
    ((stored, *_),) = NATIVE.store(((raw, itemsize, b"", -1),))
    if stored is not None:
        assert zlib.decompress(stored) == deflate.shuffle(raw, itemsize).tobytes()
    whole = raw[: len(data) // itemsize * itemsize]
    if whole.size:
        back = bytearray(whole.size)
        assert NATIVE.decode(zlib.compress(deflate.shuffle(whole, itemsize), 1), back, itemsize)
        assert bytes(back) == whole.tobytes()


def outcome(stored: bytes, nbytes: int, itemsize: int, engines: Any) -> bytes | str:
    """What decoding gives, or the message of its error."""
    out = bytearray(nbytes)
    with mock.patch.object(deflate, "ENGINES", engines):
        try:
            deflate.decode(stored, out, itemsize=itemsize)
        except ValueError as error:
            return str(error)
    return bytes(out)


@given(data=payloads(), itemsize=st.sampled_from([1, 2, 3, 4, 8]))
@settings(max_examples=150, deadline=None)
def test_chunks_of_either_encoder_come_back_from_either_decoder(data: bytes, itemsize: int) -> None:
    shuffled = deflate.shuffle(np.frombuffer(data, np.uint8), itemsize).tobytes()
    for engines in (deflate.ENGINES, PLAIN):
        with mock.patch.object(deflate, "ENGINES", engines):
            stored = deflate.encode(data, itemsize=itemsize)
        assert zlib.decompress(stored) == shuffled
        assert outcome(stored, len(data), itemsize, PLAIN) == data
        if len(data) and not len(data) % itemsize:
            out = bytearray(len(data))
            assert NATIVE.decode(stored, out, itemsize)
            assert bytes(out) == data


def mixture(rng: np.random.Generator) -> bytes:
    """As `payloads`, from numbers that are the same in every run."""

    def part() -> bytes:
        match rng.integers(4):
            case 0:
                return rng.bytes(rng.integers(200))
            case 1:
                return rng.bytes(1) * int(rng.integers(900))
            case 2:
                return rng.bytes(rng.integers(30)) * int(rng.integers(90))
        noise = rng.integers(0, rng.integers(1, 257), rng.integers(90_000))
        return noise.astype(np.uint8).tobytes()

    return b"".join(part() for _ in range(rng.integers(1, 6)))


def test_compiled_chunks_are_as_small() -> None:
    """Both plan from samples, so either may win; there are mixtures where one loses much."""
    rng = np.random.default_rng(0)
    compiled = plain = 0
    for _ in range(300):
        data, itemsize = mixture(rng), int(rng.choice([1, 2, 4, 8]))
        stored = len(deflate.encode(data, itemsize=itemsize))
        with mock.patch.object(deflate, "ENGINES", PLAIN):
            expected = len(deflate.encode(data, itemsize=itemsize))
        # The kernels give each plane a block, of nine bytes where it holds zeros only.
        assert stored <= 1.1 * expected + 64 + 9 * itemsize
        compiled, plain = compiled + stored, plain + expected
    assert compiled <= 1.002 * plain


@given(
    data=payloads(),
    level=st.integers(0, 9),
    strategy=st.integers(0, 4),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), max_size=3),
    cut=st.integers(0, 12),
    more=st.integers(-2, 2),
)
@settings(max_examples=300, deadline=None)
def test_both_decoders_accept_and_reject_alike(
    data: bytes, level: int, strategy: int, changes: list[tuple[int, int]], cut: int, more: int
) -> None:
    compressor = zlib.compressobj(level, zlib.DEFLATED, 15, 9, strategy)
    stored = bytearray(compressor.compress(data) + compressor.flush())
    for place, byte in changes:
        stored[place % len(stored)] = byte
    damaged = bytes(stored[: len(stored) - cut]) if cut < 9 else bytes(stored)
    nbytes = max(0, len(data) + (more if abs(more) == 2 else 0))
    found = outcome(damaged, nbytes, 1, deflate.ENGINES)
    assert found == outcome(damaged, nbytes, 1, PLAIN)
    if found == data and nbytes:
        assert NATIVE.decode(damaged, bytearray(nbytes), 1)


def typed(bits: np.ndarray[Any, Any], dtype: Any) -> TypedArray:
    carrier = dtypes.CARRIERS[dtype]
    return TypedArray(bits.astype(f"<u{carrier.itemsize}").view(carrier), dtype)


@st.composite
def floats(draw: st.DrawFn) -> TypedArray:
    """Any bits, or numbers of some size, of any type and length."""
    dtype = draw(st.sampled_from(FLOAT_TYPES))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    count, exponent = draw(st.integers(0, 700)), draw(st.integers(-50, 20))
    if draw(st.booleans()):
        return typed(rng.integers(0, 2**63, count), dtype)
    numbers = (rng.normal(0, 1, count) * 2.0**exponent).astype(np.float32)
    numbers[rng.random(count) < 0.1] = draw(st.sampled_from([0.0, -0.0, np.inf, 65519.99, 65520.0]))
    return cast_values(TypedArray(numbers, "float32"), dtype)


def same(one: TypedArray, other: TypedArray) -> bool:
    return one.dtype == other.dtype and dtypes.same_bits(one.values, other.values)


@given(array=floats(), dtype=st.sampled_from(FLOAT_TYPES))
@settings(max_examples=300, deadline=None)
def test_casts(array: TypedArray, dtype: Any) -> None:
    assert same(cast_values(array, dtype), without(dtypes, lambda: cast_values(array, dtype)))
    assert dtypes.count_not_finite(array) == without(dtypes, lambda: dtypes.count_not_finite(array))


@given(
    array=floats(),
    policy=st.sampled_from(dtypes.DTYPE_POLICIES),
    on_overflow=st.sampled_from(["float32", "clip"]),
)
@settings(max_examples=400, deadline=None)
def test_counted_casts(array: TypedArray, policy: Any, on_overflow: Any) -> None:
    def run() -> Any:
        return cast_for_storage(array, policy=policy, on_overflow=on_overflow)

    found, expected = run(), without(dtypes, run)
    assert same(found.array, expected.array)
    assert dataclasses.replace(found, array=expected.array) == expected


def test_every_float16_and_its_neighbours() -> None:
    halves = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    wide = halves[np.isfinite(halves)].astype(np.float32)
    # The halfway points of rounding, and the floats beside them.
    middle = (wide[:-1].astype(np.float64) + wide[1:]) / 2
    near = middle.astype(np.float32)
    values = np.concatenate((wide, near, np.nextafter(near, -np.inf), np.nextafter(near, np.inf)))
    array = TypedArray(values.astype(np.float32), "float32")
    assert same(
        cast_values(array, "float16"), without(dtypes, lambda: cast_values(array, "float16"))
    )
    both = TypedArray(halves, "float16")
    for dtype in KINDS:
        expected = without(dtypes, lambda dtype=dtype: cast_values(both, dtype))
        assert same(cast_values(both, dtype), expected)


@st.composite
def states(draw: st.DrawFn) -> tuple[np.ndarray[Any, Any], ChannelScale, float]:
    """Hidden states with values far off, infinite and NaN, a scale, and a step."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    rows, width = draw(st.integers(0, 9)), draw(st.integers(1, 600))
    dtype = draw(st.sampled_from(["<f2", "<f4"]))
    size = draw(st.sampled_from([1e-6, 1.0, 3e4]))
    values = (rng.standard_t(2, (rows, width)) * size).astype(dtype)
    odd = draw(st.sampled_from([np.nan, np.inf, -np.inf, 0.0, 65504.0]))
    values[rng.random(values.shape) < draw(st.sampled_from([0.0, 0.01]))] = odd
    sigma = (np.exp(rng.normal(0, 1, width)) * size).astype(np.float32)
    step = draw(st.sampled_from([0.02, 0.05, 0.25, 1.0]))
    offset = (rng.normal(0, 1, width) * size).astype(np.float32)
    return values, ChannelScale((sigma * np.float32(step)), offset, sigma), step


@given(case=states())
@settings(max_examples=150, deadline=None)
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
def test_steps(case: tuple[np.ndarray[Any, Any], ChannelScale, float]) -> None:
    values, scale, step = case

    def encoded() -> Any:
        return channel_steps.to_steps(values, scale, step)

    found, expected = encoded(), without(channel_steps, encoded)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one, other)
    form = channel_steps.StepFormat.of(step)
    for as_half in (False, True):

        def decoded(*, as_half: bool = as_half) -> Any:
            numbers = found[0], scale, form.zero_point, form.spacing
            return channel_steps.from_steps(*numbers, as_half=as_half)

        assert decoded().tobytes() == without(channel_steps, decoded).tobytes()


@given(array=floats(), levels=st.integers(1, 255))
@settings(deadline=None)
def test_levels(array: TypedArray, levels: int) -> None:
    with np.errstate(all="ignore"):
        is_taken = array.dtype in ("float16", "float32")
        values = array.values if is_taken else array.values.astype("<f4")
        found = attention.to_levels(values)
        expected = without(attention, lambda: attention.to_levels(values))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)
    for as_half in (False, True):

        def decoded(*, as_half: bool = as_half) -> Any:
            return attention.from_levels(found[0], levels, as_half=as_half)

        assert decoded().tobytes() == without(attention, decoded).tobytes()


@given(
    found=st.lists(floats(), max_size=4),
    codec=st.sampled_from(["gzip", "deflate", "zstd", None]),
    target=st.sampled_from([64, 4096]),
    looks_back=st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_arrays_are_stored_alike(
    found: list[TypedArray], codec: Any, target: int, *, looks_back: bool
) -> None:
    def run() -> Any:
        given = [Storing(each.values, each.dtype, codec, each) for each in found]
        # Counted are not those that are stored.
        given += [Storing(each.values, each.dtype, codec, each) for each in found[::-1]]
        given += [Storing(np.array([b"a", b"bc"]), "text:2", codec)]
        return store_arrays(given, looks_back=looks_back)

    shape = functools.partial(arrays.chunk_shape, target_nbytes=target)
    with mock.patch.object(arrays, "chunk_shape", shape):
        one, other = run(), without(arrays, run)
    for compiled, plain in zip(one, other, strict=True):
        assert compiled._replace(encoded=None) == plain._replace(encoded=None)
        assert compiled.comes_back is (True if looks_back and codec is not None else None)
        if codec is not None:
            # `encode_array` has the compiled encoder, too.
            assert tuple(map(bytes, compiled.encoded.chunks)) == plain.encoded.chunks
            assert compiled.encoded.checksums == plain.encoded.checksums


# Prints a hash of what each kernel gives for the same data.
SCRIPT = """
import numpy as np, xxhash
from h5traces.format.native import NATIVE
rng = np.random.default_rng(5)
print(NATIVE.features())
for count in (1, 7, 8, 300, 5000):
    bits = rng.integers(0, 2**32, count, np.uint32)
    floats = (rng.normal(0, 1, count) * 10.0 ** rng.integers(-9, 6, count)).astype(np.float32)
    found = list(NATIVE.store(((bits, 0, b"head", 2), (bits, 1, b"", -1), (bits, 4, b"", 2))))
    for itemsize in (1, 2, 4, 8):
        back = bytearray(4 * count)
        ((stored, *facts),) = NATIVE.store(((floats, itemsize, b"head", 2),))
        found += [stored, tuple(facts)]
        if not len(back) % itemsize:
            found += [NATIVE.decode(stored, back, itemsize), back]
    for kind in (0, 1):
        narrow, wide = np.empty(count, np.uint16), np.empty(count, np.float32)
        found += [NATIVE.cast(floats, 2, narrow, kind), narrow]
        found += [NATIVE.cast(narrow, kind, wide, 2), wide]
    scale = np.abs(rng.normal(0, 1, (5, count))).astype("<f4") + np.float32(0.1)
    numbers, beyond = np.empty(count, np.uint16), np.zeros(count, np.int64)
    found += [NATIVE.to_steps(floats, 2, scale, 2000.0, 16, 32768, numbers, 2, beyond)]
    NATIVE.from_steps(numbers, 2, scale[:2].copy(), 32768, 1, narrow)
    found += [numbers, beyond, narrow]
    for each in found:
        is_number = isinstance(each, (int, tuple))
        print(xxhash.xxh3_64_hexdigest(str(each).encode() if is_number else bytes(each)))
"""


def test_processors_without_wide_registers_give_the_same() -> None:
    outputs = {}
    for mode in ("1", "plain"):
        command = [sys.executable, "-c", SCRIPT]
        environment = os.environ | {"H5TRACES_KERNELS": mode}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
        features, _, outputs[mode] = done.stdout.partition("\n")
        assert mode != "plain" or features != "AVX2"
    assert outputs["plain"] == outputs["1"]
    assert len(outputs["1"].split()) > 100


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("cast", (b"abcd", 2, bytearray(4), 0)),
        ("cast", (b"abcd", 3, bytearray(2), 0)),
        ("to_steps", (bytes(8), 0, bytes(60), 1.0, 1, 0, bytearray(3), 1, bytearray(8))),
        ("to_steps", (bytes(8), 0, b"", 1.0, 1, 0, bytearray(4), 1, bytearray(8))),
        ("from_steps", (bytes(4), 1, b"", 0, 1, bytearray(8))),
        ("from_steps", (bytes(4), 1, bytes(8), 0, 1, bytearray(7))),
        ("to_levels", (bytes(4), bytes(100), bytearray(2))),
        ("take", (bytes(4), bytes(512), bytearray(9))),
        ("store", (((b"abcd", 2, b"", 3),),)),
        ("run_plan", (-1, b"", bytes(79), bytearray(0), b"", bytearray(1), 1)),
    ],
)
def test_buffers_of_wrong_sizes_are_refused(name: str, arguments: tuple[Any, ...]) -> None:
    with pytest.raises(ValueError, match=r"buffer|itemsize|kind|plan|table"):
        getattr(NATIVE, name)(*arguments)
