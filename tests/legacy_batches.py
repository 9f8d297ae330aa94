"""Small legacy batches in every layout that was ever written, with their edge cases.

Own builders: the numbers are random, only layouts, types and lengths are as in real batches.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
from dataclasses import fields
from types import FunctionType
from typing import TYPE_CHECKING, Any

import numpy as np

import h5traces
from h5traces.writing.options import PrecisionOptions, TargetOptions

if TYPE_CHECKING:
    from pathlib import Path

LAYERS, HIDDEN, HEADS, BEAMS = 3, 8, 2, 5
PROMPT = 5

LAYOUTS = (
    "full_gz",
    "full_pkl",
    "split",
    "final_cut",
    "final_full",
    "step_min",
    "step_clean",
    "step_cut",
    "step_full",
    "container_dict",
)
DTYPES = (
    "float16",
    "float32",
    "float32-from-float16",
    "float32-from-bfloat16",
    "float64",
    ">f4",
)
ODD_TOKENS = (
    "\ufffd",
    "",
    "\n",
    "\x00",
    "a\x00",
    "\x00b",
    "\u00e9",
    "\U0001f600",
    "\u0301",
    "\u65e5\u672c",
    "\ud83d",
    "\udc00\ud800",
    "\u241b",
    "\u241b0041",
    "'\"\\",
)
ODD_TEXT = "l\u00ednea 1\nline 2 \U0001f600 \u65e5\u672c \ufffd \ud83d \x00"
# What each sample of a batch is, by index.
ONE_STEP, ZERO_TOKENS, NOT_FINITE, ODD_UNICODE, EMPTY_ANSWER, PLAIN = range(6)
NUM_SAMPLES = 6

_FILE_NAMES = {
    "full_gz": "llama2_chat_7B_triviaqa_batch_0000.pkl.gz",
    "full_pkl": "llama2_chat_7B_triviaqa_batch_0000.pkl",
    "split": "llama2_chat_7B_triviaqa_batch_0000_sub0001.pkl.gz",
    "final_cut": "llama2_chat_7B_triviaqa_batch_0001.pkl",
    "final_full": "llama2_chat_7B_triviaqa_batch_0002.pkl",
    "step_min": "trivia_qa_traces_batch_0000.pkl",
    "step_clean": "trivia_qa_traces_batch_0001.pkl",
    "step_cut": "trivia_qa_traces_batch_0002.pkl",
    "step_full": "trivia_qa_traces_Qwen3-4B-Instruct-2507.pkl",
    "container_dict": "container.pkl",
}
_PROTOCOLS = {"split": 5}


def file_name(layout: str) -> str:
    """The name that the pipeline gave a batch of this layout."""
    return _FILE_NAMES[layout]


def cast(values: np.ndarray, dtype: str) -> np.ndarray:
    """float64 numbers in one of `DTYPES`."""
    if dtype == "float32-from-float16":
        return values.astype(np.float16).astype(np.float32)
    if dtype == "float32-from-bfloat16":
        return (values.astype(np.float32).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    return values.astype(dtype)


class _Maker:
    """The arrays and tokens of one sample."""

    def __init__(self, index: int, dtype: str, seed: int) -> None:
        self.rng = np.random.default_rng((seed, index))
        self.index = index % NUM_SAMPLES
        self.ordinal = index
        self.dtype = dtype
        lengths = {ONE_STEP: 1, ODD_UNICODE: len(ODD_TOKENS) + 2}
        self.answer_len = lengths.get(self.index, 4 + int(self.rng.integers(0, 4)))
        self.seq_len = PROMPT + self.answer_len
        self.cut = 0 if self.index == ZERO_TOKENS else max(1, self.answer_len - 1)
        self.tokens = self.rng.integers(3, 32000, self.seq_len)
        words = [f"w{number} " for number in range(self.seq_len)]
        if self.index == ODD_UNICODE:
            words[PROMPT : PROMPT + len(ODD_TOKENS)] = ODD_TOKENS
        self.decoded = words
        answers = {EMPTY_ANSWER: "", ODD_UNICODE: ODD_TEXT}
        self.answer = answers.get(self.index, "the answer")
        self.hidden = [self._hidden() for _ in range(LAYERS)]
        self.attentions = [self._attention() for _ in range(LAYERS)]
        if self.index == NOT_FINITE:
            self.hidden[0][-1, :3] = np.nan, np.inf, -np.inf
            self.hidden[-1][0, 0] = -0.0
            self.attentions[0][0, -1, 0] = np.nan

    def _hidden(self) -> np.ndarray:
        return cast(self.rng.standard_normal((self.seq_len, HIDDEN)) * 3, self.dtype)

    def _attention(self) -> np.ndarray:
        scores = np.tril(np.exp(self.rng.standard_normal((HEADS, self.seq_len, self.seq_len))))
        return cast(scores / scores.sum(-1, keepdims=True), self.dtype)

    @property
    def question_id(self) -> str:
        return f"tc_{self.ordinal}"

    def full(self) -> dict[str, Any]:
        return {
            "hidden_states": self.hidden,
            "attentions": self.attentions,
            "tokens": self.tokens,
            "tokens_decoded": self.decoded,
            "generated_answer_clean": self.answer,
            "question_id": self.question_id,
        }

    def final(self, *, full: bool) -> dict[str, Any]:
        cut = self.answer_len if full else self.cut
        if cut == 1:
            hidden = [each[:PROMPT].copy() for each in self.hidden]
            weights = [each[:, :PROMPT, :PROMPT].copy() for each in self.attentions]
        else:
            num_keys = PROMPT + max(cut, 1) - 1
            hidden = [each[num_keys - 1 : num_keys].copy() for each in self.hidden]
            weights = [
                each[:, num_keys - 1 : num_keys, :num_keys].copy() for each in self.attentions
            ]
        span = slice(None) if full else slice(PROMPT, PROMPT + cut)
        return {
            **self.full(),
            "hidden_states": hidden,
            "attentions": weights,
            "tokens": self.tokens[span],
            "tokens_decoded": self.decoded[span],
        }

    def _steps(self, num_steps: int) -> tuple[list[Any], list[Any]]:
        hidden: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
        weights: list[list[np.ndarray]] = [[] for _ in range(LAYERS)]
        for layer in range(LAYERS):
            for step in range(num_steps):
                rows = slice(0, PROMPT) if step == 0 else slice(PROMPT + step - 1, PROMPT + step)
                num_keys = PROMPT + step
                hidden[layer].append(np.stack([self.hidden[layer][rows]] * BEAMS))
                part = self.attentions[layer][:, rows, :num_keys]
                weights[layer].append(np.stack([part] * BEAMS))
                if step:
                    # The beams differ from the second step on.
                    hidden[layer][-1][1:] *= hidden[layer][-1].dtype.type(0.5)
        return hidden, weights

    def in_steps(self, variant: str) -> dict[str, Any]:
        num_steps = self.answer_len if variant == "step_full" else self.cut
        hidden, weights = self._steps(num_steps)
        arrays = {"hidden_states": hidden, "attentions": weights}
        answer_span = slice(PROMPT, PROMPT + num_steps)
        question = {"question": "Who painted the ceiling?"}
        references = {"ground_truth_answers": ["Michelangelo", "Michael \u00c1ngelo"]}
        counts = {"prompt_length": PROMPT, "num_layers": LAYERS}
        if variant == "step_min":
            return {
                **arrays,
                "tokens": self.tokens[answer_span],
                "tokens_decoded": self.decoded[answer_span],
                "generated_answer_clean": self.answer,
                "question_id": self.question_id,
            }
        if variant == "step_full":
            return {
                **question,
                "generated_text": f"Q: ? A: {self.answer}",
                "generated_answer": self.answer,
                **arrays,
                "tokens": self.tokens,
                **counts,
                "example_id": self.ordinal,
                **references,
            }
        cutoff = {
            "cutoff_method": "first_period",
            "tokens_before_cutoff": num_steps,
            "tokens_after_cutoff": self.answer_len - num_steps,
        }
        batch = {"example_id": 3, "global_example_id": self.ordinal, "batch_number": 0}
        if variant == "step_clean":
            return {
                **question,
                "generated_answer_clean": self.answer,
                **arrays,
                "tokens": self.tokens[answer_span],
                "tokens_decoded": self.decoded[answer_span],
                **counts,
                **cutoff,
                **batch,
                **references,
            }
        return {
            **question,
            "generated_text": f"Q: ? A: {self.answer}",
            "generated_answer": self.answer,
            "generated_answer_clean": self.answer,
            **arrays,
            "tokens": self.tokens[: PROMPT + num_steps],
            "tokens_full": self.tokens,
            **counts,
            **cutoff,
            **batch,
            **references,
        }


def make_batch(
    layout: str, *, num_samples: int = NUM_SAMPLES, dtype: str = "float16", seed: int = 0
) -> Any:
    """A batch as its producer held it in memory; the first samples are the edge cases."""
    makers = [_Maker(index, dtype, seed) for index in range(num_samples)]
    if layout == "container_dict":
        return {
            "traces": [
                [
                    (hidden, weights.astype(np.float64).mean(0).astype(weights.dtype))
                    for hidden, weights in zip(maker.hidden, maker.attentions, strict=True)
                ]
                for maker in makers
            ],
            "labels": [index % 2 for index in range(num_samples)],
            "question_ids": [maker.question_id for maker in makers],
        }
    if layout.startswith("step_"):
        return [maker.in_steps(layout) for maker in makers]
    if layout.startswith("final_"):
        return [maker.final(full=layout == "final_full") for maker in makers]
    return [maker.full() for maker in makers]


def with_torch(batch: Any, dtype: str | None = None) -> Any:
    """The batch with torch tensors for its arrays; `dtype` is torch's name for floats."""
    import torch

    if isinstance(batch, np.ndarray):
        tensor = torch.from_numpy(np.ascontiguousarray(batch))
        if dtype is not None and tensor.is_floating_point():
            return tensor.to(getattr(torch, dtype))
        return tensor
    if isinstance(batch, dict):
        return {key: with_torch(value, dtype) for key, value in batch.items()}
    if isinstance(batch, (list, tuple)):
        return type(batch)(with_torch(value, dtype) for value in batch)
    return batch


