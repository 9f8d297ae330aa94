"""What is extracted, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, get_args

from h5traces.errors import ExtractionError
from h5traces.extract.capture import KINDS, Kind, LastState
from h5traces.extract.generation import GenerationOptions
from h5traces.extract.prompts import DEFAULT_TEMPLATE
from h5traces.format.dtypes import DTYPE_POLICIES, DtypePolicy
from h5traces.format.extraction import AnswerCut

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

OnNan = Literal["error", "skip", "keep"]


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
