"""Bytes to objects: what is taken, beside what test_bad_input.py shows to be refused."""

import pytest

from server.api.json_body import load_json, parse_object
from server.errors import BadRequest


@pytest.mark.parametrize(
    ("raw", "value"),
    [
        (b'{"a": "\xc3\xa9"}', {"a": "é"}),
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        (b'{"a": "\\ud83d\\ude00"}', {"a": "😀"}),
        (b'{"a": "\\u00e9\\ndone"}', {"a": "é\ndone"}),
        (b'{"a": 12345678901234567890, "b": 1.5e3}', {"a": 12345678901234567890, "b": 1500.0}),
        (b' {"a": {"b": [{"a": null}]}, "b": {}} ', {"a": {"b": [{"a": None}]}, "b": {}}),
    ],
)
def test_json_objects_are_taken(raw: bytes, value: object) -> None:
    assert parse_object(raw) == value


@pytest.mark.parametrize("raw", [b'{"a":"\\udc00"}', b'{"\\ud800":1}', b'{"a":"\\ude00\\ud83d"}'])
def test_halves_of_surrogate_pairs_are_refused(raw: bytes) -> None:
    with pytest.raises(BadRequest, match="surrogate"):
        parse_object(raw)


def test_long_duplicate_keys_are_not_repeated_to_the_client() -> None:
    key = b"k" * 1000
    with pytest.raises(BadRequest) as caught:
        parse_object(b'{"' + key + b'":1,"' + key + b'":2}')

    assert len(caught.value.message) < 100


def test_hundreds_of_thousands_of_lists_and_objects_are_refused() -> None:
    """Millions of them would keep every other thread waiting for most of a second."""
    with pytest.raises(BadRequest, match="brackets"):
        parse_object(b'{"a": [' + b"[]," * 300_000 + b"0]}")
    with pytest.raises(BadRequest, match="brackets"):
        parse_object(b'{"a": [' + b"{}," * 300_000 + b"0]}")
    with pytest.raises(BadRequest, match="brackets"):
        load_json("[" + "[]," * 300_000 + "0]")
    assert parse_object(b'{"a": "' + b"[" * 100_000 + b'"}') == {"a": "[" * 100_000}
