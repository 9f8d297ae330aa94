"""How precisely arrays are stored, and what their scales were made from."""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal

from pydantic import Field, ValidationError, model_validator

from h5traces.errors import ArgumentError, PrecisionError, Problem
from h5traces.format.document import Document, problems_of

AttentionBits = Literal[8]
HeadMean = Literal["none", "beside", "only"]
Tier = Literal["exact", "fine", "analysis", "compact", "native"]

# Finer steps than this cannot reach 20 sigma in 16 bits; coarser ones say hardly more than a sign.
FINEST_STEP: Final = 0.001
COARSEST_STEP: Final = 4.0


class Precision(Document):
    """How precisely arrays are stored; what is not given stays in float16."""

    step: Annotated[
        float | None,
        Field(
            ge=FINEST_STEP,
            le=COARSEST_STEP,
            description="Steps of hidden states, in sigma of each channel; the error is at most "
            "half of it.",
        ),
    ] = None
    attention_bits: Annotated[
        AttentionBits | None,
        Field(description="Attention weights on a square-root scale of 255 levels."),
    ] = None
    head_mean: Annotated[
        HeadMean,
        Field(
            description="Whether attentions averaged over heads are stored: not at all, beside "
            "the heads, or only they."
        ),
    ] = "none"
    mantissa_bits: Annotated[
        int | None,
        Field(ge=1, le=9, description="What is in float16 is rounded to this many mantissa bits."),
    ] = None

    def __init__(self, **given: Any) -> None:
        try:
            super().__init__(**given)
        except ValidationError as error:
            message = "; ".join(map(str, problems_of(error)))
            raise PrecisionError(message) from error

    # Documents of archives are validated without it, so that their errors name the archive.
    __init__.__pydantic_base_init__ = True  # type: ignore[attr-defined]

    @model_validator(mode="after")
    def _heads_are_stored(self) -> Precision:
        if self.head_mean == "only" and self.attention_bits is not None:
            message = (
                "attention_bits are given for heads that head_mean='only' does not store; use "
                "head_mean='beside', or leave attention_bits out"
            )
            raise ValueError(message)
        return self

    @classmethod
    def of(cls, tier: Tier | Precision = "exact", **changes: Any) -> Precision:
        """A tier by its name, with some of its parameters changed.

        Parameters
        ----------
        tier
            One of `TIERS`, or a precision to start from.
        changes
            Fields of this class; those that are None stay as the tier has them.

        Raises
        ------
        PrecisionError
            There is no such tier, or the parameters do not go together.
        """
        if isinstance(tier, str) and tier not in TIERS:
            message = f"tier is {tier!r}, expected one of {', '.join(TIERS)}"
            raise PrecisionError(message)
        if not isinstance(tier, (str, Precision)):
            message = f"precision is {tier!r}, expected the name of a tier ({', '.join(TIERS)}), "
            message += "a Precision or PrecisionOptions"
            raise ArgumentError(message)
        start = TIERS[tier] if isinstance(tier, str) else tier
        wanted = {name: value for name, value in changes.items() if value is not None}
        if "attention_bits" in wanted and "head_mean" not in wanted and start.head_mean == "only":
            wanted["head_mean"] = "beside"
        if wanted.get("head_mean") == "only" and "attention_bits" not in wanted:
            wanted["attention_bits"] = None
        try:
            return cls.model_validate({**start.model_dump(), **wanted})
        except ValidationError as error:
            message = "; ".join(_told(each, wanted) for each in problems_of(error))
            raise PrecisionError(message) from error

    @property
    def is_exact(self) -> bool:
        """Whether nothing is lost, and nothing added."""
        return self == EXACT

    @property
    def is_lossy(self) -> bool:
        """Whether anything is given up; a head mean beside the heads is only added."""
        return self not in (EXACT, _WITH_MEAN)

    @property
    def tier(self) -> str:
        """Name of the tier that is made of these, or ``custom``."""
        return next((name for name, each in TIERS.items() if each == self), "custom")

    def __str__(self) -> str:
        parts = {
            "hidden states in steps of {} sigma": self.step,
            "attentions in {} bits": self.attention_bits,
            "head mean {}": None if self.head_mean == "none" else self.head_mean,
            "float16 rounded to {} mantissa bits": self.mantissa_bits,
        }
        stated = ", ".join(text.format(value) for text, value in parts.items() if value is not None)
        return f"{self.tier} ({stated})" if stated else self.tier


EXACT: Final = Precision()
_WITH_MEAN: Final = Precision(head_mean="beside")
TIERS: Final[dict[Tier, Precision]] = {
    "exact": EXACT,
    "fine": Precision(step=0.02, attention_bits=8, head_mean="beside"),
    "analysis": Precision(step=0.1, attention_bits=8, head_mean="beside"),
    "compact": Precision(step=0.4, head_mean="only"),
    "native": Precision(mantissa_bits=5),
}


def _told(problem: Problem, given: dict[str, Any]) -> str:
    """pydantic's finding with the value that it is about."""
    if problem.loc not in given:
        return problem.message
    message = f"{problem.message[:1].lower()}{problem.message[1:]}"
    return f"{problem.loc} is {given[problem.loc]!r}: {message}"


class CalibrationRecord(Document):
    """What channels were measured on."""

    num_samples: Annotated[int, Field(ge=1, description="Samples that were looked at.")]
    num_tokens: Annotated[
        int, Field(ge=1, description="Tokens among them, without the first of each sample.")
    ]
    sources: Annotated[
        tuple[str, ...], Field(description="Names of the files, without their folders.")
    ] = ()
    model_id: Annotated[str | None, Field(description="As the sources give it.")] = None
    generator: Annotated[str, Field(description="Program and version that measured.")]
    method: Annotated[str, Field(description="How, in one sentence.")]
