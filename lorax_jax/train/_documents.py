"""`tokenize`: from records to token ids, each with the weight that it has in the loss.

A record becomes pieces of text, each learned or only read, and the pieces are tokenized
one by one: then the tokens of a prompt are the same in training as in generation, where
the prompt stands alone.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from ._errors import DataError
from ._records import Chat, Completion, Record


@dataclasses.dataclass(frozen=True)
class Document:
    """Token ids that belong together.

    Attributes:
        ids: the tokens.
        weights: how much predicting each token counts: 0 for prompts, and for the
            first token, before which there is nothing to predict it from.
        bytes: size in UTF-8 of the text behind the tokens that count.
    """

    ids: Int[np.ndarray, "tokens"]
    weights: Float[np.ndarray, "tokens"]
    bytes: int

    def __len__(self) -> int:
        return len(self.ids)


Piece = tuple[str, bool]  # a text, and whether it is learned


def tokenize(records: Iterable[Record], tokenizer: Any) -> list[Document]:
    """Tokenizes records.

    A text starts with the tokenizer's beginning-of-text token, where it adds one, and
    ends with its end-of-text token. A chat is written by the tokenizer's chat template,
    which says how turns begin and end; a tokenizer without one gets a line for each
    message,

        User: 2 + 2?
        Assistant: 4

    Args:
        records: from `read_records`.
        tokenizer: a `transformers` tokenizer.

    Returns:
        A document for each record.

    Raises:
        DataError: if a record has no token to learn, or the chat template rewrites
            earlier turns, so that nobody can tell which tokens are the assistant's.
    """
    return [_document(record, tokenizer) for record in records]


def _document(record: Record, tokenizer: Any) -> Document:
    if isinstance(record, Chat) and tokenizer.chat_template:
        pieces, before, after = _from_template(record, tokenizer), [], []
    else:
        pieces = _pieces(record)
        before, after = _beginning(tokenizer), _end(tokenizer)
    ids, weights, size = list(before), [0.0] * len(before), 0
    for text, learned in pieces:
        new = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if learned:
            size += len(text.encode())
            if new and not ids:  # the very first token
                size -= len(tokenizer.decode(new[:1]).encode())
        ids += new
        weights += [float(learned)] * len(new)
    ids, weights = ids + after, weights + [1.0] * len(after)
    weights[:1] = [0.0] * len(weights[:1])
    if not any(weights[: len(weights) - len(after)]):
        raise DataError(
            f"{record.where}: no completion tokens: the tokenizer makes "
            f"{len(ids)} tokens of it, none of which can be learned."
        )
    return Document(np.array(ids, np.int32), np.array(weights, np.float32), size)


def _pieces(record: Record) -> list[Piece]:
    match record:
        case Completion(prompt, completion):
            return [(prompt, False), (completion, True)]
        case Chat(messages):
            pieces = []
            for role, content in messages:
                name = f"{role.capitalize()}:"
                if role == "assistant":
                    pieces += [(name, False), (f" {content}\n", True)]
                else:
                    pieces.append((f"{name} {content}\n", False))
            return pieces
    return [(record.text, True)]


def _from_template(record: Chat, tokenizer: Any) -> list[Piece]:
    """The pieces of a chat: each assistant's turn is what it adds to the turns before.

    The turn's opening (`<|im_start|>assistant`) is the generation prompt and is read,
    its content and what closes it are learned.
    """
    messages = [{"role": role, "content": text} for role, text in record.messages]

    def render(count: int, opened: bool = False) -> str:
        try:
            return tokenizer.apply_chat_template(
                messages[:count], tokenize=False, add_generation_prompt=opened
            )
        except Exception as error:  # a template raises what it likes
            raise DataError(
                f"{record.where}: the chat template refuses it: {error}"
            ) from error

    pieces, done, whole = [], 0, render(len(messages))
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        opening, turn = render(number, opened=True), render(number + 1)
        if not (turn.startswith(opening) and whole.startswith(turn)):
            raise DataError(
                f"{record.where}: the tokenizer's chat template rewrites earlier "
                f"turns, so what the assistant says in messages[{number}] cannot be "
                "told apart. Write the line with 'prompt' and 'completion'."
            )
        pieces += [(whole[done : len(opening)], False), (turn[len(opening) :], True)]
        done = len(turn)
    return pieces  # what follows the last answer is not needed


def chat_prompt(message: str, tokenizer: Any) -> str:
    """A user's message, and the opening of the answer, as `tokenize` writes them.

    Args:
        message: what the user says.
        tokenizer: a `transformers` tokenizer.

    Returns:
        A prompt to generate from.
    """
    if not tokenizer.chat_template:
        return f"User: {message}\nAssistant:"
    turns = [{"role": "user", "content": message}]
    return tokenizer.apply_chat_template(
        turns, tokenize=False, add_generation_prompt=True
    )


def _beginning(tokenizer: Any) -> list[int]:
    first = tokenizer("", verbose=False)["input_ids"][:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def _end(tokenizer: Any) -> list[int]:
    return [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]


def total_bytes(documents: Sequence[Document]) -> int:
    """Size of the text behind all tokens that count, for bits per byte."""
    return sum(document.bytes for document in documents)
