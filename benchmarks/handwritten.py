"""What does the transform cost against LoRA layers written by hand?

Both sides are the same Llama and the same train step. On one side `adapt` turns the
plain model into the adapted one; on the other the model's linear layers are written
with `x @ W + (scale * (x @ A)) @ B` inside, the scale where it is cheapest. First that
loss and gradients agree, then operations as XLA counts them, time to trace and compile,
and time of a step.

    python benchmarks/handwritten.py [--spec small] [--rounds 30] [--save NAME]
"""

import argparse
import contextlib
import functools

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from timing import facts, in_turns, median, save, stages

import lorax_jax as lj
from lorax_jax import models
from lorax_jax.models import _llama, _modules

SCALE, RANK = 2.0, 16


class HandLinear(_modules.Linear):
    """The model's linear layer with LoRA written into it."""

    def __init__(self, d_in, d_out, *, rngs, **kwargs):
        super().__init__(d_in, d_out, rngs=rngs, **kwargs)
        self.lora_a = nnx.Param(jnp.zeros((d_in, RANK), jnp.float32))
        self.lora_b = nnx.Param(jnp.zeros((RANK, d_out), jnp.float32))

    def __call__(self, x):
        a = self.lora_a[...].astype(x.dtype)
        b = self.lora_b[...].astype(x.dtype)
        return super().__call__(x) + (SCALE * (x @ a)) @ b


@contextlib.contextmanager
def by_hand():
    """Builds Llamas from `HandLinear`."""
    plain, _llama.Linear = _llama.Linear, HandLinear
    try:
        yield
    finally:
        _llama.Linear = plain


def split(tree):
    """Takes the hand-written factors out of a tree: (factors, rest)."""
    train, base = {}, {}
    for name, value in tree.items():
        if isinstance(value, dict):
            inner_train, base[name] = split(value)
            if inner_train:
                train[name] = inner_train
        else:
            (train if name.startswith("lora_") else base)[name] = value
    return train, base


def join(train, base):
    """Undoes `split`."""
    out = dict(base)
    for name, value in train.items():
        inner = isinstance(value, dict)
        out[name] = join(value, base[name]) if inner else value
    return out


def loss_of(logits, ids):
    logits = logits[:, :-1].astype(jnp.float32)
    return optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:]).mean()


def step_of(loss, tx):
    def step(train, state, base, fixed, ids):
        value, grads = jax.value_and_grad(loss)(train, base, fixed, ids)
        updates, state = tx.update(grads, state, train)
        return optax.apply_updates(train, updates), state, value

    return step


def factors(adapter, tree, prefix=""):
    """The hand-written tree's factors, filled from an adapter of ours."""
    out = {}
    for name, value in tree.items():
        if "lora_a" in value:
            ours = adapter.train[f"{prefix}{name}/kernel"]
            out[name] = {"lora_a": ours["a"], "lora_b": ours["b"]}
        else:
            out[name] = factors(adapter, value, f"{prefix}{name}/")
    return out


