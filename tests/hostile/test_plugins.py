"""No filter plugin on disk is looked at for the sake of a file.

The plugin folder holds a pipe under a plugin's name. Loading it would open it for reading, which
shows at the other end.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import hdf5_attacks
import plugin_attacks
import pytest
import specimen
from h5py import h5pl

from h5traces.rewriting.repack import repack
from h5traces.storage.hdf5.safety import no_plugin_search
from h5traces.writing.options import PrecisionOptions

SECONDS = 60
FOLDER = Path(__file__).parent
READ_WITH_H5PY = "import h5py, sys; h5py.File(sys.argv[1])['samples/00000000/tokens'][:]"
READ_WITH_PLUGIN = (
    f"import hdf5plugin, h5py, sys; h5py.File(sys.argv[1])['{plugin_attacks.LAYER}'][:]"
)
READ_WITH_US = """
import contextlib, sys, warnings
sys.path.insert(0, sys.argv[2])
import h5traces, probe
from h5traces.format.limits import ReadLimits
warnings.simplefilter("ignore")
limits = ReadLimits(search_plugins=len(sys.argv) > 3)
h5traces.validate(sys.argv[1], limits=limits)
with contextlib.suppress(h5traces.errors.H5TracesError):
    probe.read(sys.argv[1])
for name in probe.COMMANDS:
    probe.command(name, sys.argv[1])
"""
ASK_HDF5 = """
from h5py import h5z
from h5traces.storage.hdf5.safety import no_plugin_search
import sys
with no_plugin_search(allowed=len(sys.argv) > 3):
    h5z.filter_avail(54321)
"""


def is_loaded(tmp_path: Path, code: str, path: Path, *more: str) -> bool:
    """Whether the code, run in its own process, opens the plugin."""
    folder = tmp_path / "plugins"
    folder.mkdir()
    pipe = folder / "libh5trap.so"
    os.mkfifo(pipe)
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(path), str(FOLDER), *more],
        env={**os.environ, "HDF5_PLUGIN_PATH": str(folder)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    end = time.monotonic() + SECONDS
    while child.poll() is None and time.monotonic() < end:
        try:
            # Works only while somebody waits at the other end; then the plugin is an empty file.
            os.close(os.open(pipe, os.O_WRONLY | os.O_NONBLOCK))
        except OSError:
            time.sleep(0.01)
            continue
        child.kill()
        child.communicate()
        return True
    _, errors = child.communicate()
    assert code == READ_WITH_H5PY or child.returncode == 0, errors
    return False


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "archive.h5"
    specimen.write(made)
    hdf5_attacks.unknown_filter(made)
    return made


def test_trap_works(tmp_path: Path, path: Path) -> None:
    assert is_loaded(tmp_path, READ_WITH_H5PY, path)


def test_unknown_filter_loads_no_plugin(tmp_path: Path, path: Path) -> None:
    assert not is_loaded(tmp_path, READ_WITH_US, path)


def test_unknown_filter_of_index_loads_no_plugin(tmp_path: Path) -> None:
    path = tmp_path / "archive.h5"
    specimen.write(path)
    hdf5_attacks.unknown_filter_of_index(path)
    assert not is_loaded(tmp_path, READ_WITH_US, path)


def test_known_filter_is_not_looked_for_on_disk(tmp_path: Path) -> None:
    source, path = tmp_path / "source.h5", tmp_path / "archive.h5"
    specimen.write(source)
    repack(source, path, precision=PrecisionOptions(codec="zstd"))
    assert not is_loaded(tmp_path, READ_WITH_US, path)


def is_executed(folder: Path, code: str, path: Path) -> bool:
    """Whether the code imports a package that lies in the folder it is started in."""
    (folder / "blosc2_grok.py").write_text("open('executed.txt', 'w').close()")
    # `python` and `python3` are what Blosc2 starts.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    subprocess.run(
        [sys.executable, "-c", code, str(path), str(FOLDER)],
        cwd=folder,
        env={**os.environ, "PATH": search},
        capture_output=True,
        timeout=SECONDS,
        check=False,
    )
    return (folder / "executed.txt").exists()


def test_codec_of_a_chunk_executes_nothing(tmp_path: Path) -> None:
    """With h5py and hdf5plugin, reading in a stranger's folder runs the stranger's code."""
    path = tmp_path / "archive.h5"
    specimen.write(path)
    plugin_attacks.put_chunk(path, "blosc2", plugin_attacks.user_codec)
    folders = [tmp_path / "stock", tmp_path / "ours"]
    for folder in folders:
        folder.mkdir()
    assert is_executed(folders[0], READ_WITH_PLUGIN, path)
    assert not is_executed(folders[1], READ_WITH_US, path)


def test_hdf5_itself_searches_only_where_asked_to(tmp_path: Path, path: Path) -> None:
    assert not is_loaded(tmp_path, ASK_HDF5, path)
    shutil.rmtree(tmp_path / "plugins")
    assert is_loaded(tmp_path, ASK_HDF5, path, "allowed")


def test_search_path_is_given_back() -> None:
    before = search_path()
    assert before
    with pytest.raises(ZeroDivisionError):
        leave_by_an_error()
    assert search_path() == before


def search_path() -> list[bytes]:
    return [h5pl.get(index) for index in range(h5pl.size())]


def leave_by_an_error() -> None:
    with no_plugin_search(allowed=False):
        assert search_path() == []
        with no_plugin_search(allowed=False):
            assert search_path() == []
        raise ZeroDivisionError
