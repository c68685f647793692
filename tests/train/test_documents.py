import numpy as np
import pytest

from lorax_jax.train import (
    Chat,
    Completion,
    DataError,
    Text,
    chat_prompt,
    tokenize,
    total_bytes,
)

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Drops what the assistant said before the last turn, as some reasoning models do.
FORGETFUL = (
    "{% for m in messages %}<|{{ m.role }}|>"
    "{{ m.content if loop.last or m.role == 'user' else '...' }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = Chat(
    (("user", "Hi"), ("assistant", "Hello"), ("user", "2?"), ("assistant", "3")),
    "a.jsonl, line 1",
)


def learned(document, tokenizer):
    """The text behind each run of tokens that count."""
    runs = np.split(document.ids, np.flatnonzero(np.diff(document.weights)) + 1)
    counts = np.split(document.weights, np.flatnonzero(np.diff(document.weights)) + 1)
    return [tokenizer.decode(r) for r, c in zip(runs, counts, strict=True) if c[0]]


def test_a_text_ends_and_all_but_its_first_token_counts(tokenizer):
    (document,) = tokenize([Text("The cat sat.", "a.txt")], tokenizer)
    assert tokenizer.decode(document.ids) == "The cat sat.<|endoftext|>"
    assert document.weights.tolist() == [0.0] + [1.0] * (len(document) - 1)
    first = tokenizer.decode(document.ids[:1])
    assert document.bytes == len("The cat sat.") - len(first)
    assert total_bytes([document, document]) == 2 * document.bytes


def test_a_beginning_of_text_is_put_where_the_tokenizer_puts_one(tokenizer):
    plain = tokenize([Text("The cat", "a.txt")], tokenizer)[0]
    original = type(tokenizer).__call__

    class Beginning(type(tokenizer)):
        def __call__(self, text, add_special_tokens=True, **kwargs):
            found = original(self, text, add_special_tokens=False, **kwargs)
            if add_special_tokens:
                found["input_ids"] = [self.bos_token_id, *found["input_ids"]]
            return found

    tokenizer.__class__ = Beginning
    (document,) = tokenize([Text("The cat", "a.txt")], tokenizer)
    assert document.ids.tolist() == [tokenizer.bos_token_id, *plain.ids.tolist()]
    assert document.weights.tolist() == [0.0] + [1.0] * len(plain)
    assert document.bytes == len("The cat")


def test_a_prompt_is_read_and_its_completion_learned(tokenizer):
    record = Completion("The cat sat on", " the mätt", "a.jsonl, line 1")
    (document,) = tokenize([record], tokenizer)
    assert learned(document, tokenizer) == [" the mätt<|endoftext|>"]
    assert document.bytes == len(" the mätt".encode())


def test_a_prompt_has_the_tokens_that_it_has_alone(tokenizer):
    # Tokenized together, "s" and "at" would be one token.
    (document,) = tokenize([Completion("The s", "at", "line 1")], tokenizer)
    alone = tokenizer("The s")["input_ids"]
    assert document.ids[: len(alone)].tolist() == alone
    assert tokenizer("The sat")["input_ids"][: len(alone)] != alone


def test_a_chat_without_a_template(tokenizer):
    assert not tokenizer.chat_template
    (document,) = tokenize([CHAT], tokenizer)
    text = "User: Hi\nAssistant: Hello\nUser: 2?\nAssistant: 3\n<|endoftext|>"
    assert tokenizer.decode(document.ids) == text
    assert learned(document, tokenizer) == [" Hello\n", " 3\n<|endoftext|>"]


def test_a_chat_by_the_template(tokenizer):
    tokenizer.chat_template = CHATML
    (document,) = tokenize([CHAT], tokenizer)
    assert tokenizer.decode(document.ids) == (
        "<|user|>Hi<|end|>\n<|assistant|>Hello<|end|>\n"
        "<|user|>2?<|end|>\n<|assistant|>3<|end|>\n"
    )
    assert learned(document, tokenizer) == ["Hello<|end|>\n", "3<|end|>\n"]


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_prompt_is_written_as_in_training(tokenizer, template):
    tokenizer.chat_template = template
    (document,) = tokenize([CHAT], tokenizer)
    text = tokenizer.decode(document.ids)
    assert text.startswith(chat_prompt("Hi", tokenizer))


def test_a_template_that_rewrites_earlier_turns(tokenizer):
    tokenizer.chat_template = FORGETFUL
    with pytest.raises(DataError, match=r"line 1: the tokenizer's chat template rewr"):
        tokenize([CHAT], tokenizer)


def test_a_template_that_refuses(tokenizer):
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(DataError, match="line 1: the chat template refuses it: no sys"):
        tokenize([CHAT], tokenizer)


def test_a_text_of_one_token_has_nothing_to_learn(tokenizer):
    with pytest.raises(DataError, match=r"line 3: no completion tokens: the tokenizer"):
        tokenize([Text("a", "line 3")], tokenizer)
