"""Peak memory: every case in a separate process."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from suite.cases.children import call
from suite.formats import all_formats
from suite.workspace import payload_nbytes

if TYPE_CHECKING:
    from collections.abc import Callable

    from suite.workspace import Workspace


def _chosen(name: str, formats: tuple[str, ...] | None) -> bool:
    """Of the other codecs of h5traces, more threads show more than one does."""
    if formats is not None:
        return name in formats
    return "h5traces" not in name or "gzip" in name or "all cores" in name


def run(workspace: Workspace, log: Callable[[str], None]) -> dict[str, Any]:
    """Resident bytes of a bare interpreter, after imports, and at the peak."""
    folder = workspace.folder / "memory"
    folder.mkdir()
    formats: dict[str, Any] = {}
    for name, each in all_formats().items():
        if not each.installed or not _chosen(name, workspace.scale.memory_formats):
            continue
        log(f"  {name}")
        path = each.path(folder)
        found = formats.setdefault(name, {})
        if not each.written_by:
            path.unlink(missing_ok=True)
            samples = str(workspace.sample_files)
            found["write"] = call("write", format=name, path=str(path), samples=samples)
        found["scan"] = call("scan", format=name, path=str(path))
    commands: dict[str, Any] = {}
    target = folder / "converted.h5"
    for source in (workspace.batch_pkl, workspace.batch_gz):
        for verify in (False, True):
            suffix = "".join(source.suffixes[-2:] if source.suffix == ".gz" else source.suffixes)
            name = f"convert {suffix} {'--verify' if verify else '--no-verify'}"
            log(f"  {name}")
            commands[name] = call("convert", path=str(source), target=str(target), verify=verify)
            target.unlink()
    commands["gzip + pickle.load"] = call("load_pickle", path=str(workspace.batch_gz))
    shutil.rmtree(folder)
    return {
        "largest_sample_nbytes": max(payload_nbytes([each]) for each in workspace.samples),
        "payload_nbytes": payload_nbytes(workspace.samples),
        "formats": formats,
        "commands": commands,
    }
