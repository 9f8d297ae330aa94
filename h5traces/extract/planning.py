"""What a run will ask, before any weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from h5traces.errors import ExtractionError, TooLongError
from h5traces.extract.generation import sample_seed
from h5traces.extract.prompts import Prompter

if TYPE_CHECKING:
    from h5traces.extract.options import ExtractOptions
    from h5traces.extract.questions import Question


@dataclass(frozen=True)
class Job:
    """A question on its way through the model.

    Attributes
    ----------
    question
        What is asked.
    prompt
        Its token ids.
    seed
        Of the sample's random numbers.
    """

    question: Question
    prompt: tuple[int, ...]
    seed: int


class Planner:
    """Makes jobs of questions; needs a tokenizer and a configuration, but no weights.

    Parameters
    ----------
    tokenizer
        The model's.
    config
        The model's configuration.
    options
        What to extract, and how.

    Raises
    ------
    ExtractionError
        The prompt template cannot be used, or an option has a value that it cannot have.
    """

    def __init__(self, tokenizer: Any, config: Any, options: ExtractOptions) -> None:
        options.check()
        self._options = options
        self._prompter = Prompter(tokenizer, options.prompt_template, chat=options.chat)
        self._family = config.model_type
        self._context = getattr(config.get_text_config(), "max_position_embeddings", None)

    def job(self, question: Question) -> Job:
        """A question with its prompt.

        Raises
        ------
        TooLongError
            Prompt and answer may exceed the model's context.
        ExtractionError
            The question is empty.
        """
        try:
            prompt = self._prompter.token_ids(question.text)
        except ExtractionError as error:
            message = f"{question.sample_id}: {error}"
            raise ExtractionError(message) from error
        longest = self._options.generation.max_new_tokens
        if self._context is not None and len(prompt) + longest > self._context:
            message = (
                f"{question.sample_id}: the prompt has {len(prompt)} tokens, and with up to "
                f"{longest} of the answer it exceeds the {self._context} that {self._family} "
                "takes; shorten it, or lower --max-new-tokens"
            )
            raise TooLongError(message)
        return Job(question, prompt, sample_seed(self._options.seed, question.sample_id))
