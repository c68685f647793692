"""What does each kind of adapter cost over plain LoRA?

One Llama, one train step, adapters on all of its linear layers. First that the loss on
adapted weights is the loss on merged ones; then, the kinds taking turns, time of a
step, operations and bytes beside the arguments, in percent of plain LoRA's.

    python benchmarks/kinds.py [--spec small] [--rounds 20] [--save NAME]
"""

import argparse
import functools

import jax
import jax.numpy as jnp
import optax
from handwritten import RANK, SCALE, SPECS, loss_of
from timing import facts, in_turns, median, save, stages

import lorax_jax as lj
from lorax_jax import models

KINDS = {
    "lora": {},
    "lora with dropout": {"dropout": 0.1},
    "dora": {"dora": True},
}


def moved(adapter, key):
    """The adapter with B off zero, so that all of it acts."""
    train = {}
    for i, (name, arrays) in enumerate(adapter.train.items()):
        b = jax.random.normal(jax.random.fold_in(key, i), arrays["b"].shape)
        train[name] = arrays | {"b": (1e-2 * b).astype(arrays["b"].dtype)}
    return lj.Adapter(train, adapter.fixed)


def compare(config, *, scan, batch, length, dtype, rounds):
    """All kinds on one form of the model."""
    model = models.from_config(config, dtype=dtype, scan_layers=scan)
    params = model.init(jax.random.key(0))
    shape = (batch, length)
    ids = jax.random.randint(jax.random.key(1), shape, 0, config["vocab_size"])
    forward, tx = lj.adapt(model.apply), optax.adamw(1e-3)
    plain = jax.jit(lambda params, ids: loss_of(model.apply(params, ids), ids))
    key = jax.random.key(3)
    out, calls = {}, {}
    for name, options in KINDS.items():
        lora = lj.LoraConfig("all-linear", rank=RANK, alpha=SCALE * RANK, **options)
        plan = lj.plan(lora, params, model.apply, (ids,))
        adapter = moved(lj.init(plan, params, key=jax.random.key(2)), key)
        used = key if "dropout" in options else None

        def loss(train, fixed, params, ids, key):
            bound = lj.bind(params, lj.Adapter(train, fixed), key=key)
            return loss_of(forward(bound, ids), ids)

        def step(train, state, fixed, params, ids, key, loss=loss):
            value, grads = jax.value_and_grad(loss)(train, fixed, params, ids, key)
            updates, state = tx.update(grads, state, train)
            return optax.apply_updates(train, updates), state, value

        adapted = jax.jit(loss)(*adapter, params, ids, None)
        merged = plain(jax.jit(lj.merge)(params, adapter), ids)
        difference = abs(float(adapted / merged) - 1)
        assert difference < 20 * float(jnp.finfo(dtype).eps), (name, difference)
        args = (adapter.train, tx.init(adapter.train), adapter.fixed, params, ids, used)
        seconds, program = stages(step, *args)
        out[name] = facts(program) | {"merged_difference": difference}
        out[name] |= {f"{part}_s": value for part, value in seconds.items()}
        calls[name] = functools.partial(program, *args)
    for name, seconds in in_turns(calls, rounds).items():
        out[name] |= {"step_s": median(seconds), "steps_s": seconds}
    for row in out.values():
        row["step_ratio"] = row["step_s"] / out["lora"]["step_s"]
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--spec", default="small", choices=SPECS)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--save", default=None, help="name of the results file")
    args = parser.parse_args()
    config = {"model_type": "llama", "tie_word_embeddings": True, **SPECS[args.spec]}
    results = {"config": config, "arguments": vars(args)}
    for scan in (False, True):
        form = "scanned" if scan else "unrolled"
        results[form] = compare(
            config,
            scan=scan,
            batch=args.batch,
            length=args.length,
            dtype=jnp.dtype(args.dtype),
            rounds=args.rounds,
        )
        for name, row in results[form].items():
            print(
                f"{form:9} {name:18} {1e3 * row['step_s']:8.1f} ms  "
                f"x{row['step_ratio']:.3f}  temporary "
                f"{row['temporary_bytes'] / 1e9:.2f} GB  "
                f"trace+compile {row['total_s']:.1f} s",
                flush=True,
            )
    if args.save:
        print(save(args.save, results))


if __name__ == "__main__":
    main()
