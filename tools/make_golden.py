#!/usr/bin/env python3
"""Writes the golden archives: small files that every later release must read as they were meant.

    python tools/make_golden.py tests/archives/unstable

writes one archive per layout and, beside them, ``expected.json``: what their sources held, told by
the sources themselves and not by the archives. Needs torch for the archive of tensors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

import h5traces
from h5traces.writing.options import PrecisionOptions, TargetOptions

LAYERS, HIDDEN, HEADS, PROMPT = 3, 8, 2, 4
WORDS = ("The", " answer", "\u00e9", "\ufffd", "\U0001f600", "\x00", "", "\ud83d", "\u241b", " end")


@dataclass(frozen=True)
class Golden:
    """One archive: the batch it is made of, and how."""

    batch: Any
    options: dict[str, Any] = field(default_factory=dict)
    file_name: str = "tiny_triviaqa_batch_0000.pkl"


def describe(value: Any) -> Any:
    """A value as JSON that tells its type and every bit; long contents as SHA-256."""
    if isinstance(value, torch.Tensor):
        data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return ["tensor", str(value.dtype), list(value.shape), hashlib.sha256(data).hexdigest()]
    if isinstance(value, (np.ndarray, np.generic)):
        little = np.ascontiguousarray(value, dtype=value.dtype.newbyteorder("<"))
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        digest = hashlib.sha256(little.tobytes()).hexdigest()
        return [kind, value.dtype.str.replace("=", "<"), list(value.shape), digest]
    if isinstance(value, dict):
        return ["dict", [[describe(key), describe(each)] for key, each in value.items()]]
    if isinstance(value, (list, tuple)):
        return [type(value).__name__, [describe(each) for each in value]]
    if isinstance(value, float):
        return ["float", value.hex()]
    if isinstance(value, (bytes, bytearray)):
        return [type(value).__name__, value.hex()]
    if isinstance(value, int) and not isinstance(value, bool):
        return ["int", str(value)]
    return value


def trace(rng: np.random.Generator, number: int, num_answer: int = 6) -> dict[str, Any]:
    """A sample of the newest layout: float64 numbers, cast by the caller."""
    seq_len = PROMPT + num_answer
    scores = np.tril(np.exp(rng.standard_normal((LAYERS, HEADS, seq_len, seq_len))))
    return {
        "hidden_states": list(rng.standard_normal((LAYERS, seq_len, HIDDEN)) * 3),
        "attentions": list(scores / scores.sum(-1, keepdims=True)),
        "tokens": rng.integers(3, 32000, seq_len),
        "tokens_decoded": [WORDS[index % len(WORDS)] for index in range(seq_len)],
        "generated_answer_clean": "\u00e9 \U0001f600\nline 2" if number else "",
        "question_id": f"tc_{number}",
    }


def in_type(batch: list[dict[str, Any]], dtype: str) -> list[dict[str, Any]]:
    """The batch with its layered arrays in another type."""

    def cast(array: np.ndarray) -> np.ndarray:
        if dtype != "bfloat16":
            return array.astype(dtype)
        return (array.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)

    kinds = ("hidden_states", "attentions")
    return [
        {key: [cast(each) for each in value] if key in kinds else value for key, value in t.items()}
        for t in batch
    ]


def full(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Whole sequences in float16, with values that are not finite and an id that repeats."""
    batch = in_type([trace(rng, number) for number in range(3)], "float16")
    batch[1]["hidden_states"][0][-1, :4] = np.nan, np.inf, -np.inf, -0.0
    batch[2]["question_id"] = batch[1]["question_id"]
    return batch


