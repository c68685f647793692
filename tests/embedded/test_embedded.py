"""The embedded model is what its card says, and its scripts still run."""

import json
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from lorax_jax import models
from lorax_jax.embedded import ADAPT_TEXT, HELDOUT_TEXT, MODEL_DIR, texts, train

CARD = MODEL_DIR.parent / "README.md"
CONTEXT = 512


@pytest.fixture(scope="module")
def loaded():
    return models.load(MODEL_DIR)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(MODEL_DIR / "tokenizer.json"))


def test_everything_is_there_and_small():
    files = {path.name: path.stat().st_size for path in MODEL_DIR.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= files.keys()
    assert sum(files.values()) <= 8_000_000
    assert HELDOUT_TEXT.stat().st_size <= 250_000


def test_config_is_the_training_script_s(tokenizer):
    config = json.loads((MODEL_DIR / "config.json").read_text("utf-8"))
    assert config == train.architecture(tokenizer.get_vocab_size())


def test_parameters_are_float32_and_as_many_as_the_card_says(loaded):
    _, params = loaded
    leaves = jax.tree.leaves(params)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
    (count,) = re.findall(r"([\d,]+) parameters", CARD.read_text("utf-8"))
    assert sum(leaf.size for leaf in leaves) == int(count.replace(",", ""))


@pytest.mark.parametrize(
    "text",
    [
        "In the beginning God created the heaven and the earth.\n",
        "  two  spaces,\ttabs\r\n\n\nand no end ",
        "Ünïcödé — 日本語, עברית, 👩‍👩‍👧 \x00\x7f\u200b\ufeff",
        "".join(map(chr, range(0x20, 0x250))),
    ],
)
def test_tokenizer_writes_any_text_without_loss(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    theirs = models.tokenizer(MODEL_DIR)
    assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.decode(theirs(text)["input_ids"]) == text


def test_end_of_text_is_token_0(tokenizer):
    theirs = models.tokenizer(MODEL_DIR)
    assert tokenizer.token_to_id(train.EOS) == theirs.eos_token_id == 0


def test_heldout_bits_per_byte_are_the_card_s(loaded, tokenizer):
    text = HELDOUT_TEXT.read_text("utf-8")
    bits = train.bits_per_byte(*loaded, tokenizer, text, CONTEXT)
    (card,) = re.findall(r"([\d.]+) bits per byte", CARD.read_text("utf-8"))
    assert bits == pytest.approx(float(card), abs=1e-3)
    assert bits <= 2.0


def test_devil_s_dictionary_is_foreign_to_it(loaded, tokenizer):
    text = ADAPT_TEXT.read_text("utf-8")[-8_000:]
    assert train.bits_per_byte(*loaded, tokenizer, text, CONTEXT) > 3.0


def test_transformers_computes_the_same_loss(loaded):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    model, params = loaded
    theirs = transformers.AutoModelForCausalLM.from_pretrained(MODEL_DIR)
    assert theirs.dtype == torch.float32
    text = HELDOUT_TEXT.read_text("utf-8")[:8_000]
    ids = np.array(models.tokenizer(MODEL_DIR)(text)["input_ids"])[None, :CONTEXT]
    with torch.no_grad():
        loss = theirs(torch.tensor(ids), labels=torch.tensor(ids)).loss.item()
    ours = train.nats(model, params, ids[:, :-1], ids[:, 1:]).mean()
    assert float(ours) == pytest.approx(loss, abs=1e-4)


def test_samples_are_scripture(loaded, tokenizer):
    """Nearly every word that it writes is one of the King James Bible's."""
    model, params = loaded
    known = set(re.findall(r"[a-z]+", HELDOUT_TEXT.read_text("utf-8").lower()))
    ids, _ = models.generate(
        model.apply,
        params,
        np.array([tokenizer.encode("And the LORD said").ids]),
        max_new_tokens=100,
        temperature=0.7,
        key=jax.random.key(0),
    )
    words = re.findall(r"[a-z]+", tokenizer.decode(np.array(ids[0])).lower())
    assert len(words) > 50
    assert sum(word in known for word in words) > 0.9 * len(words)


BIBLE = """
Genesis 1

  1 In the beginning.
  2 And the earth.

1 John 2

  1 My.
"""


def test_chapters_lose_their_verse_numbers():
    assert texts.chapters(BIBLE) == [
        "Genesis 1\nIn the beginning.\nAnd the earth.\n",
        "1 John 2\nMy.\n",
    ]


def test_a_wrongly_made_corpus_is_refused():
    with pytest.raises(ValueError, match="bible -l100000 Gen1:1-Rev22:21"):
        texts.chapters("Ge1:1 In the beginning God created the heaven.\n")


def test_split_spreads_what_is_held_out():
    documents = [str(i) for i in range(60)]
    kept, heldout = texts.split(documents)
    assert heldout == ["10", "30", "50"]
    assert sorted(kept + heldout) == sorted(documents)


def test_dictionary_is_unwrapped_and_cleaned():
    raw = (
        "header\n\n"
        "ABASEMENT, n.  A decent\nattitude.  See {WEALTH}.\n    More\nprose.\n\n"
        "    _Verse_ one\n        and two.\n                    G.J.\n\n"
        "NEGRO, n.  Left out\n\n    with its verse.\n\nZEAL, n.  A passion.\n\n"
        " abcdefghijklmnopqrstuvwxyz\n"
    )
    assert texts.dictionary(raw) == (
        "ABASEMENT, n. A decent attitude. See WEALTH.\nMore prose.\n\n"
        "    Verse one\n    and two.\n    G.J.\n\nZEAL, n. A passion.\n"
    )


def test_epochs_hold_every_token_in_some_order():
    documents = [np.full(40, i, np.int32) for i in range(1, 9)]
    feed = train.epochs(documents, np.array([9]), context=16, seed=0)
    first, second = next(feed), next(feed)
    assert first.shape == second.shape == (20, 17)
    assert not np.array_equal(first, second)
    assert set(range(1, 9)) <= set(np.unique(first))
    again = next(train.epochs(documents, np.array([9]), context=16, seed=0))
    np.testing.assert_array_equal(first, again)


def test_a_corpus_shorter_than_a_window_is_refused():
    with pytest.raises(ValueError, match="`--context` = 64 tokens, but .* has 5"):
        next(train.epochs([np.arange(5)], np.array([9]), context=64, seed=0))


def test_bits_per_byte_count_every_byte_once(tokenizer):
    """A model that knows nothing pays ln(vocab) nats for each token."""

    class Uniform:
        def apply(self, params, ids):
            return jnp.zeros((*ids.shape, 3072)) + params

    text = "Thou shalt not steal. " * 9
    count = len(tokenizer.encode(text).ids)
    expected = count * math.log2(3072) / len(text.encode())
    for context in (7, 16, 1000):
        bits = train.bits_per_byte(Uniform(), jnp.zeros(()), tokenizer, text, context)
        assert bits == pytest.approx(expected, rel=1e-5)


@pytest.mark.usefixtures("relaxed")  # optax promotes its step count
def test_the_training_script_runs(tmp_path, capsys):
    verses = HELDOUT_TEXT.read_text("utf-8").splitlines()[1:260]
    corpus = "".join(
        f"\nGenesis {n}\n\n  1 {verse}\n"
        for n, verse in enumerate(filter(None, verses), start=1)
    )
    (tmp_path / "bible.txt").write_text(corpus, "utf-8")
    train.main(
        f"--corpus {tmp_path}/bible.txt --out {tmp_path}/model "
        "--steps 2 --batch 2 --context 32 --vocab 300".split()
    )
    assert "bits per byte on held-out chapters" in capsys.readouterr().out
    model, params = models.load(tmp_path / "model")
    logits = model.apply(params, jnp.zeros((1, 4), jnp.int32))
    assert logits.shape == (1, 4, 300) and bool(jnp.isfinite(logits).all())