class _NumpyOnePickler(pickle._Pickler):  # type: ignore[name-defined]  # the one in Python
    """Names numpy's modules as numpy 1 did."""

    def save_global(self, obj: Any, name: str | None = None) -> None:
        module = getattr(obj, "__module__", None) or ""
        if not module.startswith("numpy._core"):
            super().save_global(obj, name)
            return
        module, name = module.replace("numpy._core", "numpy.core"), name or obj.__qualname__
        if self.proto >= 4:
            self.save(module)
            self.save(name)
            self.write(pickle.STACK_GLOBAL)
        else:
            self.write(pickle.GLOBAL + f"{module}\n{name}\n".encode())
        self.memoize(obj)

    dispatch = {**pickle._Pickler.dispatch, FunctionType: save_global}  # noqa: RUF012


def dumps(batch: Any, protocol: int = 4, *, numpy1: bool = False) -> bytes:
    """The batch pickled, on request with numpy 1's module names."""
    if not numpy1:
        return pickle.dumps(batch, protocol)
    out = io.BytesIO()
    _NumpyOnePickler(out, protocol).dump(batch)
    return out.getvalue()


def write_batch(
    path: Path, batch: Any, *, protocol: int = 4, numpy1: bool = False, level: int = 1
) -> Path:
    """Write a batch to `path`, through gzip where its name says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = dumps(batch, protocol, numpy1=numpy1)
    path.write_bytes(gzip.compress(data, level) if path.name.endswith(".gz") else data)
    return path


def write_layout(folder: Path, layout: str, batch: Any | None = None, **options: Any) -> Path:
    """Write a batch of `layout` under the name and in the protocol of its producer."""
    protocol = _PROTOCOLS.get(layout, 4)
    made = make_batch(layout) if batch is None else batch
    return write_batch(folder / _FILE_NAMES[layout], made, **{"protocol": protocol, **options})


def as_dicts(batch: Any) -> list[dict[str, Any]]:
    """A batch as the list of dicts that h5traces gives for it: containers have a form of theirs."""
    if isinstance(batch, list):
        return batch
    return [
        {
            "hidden_states": [hidden for hidden, _ in pairs],
            "attention_mean": [weights for _, weights in pairs],
            "label": label,
            "question_id": question_id,
        }
        for pairs, label, question_id in zip(
            batch["traces"], batch["labels"], batch["question_ids"], strict=True
        )
    ]


def _map_arrays(trace: dict[str, Any], change: Any) -> dict[str, Any]:
    def changed(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(changed(each) for each in value)
        return change(value)

    kinds = ("hidden_states", "attentions", "attention_mean")
    return {key: changed(value) if key in kinds else value for key, value in trace.items()}


def native(trace: dict[str, Any]) -> dict[str, Any]:
    """The trace with its layered arrays in the machine's byte order."""
    return _map_arrays(trace, lambda array: array.astype(array.dtype.newbyteorder("=")))


