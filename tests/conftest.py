"""What all tests share.

pytest puts the folder of this file on ``sys.path``, so that every test can import
``legacy_batches``, and the folder of each test, so that ``tests/roundtrip`` shares ``strategies``.
"""

from __future__ import annotations

import os
import shutil

import pytest
from child_processes import leave_home
from hypothesis import settings

# Disks and machines differ; a slow example is not a failure.
settings.register_profile("h5traces", deadline=None)
settings.load_profile("h5traces")

# So that no test, `h5traces --install-completion` least of all, changes the home of its user.
_HOME = leave_home()


def pytest_unconfigure() -> None:
    _HOME.cleanup()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    missing = [name for name in ("h5dump", "h5ls", "h5repack") if shutil.which(name) is None]
    if not missing:
        return
    if os.environ.get("CI"):
        message = f"{', '.join(missing)} not installed: CI must not skip what only they can show"
        raise pytest.UsageError(message)
    skip = pytest.mark.skip(reason=f"{', '.join(missing)} not installed")
    for item in items:
        if item.get_closest_marker("h5tools"):
            item.add_marker(skip)
