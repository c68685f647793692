"""Train the embedded base model: tokenizer, Llama, Hugging Face folder.

    apt-get install bible-kjv
    bible -l100000 Gen1:1-Rev22:21 > bible.txt
    python -m lorax_jax.embedded.train --corpus bible.txt --out DIR

It needs only the library's own dependencies and runs on whatever JAX finds: a minute on
a GPU, hours on a CPU. The seed fixes the first weights, the batches and the noise; a
GPU still adds in varying order, so two runs agree closely, not bit for bit.
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from safetensors.numpy import save as to_safetensors
from tokenizers import Tokenizer, decoders, pre_tokenizers, trainers
from tokenizers.models import BPE

from .. import models
from .texts import as_text, chapters, split

EOS = "<|endoftext|>"  # token 0; it also starts a text and pads a batch


def train_tokenizer(documents: list[str], vocab: int) -> Tokenizer:
    """A byte-level BPE: learned on `documents`, able to write any text without loss."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def architecture(vocab: int) -> dict:
    """The Hugging Face config: sized so that the float32 folder stays below 8 MB."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab,
        "hidden_size": 192,
        "intermediate_size": 576,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.02,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "dtype": "float32",
    }


def epochs(
    documents: list[np.ndarray], blank: np.ndarray, context: int, seed: int
) -> Iterator[np.ndarray]:
    """Endless epochs, each an array of windows `(windows, context + 1)`.

    Every epoch shuffles the documents anew and cuts at a new offset. About half of the
    documents end with the end-of-text token, the others with the `blank` line that
    separates documents in a plain text file, so that the model knows both.

    Raises:
        ValueError: if the documents do not fill one window.
    """
    total = sum(map(len, documents))
    if total <= context:
        raise ValueError(
            f"`--context` = {context} tokens, but the corpus has {total} to train on. "
            "Give a longer corpus or a smaller context."
        )
    rng = np.random.default_rng(seed)
    ends = [np.zeros(1, np.int32), blank]
    while True:
        pieces = []
        for i in rng.permutation(len(documents)):
            pieces += [documents[i], ends[rng.integers(2)]]
        stream = np.concatenate(pieces).astype(np.int32)
        stream = np.roll(stream, rng.integers(len(stream)))
        starts = rng.permutation((len(stream) - 1) // context) * context
        yield stream[starts[:, None] + np.arange(context + 1)]  # (windows, context + 1)


def nats(model, params, inputs: jax.Array, targets: jax.Array) -> jax.Array:
    """Negative log likelihood of `targets` given `inputs`, both `(batch, context)`."""
    logits = model.apply(params, inputs).astype(jnp.float32)  # (batch, context, vocab)
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets)


def bits_per_byte(
    model, params, tokenizer: Tokenizer, text: str, context: int
) -> float:
    """The nats of all of `text` / ln 2 / its UTF-8 bytes.

    The text is one stream, cut into windows of `context` predictions that see nothing
    before their own start: the plainest way to count, and an upper bound. The very
    first token is predicted from the end-of-text token.
    """
    ids = np.array([0, *tokenizer.encode(text).ids], np.int32)
    score = jax.jit(partial(nats, model))
    total = 0.0
    for start in range(0, len(ids) - 1, context):
        window = np.zeros(context + 1, np.int32)  # one shape, so one compilation
        piece = ids[start : start + context + 1]
        window[: len(piece)] = piece
        losses = score(params, window[None, :-1], window[None, 1:])
        total += float(losses[0, : len(piece) - 1].sum())
    return total / math.log(2) / len(text.encode())


def fit(model, windows: Iterator[np.ndarray], vocab: int, args: argparse.Namespace):
    """AdamW with warmup and a cosine to zero; returns the trained parameters.

    The corpus is small and the model reads it dozens of times. What keeps it from
    learning it by heart is weight decay and noise: a share `args.noise` of the input
    tokens is replaced by random ones (the targets are not).
    """
    params = model.init(jax.random.key(args.seed))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, args.lr, max(1, args.steps // 20), args.steps
    )
    matrices = jax.tree.map(lambda w: w.ndim > 1, params)  # norms do not decay
    tx = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b2=0.98, weight_decay=args.decay, mask=matrices),
    )
    state = tx.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch, key):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        where, what = jax.random.split(key)
        noise = jax.random.randint(what, inputs.shape, 1, vocab)
        swap = jax.random.bernoulli(where, args.noise, inputs.shape)
        inputs = jnp.where(swap, noise, inputs)

        def loss(params):
            return nats(model, params, inputs, targets).mean()

        value, grads = jax.value_and_grad(loss)(params)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    began, last = time.perf_counter(), None
    for number in range(1, args.steps + 1):
        if last is None or len(last) < args.batch:  # a new epoch; the rest is dropped
            last = next(windows)
        batch, last = last[: args.batch], last[args.batch :]
        key = jax.random.fold_in(jax.random.key(args.seed + 1), number)
        params, state, value = step(params, state, batch, key)
        if number % max(1, args.steps // 10) == 0:
            seconds = time.perf_counter() - began
            print(f"step {number:>6,}  loss {float(value):.4f}  {seconds:6.1f} s")
    return params


def save(out: Path, model, params, config: dict, tokenizer: Tokenizer) -> None:
    """Writes the Hugging Face folder: config, float32 weights, tokenizer."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {
        name: np.ascontiguousarray(w, np.float32)
        for name, w in models.to_hf(model, params).items()
    }
    content = to_safetensors(weights, metadata={"format": "pt"})
    (out / "model.safetensors").write_bytes(content)
    tokenizer.save(str(out / "tokenizer.json"))
    files = {
        "config.json": config,
        "generation_config.json": {"bos_token_id": 0, "eos_token_id": 0},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": EOS,
            "eos_token": EOS,
            "pad_token": EOS,
            "clean_up_tokenization_spaces": False,
        },
    }
    for name, content in files.items():
        (out / name).write_text(json.dumps(content, indent=2) + "\n", "utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line; its defaults made the model in this folder."""
    it = argparse.ArgumentParser(
        prog="python -m lorax_jax.embedded.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    it.add_argument("--corpus", type=Path, required=True, help="output of `bible`")
    it.add_argument("--out", type=Path, required=True, help="folder to write")
    it.add_argument("--vocab", type=int, default=3072)
    it.add_argument("--steps", type=int, default=4000)
    it.add_argument("--batch", type=int, default=32)
    it.add_argument("--context", type=int, default=512)
    it.add_argument("--lr", type=float, default=3e-3)
    it.add_argument("--decay", type=float, default=1.0)
    it.add_argument("--noise", type=float, default=0.15)
    it.add_argument("--seed", type=int, default=0)
    return it


def main(argv: list[str] | None = None) -> None:
    """Trains the model and writes its folder; the command line of this module."""
    args = parser().parse_args(argv)
    training, heldout = split(chapters(args.corpus.read_text("utf-8")))
    tokenizer = train_tokenizer(training, args.vocab)
    config = architecture(tokenizer.get_vocab_size())
    model = models.from_config(config, dtype=jnp.float32)

    documents = [np.array(e.ids) for e in tokenizer.encode_batch(training)]
    blank = np.array(tokenizer.encode("\n").ids)
    windows = epochs(documents, blank, args.context, args.seed)
    params = fit(model, windows, config["vocab_size"], args)

    save(args.out, model, params, config, tokenizer)
    text = as_text(heldout)
    bits = bits_per_byte(model, params, tokenizer, text, args.context)
    size = sum(w.size for w in jax.tree.leaves(params))
    print(f"{size:,} parameters; {bits:.4f} bits per byte on held-out chapters")


if __name__ == "__main__":
    main()
