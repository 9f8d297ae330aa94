"""Memory of arrays that were let go is used again, and never while something refers to it."""

from __future__ import annotations

import gc
import os
import random
import threading

import numpy as np

from h5traces.storage.memory import Pool

MB = 1 << 20


def address(array: np.ndarray) -> int:
    return int(array.__array_interface__["data"][0])


def test_memory_comes_back_when_the_last_view_is_gone() -> None:
    pool = Pool()
    first = pool.array(3 * MB)
    place = address(first)
    view = np.ndarray((10, 10), "f2", first, 64)[2:]
    held = memoryview(first)
    del first
    second = pool.array(3 * MB)
    assert address(second) != place
    assert pool.kept == 0
    del view
    assert pool.kept == 0
    held.release()
    del held
    gc.collect()
    assert 3 * MB <= pool.kept <= 3.4 * MB
    assert address(pool.array(3 * MB - 1000)) == place


def test_no_more_is_kept_than_allowed() -> None:
    pool = Pool(4 * MB)
    arrays = [pool.array(1 * MB) for _ in range(10)]
    assert pool.kept == 0
    del arrays
    gc.collect()
    assert 3 * MB <= pool.kept <= 4 * MB


def test_arrays_of_all_sizes_are_writable_and_as_long_as_asked() -> None:
    pool = Pool()
    for nbytes in (0, 1, 128 << 10, (128 << 10) + 1, 5 * MB + 3):
        array = pool.array(nbytes)
        array[:] = 7
        assert array.nbytes == nbytes
        assert array.flags.c_contiguous


def test_threads_never_share_memory() -> None:
    pool = Pool(8 * MB)
    wrong: list[int] = []

    def work(number: int) -> None:
        order = random.Random(number)
        for _ in range(200):
            array = pool.array(order.randrange(128 << 10, 1 * MB))
            array[::4096] = number
            if not (array[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_a_forked_process_leaves_the_memory_of_its_parent_alone() -> None:
    pool = Pool()
    array = pool.array(1 * MB)
    array[:] = 1
    process = os.fork()
    if not process:
        array[:] = 2
        os._exit(0)
    os.waitpid(process, 0)
    assert (array == 1).all()
