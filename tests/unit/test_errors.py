"""Every error can be built from one string, pickled, and caught as what it is."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from h5traces import errors
from h5traces.errors import H5TracesError, LossyWarning, Problem, SchemaError, StoredStateWarning

MESSAGE = "batch.h5: something is wrong; expected something else; do this"
CLASSES = sorted(
    (
        each
        for each in vars(errors).values()
        if isinstance(each, type) and issubclass(each, Exception)
    ),
    key=lambda each: each.__name__,
)


def subclasses(base: type) -> set[type]:
    return {base}.union(*(subclasses(each) for each in base.__subclasses__()))


def test_all_errors_live_in_one_module() -> None:
    import h5traces.archive.token_axis
    import h5traces.cli.app
    import h5traces.extract.generation
    import h5traces.rewriting
    import h5traces.storage.footer_rows

    elsewhere = {each for each in subclasses(H5TracesError) if each.__module__ != errors.__name__}
    # Private to the reader of footers: users meet CorruptArchiveError; and to what reads answers,
    # each of which says what it does without one.
    private = {
        h5traces.storage.footer_rows.FooterError,
        h5traces.archive.token_axis.NoAnswerError,
        h5traces.extract.generation.UnfitAnswerError,
    }
    assert elsewhere <= private
    others = {each for each in CLASSES if not issubclass(each, H5TracesError)}
    assert others == {StoredStateWarning, LossyWarning}


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_survives_what_worker_processes_do(kind: type[Exception]) -> None:
    error = kind(MESSAGE)
    assert str(error) == MESSAGE
    for again in (
        pickle.loads(pickle.dumps(error)),
        copy.copy(error),
        # torch.utils.data re-raises a worker's error so.
        type(error)(str(error)),
    ):
        assert type(again) is kind
        assert str(again) == MESSAGE
    assert kind.__doc__


@pytest.mark.parametrize(
    ("name", "base"),
    [
        ("OptionError", ValueError),
        ("SchemaError", ValueError),
        ("TraceNotFoundError", KeyError),
        ("LayerIndexError", IndexError),
        ("SampleIndexError", IndexError),
        ("MissingDependencyError", ImportError),
        ("UnsafePickleError", errors.ConversionError),
        ("HostileFileError", errors.CorruptArchiveError),
        ("NotAnArchiveError", errors.ArchiveError),
        ("CorruptArchiveError", errors.ArchiveError),
        ("UnsupportedVersionError", errors.ArchiveError),
        ("UnsupportedEncodingError", errors.ArchiveError),
        ("MissingFilterError", errors.ArchiveError),
        ("StoredStateWarning", UserWarning),
    ],
)
def test_can_be_caught_as(name: str, base: type) -> None:
    assert issubclass(getattr(errors, name), base)


def test_problems_of_a_schema_error_survive_pickling() -> None:
    problems = [Problem("/samples/00000003", "is missing", "missing"), Problem("x", "y", "z")]
    error = pickle.loads(pickle.dumps(SchemaError(MESSAGE, problems)))
    assert error.problems == tuple(problems)
    assert str(error) == MESSAGE
    assert SchemaError(MESSAGE).problems == ()
    assert problems[0].as_dict() == {
        "loc": "/samples/00000003",
        "message": "is missing",
        "kind": "missing",
    }


def raise_schema_error() -> None:
    raise SchemaError(MESSAGE, [Problem("a", "b", "c")])


def test_an_error_crosses_a_process_pool() -> None:
    with (
        ProcessPoolExecutor(1, get_context("spawn")) as pool,
        pytest.raises(SchemaError, match="something is wrong") as caught,
    ):
        pool.submit(raise_schema_error).result()
    assert caught.value.problems == (Problem("a", "b", "c"),)
