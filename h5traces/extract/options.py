"""Options of an extraction: what is computed, how answers are generated, model and data set."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from h5traces.archive.selection import check_named_once
from h5traces.arguments import checked_options, shown
from h5traces.errors import ExtractionError, LayerIndexError
from h5traces.extract.kept import check_tokens
from h5traces.format.archive import AnswerCut
from h5traces.format.kinds import (
    ATTENTION_WINDOW,
    KEYS,
    LOGITS,
    MODEL_KINDS,
    QUERIES,
    TOKEN_KINDS,
)
from h5traces.format.layout import ATTENTION_MEAN, ATTENTIONS, HIDDEN_STATES
from h5traces.format.text import as_names

if TYPE_CHECKING:
    from collections.abc import Sequence

DEFAULT_KINDS: Final = (HIDDEN_STATES, ATTENTIONS)
LastState = Literal["final_norm", "block_output"]
ModelDtype = Literal["auto", "float32", "float16", "bfloat16"]
# Kinds that hold attention, by form.
_FORMS: Final = {
    "full": (ATTENTIONS,),
    "qk": (QUERIES, KEYS),
    "window:N": (ATTENTION_WINDOW,),
    "mean": (ATTENTION_MEAN,),
    "none": (),
}
_WINDOW: Final = re.compile(r"window:([1-9][0-9]{0,5})")
OnNan = Literal["error", "skip", "keep"]

# The prompt of the pipeline that wrote the pickled batches.
DEFAULT_TEMPLATE: Final = "Answer the question concisely. Q: {question} A:"


@checked_options
@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How answers are generated.

    Attributes
    ----------
    max_new_tokens
        Largest number of tokens of an answer; 0 to run prompts only.
    num_beams
        Beams of beam search; 1 for none.
    do_sample
        Draw tokens at random.
    temperature, top_k, top_p
        Parameters of random draws; a `top_k` of 0 keeps all tokens.
    num_generations
        Answers to each question; above 1, they are drawn at random, each with its own seed.

    Raises
    ------
    ExtractionError
        A number is out of range, or tokens of beams would be drawn at random.
    """

    max_new_tokens: int = 64
    num_beams: int = 1
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    num_generations: int = 1

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 0, "at least 0"),
            "num_beams": (self.num_beams >= 1, "at least 1"),
            "temperature": (self.temperature > 0, "above 0"),
            "top_k": (self.top_k >= 0, "0 for all tokens, or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "num_generations": (self.num_generations >= 1, "at least 1"),
        }
        for name, (is_good, expected) in ranges.items():
            if not is_good:
                message = f"{name} is {getattr(self, name)}, expected {expected}"
                raise ExtractionError(message)
        if self.do_sample and self.num_beams > 1:
            message = "sampling with beams has no seed per sample; choose one of the two"
            raise ExtractionError(message)
        if self.num_generations > 1 and not (self.do_sample and self.max_new_tokens):
            message = (
                f"num_generations is {self.num_generations}, but answers that are not drawn at "
                "random are all the same; set do_sample, and max_new_tokens above 0"
            )
            raise ExtractionError(message)


