"""Sizes against every plain alternative, damage that must never pass, missing libraries."""

from __future__ import annotations

import dataclasses
import tracemalloc
import zlib

import numpy as np
import pytest

from h5traces.storage import deflate
from h5traces.storage import deflate as engines_module
from h5traces.storage import deflate as planes
from h5traces.storage.deflate import Engines

INSTALLED = Engines.installed()
ENGINES = {
    "installed": INSTALLED,
    "without kernels": dataclasses.replace(INSTALLED, native=None),
    "without isal": dataclasses.replace(INSTALLED, isal_zlib=None, igzip_lib=None, native=None),
    "without zlib-ng": dataclasses.replace(INSTALLED, zlib_ng=None, native=None),
    "zlib only": Engines(None, None, None),
}
ALL_INSTALLED = bool(INSTALLED.isal_zlib and INSTALLED.zlib_ng)


@pytest.fixture(params=ENGINES)
def engines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Engines:
    monkeypatch.setattr(deflate, "ENGINES", ENGINES[request.param])
    return ENGINES[request.param]


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x8000) & np.uint32(0xFFFF0000)).view(np.float32)


def causal_attentions(num_heads: int, seq_len: int) -> np.ndarray:
    rng = np.random.default_rng(3)
    scores = rng.standard_normal((num_heads, seq_len, seq_len)) * rng.uniform(
        0.5, 3, (num_heads, 1, 1)
    )
    scores[:, :, 0] += rng.uniform(0, 5, (num_heads, 1))
    weights = np.tril(np.exp(scores))
    return weights / weights.sum(axis=-1, keepdims=True)


def families() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(4)
    hidden = rng.standard_t(5, (43, 2048)) * np.exp(rng.normal(0, 0.4, 2048))
    rows = rng.standard_normal((12, 4096)).astype(np.float16)
    words = [bytes(rng.integers(97, 123, rng.integers(2, 9), np.uint8)) for _ in range(400)]
    text = b" ".join(words[i] for i in rng.zipf(1.3, 40_000) % 400)
    return {
        "random bytes": rng.integers(0, 256, 300_001, np.uint8),
        "zeros": np.zeros(500_000, np.float16),
        "float16 normal": rng.standard_normal((60, 2048)).astype(np.float16),
        "float16 hidden": hidden.astype(np.float16),
        "bfloat16-born hidden": to_bfloat16(hidden).astype(np.float16),
        "float32 hidden": hidden.astype(np.float32),
        "float16 held in float32": hidden.astype(np.float16).astype(np.float32),
        "rows of many scales": (hidden * np.exp(rng.normal(0, 2, (43, 1)))).astype(np.float16),
        "repeated rows": rows[rng.integers(0, 12, 40)],
        "attentions, 20 tokens": causal_attentions(32, 20).astype(np.float16),
        "small hidden": hidden[:29, :128].astype(np.float16),
        "small repeated rows": hidden[[0, 1, 2, 3] * 6, :128].astype(np.float16),
        "small attentions": causal_attentions(8, 29).astype(np.float16),
        "attentions, 43 tokens": causal_attentions(32, 43).astype(np.float16),
        "attentions, 100 tokens": causal_attentions(32, 100).astype(np.float16),
        "attentions, 200 tokens": causal_attentions(8, 200).astype(np.float16),
        "bfloat16-born attentions": to_bfloat16(causal_attentions(32, 43)).astype(np.float16),
        "half zero": (rng.standard_normal((40, 2048)) * rng.integers(0, 2, (40, 2048))).astype(
            "<f2"
        ),
        "sparse": (rng.standard_normal((40, 2048)) * (rng.random((40, 2048)) > 0.9)).astype("<f2"),
        "counting": np.arange(50_000),
        "random walk": np.cumsum(rng.integers(-3, 4, 50_000)).astype(np.int32),
        "small integers": rng.integers(0, 7, 100_000).astype(np.int32),
        "bits": rng.integers(0, 2, 100_000).astype(np.uint8),
        "tokens, 43": rng.integers(0, 32_000, 43),
        "tokens, 2000": rng.integers(0, 32_000, 2000),
        "text": np.frombuffer(text, np.uint8),
        "text, 600 bytes": np.frombuffer(text[:600], np.uint8),
        "text, 5000 bytes": np.frombuffer(text[:5000], np.uint8),
        "one value": np.ones(1),
    }


