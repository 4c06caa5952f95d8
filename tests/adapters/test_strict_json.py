"""JSON that other readers would read differently, or that would take long to read, is refused."""

import pytest

from adapters.errors import AdapterInvalid
from adapters.strict_json import MAX_VALUES, parse_object


def test_objects_come_out_as_they_are() -> None:
    assert parse_object(b'{"a": [1, {"b": "\\u00e4,[{"}], "c": null}', "it") == {
        "a": [1, {"b": "\u00e4,[{"}],
        "c": None,
    }


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"7",
        b"{",
        b'{"a": 1, "a": 1}',
        b'{"x": [{"a": 1, "b": 2, "a": 3}]}',
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": "\xff"}',
        b"\xef\xbb\xbf{}",
        b'{"a": ' * 20_000,
        b'{"a": ' + b"9" * 5_000 + b"}",
    ],
    ids=lambda text: str(text[:20]),
)
def test_what_is_not_plain_json_is_refused(text: bytes) -> None:
    with pytest.raises(AdapterInvalid, match=r"^it "):
        parse_object(text, "it")


@pytest.mark.parametrize("value", [b"1", b"[]", b"{}", b'""'])
def test_values_are_counted_before_they_are_made(value: bytes) -> None:
    num_values = MAX_VALUES // 2 - 1  # a comma each, and for some a bracket
    parse_object(b'{"a": [' + value + (b"," + value) * (num_values - 1) + b"]}", "it")

    with pytest.raises(AdapterInvalid, match="more than"):
        parse_object(b'{"a": [' + value + (b"," + value) * (MAX_VALUES + 1) + b"]}", "it")
