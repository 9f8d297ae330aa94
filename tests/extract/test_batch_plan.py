"""Which samples are computed together."""

from __future__ import annotations

from h5traces.extract.generation import Job, batches
from h5traces.extract.questions import Question


def jobs(lengths):
    return [Job(Question("?", str(n)), (1,) * length, 0) for n, length in enumerate(lengths)]


def test_neighbours_are_of_similar_length_and_every_sample_is_computed_once():
    lengths = [(n * 37) % 50 + 1 for n in range(1000)]
    found = list(batches(jobs(lengths), 4))
    assert all(len(each) == 4 for each in found)
    ids = [job.question.sample_id for batch in found for job in batch]
    assert sorted(ids, key=int) == [str(n) for n in range(1000)]
    padding = sum(len(batch[0].prompt) - len(job.prompt) for batch in found for job in batch)
    assert padding < 0.05 * sum(lengths)
    # Not far from the order of the data set.
    assert max(abs(place - int(each)) for place, each in enumerate(ids)) < 256
    assert found == list(batches(jobs(lengths), 4))


def test_samples_alone_keep_their_order():
    asked = jobs([3, 9, 1])
    assert list(batches(asked, 1)) == [[each] for each in asked]