@checked_options
@dataclass(frozen=True, kw_only=True)
class ExtractOptions:
    """What is computed. `PrecisionOptions` say how it is stored.

    Attributes
    ----------
    layers
        0-based decoder blocks, or text such as ``0,5,10-12,last``; None for all.
    kinds
        Names of `h5traces.format.kinds.MODEL_KINDS` and ``TOKEN_KINDS``, such as
        ``("hidden_states", "mlp_output", "logprobs")``.
    attentions
        What is kept of attention: ``full`` weights; ``qk``, queries and keys, of which archives
        compute the weights when they are read; ``window:N``, the weights of the last N keys of
        every query; their ``mean`` over heads; or ``none``. It changes `kinds`; None leaves them.
    top_logits
        How many ``logits`` of every token are kept, the largest ones with their ids; None for all.
    embedding
        Also keep the output of the embedding.
    last_state
        Where the last block's hidden state is taken: ``final_norm`` (after the final norm, as in
        transformers' ``hidden_states``) or ``block_output`` (before it).
    tokens
        Which tokens are stored: ``all``, ``prompt``, ``answer``, ``prompt_last``, ``last``,
        ``every:N`` (the first and each N-th after it), or ``spans`` (those in spans of the
        question). Of attentions, only the weights among them.
    generation
        How answers are generated.
    seed
        Every sample's own seed is derived from it and the sample's id.
    prompt_template
        Text around ``{question}``.
    chat
        Put the prompt into the tokenizer's chat template.
    answer_cut
        Where the clean answer ends: ``sentence``, ``newline``, or ``none``. Arrays are never cut.
    batch_size
        Number of samples computed together.
    on_nan
        Samples with NaN values raise an ``error``, are left out (``skip``) or stored (``keep``).

    Raises
    ------
    ExtractionError
        An option has a value that is not allowed.
    LayerIndexError
        No layer is chosen.
    """

    layers: str | int | Sequence[int] | None = None
    kinds: tuple[str, ...] = DEFAULT_KINDS
    attentions: str | None = None
    top_logits: int | None = None
    embedding: bool = False
    last_state: LastState = "final_norm"
    tokens: str = "all"
    generation: GenerationOptions = field(default_factory=GenerationOptions)
    seed: int = 0
    prompt_template: str = DEFAULT_TEMPLATE
    chat: bool = False
    answer_cut: AnswerCut = "none"
    batch_size: int = 1
    on_nan: OnNan = "error"

    def __post_init__(self) -> None:
        choices = {"last_state": LastState, "answer_cut": AnswerCut, "on_nan": OnNan}
        for name, literal in choices.items():
            if getattr(self, name) not in get_args(literal):
                expected = ", ".join(get_args(literal))
                message = f"{name} is {getattr(self, name)!r}, expected {expected}"
                raise ExtractionError(message)
        check_tokens(self.tokens)
        asked = as_names(self.kinds)
        object.__setattr__(self, "kinds", with_form(self.kinds, self.attentions))
        if self.attentions == "qk" and self.tokens != "all":
            message = f"attentions='qk' needs the keys of all tokens, but tokens is {self.tokens!r}"
            raise ExtractionError(message)
        if not self.kinds and asked:
            message = (
                f"nothing is stored of kinds {list(asked)} with attentions={self.attentions!r}"
            )
            raise ExtractionError(message)
        known = (*MODEL_KINDS, *TOKEN_KINDS)
        unknown = [each for each in self.kinds if each not in known]
        if not self.kinds or unknown or len(set(self.kinds)) < len(self.kinds):
            message = f"kinds is {list(self.kinds)}, expected some of {', '.join(known)}"
            raise ExtractionError(message)
        if self.top_logits is not None and (self.top_logits < 1 or LOGITS not in self.kinds):
            message = (
                f"top_logits is {self.top_logits}, expected at least 1, with 'logits' among kinds"
            )
            raise ExtractionError(message)
        for name, least in (("batch_size", 1), ("seed", 0)):
            if getattr(self, name) < least:
                message = f"{name} is {getattr(self, name)}, expected at least {least}"
                raise ExtractionError(message)
        if self.layers is not None and not isinstance(self.layers, int) and not len(self.layers):
            message = "no layer was chosen; expected 0-based numbers, or None for all layers"
            raise LayerIndexError(message)
        check_named_once(self.layers)

    def kept(self, layers: Sequence[int]) -> dict[str, Any]:
        """What archives record of it: what is stored of a model, of which `layers` were chosen."""
        return {
            "layers": [*layers],
            "kinds": [*self.kinds],
            "embedding": self.embedding,
            "last_state": self.last_state,
            "window": window_of(self.attentions) or None,
            "top_logits": self.top_logits,
        }


