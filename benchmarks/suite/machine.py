"""What the figures were measured on."""

from __future__ import annotations

import os
import platform
import sys
import zlib
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Final

from h5traces.format.native import describe

PACKAGES: Final = (
    "h5traces",
    "numpy",
    "h5py",
    "hdf5plugin",
    "isal",
    "zlib-ng",
    "torch",
    "safetensors",
    "zarr",
    "numcodecs",
    "matplotlib",
)


def describe_machine(work: Path) -> dict[str, str]:
    """Processor, memory, system and file system; no names of hosts or folders."""
    return {
        "processor": _processor(),
        "cores": str(os.cpu_count()),
        "memory": f"{_memory_nbytes() / 1e9:.0f} GB",
        "system": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "file system": _file_system(work),
        "kernels": describe(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def load_average() -> str:
    """Runnable processes over the last 1, 5 and 15 minutes."""
    return " ".join(f"{each:.1f}" for each in os.getloadavg())


def versions() -> dict[str, str]:
    """Python, libraries, and the C libraries beneath them."""
    found = {"python": platform.python_version(), "zlib": zlib.ZLIB_RUNTIME_VERSION}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    import h5py

    found["HDF5"] = h5py.version.hdf5_version
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _memory_nbytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _file_system(folder: Path) -> str:
    mounts = Path("/proc/mounts")
    if not mounts.exists():
        return sys.platform
    lines = [line.split()[1:3] for line in mounts.read_text().splitlines()]
    inside = [(point, kind) for point, kind in lines if folder.resolve().is_relative_to(point)]
    return max(inside, key=lambda pair: len(pair[0]), default=("", "unknown"))[1]