def compare(config, *, scan, batch, length, dtype, rounds, compiles):
    """Both sides for one form of the model."""
    kwargs = {"dtype": dtype, "scan_layers": scan}
    model = models.from_config(config, **kwargs)
    params = model.init(jax.random.key(0))
    ids = jax.random.randint(
        jax.random.key(1), (batch, length), 0, config["vocab_size"]
    )
    lora = lj.LoraConfig("all-linear", rank=RANK, alpha=SCALE * RANK, init=False)
    plan = lj.plan(lora, params, model.apply, (ids,))
    adapter = lj.init(plan, params, key=jax.random.key(2))
    forward = lj.adapt(model.apply)

    def ours(train, base, fixed, ids):
        return loss_of(forward(lj.bind(base, lj.Adapter(train, fixed)), ids), ids)

    with by_hand():
        # A config of its own: a model's layers are made once for each config.
        hand = models.from_config(config | {"initializer_range": 0.021}, **kwargs)
        hand_train, _ = split(hand.init(jax.random.key(0)))
        hand_train = factors(adapter, hand_train)

        def theirs(train, base, fixed, ids):
            del fixed
            return loss_of(hand.apply(join(train, base), ids), ids)

        tx = optax.adamw(1e-3)
        sides = {
            "transform": (ours, adapter.train, adapter.fixed),
            "by_hand": (theirs, hand_train, {}),
        }
        # The same answer first.
        values = {
            name: jax.jit(jax.value_and_grad(loss))(train, params, fixed, ids)
            for name, (loss, train, fixed) in sides.items()
        }
        (loss_a, grad_a), (loss_b, grad_b) = values["transform"], values["by_hand"]
        expected = flat(grad_b)
        got = {
            f"{name.removesuffix('/kernel')}/lora_{k}": v
            for name, pair in grad_a.items()
            for k, v in pair.items()
        }
        assert set(got) == set(expected)
        worst = max(
            float(jnp.abs(got[k] - expected[k]).max() / jnp.abs(expected[k]).max())
            for k in got
        )
        out = {"loss_difference": abs(float(loss_a - loss_b)), "gradient_error": worst}

        compiled, times = {}, {name: [] for name in sides}
        for _ in range(compiles):  # in turns
            for name, (loss, train, fixed) in sides.items():
                args = (train, tx.init(train), params, fixed, ids)
                seconds, compiled[name] = stages(step_of(loss, tx), *args)
                times[name].append(seconds)
        for name in sides:
            parts = {k: median([t[k] for t in times[name]]) for k in times[name][0]}
            out[name] = facts(compiled[name]) | {f"{k}_s": v for k, v in parts.items()}
        calls = {}
        for name, (_, train, fixed) in sides.items():
            args = (train, tx.init(train), params, fixed, ids)
            calls[name] = functools.partial(compiled[name], *args)
        for name, seconds in in_turns(calls, rounds).items():
            out[name] |= {"step_s": median(seconds), "steps_s": seconds}
    for key in ("flops", "step_s", "total_s", "trace_s", "temporary_bytes"):
        out[f"{key}_ratio"] = out["transform"][key] / out["by_hand"][key]
    return out


def flat(tree, prefix=""):
    out = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            out |= flat(value, f"{prefix}{name}/")
        else:
            out[f"{prefix}{name}"] = value
    return out


SPECS = {
    # A model that two cores train in a second or so a step.
    "small": {
        "vocab_size": 4096,
        "hidden_size": 256,
        "intermediate_size": 768,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    # The shape of Llama 3.2 1B, with Llama 2's vocabulary.
    "llama_1b": {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
    },
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--spec", default="small", choices=SPECS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--compiles", type=int, default=5)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--save", default=None, help="name of the results file")
    args = parser.parse_args()
    config = {"model_type": "llama", "tie_word_embeddings": True, **SPECS[args.spec]}
    results = {"config": config, "arguments": vars(args)}
    for scan in (False, True):
        name = "scanned" if scan else "unrolled"
        row = results[name] = compare(
            config,
            scan=scan,
            batch=args.batch,
            length=args.length,
            dtype=jnp.dtype(args.dtype),
            rounds=args.rounds,
            compiles=args.compiles,
        )
        ours, theirs = row["transform"], row["by_hand"]
        print(
            f"{name:9} flops x{row['flops_ratio']:.4f}  "
            f"step x{row['step_s_ratio']:.3f} ({1e3 * ours['step_s']:.1f} ms against "
            f"{1e3 * theirs['step_s']:.1f})  trace+compile x{row['total_s_ratio']:.3f} "
            f"({ours['total_s']:.2f} s against {theirs['total_s']:.2f}, trace "
            f"x{row['trace_s_ratio']:.2f})  "
            f"temporary x{row['temporary_bytes_ratio']:.3f} "
            f"({ours['temporary_bytes'] / 1e9:.2f} GB)  gradient error "
            f"{row['gradient_error']:.1e}",
            flush=True,
        )
    if args.save:
        print(save(args.save, results))


if __name__ == "__main__":
    main()
