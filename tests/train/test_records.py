import json

import pytest

from lorax_jax.train import Chat, Completion, DataError, Text, read_records
from lorax_jax.train._records import ROLES


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write


def jsonl(*lines):
    return "\n".join(json.dumps(line) for line in lines)


def test_plain_text(write):
    (record,) = read_records(write("a.txt", "one\r\ntwo\n"))
    assert isinstance(record, Text)
    assert record.text == "one\ntwo\n"


def test_a_byte_order_mark_is_no_text(write):
    assert read_records(write("a.txt", b"\xef\xbb\xbfhi"))[0].text == "hi"


def test_every_shape_of_line(write):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    path = write(
        "a.jsonl",
        jsonl({"text": "t"}, {"prompt": "", "completion": "c"}, {"messages": chat}),
    )
    text, completion, talk = read_records(path)
    assert isinstance(text, Text) and text.text == "t"
    assert isinstance(completion, Completion) and completion.completion == "c"
    assert isinstance(talk, Chat)
    assert talk.messages == (("user", "a"), ("assistant", "b"))


def test_blank_lines_are_skipped_and_counted(write):
    path = write("a.jsonl", '\n{"text": "a"}\n   \n\n{"text": "b"}\n')
    assert [record.where for record in read_records(path)] == [
        f"{path}, line 2",
        f"{path}, line 5",
    ]


def test_a_line_separator_inside_a_string_ends_no_line(write):
    path = write("a.jsonl", '{"text": "one\u2028two"}')
    assert read_records(path)[0].text == "one\u2028two"


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt does not exist"):
        read_records(tmp_path / "nowhere.txt")


def test_a_folder(tmp_path):
    (tmp_path / "a.txt").mkdir()
    with pytest.raises(DataError, match=r"a\.txt cannot be read: Is a directory"):
        read_records(tmp_path / "a.txt")


@pytest.mark.parametrize("content", ["", "  \n\n "])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_an_empty_file(write, name, content):
    with pytest.raises(DataError, match=rf"{name} is empty"):
        read_records(write(name, content))


def test_another_suffix(write):
    with pytest.raises(DataError, match=r"ends in '\.csv'; a data file is plain text"):
        read_records(write("a.csv", "a,b"))


def test_not_utf8(write):
    with pytest.raises(DataError, match=r"line 2: byte 0xe9 is not UTF-8"):
        read_records(write("a.txt", b"one\ncaf\xe9\n"))


@pytest.mark.parametrize("order", ["utf-16-le", "utf-16-be"])
def test_utf16(write, order):
    with pytest.raises(
        DataError, match=r"a\.txt is UTF-16.*`iconv -f utf-16 -t utf-8`"
    ):
        read_records(write("a.txt", "\ufeffone".encode(order)))


@pytest.mark.parametrize("role", ROLES)
def test_every_role(write, role):
    messages = [{"role": r, "content": "Hi"} for r in (role, "assistant")]
    found = read_records(write("a.jsonl", json.dumps({"messages": messages})))
    assert found[0].messages == ((role, "Hi"), ("assistant", "Hi"))


GOOD = '{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": ', "line 17: no JSON: Expecting value at column 10"),
        ("[1]", "line 17: a list, where an object"),
        ("[" * 100_000, "line 17: JSON nested too deeply"),
        ('{"txt": "a"}', r"line 17: fields \['txt'\], where 'text', or 'prompt' and"),
        ('{"completions": "a", "prompt": "b"}', "Did you mean 'completion' by"),
        ('{"text": "a", "label": 1}', r"line 17: unknown fields \['label'\] beside"),
        ('{"text": 3}', "line 17: 'text' is a int, where a string"),
        ('{"text": ""}', "line 17: 'text' is empty"),
        ('{"prompt": "a", "completion": ""}', "line 17: no completion tokens: 'compl"),
        ('{"prompt": null, "completion": "a"}', "line 17: 'prompt' is a NoneType"),
        ('{"text": "\\ud800"}', "line 17: 'text' holds half of a surrogate pair"),
        (
            f'{{"text": {"1" * 10_000}}}',
            "line 17: no JSON that can be read: Exceeds the limit",
        ),
        (
            '{"messages": [{"role": "Assistant", "content": "a"}]}',
            r"line 17, messages\[0\]: unknown role 'Assistant'; one of system, user",
        ),
        ('{"messages": []}', "line 17: 'messages' must be a list with at least one"),
        ('{"messages": {"role": "user"}}', "line 17: 'messages' must be a list"),
        ('{"messages": ["hi"]}', r"messages\[0\]: must be an object with 'role'"),
        (
            '{"messages": [{"role": "user", "content": "a", "name": "b"}]}',
            r"messages\[0\]: must be an object with 'role' and 'content' and nothing",
        ),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            "line 17: no completion tokens: no message of the role 'assistant'",
        ),
    ],
)
def test_a_broken_line_is_named(write, line, message):
    with pytest.raises(DataError, match=message):
        read_records(write("a.jsonl", GOOD * 16 + line + "\n" + GOOD))
