"""Names inside an archive."""

from __future__ import annotations

import pytest

from h5traces.format import layout


@pytest.mark.parametrize(
    ("ordinal", "name"), [(0, "00000000"), (7, "00000007"), (123_456_789, "123456789")]
)
def test_sample_names(ordinal: int, name: str) -> None:
    assert layout.sample_name(ordinal) == name
    assert layout.is_sample_name(name)
    assert layout.sample_path(ordinal) == f"/samples/{name}"


@pytest.mark.parametrize("name", ["", "0000000", "0000000a", "00000000\n", " 00000000", "-0000001"])
def test_names_of_no_sample(name: str) -> None:
    assert not layout.is_sample_name(name)


@pytest.mark.parametrize(
    ("layer", "name"), [(0, "layer_000"), (31, "layer_031"), (1000, "layer_1000")]
)
def test_layer_names(layer: int, name: str) -> None:
    assert layout.layer_name(layer) == name
    assert layout.parse_layer_name(name) == layer


@pytest.mark.parametrize(
    "name", ["layer_00", "layer_", "layer_-01", "layer_000\n", "xlayer_000", "embedding", "steps"]
)
def test_names_of_no_layer(name: str) -> None:
    assert layout.parse_layer_name(name) is None


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("plain key", "plain key"),
        ("a/b", "a%2Fb"),
        ("", "%"),
        (".", "%2E"),
        ("..", "%2E%2E"),
        ("a.b", "a.b"),
        ("%", "%25"),
        ("%2F", "%252F"),
        ("a\0", "a%00"),
        ("\u00e9", "\u00e9"),
    ],
)
def test_keys_are_escaped(key: str, name: str) -> None:
    assert layout.escape_key(key) == name
    assert layout.unescape_key(name) == key


def test_kinds_are_defined_for_people() -> None:
    for name, kind in layout.KINDS.items():
        assert kind.definition.endswith("."), name
        assert len(kind.axes) >= 2
        assert kind.image is (kind.axes[-2:] == ("query", "key"))