def steps(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Generation steps with five beams, one sample without any."""
    batch = []
    for number, num_steps in enumerate((3, 1, 0)):
        source = in_type([trace(rng, number, 4)], "float16")[0]
        rows = [slice(0, PROMPT), *(slice(PROMPT + t, PROMPT + t + 1) for t in range(3))]
        batch.append(
            {
                "question": "Who painted the ceiling?",
                "generated_answer_clean": source["generated_answer_clean"],
                "hidden_states": [
                    [np.stack([layer[row]] * 5) for row in rows[:num_steps]]
                    for layer in source["hidden_states"]
                ],
                "attentions": [
                    [np.stack([layer[:, row, : row.stop]] * 5) for row in rows[:num_steps]]
                    for layer in source["attentions"]
                ],
                "tokens": source["tokens"][PROMPT : PROMPT + num_steps],
                "tokens_decoded": source["tokens_decoded"][PROMPT : PROMPT + num_steps],
                "prompt_length": PROMPT,
                "num_layers": LAYERS,
                "ground_truth_answers": ["Michelangelo", "Michael \u00c1ngelo"],
            }
        )
    return batch


def container(rng: np.random.Generator) -> dict[str, Any]:
    """The layout of parallel lists, with attentions averaged over heads."""
    batch = in_type([trace(rng, number) for number in range(2)], "float32")
    return {
        "traces": [
            [
                (hidden, weights.mean(axis=0))
                for hidden, weights in zip(each["hidden_states"], each["attentions"], strict=True)
            ]
            for each in batch
        ],
        "labels": [0, 1],
        "question_ids": [each["question_id"] for each in batch],
    }


def container_dicts(made: dict[str, Any]) -> list[dict[str, Any]]:
    """A container as the dicts that h5traces gives for it."""
    columns = zip(made["traces"], made["labels"], made["question_ids"], strict=True)
    return [
        {
            "hidden_states": [hidden for hidden, _ in pairs],
            "attention_mean": [weights for _, weights in pairs],
            "label": label,
            "question_id": question_id,
        }
        for pairs, label, question_id in columns
    ]


def last_position(rng: np.random.Generator) -> list[dict[str, Any]]:
    """The 350 MB bug: one position of the sequence."""
    batch = full(rng)
    for each in batch:
        each["hidden_states"] = [layer[-1:] for layer in each["hidden_states"]]
        each["attentions"] = [layer[:, -1:] for layer in each["attentions"]]
    return batch


def extras(rng: np.random.Generator) -> list[dict[str, Any]]:
    """Fields of every type that the format has an encoding for."""
    (source,) = in_type([trace(rng, 0)], "float16")
    return [
        {
            **source,
            "none": None,
            "yes": True,
            "huge": 2**200,
            "negative": -(2**63),
            "float": -0.0,
            "infinite": float("-inf"),
            "text": "a\x00 \ud83d \u241b",
            "bytes": b"\x00\xff",
            "list": [1, "a", None, [2.5, True], {"b": (1, 2)}],
            "tuple": (1, (2, 3), bytearray(b"x")),
            "dict": {"a/b": 1, "": 2, ".": 3, "%": 4, "$int": 5, 7: 8},
            "a/b": 1,
            "": 2,
            "..": 3,
            "%2F": 4,
            "$int": 5,
            "arrays": {"big": np.array([1, 2], ">i4"), "list": [np.zeros((0, 3)), np.array(5)]},
            "flags": np.array([True, False]),
            "words": np.array(["a", "\u65e5\u672c"]),
            "complex": np.array([1 + 2j], np.complex64),
            "scalar": np.float16(1.5),
        },
        {key: source[key] for key in ("hidden_states", "attentions", "tokens")},
    ]


def tensors(rng: np.random.Generator) -> list[dict[str, Any]]:
    """torch tensors: bfloat16 arrays and int64 tokens."""
    batch: list[dict[str, Any]] = in_type([trace(rng, number) for number in range(2)], "float32")
    for each in batch:
        for kind in ("hidden_states", "attentions"):
            each[kind] = [torch.from_numpy(array).bfloat16() for array in each[kind]]
        each["tokens"] = torch.from_numpy(each["tokens"])
    return batch


def goldens() -> dict[str, Golden]:
    """Every archive by file name."""
    rng = np.random.default_rng(0)
    plain = [trace(rng, number) for number in range(3)]
    exact = {"precision": PrecisionOptions(dtype="auto")}
    return {
        "full.h5": Golden(full(rng)),
        "layers.h5": Golden(in_type(plain, "float16"), {"layers": [0, 2]}),
        "steps.h5": Golden(steps(rng)),
        "container.h5": Golden(container(rng), exact),
        "last_position.h5": Golden(last_position(rng)),
        "bfloat16.h5": Golden(in_type(plain, "bfloat16"), exact),
        "float32.h5": Golden(in_type(plain, "float32"), exact),
        "extras.h5": Golden(extras(rng)),
        "torch.h5": Golden(tensors(rng), exact),
    }


def source_dicts(golden: Golden) -> list[dict[str, Any]]:
    """What the archive must give back."""
    is_container = isinstance(golden.batch, dict)
    batch = container_dicts(golden.batch) if is_container else golden.batch
    kept = golden.options.get("layers")
    if kept is None:
        return batch
    kinds = ("hidden_states", "attentions")
    return [
        {key: [v[layer] for layer in kept] if key in kinds else v for key, v in each.items()}
        for each in batch
    ]


def write(name: str, golden: Golden, folder: Path) -> dict[str, Any]:
    """Write one archive; returns its entry in ``expected.json``."""
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / golden.file_name
        source.write_bytes(pickle.dumps(golden.batch, protocol=4))
        report = h5traces.convert(
            source, folder / name, target=TargetOptions(overwrite=True), **golden.options
        )
    if not report.ok:
        raise SystemExit(report.files[0].error)
    expected = source_dicts(golden)
    with h5traces.open(folder / name) as archive:
        metadata = archive.metadata
        return {
            "format_version": metadata.format_version,
            "layers": list(archive.layers),
            "num_layers": LAYERS,
            "hidden_size": metadata.hidden_size,
            "num_heads": metadata.num_heads,
            "model_id": "tiny",
            "dataset": "triviaqa",
            "ids": [each.get("question_id") for each in expected],
            "coverage": [each.metadata.coverage for each in archive],
            "digests": [each.metadata.digest for each in archive],
            "samples": [describe(each) for each in expected],
        }


def main() -> None:
    """Write all archives and ``expected.json``."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where to write")
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    expected = {name: write(name, golden, folder) for name, golden in goldens().items()}
    document = json.dumps(expected, indent=1, ensure_ascii=True)
    (folder / "expected.json").write_text(document + "\n", encoding="ascii")


if __name__ == "__main__":
    main()
