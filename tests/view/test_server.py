"""The local server: ranges of the archives that were named, and nothing else, to nobody else."""

from __future__ import annotations

import http.client
import os
import re
import signal
import socket
import subprocess
import sys
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest
from view_helpers import TOKEN, item, served, written

import h5traces
from h5traces.errors import OptionError, TargetError

if TYPE_CHECKING:
    from pathlib import Path


def ask(
    url: str, path: str, method: str = "GET", **headers: str
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and content of an answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=120)
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request(method, path, headers=named)
    answer = connection.getresponse()
    found = answer.status, {key.lower(): value for key, value in answer.getheaders()}, answer.read()
    connection.close()
    return found


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("server") / "run.h5", item(0, 4))


@pytest.mark.parametrize(
    ("stated", "part"),
    [
        ("bytes=0-7", slice(0, 8)),
        ("bytes=100-", slice(100, None)),
        ("bytes=-64", slice(-64, None)),
        ("bytes=-999999999", slice(None)),
        ("bytes=8-99999999999", slice(8, None)),
    ],
)
def test_ranges(archive: Path, stated: str, part: slice) -> None:
    data = archive.read_bytes()
    with served(archive) as url:
        status, headers, content = ask(url, f"/{TOKEN}/files/0/run.h5", Range=stated)
        assert status == 206
        assert content == data[part]
        start = range(len(data))[part][0]
        assert headers["content-range"] == f"bytes {start}-{start + len(content) - 1}/{len(data)}"
        status, headers, content = ask(url, f"/{TOKEN}/files/0/x", "HEAD", Range=stated)
        assert (status, content) == (206, b"")
        tag = headers["etag"]
        assert ask(url, f"/{TOKEN}/files/0/x", Range=stated, If_Match=tag)[0] == 206
        assert ask(url, f"/{TOKEN}/files/0/x", Range=stated, If_Match='"other"')[0] == 412


@pytest.mark.parametrize(
    "stated", ["", "bytes=", "bytes=5-3", "bytes=-0", "lines=1-2", "bytes=0-1,4-5"]
)
def test_other_ranges_are_rejected(archive: Path, stated: str) -> None:
    with served(archive) as url:
        status, _, content = ask(
            url, f"/{TOKEN}/files/0/run.h5", **({"Range": stated} if stated else {})
        )
        assert status == 416
        assert archive.read_bytes() not in content


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/index.html",
        "/files/0/run.h5",
        "/wrong/files/0/run.h5",
        "/{token}/files/1/run.h5",
        "/{token}/files/-1/run.h5",
        "/{token}/files/0/../../../../etc/passwd",
        "/{token}/..%2f..%2fetc%2fpasswd",
        "/{token}/server.py",
        "/{token}/%2e%2e/server.py",
        "//etc/passwd",
    ],
)
def test_nothing_else_is_served(archive: Path, path: str) -> None:
    with served(archive) as url:
        status, _, content = ask(url, path.format(token=TOKEN), Range="bytes=0-100")
        assert status in (404, 405)
        assert b"root:" not in content
        assert b"HDF" not in content


def test_other_pages_and_names_are_turned_away(archive: Path) -> None:
    with served(archive) as url:
        own = urlsplit(url).netloc
        for headers in (
            {"Host": "evil.example"},
            {"Host": f"localhost:{own.split(':')[1]}"},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
        ):
            status, _, content = ask(
                url, f"/{TOKEN}/files/0/run.h5", Range="bytes=0-100", **headers
            )
            assert (status, content) == (403, b"requests come from this page only")
        status, found, _ = ask(url, f"/{TOKEN}/", Origin=f"http://{own}")
        assert status == 200
        assert "access-control-allow-origin" not in found
        assert "default-src 'none'" in found["content-security-policy"]
        assert "unsafe-inline" not in found["content-security-policy"]


def test_a_pipe_in_the_place_of_an_archive_is_not_waited_for(tmp_path: Path) -> None:
    path = written(tmp_path / "run.h5", item(0, 4))
    with served(path) as url:
        path.unlink()
        os.mkfifo(path)
        status, _, content = ask(url, f"/{TOKEN}/files/0/run.h5", Range="bytes=0-100")
        assert status == 502
        assert b"is not a regular file" in content


def test_a_port_in_use_is_named(archive: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(
            OptionError, match=rf"port={port}: Address already in use; name another"
        ):
            h5traces.view.serve(archive, port=port, browser=False)


def test_the_command_prints_an_address_and_ends_by_ctrl_c(archive: Path) -> None:
    command = [sys.executable, "-m", "h5traces", "view", str(archive), "--no-browser"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        address = process.stdout.readline().strip()
        found = re.fullmatch(r"http://127\.0\.0\.1:\d+/([\w-]{22})/", address)
        assert found, address
        for _ in range(100):
            try:
                status, _, content = ask(address, urlsplit(address).path)
                break
            except ConnectionError:
                pass
        assert status == 200
        assert b"viewer.js" in content
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 0
        assert "Traceback" not in process.stderr.read()


def test_the_page_is_written_into_a_new_folder(archive: Path, tmp_path: Path) -> None:
    files = h5traces.view.export_page(archive, tmp_path / "page")
    assert {each.name for each in files} == {each.name for each in (tmp_path / "page").iterdir()}
    assert (tmp_path / "page" / "00000.h5").read_bytes() == archive.read_bytes()
    with pytest.raises(TargetError, match="is not an empty folder"):
        h5traces.view.export_page(archive, tmp_path / "page")
    with pytest.raises(TargetError, match=r"browsers read from http:// and https:// only"):
        h5traces.view.export_page("s3://bucket/run.h5", tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_no_half_written_page_is_left(
    archive: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_documents: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("h5traces.view.static.list_document", full)
    with pytest.raises(OSError, match="No space left"):
        h5traces.view.export_page(archive, tmp_path / "out" / "page")
    assert list((tmp_path / "out").iterdir()) == []


def run(*arguments: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "h5traces", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command_exports(archive: Path, tmp_path: Path) -> None:
    done = run("view", archive, "--export", tmp_path / "page")
    assert done.returncode == 0
    assert "8 files" in done.stdout
    done = run("view", tmp_path / "nothing.h5")
    assert done.returncode == 2
    assert "no such file" in done.stderr
