"""Servers that answer without end, slowly, wrongly, or send readers elsewhere."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from yarl import URL

import h5traces
from h5traces.errors import RemoteError
from h5traces.storage.remote.answers import RangeRequest
from h5traces.storage.remote.file import list_remote
from h5traces.storage.remote.paths import RemoteOptions, RemotePath, TemporaryError
from h5traces.storage.remote.web import _redirected

HERE = Path(__file__).parent
MOST_NBYTES = 200 << 20
QUICK = RemoteOptions(attempts=1, timeout=1.0, total_timeout=2.5, min_bytes_per_second=1000)
# Where no limit of time is the point.
PATIENT = RemoteOptions(attempts=1)


class HostileServer:
    def __init__(self, port):
        self.url = f"http://127.0.0.1:{port}"

    def asked(self):
        with urllib.request.urlopen(f"{self.url}/__control__", b"{}", timeout=60) as answer:
            return json.load(answer)


@contextlib.contextmanager
def running():
    command = [sys.executable, str(HERE / "hostile_server.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield HostileServer(int(process.stdout.readline()))
        finally:
            process.kill()


@pytest.fixture(scope="module")
def process():
    with running() as server:
        yield server


@pytest.fixture(scope="module")
def other_process():
    with running() as server:
        yield server


@pytest.fixture
def server(process):
    process.asked()
    return process


@pytest.fixture
def other(other_process):
    other_process.asked()
    return other_process


def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@contextlib.contextmanager
def bounded(seconds=10.0, nbytes=MOST_NBYTES):
    """The block takes no longer than this, and no more memory beyond what there is."""
    before, most, done = resident(), [0], threading.Event()

    def watch():
        while not done.wait(0.005):
            most[0] = max(most[0], resident())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.monotonic()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    assert time.monotonic() - started < seconds
    assert most[0] - before < nbytes, f"{(most[0] - before) / 1e6:.0f} MB"


def listed(url, remote=QUICK, **storage):
    options = RemoteOptions(
        **{name: getattr(remote, name) for name in remote.__slots__ if name != "storage_options"},
        storage_options=storage,
    )
    return list_remote(RemotePath(url), (".h5",), options)


@pytest.fixture(scope="module", autouse=True)
def _warm(process):
    """Libraries are loaded before anything is measured."""
    for url in (f"{process.url}/deep/", "s3://s3-no-range/"):
        with contextlib.suppress(RemoteError):
            listed(url, **(storage(process) if url.startswith("s3") else {}))


def storage(server):
    return {"key": "key", "secret": "secret", "token": "a-token", "endpoint_url": server.url}


# --- listings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("endless-page", "listing of more than 16777216 bytes"),
        ("endless-page-without-length", "listing of more than 16777216 bytes"),
        ("endless-links", "listing of more than 16777216 bytes"),
        ("many-links", "listing of more than 100000 objects"),
        ("bomb", "listing of more than 16777216 bytes"),
        ("tree", "listing of more than 100000 objects|for more than 2.5 s"),
    ],
)
@pytest.mark.parametrize("pattern", ["", "*.h5", "**/*.h5"])
def test_a_listing_without_end_comes_to_one(server, how, expected, pattern):
    if how == "tree" and pattern == "*.h5":
        assert listed(f"{server.url}/{how}/{pattern}") == []
        return
    with bounded(), pytest.raises(RemoteError, match=expected):
        listed(f"{server.url}/{how}/{pattern}")


def test_a_folder_that_holds_itself_ends(server):
    with bounded():
        found = listed(f"{server.url}/deep/")
    assert len(found) == 33
    assert str(found[0]) == f"{server.url}/deep/" + "a/" * 32 + "file.h5"


def test_limits_are_the_users(server):
    few = RemoteOptions(attempts=1, max_listed=30)
    with pytest.raises(RemoteError, match=r"more than 30 objects; .*max_listed"):
        listed(f"{server.url}/deep/", few)
    short = RemoteOptions(attempts=1, max_listing_nbytes=10)
    with pytest.raises(RemoteError, match="more than 10 bytes"):
        listed(f"{server.url}/deep/", short)


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("s3-endless-list", "answers with more than 16777216 bytes"),
        ("s3-endless-entries", "answers with more than 16777216 bytes"),
        ("s3-endless-pages", "more than 100000 objects|for more than 2.5 s"),
        ("s3-endless-error", "answers with more than 16777216 bytes"),
    ],
)
@pytest.mark.parametrize("pattern", ["", "*.h5", "**/*.h5"])
def test_a_listing_of_s3_without_end_comes_to_one(server, how, expected, pattern):
    with bounded(15), pytest.raises(RemoteError, match=expected):
        listed(f"s3://{how}/{pattern}", **storage(server))


# --- heads and bodies -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        "endless-headers",
        "endless-header",
        "endless-status",
        "endless-continue",
        "slow-head",
        "endless-range",
        "endless-chunked-range",
        "endless-object",
        "long-range",
        "two-lengths",
        "range-bomb",
        "slow-range",
        "silent-range",
        "circle",
    ],
)
def test_an_answer_without_end_comes_to_one(server, how):
    with bounded(), pytest.raises(RemoteError, match=f"{server.url}/{how}/a.h5: "):
        h5traces.open(f"{server.url}/{how}/a.h5", remote=QUICK)


@pytest.mark.parametrize(
    "how", ["endless-trailers", "endless-extension", "slow-page", "slow-head", "endless-headers"]
)
def test_a_page_without_end_comes_to_one(server, how):
    with bounded():
        # What came before trailers is a page.
        with contextlib.suppress(RemoteError):
            assert listed(f"{server.url}/{how}/") == []


@pytest.mark.parametrize(
    "how",
    [
        "endless-range",
        "endless-chunked-range",
        "endless-object",
        "long-range",
        "slow-range",
        "slow-head",
        "silent-range",
        "endless-headers",
        "endless-continue",
        "s3-endless-error",
        "s3-no-range",
    ],
)
def test_an_answer_of_s3_without_end_comes_to_one(server, how):
    with bounded(), pytest.raises(RemoteError, match=f"s3://{how}/a.h5: "):
        h5traces.open(f"s3://{how}/a.h5", remote=QUICK, storage_options=storage(server))


def test_slow_answers_are_named(server):
    with pytest.raises(RemoteError, match=r"it sends \d+ bytes per second, expected at least 1000"):
        h5traces.open(f"{server.url}/slow-range/a.h5", remote=QUICK)
    patient = RemoteOptions(attempts=1, timeout=1.0, total_timeout=3.0, min_bytes_per_second=1)
    with pytest.raises(RemoteError, match=r"not finished its answer after 3 s \(total_timeout"):
        h5traces.open(f"{server.url}/slow-range/a.h5", remote=patient)


# --- redirects ------------------------------------------------------------------------------------

SECRETS = {
    "headers": {"X-Api-Key": "a-secret", "Authorization": "Bearer a-secret"},
    "client_kwargs": {"headers": {"X-More": "a-secret"}, "cookies": {"c": "a-secret"}},
}


def test_headers_go_to_the_named_host_only(server, other):
    target = f"{other.url}/long-range/a.h5"
    with pytest.raises(RemoteError, match="sends more than"):
        h5traces.open(f"{server.url}/redirect/to/{target}", remote=PATIENT, storage_options=SECRETS)
    (own,), (foreign,) = server.asked(), other.asked()
    assert own["headers"]["x-api-key"] == own["headers"]["x-more"] == "a-secret"
    assert "a-secret" in own["headers"]["cookie"]
    assert "a-secret" not in str(foreign)
    assert foreign["headers"]["range"] == own["headers"]["range"]


def test_headers_do_not_come_back_with_a_second_redirect(server, other):
    target = f"{other.url}/redirect/to/{server.url}/long-range/a.h5"
    with pytest.raises(RemoteError, match="sends more than"):
        h5traces.open(f"{server.url}/redirect/to/{target}", remote=PATIENT, storage_options=SECRETS)
    first, last = server.asked()
    assert "a-secret" in str(first)
    assert "a-secret" not in str(last)


def test_a_redirect_on_the_same_host_keeps_them(server):
    with pytest.raises(RemoteError, match="sends more than"):
        h5traces.open(
            f"{server.url}/redirect/to//long-range/a.h5", remote=PATIENT, storage_options=SECRETS
        )
    first, last = server.asked()
    assert first["headers"]["x-api-key"] == last["headers"]["x-api-key"] == "a-secret"


def test_headers_of_a_listing_go_to_the_named_host_only(server, other):
    assert listed(f"{server.url}/redirect/to/{other.url}/deep/*.h5", **SECRETS) != []
    assert "a-secret" in str(server.asked())
    assert "a-secret" not in str(other.asked())


def test_passwords_of_an_address_go_to_its_host_only(server, other):
    address = server.url.replace("//", "//user:a-secret@")
    with pytest.raises(RemoteError, match="sends more than"):
        h5traces.open(f"{address}/redirect/to/{other.url}/long-range/a.h5", remote=PATIENT)
    assert "authorization" in server.asked()[0]["headers"]
    assert "authorization" not in other.asked()[0]["headers"]


def test_a_redirect_with_an_endless_body(server, other):
    with bounded(), pytest.raises(RemoteError, match="sends more than"):
        h5traces.open(
            f"{server.url}/redirect-with-body/to/{other.url}/long-range/a.h5", remote=PATIENT
        )


def test_requests_to_s3_follow_no_redirect(server, other):
    """The token of a session is a header like any other."""
    with bounded(), pytest.raises(RemoteError, match="follow no redirect"):
        h5traces.open("s3://s3-redirect/a.h5", remote=PATIENT, storage_options=storage(server))
    with bounded(), pytest.raises(RemoteError, match="follow no redirect"):
        listed("s3://s3-redirect/*.h5", **storage(server))
    assert all("a-token" in str(each) for each in server.asked())


@pytest.mark.parametrize("target", ["file:///etc/passwd", "ftp://host/a", "data:,x", ""])
def test_a_redirect_leads_to_a_web_address(server, target):
    with pytest.raises(RemoteError, match="redirects to no web address"):
        h5traces.open(f"{server.url}/redirect/to/{target}", remote=PATIENT)


def test_https_never_becomes_http():
    path, place = RemotePath("https://host/a.h5"), URL("https://host/a.h5")
    with pytest.raises(RemoteError, match="from https to http"):
        _redirected(path, place, "http://host/a.h5")
    assert _redirected(path, place, "/b.h5") == URL("https://host/b.h5")
    assert _redirected(path, URL("http://host/a"), "https://host/a") == URL("https://host/a")


@pytest.mark.parametrize(
    "header",
    [
        "",
        "bytes 0-99/*",
        "bytes */100",
        "bytes 100-199",
        "bytes 1-100/200",
        "bytes 100-99/200",
        "bytes 100-300/400",
        "bytes -100-199/200",
        "bytes 100-199/99999999999999999999",
        "BYTES 100-199/200 ",
        "bytes 100-199/200\r\nX: y",
        "bytes \u0661\u0660\u0660-\u0661\u0669\u0669/\u0662\u0660\u0660",
    ],
)
def test_a_range_is_the_one_asked_for(header):
    request = RangeRequest(RemotePath("https://host/a.h5"), 100, 100)
    with pytest.raises(RemoteError, match="the server answers with the range"):
        request.read_content_range(header)


@pytest.mark.parametrize("nbytes", [0, 99, 101])
@pytest.mark.parametrize("offset", [None, 100])
def test_an_answer_has_the_bytes_that_it_names(offset, nbytes):
    request = RangeRequest(RemotePath("https://host/a.h5"), offset, 100)
    request.read_content_range("bytes 100-199/200")
    with pytest.raises((RemoteError, TemporaryError)):
        request.reply(bytes(nbytes))


def test_a_range_ends_where_the_object_does():
    request = RangeRequest(RemotePath("https://host/a.h5"), None, 100)
    request.read_content_range("bytes 0-99/50")
    with pytest.raises(RemoteError, match="more than"):
        request.reply(bytes(100))
