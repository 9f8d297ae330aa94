"""verify, repack, merge, split and salvage as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from legacy_batches import make_archive, make_batch

import h5traces

COMMAND = Path(sys.executable).with_name("h5traces")


def run(*arguments):
    return subprocess.run(
        [COMMAND, *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def archive(tmp_path):
    return make_archive(tmp_path, make_batch("full_pkl"))


def damage(archive):
    data = bytearray(archive.read_bytes())
    entry = h5traces.open(archive)[1]._stored.entry("attentions/layer_001")
    data[entry.chunks.offsets[0] + 4] ^= 8
    archive.write_bytes(data)


def test_verify_says_intact_and_proves_a_conversion(archive):
    done = run("verify", archive, "--deep", "--against", archive.with_name("batch.pkl"))
    assert done.returncode == 0
    assert f"{archive}: intact" in done.stdout
    assert "samples compared with" in done.stdout
    assert not done.stderr


def test_verify_names_the_damage_and_exits_1(archive):
    damage(archive)
    done = run("verify", archive)
    assert done.returncode == 1
    assert f"{archive}:/samples/00000001/attentions/layer_001: a stored chunk is" in done.stdout
    assert "run 'h5traces salvage', which saves the samples that are intact" in done.stderr
    report = json.loads(run("verify", archive, "--json").stdout)
    assert report[0]["problems"][0]["loc"] == "/samples/00000001/attentions/layer_001"


@pytest.mark.parametrize("command", ["repack", "merge", "export"])
def test_a_damaged_source_is_named_with_the_way_out(archive, tmp_path, command):
    damage(archive)
    target = tmp_path / ("out.pkl" if command == "export" else "out.h5")
    done = run(command, archive, "-o", target)
    assert done.returncode == 1
    place = "/samples/00000001/attentions/layer_001"
    assert f"error: {archive}: {place}: chunk 0 of attentions/layer_001 is damaged" in done.stderr
    assert "restore the file from a copy, or run 'h5traces salvage'" in done.stderr
    assert not target.exists()


def test_salvage_exits_1_and_lists_the_lost(archive, tmp_path):
    damage(archive)
    done = run("salvage", archive, "-o", tmp_path / "saved.h5")
    assert done.returncode == 1
    assert "lost [1]" in done.stdout
    assert "/samples/00000001/attentions/layer_001" in done.stderr
    assert run("verify", tmp_path / "saved.h5").returncode == 0
    whole = run("salvage", tmp_path / "saved.h5", "-o", tmp_path / "again.h5")
    assert whole.stdout == f"saved 5 samples in {tmp_path / 'again.h5'}, none lost\n"


def test_repack_copies_chunks_and_says_so(archive, tmp_path):
    done = run("repack", archive, "-o", tmp_path / "two.h5", "--layers", "0,2", "--samples", "0:3")
    assert done.returncode == 0
    assert "3 samples" in done.stdout
    assert "chunks copied" in done.stdout
    two = h5traces.open(tmp_path / "two.h5")
    assert (len(two), two.layers) == (3, (0, 2))


def test_split_and_merge(archive, tmp_path):
    done = run("split", archive, "-o", tmp_path / "s" / "run.h5", "-n", 4, "--json")
    targets = json.loads(done.stdout)["targets"]
    assert [Path(each).name for each in targets][:2] == ["run-00000.h5", "run-00001.h5"]
    assert run("merge", tmp_path / "s", "-o", tmp_path / "m.h5").returncode == 0
    assert h5traces.open(tmp_path / "m.h5").ids == h5traces.open(archive).ids


def test_another_codec_is_announced(archive, tmp_path):
    done = run("repack", archive, "-o", tmp_path / "z.h5", "--codec", "zstd")
    assert done.returncode == 0
    assert "HDF5 filters 2, 32015" in done.stderr
    assert "recompressed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["repack", "{archive}", "-o", "{archive}"], "is one of the sources"),
        (["repack", "{archive}", "-o", "{out}", "--layers", "9"], "layer 9 was asked for, but"),
        (["merge", "{missing}", "-o", "{out}"], "no such file"),
        (
            ["repack", "{archive}", "-o", "{out}", "--layers", "x"],
            "'x' is not a layer; expected 0-based numbers",
        ),
        (["repack", "{archive}", "-o", "{out}", "--samples", "a:b"], "expected indices such as"),
    ],
)
def test_wrong_use_is_explained_and_writes_nothing(archive, tmp_path, arguments, message):
    names = {"archive": archive, "out": tmp_path / "out.h5", "missing": tmp_path / "no.h5"}
    before = archive.read_bytes()
    done = run(*(each.format(**names) for each in arguments))
    assert done.returncode in (1, 2)
    assert message in " ".join(done.stderr.replace("│", " ").split())
    assert not (tmp_path / "out.h5").exists()
    assert archive.read_bytes() == before


def test_without_arguments_the_help_is_shown():
    for command in ([COMMAND], [sys.executable, "-m", "h5traces"]):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 2
        assert "Make archives" in done.stdout
        assert not done.stderr


def test_an_unknown_command_gets_a_suggestion():
    done = run("convrt")
    assert done.returncode == 2
    assert "Did you mean 'convert'?" in done.stderr
    assert "Usage: h5traces [OPTIONS] COMMAND…" in done.stderr


@pytest.mark.parametrize("command", ["convert", "label", "fidelity"])
def test_errors_and_help_show_the_same_usage(command):
    shown = run(command, "--help").stdout.splitlines()[0]
    done = run(command)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == shown


def test_label_says_which_argument_is_missing():
    assert "TABLE is missing; only run.h5" in run("label", "run.h5").stderr
    assert "FILE… is missing; only scores.csv" in run("label", "scores.csv").stderr


def test_a_reader_that_stops_early_ends_a_command_quietly(archive):
    for arguments in (["inspect", *[archive] * 300], ["inspect", archive, archive]):
        with subprocess.Popen(
            [COMMAND, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as child:
            child.stdout.close()
            assert child.stderr.read() == b""
            assert child.wait() == 0


def test_a_folder_is_no_batch_to_verify_against(archive, tmp_path):
    done = run("verify", archive, "--against", tmp_path)
    assert done.returncode == 2
    assert "takes one file that the archive was made from" in done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["inspect"],
        ["ls"],
        ["validate"],
        ["verify"],
        ["repack", "-o", "{out}"],
        ["merge", "-o", "{out}"],
        ["export", "-o", "{out}"],
        ["seal"],
        ["salvage", "-o", "{out}"],
        ["features", "--last-token", "-o", "{out}"],
        ["fidelity", "{no}"],
        ["calibrate", "-o", "{out}"],
    ],
)
def test_what_is_no_archive_is_a_problem_in_every_command(tmp_path, words):
    no = tmp_path / "no.h5"
    no.write_text("no archive")
    command, *options = (each.format(no=no, out=tmp_path / "out.h5") for each in words)
    done = run(command, no, *options)
    assert (done.returncode, command) == (1, command), done.stderr
