"""`read_records`: what a data file holds, before any tokenizer has seen it."""

import codecs
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from .._errors import closest
from ._errors import DataError

SUFFIXES = (".txt", ".jsonl")
ROLES = ("system", "user", "assistant", "tool", "developer")
SHAPES = (("text",), ("prompt", "completion"), ("messages",))


@dataclasses.dataclass(frozen=True)
class Text:
    """Plain text, every token of which is learned."""

    text: str
    where: str


@dataclasses.dataclass(frozen=True)
class Completion:
    """A prompt, which is only read, and its completion, which is learned."""

    prompt: str
    completion: str
    where: str


@dataclasses.dataclass(frozen=True)
class Chat:
    """Messages `(role, content)`; what the assistant says is learned."""

    messages: tuple[tuple[str, str], ...]
    where: str


Record = Text | Completion | Chat


def read_records(path: str | os.PathLike) -> list[Record]:
    """Reads a data file.

    - `.txt`: one plain text.
    - `.jsonl`: a JSON object a line, each with `"text"`, with `"prompt"` and
      `"completion"`, or with `"messages"`, a list of `{"role": ..., "content": ...}`.
      Roles are system, user, assistant, tool and developer. Blank lines are skipped.
      A field beside these is refused, as it would have no effect.

    Args:
        path: the file, UTF-8.

    Returns:
        One record for the text, or one for each line. Each knows its file and line.

    Raises:
        DataError: if the file is missing, empty or not UTF-8, or a line is broken;
            the message says which line and why.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "data.jsonl"
        >>> _ = file.write_text('{"prompt": "2 + 2 =", "completion": " 4"}')
        >>> read_records(file)[0].completion
        ' 4'
    """
    path = Path(path)
    text = _read(path)
    if path.suffix == ".txt":
        return [Text(text, str(path))]
    lines = [(i, line) for i, line in enumerate(text.split("\n"), 1) if line.strip()]
    return [_record(line, f"{path}, line {i}") for i, line in lines]


def _read(path: Path) -> str:
    if path.suffix not in SUFFIXES:
        raise DataError(
            f"{path} ends in {path.suffix!r}; a data file is plain text (.txt) or a "
            "JSON object a line (.jsonl)."
        )
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path} does not exist.") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    if raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        raise DataError(
            f"{path} is UTF-16, and UTF-8 is meant. Convert the file, e.g. with `iconv "
            "-f utf-16 -t utf-8`."
        )
    try:
        text = raw.decode("utf-8-sig")  # some editors begin a file with a mark
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise DataError(
            f"{path}, line {line}: byte 0x{raw[error.start]:02x} is not UTF-8. Convert "
            "the file, e.g. with `iconv -f latin1 -t utf-8`."
        ) from None
    if not text.strip():
        raise DataError(f"{path} is empty.")
    return text.replace("\r\n", "\n")


def _record(line: str, where: str) -> Record:
    try:
        fields = json.loads(line)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{where}: no JSON: {error.msg} at column {error.colno}."
        ) from None
    except RecursionError:
        raise DataError(f"{where}: JSON nested too deeply.") from None
    except ValueError as error:  # a number of more digits than Python reads
        reason = str(error).split(";")[0]
        raise DataError(f"{where}: no JSON that can be read: {reason}.") from None
    if not isinstance(fields, dict):
        raise DataError(
            f"{where}: a {type(fields).__name__}, where an object such as "
            '{"text": "..."} is meant.'
        )
    shape = next((shape for shape in SHAPES if set(shape) <= set(fields)), None)
    if shape is None:
        raise DataError(_no_shape(fields, where))
    if extra := sorted(set(fields) - set(shape)):
        raise DataError(
            f"{where}: unknown fields {extra} beside {list(shape)}. They would have no "
            "effect; remove them."
        )
    if shape == ("text",):
        return Text(_string(fields, "text", where), where)
    if shape == ("messages",):
        return Chat(_messages(fields["messages"], where), where)
    prompt = _string(fields, "prompt", where, empty=True)
    return Completion(prompt, _string(fields, "completion", where), where)


def _no_shape(fields: dict[str, Any], where: str) -> str:
    known = [name for shape in SHAPES for name in shape]
    near = ""
    for name in fields:
        guess = closest(name, known, 1)[0]
        if name not in known and (name.startswith(guess) or guess.startswith(name)):
            near = f" Did you mean {guess!r} by {name!r}?"
            break
    return (
        f"{where}: fields {sorted(fields)}, where "
        + ", or ".join(" and ".join(map(repr, shape)) for shape in SHAPES)
        + f" are meant.{near}"
    )


def _messages(found: Any, where: str) -> tuple[tuple[str, str], ...]:
    if not isinstance(found, list) or not found:
        raise DataError(
            f"{where}: 'messages' must be a list with at least one message."
        )
    messages = []
    for number, message in enumerate(found):
        inside = f"{where}, messages[{number}]"
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            raise DataError(
                f"{inside}: must be an object with 'role' and 'content' and nothing "
                "else."
            )
        role = _string(message, "role", inside)
        if role not in ROLES:
            raise DataError(
                f"{inside}: unknown role {role!r}; one of {', '.join(ROLES)} is meant. "
                "Only what the assistant says is learned."
            )
        messages.append((role, _string(message, "content", inside, empty=True)))
    if not any(role == "assistant" and content for role, content in messages):
        raise DataError(
            f"{where}: no completion tokens: no message of the role 'assistant' says "
            "anything, so there is nothing to learn."
        )
    return tuple(messages)


def _string(fields: dict[str, Any], name: str, where: str, empty: bool = False) -> str:
    value = fields[name]
    if not isinstance(value, str):
        raise DataError(
            f"{where}: {name!r} is a {type(value).__name__}, where a string is meant."
        )
    if not value and name == "completion":
        raise DataError(f"{where}: no completion tokens: 'completion' is empty.")
    if not value and not empty:
        raise DataError(f"{where}: {name!r} is empty.")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{where}: {name!r} holds half of a surrogate pair, which is no character."
        ) from None
    return value
