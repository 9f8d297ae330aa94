"""Every check fires on what it names, with the right numbers, and is silent on sound traces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from small_traces import HEADS, HIDDEN, LAYERS, TOKENS, dump, padded, record, states, trace, weights
from typer.testing import CliRunner

import h5traces
from h5traces.cli.app import app
from h5traces.errors import OptionError
from h5traces.format.precision import Precision
from h5traces.format.values import TorchValue
from h5traces.meaning.checks import CHECKS, CheckOptions, Finding, Findings, named_places
from h5traces.meaning.sample_checks import QUICK, Look, SampleChecks, sample_findings, vocabulary_of

if TYPE_CHECKING:
    from h5traces.meaning.checks import FindingSummary

LOOKS = {"quick": Look(), "full": Look(full_mapper=map)}
ROOT = Path(__file__).resolve().parents[2]
both = pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)


def findings(item: dict[str, Any], look: Look = QUICK) -> list[Finding]:
    return sample_findings(record(item), look)


def summaries(*items: dict[str, Any], look: Look = QUICK, **options: Any) -> list[FindingSummary]:
    checks = SampleChecks(look)
    for item in items:
        checks.add(record(item))
    return checks.findings.summaries(CheckOptions(**options))


def only(found: list[Finding], check: str) -> Finding:
    assert {each.check for each in found} == {check}, found
    return found[0]


@both
@pytest.mark.parametrize("seed", range(5))
def test_sound_traces_have_no_findings(look: Look, seed: int) -> None:
    assert findings(trace(seed), look) == []
    assert findings(trace(seed, tokens=40), look) == []


@both
@pytest.mark.parametrize(
    "changes",
    [
        {"attentions": [each.astype(np.float32) for each in weights(3)]},
        {"attentions": [each.mean(0, keepdims=True) for each in weights(3)]},
        {"attentions": [each[:, -1:] for each in weights(3)]},
        {
            "attentions": [each[:, -3:] for each in weights(3)],
            "hidden_states": [each[-3:] for each in states(3)],
            "tokens": np.arange(3),
            "tokens_decoded": ["a", "b", "c"],
        },
        {"hidden_states": [each.astype(">f4") for each in states(3)]},
        {
            "hidden_states": [each[:1] for each in states(3)],
            "attentions": [each[:, :1, :1] for each in weights(3)],
            "tokens": np.arange(1),
            "tokens_decoded": ["a"],
        },
    ],
    ids=["float32", "one_head", "last_query", "front_cut", "big_endian", "one_token"],
)  # fmt: skip
def test_other_sound_shapes_have_no_findings(look: Look, changes: dict[str, Any]) -> None:
    found = findings(trace(3) | changes, look)
    assert [each for each in found if each.check != "last-position-only"] == []


@both
def test_zero_layers_are_named(look: Look) -> None:
    items = [trace(each) for each in range(3)]
    for item in items:
        for layer in (2, 3):
            item["hidden_states"][layer][:] = 0
    (found,) = summaries(*items, look=look)
    assert found.check == "constant-layer"
    assert found.places == ["hidden_states/layer_002", "hidden_states/layer_003"]
    assert (found.num_samples, found.samples) == (3, [0, 1, 2])
    assert found.message in ("every value is 0", "every value looked at is 0")
    assert "hidden_states, layers 2, 3: every value" in str(found)


@both
def test_a_layer_of_one_value_and_one_of_one_state(look: Look) -> None:
    item = trace(1, tokens=12)
    item["hidden_states"][0][:] = -1.5
    item["hidden_states"][1][:] = item["hidden_states"][1][0]
    messages = {each.place: each.message for each in findings(item, look)}
    assert messages == {
        "hidden_states/layer_000": f"every value{'' if look.full_mapper else ' looked at'} is -1.5",
        "hidden_states/layer_001": "all tokens have the same state",
    }


def test_one_odd_value_makes_a_layer_no_constant() -> None:
    item = trace(1, tokens=100)
    item["hidden_states"][2][:] = 0
    item["hidden_states"][2][50, 3] = 1
    assert "every value is 0" not in [each.message for each in findings(item, LOOKS["full"])]
    assert only(findings(item), "constant-layer").message == "every value looked at is 0"


@both
def test_zero_attentions_are_constant_and_nothing_else(look: Look) -> None:
    item = trace(1)
    item["attentions"][1][:] = 0
    assert only(findings(item, look), "constant-layer").place == "attentions/layer_001"


@both
@pytest.mark.parametrize("factor", [100.0, 0.01])
def test_a_layer_with_another_norm(look: Look, factor: float) -> None:
    item = trace(1)
    item["hidden_states"] = [each.astype(np.float32) for each in states(1, layers=6)]
    item["attentions"] = weights(1, layers=6)
    norms = [np.sort(np.linalg.norm(each[1:], axis=1))[3] for each in item["hidden_states"]]
    item["hidden_states"][3] *= np.float32(factor)
    (found,) = summaries(item, look=look)
    assert (found.check, found.places) == ("norm-outlier", ["hidden_states/layer_003"])
    of = max if factor > 1 else min
    # The last state is normed, and none of the neighbours.
    times = factor * norms[3] / of(norms[1], norms[2], norms[4])
    assert f"{'huge' if factor > 1 else 'tiny'}: {times:.3g} times" in found.message


@both
def test_norms_that_grow_and_massive_first_tokens_are_sound(look: Look) -> None:
    item = trace(1)
    layers = [each * np.float16(3.0**layer) for layer, each in enumerate(states(1, layers=6))]
    for layer in layers[2:5]:
        layer[0] = 2000
    item |= {"hidden_states": layers, "attentions": weights(1, layers=6)}
    assert findings(item, look) == []


@both
def test_weights_outside_0_to_1(look: Look) -> None:
    item = trace(1)
    item["attentions"][0][:, 3, 1] = -0.25
    item["attentions"][2][0, -1, 0] = 3
    found = [each for each in findings(item, look) if each.check == "attention-out-of-range"]
    assert [each.place for each in found] == ["attentions/layer_000", "attentions/layer_002"]
    low, high = found[0].span or (0, 0)
    assert low == -0.25
    assert high <= 1
    assert found[1].span == (0, 3)


@both
def test_rows_that_do_not_sum_to_1_say_their_sums(look: Look) -> None:
    """A learned sink takes a part of every row; features are told of in the reason."""
    item = trace(1)
    item["attentions"] = [
        (each * np.float16(0.5 if layer == 2 else 1)) for layer, each in enumerate(weights(1))
    ]
    item["attentions"][3][1, 4] = 0
    sums, zeros = summaries(item, look=look)
    assert sums.places == ["attentions/layer_002"]
    assert sums.message == f"{HEADS * TOKENS} rows with a sum of 0.5, not 1"
    assert zeros.message == "1 row of zeros"
    assert "divide each row by its sum" in CHECKS["attention-rows"].reason


def test_what_the_finding_says_of_features_is_so() -> None:
    from h5traces.features.reductions import lookback_ratio, row_entropy, sink_mass

    whole = weights(1)[0].astype(np.float32)
    half = whole * np.float32(0.5)
    np.testing.assert_allclose(row_entropy(half), row_entropy(whole), rtol=1e-5)
    np.testing.assert_allclose(sink_mass(half), sink_mass(whole), rtol=1e-5)
    np.testing.assert_allclose(lookback_ratio(half, 3), lookback_ratio(whole, 3), rtol=1e-5)
    uneven = whole.copy()
    uneven[:, -1] *= 0.5
    np.testing.assert_allclose(row_entropy(uneven), row_entropy(whole), rtol=1e-5)


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("keys", [16, 512, 4096])
def test_softmax_of_every_type_is_within_the_tolerance(kind: str, keys: int) -> None:
    torch = pytest.importorskip("torch")
    scores = 3 * torch.randn(8, 64, keys, generator=torch.Generator().manual_seed(keys))
    rows = torch.softmax(scores.to(getattr(torch, kind)), dim=-1)
    assert float((rows.float().sum(-1) - 1).abs().max()) < 0.01


@both
def test_mass_on_later_tokens(look: Look) -> None:
    item = trace(1, attentions=weights(1))
    item["attentions"][1][:, 2, 5] = 0.2
    item["attentions"][1][:, 2, 0] -= np.float16(0.2)
    found = [each for each in findings(item, look) if each.check == "attention-not-causal"]
    assert [(each.place, each.message, each.number) for each in found] == [
        ("attentions/layer_001", "{number row} with attention to later tokens", HEADS)
    ]


@both
@pytest.mark.parametrize("left", [True, False])
def test_rows_of_padding_are_not_looked_at(look: Look, left: bool) -> None:
    """Models fill the rows of padded queries as they like: transformers with equal weights."""
    item = trace(1, attentions=weights(1))
    pads, tokens = (slice(0, 2), slice(2, None)) if left else (slice(-2, None), slice(0, -2))
    item["attention_mask"] = np.ones(TOKENS, dtype=np.int64)
    item["attention_mask"][pads] = 0
    for each in item["attentions"]:
        each[:, tokens, pads] = 0
        each[:, tokens, tokens] /= each[:, tokens, tokens].sum(-1, keepdims=True)
        each[:, pads] = 0.5
    kept = sample_findings(record(item, keep_padding=True), look)
    assert [each.check for each in kept] == ["padding-kept"]


def without_answer(item: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in item.items() if key != "generated_answer_clean"}


@both
def test_exchanged_axes(look: Look) -> None:
    item = without_answer(trace(1))
    item["attentions"] = [np.ascontiguousarray(each.swapaxes(1, 2)) for each in item["attentions"]]
    found = [each for each in findings(item, look) if each.check == "attention-not-causal"]
    assert len(found) == LAYERS
    assert "as if query and key were exchanged" in found[0].message
    # The last query sees all, as does the first one of exchanged axes: it has no later token.
    assert found[0].number == HEADS * (TOKENS - 1)


@both
def test_an_encoder_is_sound_unless_it_generated(look: Look) -> None:
    rng = np.random.default_rng(1)
    scores = np.exp(rng.normal(size=(LAYERS, HEADS, TOKENS, TOKENS)))
    both_ways = list((scores / scores.sum(-1, keepdims=True)).astype(np.float16))
    assert findings(without_answer(trace(1, attentions=both_ways)), look) == []
    only(findings(trace(1, attentions=both_ways), look), "attention-not-causal")
    some = [*both_ways[:2], *weights(1)[2:]]
    found = findings(without_answer(trace(1, attentions=some)), look)
    assert [each.place for each in found] == ["attentions/layer_000", "attentions/layer_001"]


def test_values_that_are_not_finite_are_counted() -> None:
    item = trace(1)
    item["hidden_states"][1][2, :3] = np.nan
    item["hidden_states"][1][4, 0] = np.inf
    found = [each for each in findings(item, LOOKS["full"]) if each.check == "not-finite"]
    assert [(each.place, each.message, each.number) for each in found] == [
        ("hidden_states/layer_001", "{number NaN value}", 3),
        ("hidden_states/layer_001", "{number infinite value}", 1),
    ]


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (np.array([1, 2, -100, -100, 3, 4, 5]), "2 negative ids, the lowest -100"),
        (np.array([1, 2, 99, 100, 3, 4, 5]), "1 id beyond the vocabulary of 100, the highest 100"),
    ],
)
def test_ids_outside_the_vocabulary(tokens: Any, message: str) -> None:
    (found,) = summaries(trace(1) | {"tokens": tokens}, look=Look(vocabulary=100))
    assert (found.check, found.severity, found.message) == (
        "token-out-of-vocabulary",
        "error",
        message,
    )


def test_the_vocabulary_is_that_of_the_text() -> None:
    assert vocabulary_of({"vocab_size": 32000}) == 32000
    assert vocabulary_of({"text_config": {"vocab_size": 100}}) == 100
    assert vocabulary_of({"vocab_size": None}) is None
    assert vocabulary_of(None) is None


def test_tokens_that_do_not_fit() -> None:
    found = findings(trace(1) | {"tokens": np.arange(12), "tokens_decoded": ["t"] * 12})
    finding = only(found, "tokens-do-not-fit")
    assert (finding.place, finding.span) == ("hidden_states", (5, 5))
    assert "token ids without a position" in finding.message
    found = findings(trace(1) | {"tokens_decoded": ["t"] * 9})
    assert only(found, "tokens-do-not-fit").message == "texts beyond the token ids: {span}"
    found = findings(trace(1) | {"tokens": np.arange(8), "tokens_decoded": ["t"] * 8})
    assert only(found, "last-token-uncovered").place == "hidden_states"


@both
def test_padding_without_a_mask_is_suspected(look: Look) -> None:
    item = padded(1, [0, 0, 1, 1, 1, 1, 1])
    del item["attention_mask"]
    suspected = [each for each in findings(item, look) if each.check == "padding-suspected"]
    assert [(each.place, each.message, each.number) for each in suspected] == [
        ("tokens_decoded", "begins with {number token} '<pad>'", 2),
        ("hidden_states", "begins with {number position} of the same state", 2),
    ]
    item = trace(1)
    item["tokens_decoded"][-3:] = ["</s>"] * 3
    assert only(findings(item, look), "padding-suspected").number == 3


@pytest.mark.parametrize("run", [["no"] * 5, ["\n"] * 5, ["<0x0A>"] * 5, ["</s>"]])
def test_repeated_words_are_no_padding(run: list[str]) -> None:
    item = trace(1)
    item["tokens_decoded"][-len(run) :] = run
    assert findings(item) == []


@both
@pytest.mark.parametrize("bits", [None, 8])
def test_lossy_tiers_do_not_make_rows_odd(look: Look, bits: int | None, tmp_path: Path) -> None:
    source = dump(tmp_path / "batch.pkl", [trace(each, tokens=60) for each in range(3)])
    tier = Precision.of("exact", attention_bits=bits) if bits else "native"
    h5traces.convert(source, tmp_path / "a.h5", precision=tier)
    (report,) = h5traces.validate(tmp_path / "a.h5")
    assert report.findings == []


def test_equal_samples_and_repeated_ids(tmp_path: Path) -> None:
    items = [trace(0), trace(1), trace(0), trace(1), trace(2) | {"question_id": "q1"}]
    items.append(trace(0) | {"question_id": "other", "label": 1})
    report = h5traces.convert(dump(tmp_path / "batch.pkl", items), tmp_path / "a.h5")
    (validated,) = h5traces.validate(tmp_path / "a.h5")
    (inspected,) = h5traces.inspect(tmp_path / "a.h5", samples="all")
    for found in (report.files[0].findings, validated.findings, inspected.findings):
        by_message = {each.message: each.samples for each in found}
        assert by_message == {
            "the same bytes as sample 0": [2, 5],
            "the same bytes as sample 1": [3],
            "the id of an earlier sample": [2, 3, 4],
        }
        assert [each.severity for each in found] == ["warning", "warning", "note"]


def test_many_equal_samples_are_one_finding_more(tmp_path: Path) -> None:
    items = [trace(each) for each in range(8)] * 2
    report = h5traces.convert(dump(tmp_path / "batch.pkl", items), tmp_path / "a.h5")
    found = [each for each in report.files[0].findings if each.check == "duplicate-sample"]
    assert [each.num_samples for each in found] == [1, 1, 1, 5]
    assert found[-1].message == "the same bytes as an earlier sample"


def test_the_writer_of_a_run_checks_as_it_goes(tmp_path: Path) -> None:
    item = trace(1)
    item["hidden_states"][2][:] = 0
    item["hidden_states"][1][0, 0] = np.nan
    for spool in (True, False):
        with h5traces.create(tmp_path / f"run{spool}.h5", spool=spool) as writer:
            writer.append(trace(0))
            writer.append(item)
            writer.append(trace(0))
        found = {each.check: each.samples for each in writer.findings.summaries()}
        assert found == {
            "not-finite": [1],
            "constant-layer": [1],
            "duplicate-sample": [2],
            "repeated-id": [2],
        }


def test_a_resumed_run_counts_on(tmp_path: Path) -> None:
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append(trace(0))
        writer.suspend()
    with h5traces.create(tmp_path / "run.h5") as writer:
        writer.append(trace(0))
    (found,) = (each for each in writer.findings.summaries() if each.check == "repeated-id")
    assert found.samples == [1]


def run(*words: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in words])


@pytest.fixture
def zeros(tmp_path: Path) -> Path:
    items = [trace(each) for each in range(2)]
    for item in items:
        item["hidden_states"][2][:] = 0
    return dump(tmp_path / "zeros.pkl", items)


@pytest.mark.parametrize(
    ("options", "code", "is_told"),
    [
        ((), 0, True),
        (("--fail-on", "warning"), 1, True),
        (("--fail-on", "warning", "--ignore", "constant-layer"), 0, False),
        (("--ignore", "constant-layer", "--ignore", "not-finite"), 0, False),
    ],
)
def test_options_are_the_same_everywhere(
    zeros: Path, tmp_path: Path, options: tuple[str, ...], code: int, is_told: bool
) -> None:
    archive = tmp_path / "zeros.h5"
    commands = [
        ("convert", zeros, "-o", archive, "--overwrite"),
        ("inspect", zeros),
        ("inspect", archive),
        ("validate", archive),
        ("validate", "--isolated", archive),
    ]
    for command in commands:
        result = run(*command, *options)
        assert result.exit_code == code, (command, result.output)
        assert ("[constant-layer] hidden_states, layer 2" in result.output) == is_told, command
        found = run(*command, *options, "--json")
        assert found.exit_code == code
        documents = json.loads(found.stdout)
        (document,) = documents["files"] if command[0] == "convert" else documents
        checks = {each["check"] for each in document["findings"]}
        assert checks == ({"constant-layer"} if is_told else set())


def test_unknown_ids_are_named_with_a_guess(zeros: Path) -> None:
    result = run("inspect", zeros, "--ignore", "constant-layers")
    assert result.exit_code == 2
    assert "did you mean 'constant-layer'?" in result.output
    with pytest.raises(OptionError, match="fail_on is 'note', expected 'error' or 'warning'"):
        CheckOptions(fail_on="note")  # type: ignore[arg-type]


def test_errors_fail_by_default(tmp_path: Path) -> None:
    source = dump(tmp_path / "batch.pkl", [trace(0) | {"tokens": -np.arange(TOKENS)}])
    report = h5traces.convert(source, tmp_path / "a.h5")
    assert not report.ok
    assert "[token-out-of-vocabulary] tokens: 6 negative ids" in report.problems[0]
    assert not h5traces.validate(tmp_path / "a.h5").ok
    options = CheckOptions(ignore="token-out-of-vocabulary")
    assert h5traces.validate(tmp_path / "a.h5", checks=options).ok


def test_verdicts_say_what_they_cover(zeros: Path, tmp_path: Path) -> None:
    archive = tmp_path / "zeros.h5"
    run("convert", zeros, "-o", archive)
    number = CheckOptions().num_checks
    full, quick = run("validate", archive).output, run("validate", "--quick", archive).output
    verdict = "valid, with 1 warning (2 samples, 22 datasets); structure, schema, index; "
    assert f"{verdict}{number} checks of meaning on every value\n" in full
    assert "; ✓ structure, schema, index; no array was read (quick)\n" in quick
    assert "constant-layer" not in quick
    fewer = run("validate", archive, "--ignore", "constant-layer").output
    assert f"valid (2 samples, 22 datasets); ✓ structure, schema, index; {number - 1} ch" in fewer
    shown = run("inspect", archive).output
    assert f"  {number} checks of meaning: every value of 1 sample; 1 other not read" in shown


def test_layers_that_differ_in_every_sample_are_one_finding() -> None:
    found = Findings()
    for sample in range(40):
        place = f"hidden_states/layer_{sample % 32:03d}"
        found.add([Finding("not-finite", place, "{number NaN value}", 2)], sample)
    (summary,) = found.summaries()
    assert str(summary).startswith(
        "[not-finite] hidden_states, layers 0-31: 80 NaN values (40 samples: 0, 1, 2, 3, 4 and 35 "
    )
    few = Findings()
    for sample in range(3):
        few.add([Finding("not-finite", f"hidden_states/layer_{sample:03d}", "NaN", 1)], sample)
    assert [each.samples for each in few.summaries()] == [[0], [1], [2]]


def test_many_files_with_one_kind_of_finding_are_a_few_lines(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    for number in range(9):
        row = trace(number)
        row["hidden_states"][0][: number + 1, 0] = np.nan
        dump(folder / f"sample_{number}.pkl", [row])
    printed = run("convert", folder, "-o", f"{tmp_path}/out/")
    lines = [line for line in printed.stderr.splitlines() if "not-finite" in line]
    assert len(lines) == 6
    assert lines[-1] == "warning: and 2 more of [not-finite], which --json lists"


def test_remedies_name_flags_on_the_command_line(tmp_path: Path) -> None:
    row = trace(0)
    del row["attentions"]
    source, archive = dump(tmp_path / "batch.pkl", [row]), tmp_path / "a.h5"
    expected = "Say what it is, to convert or repack: "
    expected += "--first-state embedding or --first-state block."
    assert expected in run("convert", source, "-o", archive).stderr
    assert expected in run("inspect", source).output
    assert expected in run("validate", archive).output


def test_one_position_is_a_fault_only_beside_more_tokens(tmp_path: Path) -> None:
    row = trace(0)
    row = {"hidden_states": [each[-1:] for each in row["hidden_states"]], "tokens": row["tokens"]}
    ignored = CheckOptions(ignore="first-state-unknown")
    for number, expected in enumerate(["last-position-only", "one-position"]):
        source = dump(tmp_path / f"{number}.pkl", [row])
        archive = tmp_path / f"{number}.h5"
        report = h5traces.convert(source, archive, checks=ignored)
        assert [each.check for each in report.files[0].findings] == [expected]
        (validated,) = h5traces.validate(archive, checks=ignored)
        assert [each.check for each in validated.findings] == [expected]
        row.pop("tokens", None)


def test_findings_add_up() -> None:
    found, message = Findings(), "{number row} with a sum of {span}, not 1"
    for sample in range(9):
        for layer in (2, 3, 4, 7):
            place, span = f"attentions/layer_{layer:03d}", (0.1 * layer, 0.5)
            found.add([Finding("attention-rows", place, message, 2, span)], sample)
    (summary,) = found.summaries()
    assert str(summary).startswith(
        "[attention-rows] attentions, layers 2-4, 7: 72 rows with a sum of 0.2 to 0.5, not 1 "
        "(9 samples: 0, 1, 2, 3, 4 and 4 more). "
    )


def test_infinite_figures_are_told() -> None:
    found = Findings()
    message = "weights from {span}, expected 0 to 1"
    span = (-float("inf"), float("inf"))
    found.add([Finding("attention-out-of-range", "attentions/layer_000", message, span=span)], 0)
    assert found.summaries()[0].message == "weights from -inf to inf, expected 0 to 1"


def test_places_for_people() -> None:
    names = ["hidden_states/layer_001", "hidden_states/embedding", "a/position_000", "tokens"]
    told = "hidden_states, layer 1; a, position 0; hidden_states/embedding; tokens"
    assert named_places(names) == told


def test_the_page_is_made_of_the_register() -> None:
    command = [sys.executable, ROOT / "tools" / "gen_checks.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_shipped_examples_have_no_findings() -> None:
    for found in h5traces.inspect(ROOT / "examples" / "legacy", samples="all"):
        assert found.findings == []
        assert found.num_samples


def test_tensors_are_looked_at(tmp_path: Path) -> None:
    item = trace(1)
    bits = [TorchValue(np.zeros((TOKENS, HIDDEN), np.uint16), "bfloat16") for _ in range(LAYERS)]
    found = findings(item | {"hidden_states": bits})
    assert only(found, "constant-layer").message == "every value looked at is 0"


def test_every_check_is_documented() -> None:
    page = (ROOT / "docs" / "checks.md").read_text(encoding="utf-8")
    for each in CHECKS.values():
        assert f"### {each.id}\n" in page
        assert each.reason.endswith(".")
        assert each.remedy.endswith(".")
