"""What is extracted, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal, get_args

from h5traces.archive.selection import choose_layers
from h5traces.errors import ExtractionError, LayerIndexError
from h5traces.extract.questions import Columns
from h5traces.format.archive import AnswerCut
from h5traces.format.dtypes import DTYPE_POLICIES, DtypePolicy
from h5traces.storage.codecs import GZIP
from h5traces.writing.options import AUTOMATIC_SAMPLES

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from h5traces.extract.models import ModelDtype
    from h5traces.format.dtypes import OverflowPolicy
    from h5traces.format.precision import Precision, Tier
    from h5traces.paths import PathLike


Kind = Literal["hidden_states", "attentions"]
LastState = Literal["final_norm", "block_output"]
KINDS: Final[tuple[Kind, ...]] = ("hidden_states", "attentions")
OnNan = Literal["error", "skip", "keep"]


# What the pipeline behind the old batches asked.
DEFAULT_TEMPLATE: Final = "Answer the question concisely. Q: {question} A:"


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How answers are generated.

    Attributes
    ----------
    max_new_tokens
        Tokens of an answer, at most.
    num_beams
        Beams of beam search; 1 for none.
    do_sample
        Whether tokens are drawn at random.
    temperature, top_k, top_p
        Of drawing; 0 is no top-k.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises
        ------
        ExtractionError
            A number is out of its range, or beams are to be drawn.
        """
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "at least 1"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0"),
            "top_k": (self.top_k >= 0, "0 for none, or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
        }
        for name, (is_good, expected) in ranges.items():
            if not is_good:
                message = f"{name} is {getattr(self, name)}, expected {expected}"
                raise ExtractionError(message)
        if self.do_sample and self.num_beams > 1:
            message = "sampling with beams has no seed per sample; choose one of the two"
            raise ExtractionError(message)


@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What is extracted, and how.

    Attributes
    ----------
    layers
        0-based decoder blocks, or text such as ``0,5,10-12,last``; None for all.
    kinds
        ``hidden_states``, ``attentions``, or both.
    dtype
        Type that arrays will be stored in; casts to the narrow ones are made on the device.
    embedding
        Whether to store the output of the embedding, too.
    last_state
        Where the last block's hidden state is taken: ``final_norm``, as transformers returns it, or
        ``block_output``, before that norm.
    generation
        How answers are generated.
    seed
        Each sample's own seed is derived from it and the sample's id.
    prompt_template
        Text around ``{question}``.
    chat
        Put the prompt into the tokenizer's chat template.
    answer_cut
        Where the clean answer ends: ``sentence``, ``newline``, or ``none``. Arrays are never cut.
    batch_size
        Samples that are computed together.
    on_nan
        What becomes of samples with NaN among their values: an error, left out, or kept.
    """

    layers: str | Iterable[int] | None = None
    kinds: tuple[Kind, ...] = KINDS
    dtype: DtypePolicy = "float16"
    embedding: bool = False
    last_state: LastState = "final_norm"
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    seed: int = 0
    prompt_template: str = DEFAULT_TEMPLATE
    chat: bool = False
    answer_cut: AnswerCut = "none"
    batch_size: int = 1
    on_nan: OnNan = "error"

    def check(self) -> None:
        """Refuse values that mean nothing.

        Raises
        ------
        ExtractionError
            An option has a value that it cannot have.
        """
        choices: Mapping[str, tuple[str, ...]] = {
            "dtype": DTYPE_POLICIES,
            "last_state": get_args(LastState),
            "answer_cut": get_args(AnswerCut),
            "on_nan": get_args(OnNan),
        }
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                message = f"{name} is {getattr(self, name)!r}, expected {', '.join(allowed)}"
                raise ExtractionError(message)
        unknown = [each for each in self.kinds if each not in KINDS]
        if unknown or not self.kinds:
            message = f"kinds is {list(self.kinds)}, expected some of {', '.join(KINDS)}"
            raise ExtractionError(message)
        for name, least in (("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                message = f"{name} is {getattr(self, name)}, expected at least {least}"
                raise ExtractionError(message)
        self.generation.check()


@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model computes, and where.

    Attributes
    ----------
    model_id
        Hub id, local folder, or alias.
    revision
        Commit, branch or tag on the hub.
    dtype
        Type to compute in; ``auto`` is the checkpoint's own, but float32 on processors.
    device
        As torch names it, or ``auto`` to spread the model over all.
    load_in_4bit
        Quantise the weights with bitsandbytes.
    """

    model_id: str
    revision: str | None = None
    dtype: ModelDtype = "auto"
    device: str | None = None
    load_in_4bit: bool = False


@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """Which questions are asked.

    Attributes
    ----------
    dataset
        ``triviaqa``, ``truthfulqa``, or a JSONL or CSV file.
    num_samples
        The first so many; None for all.
    path
        A local copy of a data set that is known by name.
    revision
        Its commit, branch or tag on the hub.
    columns
        Which columns of a file to read.
    """

    dataset: str
    num_samples: int | None = None
    path: str | None = None
    revision: str | None = None
    columns: Columns = field(default_factory=Columns)


@dataclass(frozen=True, kw_only=True)
class StoreOptions:
    """How archives are written; see `h5traces.create`.

    Attributes
    ----------
    shard_samples, tier, scales, calibration_samples, on_overflow, codec, workers, verify
        As there. The stored type is that of `ExtractOptions`.
    check_space
        Refuse to start where the disk is too small for the forecast.
    """

    shard_samples: int | None = None
    tier: Tier | Precision = "exact"
    scales: PathLike | None = None
    calibration_samples: int = AUTOMATIC_SAMPLES
    on_overflow: OverflowPolicy = "float32"
    codec: str = GZIP.name
    workers: int | None = None
    verify: bool = True
    check_space: bool = True


def layer_numbers(choice: str | Iterable[int] | None, num_layers: int) -> tuple[int, ...]:
    """Layer numbers, ascending.

    Parameters
    ----------
    choice
        0-based numbers, or text such as ``0,5,10-12,last``; None for all layers.
    num_layers
        Decoder blocks of the model.

    Raises
    ------
    LayerIndexError
        The model has no such layer, or the text is no choice of layers.
    """
    chosen = choose_layers(choice, range(num_layers))
    if not chosen:
        message = f"no layer was chosen; expected numbers from 0 to {num_layers - 1}"
        raise LayerIndexError(message)
    return chosen
