"""`--new-token`: into the tokenizer, the tables, the adapter, and out again."""

import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_folder import EOS, TEXT, write_model

import lorax_jax as lj
from lorax_jax import embedded, models

CALLS = TEXT.replace("sat on the", "<tool>sit</tool> on the")
NEW = ("--new-token", "<tool>", "--new-token", "</tool>")


@pytest.fixture
def calls(here):
    (here / "calls.txt").write_text(CALLS)
    return here / "calls.txt"


def done(result):
    assert result.exit_code == 0, result.output
    return result.stdout


def text_of(apply, params, tokenizer, prompt, count):
    """Greedy text, as `generate` makes it."""
    ids = np.array([tokenizer(prompt).input_ids], np.int32)
    found, _ = models.generate(apply, params, ids, max_new_tokens=count)
    return tokenizer.decode(np.asarray(found)[0])


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_from_end_to_end(finetune, run, here, calls, tied):
    """What is trained says the new token, as an adapter and merged."""
    write_model(here / "base", tie_word_embeddings=tied)
    out = done(
        finetune("--export", *NEW, model="base", data=calls, steps=40, lr=0.02, rank=8)
    )
    first = len(models.tokenizer(here / "base"))
    assert f"tokens    <tool> ({first}), </tool> ({first + 1}): the vocab" in out
    folder = here / "lorax-out"
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    rows = config["trainable_token_indices"]
    heads = [] if tied else ["lm_head"]
    assert rows == dict.fromkeys(["model.embed_tokens", *heads], [first, first + 1])
    tokenizer = models.tokenizer(folder / "adapter")
    assert tokenizer("<tool>").input_ids == [first]
    held = load_file(folder / "adapter" / "adapter_model.safetensors")
    deltas = [x.shape for name, x in held.items() if "delta" in name]
    assert deltas == [(2, 32)] * (1 if tied else 2)
    greedy = ["--temperature", 0, "--max-new-tokens", 6, "--prompt", "The cat"]
    said = done(run("generate", "--adapter", folder / "adapter", *greedy))
    assert re.search("</?tool>", said)
    assert done(run("generate", "--model", folder / "merged", *greedy)) == said
    done(run("merge", folder / "adapter", "again"))
    assert done(run("generate", "--model", "again", *greedy)) == said
    merged = json.loads((here / "again" / "config.json").read_text())
    assert merged["vocab_size"] == first + 2
    shown = done(run("inspect", folder / "adapter"))
    assert "embed_tokens/embedding" in shown and "Every B has moved" in shown


def test_the_embedded_model(run, here, calls):
    """Offline, on what comes with the library."""
    args = ["finetune", "--data", calls, *NEW, "--steps", 3, "--batch", 2]
    out = done(run(*args, "--length", 16, "--sample-tokens", 4, "--heldout", 0.02))
    size = json.loads((embedded.MODEL_DIR / "config.json").read_text())["vocab_size"]
    assert re.search(rf"grew from {size:,} to {size + 2:,}", out)
    folder = here / "lorax-out" / "adapter"
    model, params, adapter, receipt = models.load_adapted(folder)
    assert model.config.vocab_size == size + 2 and not receipt.problems
    moved = adapter.train["embed_tokens/embedding@rows"]["rows"]
    start = params["embed_tokens"]["embedding"][size:]
    assert (np.abs(moved - start).max(1) > 0).all()
    # Generation with the new tokens decodes to their texts.
    tokenizer = models.tokenizer(folder)
    bound = lj.bind(params, adapter)
    text = text_of(lj.adapt(model.apply), bound, tokenizer, "A <tool>sit</tool>", 4)
    assert text.startswith("A <tool>sit</tool>")
    prompt = ["--prompt", "A <tool>sit</tool>", "--max-new-tokens", 4]
    said = done(run("generate", "--adapter", folder, "--temperature", 0, *prompt))
    assert said.rstrip("\n") == text.rstrip("\n")


def test_what_a_model_says_is_decoded(run, here):
    """A model made to say a new token between two old ones says its text."""
    write_model(here / "base", tie_word_embeddings=False)
    model, params = models.load(here / "base")
    tokenizer = models.tokenizer(here / "base")
    tokenizer.add_tokens(["<tool>"])
    model, params, _ = models.grow(model, params, to=len(tokenizer), init="normal")
    cat, new, sat = (
        tokenizer(text).input_ids[-1] for text in ("The cat", "<tool>", "cat sat")
    )
    table = np.asarray(params["embed_tokens"]["embedding"])
    head = np.zeros_like(params["lm_head"]["kernel"])
    head[:, new], head[:, sat] = table[cat], table[new]
    layers = jax.tree.map(np.zeros_like, params["layers"])  # they hand on the token
    params = params | {"layers": layers, "lm_head": {"kernel": head}}
    text = text_of(model.apply, params, tokenizer, "The cat", 2)
    assert text == "The cat<tool> sat"


def test_a_model_with_rows_to_spare(finetune, here, calls):
    """Padded tables do not grow."""
    write_model(here / "padded", vocab_size=320)
    out = done(finetune(*NEW, model="padded", data=calls))
    assert "rows that the model had to spare" in out
    adapter = here / "lorax-out" / "adapter"
    assert lj.checkpoint.read_growth(adapter) is None
    assert models.load_adapted(adapter).model.config.vocab_size == 320


def test_resuming(finetune, run, here, calls, monkeypatch):
    """The tokens are the run's, and are not given again."""
    from lorax_jax.train import _finetune

    real, seen = _finetune.save_state, []

    def save(*args, **kwargs):
        found = real(*args, **kwargs)
        seen.append(found)
        if len(seen) == 1:
            raise KeyboardInterrupt
        return found

    monkeypatch.setattr(_finetune, "save_state", save)
    result = finetune(*NEW, data=calls, save_every=2)
    assert result.exit_code == 130, result.output
    out = done(run("finetune", "--resume", "lorax-out"))
    assert "the vocabulary grew" in out
    rows = load_file(here / "lorax-out" / "adapter" / "adapter_model.safetensors")
    assert any("delta" in name for name in rows)


REFUSED = {
    "known": ([EOS], "--new-token '<.endoftext.>' is token 0 of the tokenizer alr"),
    "twice": (["<t>", "<t>"], "--new-token '<t>' is named twice"),
    "empty": ([" "], "--new-token ' ' is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(finetune, here, case):
    tokens, message = REFUSED[case]
    result = finetune(*(x for token in tokens for x in ("--new-token", token)))
    assert result.exit_code == 2
    assert re.search(message, result.stderr)
    assert not (here / "lorax-out").exists()


def test_more_that_is_refused(finetune, here):
    write_model(here / "small", vocab_size=100)
    result = finetune(*NEW, model="small")
    assert result.exit_code == 2
    assert re.search(
        "knows token .*, and the model's table has 100 rows", result.stderr
    )
    result = finetune(*NEW, targets="embed_tokens/.*", tie="shared")
    assert result.exit_code == 2
    assert "--targets takes embed_tokens/embedding, and --new-token" in result.stderr
