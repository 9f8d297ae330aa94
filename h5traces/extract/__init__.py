"""From a transformers model straight into archives.

>>> from h5traces.extract import extract              # doctest: +SKIP
>>> with h5traces.create("traces/") as writer:        # doctest: +SKIP
...     for record in extract(model, tokenizer, questions):
...         writer.append(record)
"""

from typing import TYPE_CHECKING

from h5traces.lazy import lazy_names

if TYPE_CHECKING:
    from h5traces.extract.extracting import extract_dataset
    from h5traces.extract.extractor import extract, extract_activations_and_attentions
    from h5traces.extract.measuring import estimate_from_files
    from h5traces.extract.models import (
        MODEL_ALIASES,
        hide_progress_bars,
        load_model,
        load_tokenizer,
        model_shape,
    )
    from h5traces.extract.options import (
        Columns,
        DatasetChoice,
        ExtractOptions,
        GenerationOptions,
        ModelChoice,
    )
    from h5traces.extract.pilot import estimate_with_pilot
    from h5traces.extract.questions import Question
    from h5traces.extract.running import ExtractionReport
    from h5traces.extract.sizes import ModelShape

__all__ = [
    "MODEL_ALIASES",
    "Columns",
    "DatasetChoice",
    "ExtractOptions",
    "ExtractionReport",
    "GenerationOptions",
    "ModelChoice",
    "ModelShape",
    "Question",
    "estimate_from_files",
    "estimate_with_pilot",
    "extract",
    "extract_activations_and_attentions",
    "extract_dataset",
    "hide_progress_bars",
    "load_model",
    "load_tokenizer",
    "model_shape",
]

_HOMES = {
    "Columns": "h5traces.extract.options",
    "DatasetChoice": "h5traces.extract.options",
    "ExtractOptions": "h5traces.extract.options",
    "ExtractionReport": "h5traces.extract.running",
    "GenerationOptions": "h5traces.extract.options",
    "MODEL_ALIASES": "h5traces.extract.models",
    "ModelChoice": "h5traces.extract.options",
    "ModelShape": "h5traces.extract.sizes",
    "Question": "h5traces.extract.questions",
    "estimate_from_files": "h5traces.extract.measuring",
    "estimate_with_pilot": "h5traces.extract.pilot",
    "extract": "h5traces.extract.extractor",
    "extract_activations_and_attentions": "h5traces.extract.extractor",
    "extract_dataset": "h5traces.extract.extracting",
    "hide_progress_bars": "h5traces.extract.models",
    "load_model": "h5traces.extract.models",
    "load_tokenizer": "h5traces.extract.models",
    "model_shape": "h5traces.extract.models",
}
if not TYPE_CHECKING:  # names that do not exist stay errors of type checkers
    __getattr__, __dir__ = lazy_names(__name__, _HOMES, extra="extract")
