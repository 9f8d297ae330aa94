"""Stops at some of the calls; ``python tools/crash_test.py`` tries all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from scenarios import SCENARIOS

ENGINE = Path(__file__).with_name("crashing.py")
# Syncing a real disk thousands of times takes minutes, and the harness counts syncs by itself.
FAST_FOLDER = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None

# Kinds of stops, and how many of them per scenario.
COUNTS = {"kill": 6, "signal": 3, "error": 2, "power": 8, "limit": 3, "random": 5}


def stop(scenario: str, *options: str) -> list[dict]:
    command = [sys.executable, str(ENGINE), scenario, *options]
    if FAST_FOLDER is not None:
        command += ["--folder", FAST_FOLDER]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.fixture(scope="module")
def results():
    """All scenarios, run side by side."""
    stops = [f"{kind}={count}" for kind, count in COUNTS.items()]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        started = {scenario: pool.submit(stop, scenario, *stops) for scenario in SCENARIOS}
        yield started
        for each in started.values():
            each.cancel()


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_nothing_is_lost_and_the_next_run_finishes(scenario, results):
    found = results[scenario].result()
    assert {each["kind"] for each in found} == set(COUNTS)
    for each in found:
        assert each["stops"] > 0, each
        assert not each["problems"], each
        assert not each["parts"], each


@pytest.mark.parametrize("without", ["file sync", "folder sync"])
def test_these_tests_notice_a_writer_that_does_not_sync(without):
    (found,) = stop("run into shards", "power=4", "--without", without)
    assert found["lost"] > 0
