"""JSON bodies that cost nothing but a refusal."""

import json

import pytest

from core.errors import InvalidRequest
from router.http.body import parse_object

DEEP = b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"
REFUSED = {
    "nothing": (b"", "EOF"),
    "spaces": (b"   ", "EOF"),
    "cut off": (b'{"a": 1', "EOF"),
    "more behind": (b'{"a": 1} {"b": 2}', "trailing characters"),
    "comment": (b'{"a": 1 /* one */}', "expected"),
    "single quotes": (b"{'a': 1}", "key must be a string"),
    "trailing comma": (b'{"a": 1,}', "trailing comma"),
    "NaN": (b'{"a": NaN}', "expected value"),
    "Infinity": (b'{"a": Infinity}', "expected value"),
    "minus Infinity": (b'{"a": -Infinity}', "invalid number"),
    "invalid UTF-8": (b'{"a": "\xff"}', "unicode"),
    "UTF-16": (json.dumps({"a": 1}).encode("utf-16"), "expected value"),
    "byte order mark": (b'\xef\xbb\xbf{"a": 1}', "expected value"),
    "lone surrogate": (b'{"a": "\\ud800"}', "escape|surrogate"),
    "control character": (b'{"a": "\x00"}', "control character"),
    "digits": (b'{"a": ' + b"9" * 100_000 + b"}", "number out of range"),
    "deep": (DEEP, "recursion limit"),
    "deep, cut off": (b'{"a":' * 100_000, "recursion limit"),
    "array": (b"[1, 2]", "must be a JSON object, not an array"),
    "string": (b'"prompt"', "must be a JSON object, not a string"),
    "null": (b"null", "must be a JSON object, not null"),
    "number": (b"7", "must be a JSON object, not a number"),
    "boolean": (b"true", "must be a JSON object, not a boolean"),
    "twice": (b'{"temperature": 0, "temperature": 1}', "'temperature' twice"),
    "twice, inside": (b'{"a": [{"b": 1, "c": 2, "b": 3}]}', "'b' twice"),
    "many values": (b'{"a": [' + b"0," * 4_000_000 + b"0]}", "more than 1000000 commas"),
    "many keys": (b'{"a": {' + b",".join(b'"%d":0' % key for key in range(400_001)) + b"}}", "more than 400000 colons"),
    "many objects": (b'{"a": [' + b"{}," * 200_000 + b"{}]}", "more than 100000 objects"),
}


@pytest.mark.parametrize(("body", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_refused_is_refused_by_reason(body: bytes, reason: str) -> None:
    with pytest.raises(InvalidRequest, match=reason) as refused:
        parse_object(body)
    assert refused.value.field == "body"
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize(
    ("body", "meant"),
    [
        (b'{"a": "\\u00e9\\ud83d\\ude00"}', {"a": "\u00e9\U0001f600"}),
        (b'{"a": 5.0, "b": -0, "c": 1e3}', {"a": 5.0, "b": 0, "c": 1000.0}),
        (b' \n{"a": {"b": {}}, "c": {"b": {}}} ', {"a": {"b": {}}, "c": {"b": {}}}),
        (b'{"a": 18446744073709551615}', {"a": 2**64 - 1}),
        (b'{"a": "x\\"twice\\": 1, \\"twice\\": 2"}', {"a": 'x"twice": 1, "twice": 2'}),
    ],
)
def test_what_is_json_is_read(body: bytes, meant: object) -> None:
    assert parse_object(body) == meant