def raw_deflate(library, level: int, strategy: int, data: bytes) -> bytes:
    compressor = library.compressobj(level, zlib.DEFLATED, -15, 8, strategy)
    return compressor.compress(data) + compressor.flush()


def candidate_sizes(shuffled: bytes, itemsize: int) -> dict[str, int]:
    """Sizes of one stream over all planes, and of every plane by itself, with each setting."""
    settings = {"zlib 6": (zlib, 6, 0), "huffman": (zlib, 1, zlib.Z_HUFFMAN_ONLY)}
    settings["runs"] = (zlib, 1, zlib.Z_RLE)
    if ALL_INSTALLED:
        settings["zlib-ng 6"] = (INSTALLED.zlib_ng, 6, 0)
        settings |= {f"isal {level}": (INSTALLED.isal_zlib, level, 0) for level in range(4)}
    count = len(shuffled) // itemsize
    by_plane = [shuffled[i * count : (i + 1) * count] for i in range(itemsize)]
    sizes = {"raw": len(shuffled) + len(shuffled) // 10_000}
    for name, setting in settings.items():
        sizes[name] = len(raw_deflate(*setting, shuffled))
        sizes[f"{name}, by plane"] = sum(len(raw_deflate(*setting, plane)) for plane in by_plane)
    return sizes


BOTH = {"installed": INSTALLED, "without kernels": ENGINES["without kernels"]}


@pytest.mark.parametrize("engines", BOTH, indirect=True)
@pytest.mark.parametrize("name", families())
def test_no_plain_alternative_is_smaller_by_more_than_one_per_cent(
    name: str, engines: Engines
) -> None:
    values = families()[name]
    stored = deflate.encode(values, itemsize=values.itemsize)
    sizes = candidate_sizes(zlib.decompress(stored), values.itemsize)
    best = min(sizes, key=sizes.__getitem__)
    # 24 bytes: header, checksum, and the flush between planes, which candidates do without.
    assert len(stored) <= 1.01 * sizes[best] + 24, f"{best} needs {sizes[best]}"


@pytest.mark.parametrize("name", families())
def test_without_libraries_zlib_alone_stays_as_small(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = families()[name]
    monkeypatch.setattr(deflate, "ENGINES", ENGINES["zlib only"])
    stored = deflate.encode(values, itemsize=values.itemsize)
    shuffled = zlib.decompress(stored)
    sizes = candidate_sizes(shuffled, values.itemsize)
    plain = [size for name, size in sizes.items() if not name.startswith(("isal", "zlib-ng"))]
    assert len(stored) <= 1.01 * min(plain) + 24


@pytest.mark.parametrize("name", ["float16 normal", "float16 hidden"])
def test_hidden_states_are_within_one_per_cent_of_the_entropy(name: str) -> None:
    values = families()[name]
    stored = deflate.encode(values, itemsize=2)
    low, high = planes.plane_view(np.frombuffer(zlib.decompress(stored), np.uint8), 2)
    assert len(stored) <= 1.01 * (entropy_nbytes(low) + entropy_nbytes(high))


def entropy_nbytes(plane: np.ndarray) -> float:
    counts = np.bincount(plane, minlength=256)
    shares = counts[counts > 0] / plane.size
    return float(-(shares * np.log2(shares)).sum() * plane.size / 8)


@pytest.mark.parametrize("itemsize", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("nbytes", [0, 1, 7, 100, 8191, 65_535, 65_536, 1_000_001])
def test_noise_costs_no_more_than_stored_blocks(
    nbytes: int, itemsize: int, engines: Engines
) -> None:
    raw = np.random.default_rng(nbytes).bytes(nbytes)
    stored = deflate.encode(raw, itemsize=itemsize)
    assert len(stored) <= nbytes + 6 + 5 * (nbytes // 65_535 + itemsize)


def test_half_noise_half_zeros_in_one_plane_is_coded_as_both(engines: Engines) -> None:
    raw = np.random.default_rng(5).bytes(200_000) + bytes(200_000)
    assert len(deflate.encode(raw, itemsize=1)) < 202_000


def test_all_engines_agree_on_the_bytes(engines: Engines) -> None:
    values = causal_attentions(4, 43).astype(np.float16)
    stored = deflate.encode(values, itemsize=2)
    low_first = values.view(np.uint8).reshape(-1, 2).T.tobytes()
    assert zlib.decompress(stored) == low_first


def test_buffers_of_any_kind_are_taken() -> None:
    values = np.arange(600, dtype="<f4").reshape(20, 30)
    stored = deflate.encode(values, itemsize=4)
    assert stored == deflate.encode(memoryview(values.tobytes()), itemsize=4)
    out = np.empty_like(values)
    deflate.decode(memoryview(stored), out, itemsize=4)
    np.testing.assert_array_equal(out, values)
    unaligned = memoryview(bytearray(values.nbytes + 1))[1:]
    deflate.decode(bytearray(stored), unaligned, itemsize=4)
    assert unaligned == values.tobytes()


def test_arrays_without_elements_are_taken() -> None:
    empty = np.empty((0, 5), np.float16)
    deflate.decode(deflate.encode(empty, itemsize=2), empty.copy(), itemsize=2)


def test_misuse_is_reported() -> None:
    values = np.zeros((4, 6), np.float16)
    with pytest.raises(ValueError, match="itemsize is 0"):
        deflate.encode(values, itemsize=0)
    with pytest.raises(ValueError, match="not contiguous"):
        deflate.encode(values.T, itemsize=2)
    with pytest.raises(ValueError, match="read-only"):
        deflate.decode(deflate.encode(values, itemsize=2), bytes(48), itemsize=2)


SAMPLES = {
    "noise and huffman": families()["float16 hidden"][:6],
    "runs": causal_attentions(8, 30).astype(np.float16),
    "text": families()["text"][:30_000],
    "tokens": families()["tokens, 43"],
}


@pytest.fixture(params=SAMPLES.values(), ids=SAMPLES)
def sample(request: pytest.FixtureRequest) -> np.ndarray:
    return request.param


def decode_into(stored: bytes, sample: np.ndarray) -> np.ndarray:
    out = np.full(sample.nbytes, 0xA5, np.uint8)
    try:
        deflate.decode(stored, out, itemsize=sample.itemsize)
    except ValueError:
        assert (out == 0xA5).all(), "a failed decode has written to the output"
        raise
    return out


def test_every_truncation_is_refused(sample: np.ndarray, engines: Engines) -> None:
    stored = deflate.encode(sample, itemsize=sample.itemsize)
    lengths = {*range(12), *range(len(stored) - 12, len(stored)), *range(0, len(stored), 397)}
    for length in lengths:
        with pytest.raises(ValueError, match="zlib stream"):
            decode_into(stored[:length], sample)


def test_flipped_bits_never_give_other_numbers(sample: np.ndarray, engines: Engines) -> None:
    stored = deflate.encode(sample, itemsize=sample.itemsize)
    rng = np.random.default_rng(6)
    positions = [*range(8 * 20), *rng.integers(0, 8 * len(stored), 300)]
    refused = 0
    for position in positions:
        damaged = bytearray(stored)
        damaged[position // 8] ^= 1 << position % 8
        try:
            out = decode_into(damaged, sample)
        except ValueError:
            refused += 1
        else:
            assert out.tobytes() == sample.tobytes()
    assert refused > 0.95 * len(positions)


def test_a_wrong_checksum_is_refused(sample: np.ndarray, engines: Engines) -> None:
    stored = deflate.encode(sample, itemsize=sample.itemsize)
    for index in range(-4, 0):
        damaged = bytearray(stored)
        damaged[index] ^= 0x10
        with pytest.raises(ValueError, match="not an intact zlib stream"):
            decode_into(damaged, sample)


@pytest.mark.parametrize("stray", [b"\0", b"stray", bytes(10_000)])
def test_bytes_behind_the_stream_are_refused(
    sample: np.ndarray, stray: bytes, engines: Engines
) -> None:
    stored = deflate.encode(sample, itemsize=sample.itemsize)
    with pytest.raises(ValueError, match=f"{len(stray)} stray bytes follow"):
        decode_into(stored + stray, sample)


@pytest.mark.parametrize(
    ("difference", "message"), [(-1, "more than the expected"), (-2, "more"), (1, "expected")]
)
def test_a_chunk_of_another_size_is_refused(
    sample: np.ndarray, difference: int, message: str, engines: Engines
) -> None:
    stored = deflate.encode(sample, itemsize=sample.itemsize)
    out = np.zeros(sample.nbytes + difference, np.uint8)
    with pytest.raises(ValueError, match=message):
        deflate.decode(stored, out, itemsize=sample.itemsize)
    assert not out.any()


def test_a_chunk_for_an_empty_output_is_refused(sample: np.ndarray, engines: Engines) -> None:
    stored = deflate.encode(sample, itemsize=sample.itemsize)
    with pytest.raises(ValueError, match="more than the expected 0 bytes"):
        deflate.decode(stored, bytearray(), itemsize=sample.itemsize)


def test_a_bomb_is_not_inflated(engines: Engines) -> None:
    bomb = zlib.compress(bytes(200_000_000), 9)
    out = bytearray(1000)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="more than the expected 1000 bytes"):
            deflate.decode(bomb, out, itemsize=2)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2_000_000


@pytest.mark.parametrize("garbage", [b"", b"\x1f\x8b\x08\x00", b"PK\x03\x04" * 9, bytes(50)])
def test_what_is_no_zlib_stream_is_refused(garbage: bytes, engines: Engines) -> None:
    with pytest.raises(ValueError, match="zlib stream"):
        deflate.decode(garbage, bytearray(100), itemsize=2)


def test_missing_libraries_are_noticed_in_one_place(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_module(name: str) -> None:
        raise ImportError(name)

    monkeypatch.setattr(engines_module, "import_module", no_module)
    monkeypatch.setattr(engines_module, "NATIVE", None)
    assert Engines.installed() == Engines(None, None, None)


def test_repeats_are_seen_at_odd_distances_and_not_in_noise() -> None:
    rng = np.random.default_rng(7)
    assert planes.repeats(rng.integers(0, 256, 100_000, np.uint8), 7) == 0
    assert planes.repeats(np.tile(rng.integers(0, 256, 4999, np.uint8), 20), 7) > 0.9


@pytest.mark.parametrize("size", range(12))
def test_tiny_planes_are_looked_at(size: int) -> None:
    assert (planes.repeats(np.full(size, 7, np.uint8), 7) > 0) == (size > 9)
    if size:
        (facts,) = planes.survey(np.zeros((1, size), np.uint8))
        assert facts.entropy == facts.variation == 0


def test_a_survey_knows_noise_activations_and_masked_attentions() -> None:
    values = families()["float16 hidden"]
    both = planes.plane_view(planes.shuffle(values.view(np.uint8).ravel(), 2), 2)
    (low, facts), high = planes.survey(both), both[1]
    assert low.noise
    assert facts.entropy == pytest.approx(entropy_nbytes(high) * 8 / high.size, abs=0.1)
    assert facts.pairs == pytest.approx(facts.collision, abs=0.01)
    masked = causal_attentions(32, 43).astype(np.float16)
    both = planes.plane_view(planes.shuffle(masked.view(np.uint8).ravel(), 2), 2)
    for facts in planes.survey(both):
        assert facts.pairs > facts.collision + 0.1
        assert facts.zeros > 0.4


@pytest.mark.parametrize("engines", ["installed", "zlib only"])
def test_repeats_behind_noise_and_in_planes_of_some_order_are_found(
    engines: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deflate, "ENGINES", ENGINES[engines])
    rows = families()["repeated rows"]
    from_bfloat16 = to_bfloat16(rows).astype(np.float16)
    for values, share in ((rows, 0.6), (from_bfloat16, 0.4)):
        assert len(deflate.encode(values, itemsize=2)) < share * values.nbytes


def test_heads_vary_and_bytes_of_one_distribution_do_not() -> None:
    heads = np.random.default_rng(8).normal(0, 1, (50, 1024))
    spreads = np.exp2(np.arange(50) / 4)[:, np.newaxis]
    high = [
        values.astype(np.float16).view(np.uint8).reshape(-1, 2)[:, 1]
        for values in (heads, heads * spreads)
    ]
    alike, varied = planes.survey(np.stack(high))
    assert alike.variation == pytest.approx(0, abs=0.05)
    assert varied.variation > 1