def in_float16(trace: dict[str, Any]) -> dict[str, Any]:
    """The trace with its layered arrays cast as the default of `convert` does."""

    def change(array: Any) -> Any:
        if isinstance(array, np.ndarray):
            return array.astype(np.float16)
        # As numpy casts, in one rounding; torch casts float64 in two.
        wide = array.float() if array.dtype.itemsize == 2 else array
        return with_torch(wide.numpy().astype(np.float16))

    return _map_arrays(trace, change)


def bits(array: np.ndarray) -> bytes:
    """The array's elements in C order."""
    return np.ascontiguousarray(array).tobytes()


def assert_same(found: Any, expected: Any, place: str = "value") -> None:
    """Fail unless both have the same types, key order, dtypes, shapes and bits."""
    assert type(found) is type(expected), f"{place}: {type(found)} is not {type(expected)}"
    if isinstance(expected, dict):
        assert list(found) == list(expected), f"{place}: {list(found)} != {list(expected)}"
        for (found_key, found_value), (key, value) in zip(
            found.items(), expected.items(), strict=True
        ):
            assert_same(found_key, key, f"{place}: key {key!r}")
            assert_same(found_value, value, f"{place}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), f"{place}: {len(found)} items, not {len(expected)}"
        for index, (left, right) in enumerate(zip(found, expected, strict=True)):
            assert_same(left, right, f"{place}[{index}]")
    elif isinstance(expected, (np.ndarray, np.generic)):
        assert found.dtype == expected.dtype, f"{place}: {found.dtype} is not {expected.dtype}"
        assert found.shape == expected.shape, f"{place}: {found.shape} is not {expected.shape}"
        assert bits(found) == bits(expected), f"{place}: values differ"
    elif isinstance(expected, float):
        assert struct.pack("<d", found) == struct.pack("<d", expected), f"{place}: {found!r}"
    elif type(expected).__module__ == "torch":
        assert found.dtype == expected.dtype, f"{place}: {found.dtype} is not {expected.dtype}"
        assert found.shape == expected.shape, f"{place}: {found.shape} is not {expected.shape}"
        assert _tensor_bits(found) == _tensor_bits(expected), f"{place}: values differ"
    else:
        assert found == expected, f"{place}: {found!r} is not {expected!r}"


def _tensor_bits(tensor: Any) -> bytes:
    import torch

    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def grouped(**options: Any) -> dict[str, Any]:
    """Keyword arguments of `convert` and `repack`: flat options are put into their groups."""
    found: dict[str, Any] = {}
    for name, group in (("precision", PrecisionOptions), ("target", TargetOptions)):
        known = {each.name for each in fields(group)} & set(options)
        if known:
            found[name] = group(**{each: options.pop(each) for each in known})
    return {**options, **found}


def make_archive(folder: Path, batch: Any, *, name: str = "batch.pkl", **options: Any) -> Path:
    """An archive that `h5traces.convert` made of `batch`, beside its pickle in `folder`."""
    source = write_batch(folder / name, batch)
    target = source.with_name(f"{name.partition('.')[0]}.h5")
    report = h5traces.convert(source, target, **grouped(**options))
    assert report.ok, report.files[0].error
    return target
