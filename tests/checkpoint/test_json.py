"""JSON that somebody else wrote."""

import pytest

from lorax_jax._errors import CheckpointError
from lorax_jax._json import MOST_BYTES, parse_json, read_json


def test_json_is_read():
    text = b'{"a": [1, 2.5, null, true, "x"], "b": {}}'
    assert parse_json(text, "it") == {"a": [1, 2.5, None, True, "x"], "b": {}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "it is not JSON: Expecting value"),
        (b"{'a': 1}", "it is not JSON: Expecting property name"),
        (b'{"a": 1, "b": 2, "a": 3}', "it repeats the key 'a'"),
        (b'{"a": {"b": 1, "b": 1}}', "it repeats the key 'b'"),
        (b'{"a": NaN}', "it holds NaN, which is no finite number"),
        (b'{"a": -Infinity}', "it holds -Infinity"),
        (b'{"a": 1e999}', "it holds 1e999"),
        (b"[" * 41 + b"]" * 41, "it nests too deeply"),
        (b'{"a":' * 41 + b"1" + b"}" * 41, "it nests too deeply"),
        (b"[" * 200_000, "it (nests too deeply|is not JSON)"),
        (b'{"a":' * 200_000, "it (nests too deeply|is not JSON)"),
        (b"\xff\xfe\x00", "it is not JSON"),
        (b'"\xe2\x28\xa1"', "it is not JSON"),
        (b'{"a": 1' + b"0" * 10_000 + b"}", "it is not JSON: Exceeds the limit"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(CheckpointError, match=message):
        parse_json(text, "it")


def test_as_deep_as_anything_real():
    assert parse_json(b"[" * 40 + b"]" * 40, "it") is not None


def test_infinities_where_they_are_allowed():
    assert parse_json(b'{"a": Infinity}', "it", finite=False) == {"a": float("inf")}


def test_a_repeated_key_among_very_many_is_found_in_time():
    keys = ",".join(f'"{i}": 0' for i in range(200_000))
    with pytest.raises(CheckpointError, match="repeats the key '199999'"):
        parse_json(f'{{{keys}, "199999": 1}}'.encode(), "it")


def test_files(tmp_path):
    path = tmp_path / "a.json"
    with pytest.raises(CheckpointError, match="cannot be read: .*No such file"):
        read_json(path)
    path.write_text("[1]")
    with pytest.raises(CheckpointError, match="holds a list, not a JSON object"):
        read_json(path)
    path.write_text('{"a": 1}')
    assert read_json(path) == {"a": 1}
    with open(path, "r+b") as file:
        file.truncate(MOST_BYTES + 1)  # sparse: it takes no space
    with pytest.raises(CheckpointError, match="has 16,777,217 bytes; a configuration"):
        read_json(path)