def with_form(kinds: str | Sequence[str], form: str | None) -> tuple[str, ...]:
    """Kinds with attention in a form, as `ExtractOptions` takes both, or ExtractionError."""
    names = as_names(kinds)
    if form is not None:
        known = _FORMS.get("window:N" if window_of(form) else form if form != "window:N" else "")
        if known is None:
            message = f"attentions is {shown(form)}, expected {', '.join(_FORMS)}"
            raise ExtractionError(message)
        others = [each for each in names if each != ATTENTIONS]
        names = (*others, *(each for each in known if each not in others))
    if ATTENTION_WINDOW in names and not window_of(form):
        message = (
            f"kinds has {ATTENTION_WINDOW!r}, whose width is to be named: attentions='window:N'"
        )
        raise ExtractionError(message)
    return names


def window_of(form: str | None) -> int:
    """How many keys of every query a form of attention keeps; 0 for other forms."""
    found = _WINDOW.fullmatch(form or "")
    return int(found[1]) if found else 0


@checked_options
@dataclass(frozen=True, kw_only=True)
class ModelChoice:
    """Which model is asked, and where it runs.

    Attributes
    ----------
    model_id
        Hub id, local folder, or alias.
    revision
        Commit, branch or tag on the hub; None for a local folder.
    dtype
        Type to compute in; ``auto`` is the checkpoint's own, but float32 on CPUs.
    device
        A name that torch knows, or ``auto`` to spread the model over all devices. None means CUDA
        if there is a GPU, else the CPU.
    load_in_4bit
        Quantise the weights with bitsandbytes.
    trust_remote_code
        Run Python code that comes with the model; on the hub, `revision` must then be a commit.
        See SECURITY.md.
    threads
        Threads that compute on a CPU; None for as many as there are cores that the load of the last
        minute left free, and no more than torch would take.
    engine
        What runs the model: a `h5traces.vllm.VllmEngine`, or None for transformers.
    """

    model_id: str
    revision: str | None = None
    dtype: ModelDtype = "auto"
    device: str | None = None
    load_in_4bit: bool = False
    trust_remote_code: bool = False
    threads: int | None = None
    engine: Any = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            message = f"threads is {self.threads}, expected at least 1, or None"
            raise ExtractionError(message)


@checked_options
@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of the columns of a file; None for the first of the usual names that is there.

    Attributes
    ----------
    question, sample_id, answers
        Of questions, their ids, and reference answers.
    given
        Of answers that the model is given instead of generating them; None to generate. A cell
        holds text, token ids, or a list of several answers.
    messages, tools
        Of chats: lists of messages, and the tools that they may call, as chat templates take them.
        A last message of the assistant is a given answer.
    prompt_ids
        Of prompts as token ids, which are run as they are.
    spans
        Of lists of character spans of the given answer.
    """

    question: str | None = None
    sample_id: str | None = None
    answers: str | None = None
    given: str | None = None
    messages: str | None = None
    tools: str | None = None
    prompt_ids: str | None = None
    spans: str | None = None


@checked_options
@dataclass(frozen=True, kw_only=True)
class DatasetChoice:
    """Which questions are asked.

    Attributes
    ----------
    dataset
        ``triviaqa``, ``truthfulqa``, or a JSONL or CSV file.
    num_samples
        Number of questions, from the start; None for all.
    path
        Local copy of the repository of ``triviaqa`` or ``truthfulqa``.
    revision
        Commit, branch or tag of that repository on the hub.
    columns
        Columns of a file.

    Raises
    ------
    ExtractionError
        `num_samples` is not positive.
    """

    dataset: str
    num_samples: int | None = None
    path: str | None = None
    revision: str | None = None
    columns: Columns = field(default_factory=Columns)

    def __post_init__(self) -> None:
        if self.num_samples is not None and self.num_samples < 1:
            message = f"num_samples is {self.num_samples}, expected at least 1"
            raise ExtractionError(message)
