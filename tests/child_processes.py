"""Processes that tests start, whoever started the tests.

A child inherits ignored signals: under ``nohup``, or in the background of a shell, Ctrl-C would not
reach it. And it writes into the home of whoever runs the tests, unless that is another folder.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

REAL_HOME = Path.home()
# Not `preexec_fn`: Python warns of it where the tests run threads.
_LAUNCHER = """
import os, signal, sys
names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT", "SIGPIPE", "SIGXFSZ")
numbers = [getattr(signal, name) for name in names]
for number in numbers:
    signal.signal(number, signal.SIG_DFL)
signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
os.execvp(sys.argv[1], sys.argv[1:])
"""


def start_process(command: list[str], **options: Any) -> subprocess.Popen[str]:
    """A process that a test sends signals to, which do what they do in a terminal.

    Its output is text, and comes by pipes where `options` do not say otherwise.
    """
    launched = [sys.executable, "-I", "-S", "-c", _LAUNCHER, *command]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(launched, text=True, **{**pipes, **options})


def leave_home() -> tempfile.TemporaryDirectory[str]:
    """Give this process and its children an empty home, which goes with the returned object."""
    folder = tempfile.TemporaryDirectory(prefix="h5traces-home-", ignore_cleanup_errors=True)
    # Packages that were installed for the user stay.
    os.environ.setdefault("PYTHONUSERBASE", site.getuserbase())
    os.environ["HOME"] = folder.name
    return folder
