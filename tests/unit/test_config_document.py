"""JSON as a configuration needs it: every ambiguity is an error with a place."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from backup_worker.config.document import expand, parse
from em_bridge.errors import ConfigError


@pytest.mark.parametrize(
    ("content", "message", "hint"),
    [
        (b'{"a": 1,}', "f.json: line 1, column 9: not valid JSON", "remove the comma"),
        (b'{"a": [1,\n]}', "f.json: line 2, column 1: not valid JSON", "remove the comma"),
        (b"{'a': 1}", "f.json: line 1, column 2: not valid JSON", "double quotes"),
        (b'{"a": 1 // why\n}', "f.json: line 1, column 9", "no comments"),
        (b'{"a": True}', "f.json: line 1, column 7", "lower case"),
        (b'{"a":', "f.json: line 1, column 6", "ends too early"),
        (b"", "f.json: line 1, column 1", "ends too early"),
        (b"[]", "f.json: must be a JSON object", ""),
        (b'{"a": {"b": [1, NaN]}}', "f.json: a.b[1]: NaN is not a number", ""),
        (b'{"a": -Infinity}', "f.json: a: -Infinity is not a number", ""),
        (b'{"a": 1e999}', "f.json: a: 1e999 is not a number", ""),
        (b'{"a": ' + b"9" * 5000 + b"}", "f.json: a: 99999999999999999999… is not a number", ""),
        (b'{"x": {"a": 1, "b": 2, "a": 3}}', 'f.json: x: key "a" is written twice', "keep one"),
        (b"\xef\xbb\xbf{}", "f.json: line 1, column 1: starts with a byte-order mark", "without"),
        (b"\xff\xfe{\x00}\x00", "f.json: line 1, column 1: starts with a byte-order mark", "UTF-8"),
        (b'{\n "a": "\xff"}', "f.json: line 2, column 8: is not UTF-8 (byte 0xff)", "UTF-8"),
        (b'{"a":' * 100_000, "f.json: is nested too deeply", ""),
        (b'{"a": "\\u0000"}', "f.json: a: holds a character", ""),
        (b'{"a": "\\ud800"}', "f.json: a: holds a character", ""),
    ],
)
def test_an_ambiguous_document_is_refused_with_its_place(content: bytes, message: str, hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(content, "f.json")
    assert caught.value.message.startswith(message)
    assert hint in (caught.value.hint or "")


PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**15), 10**15)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), inner, max_size=4
        )
    ),
    max_leaves=12,
)


@given(
    st.dictionaries(
        st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])), PLAIN, max_size=4
    )
)
def test_a_plain_document_is_read_as_it_was_written(document: dict[str, Any]) -> None:
    assert parse(json.dumps(document).encode(), "f.json") == document


@given(st.binary(max_size=200))
def test_any_bytes_are_a_document_or_a_refusal(content: bytes) -> None:
    try:
        parse(content, "f.json")
    except ConfigError as error:
        assert error.message.startswith("f.json: ")


def test_variables_are_replaced_below_lists_and_maps_but_not_in_keys() -> None:
    document = {"${K}": ["${A}-${B}", {"x": "$${A}", "n": 1}]}
    assert expand(document, {"A": "1", "B": "${A}"}, "f.json") == {"${K}": ["1-${A}", {"x": "${A}", "n": 1}]}


@pytest.mark.parametrize("text", ["${}", "${A B}", "${1}", "${A", "${A B/x", "x${"])
def test_what_cannot_be_a_variable_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="does not name an environment variable"):
        expand({"a": text}, {}, "f.json")
