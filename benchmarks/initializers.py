"""Do initializers help? Loss curves of six, over learning rates and seeds.

One model, one text, the same steps, scale and schedule for each initializer; a sweep
of learning rates; several seeds, which differ in the order of the rows and in what is
drawn at random, trained side by side by `vmap` on one untouched base. First that every
start leaves the model's loss as it is. Then training loss and loss on held-out rows, in
nats per token, each initializer at the rate that is best for it on held-out rows.

    python benchmarks/fetch_smollm2.py
    python benchmarks/initializers.py --model benchmarks/cache/smollm2 --save smollm2
    python benchmarks/initializers.py --show initializers_smollm2   # the table again

Without `--model` the embedded model is trained.
"""

import argparse
import functools
import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from timing import RESULTS, machine

import lorax_jax as lj
from lorax_jax import capturing, embedded, models, statistics

METHODS = ("kaiming", "pissa", "olora", "eva", "corda_ipm", "lora_ga")
RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2)


def rows_of(folder, length):
    """The embedded text as rows of tokens: those to train on, and those held out."""
    text = models.tokenizer(folder)(embedded.ADAPT_TEXT.read_text())
    ids = np.asarray(text["input_ids"], np.int32)
    ids = ids[: len(ids) // (length + 1) * (length + 1)].reshape(-1, length + 1)
    order = np.random.default_rng(0).permutation(len(ids))
    held = max(1, len(ids) // 10)
    return ids[order[held:]], ids[order[:held]]


def loss_of(apply, params, ids):
    logits = apply(params, ids[:, :-1]).astype(jnp.float32)
    labels = ids[:, 1:]
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def started(method, model, params, rows, options):
    """The plan and what its initializer reads, and the seconds that it took."""
    config = lj.LoraConfig(
        "all-linear", rank=options.rank, alpha=options.rank, init=method
    )
    plan = lj.plan(config, params, model.apply, (rows[:1, :-1],))
    batches = list(rows[: options.rows].reshape(-1, options.batch, rows.shape[1]))
    start = time.perf_counter()
    stats = None
    if method in ("eva", "corda_ipm"):
        moments = method == "eva"
        stat = statistics.Moments() if moments else statistics.SecondMoment()
        gather = capturing.capture(model.apply, plan, stat=stat)
        stats = gather.run(params, [ids[:, :-1] for ids in batches])
        if moments:
            spectra = lj.spectra(plan, stats=stats, size=2 * options.rank)
            shares = {name: v / spectra.totals[name] for name, v in spectra.items()}
            plan = capturing.redistribute(plan, shares, rho=2.0)
    if method == "lora_ga":
        loss = functools.partial(loss_of, model.apply)
        stats = lj.capture_grad(loss, plan).run(params, batches)
    init = jax.jit(functools.partial(lj.init, plan, stats=stats))
    adapter = jax.block_until_ready(init(params, key=jax.random.key(0)))
    seconds = time.perf_counter() - start
    return plan, stats, adapter, seconds


def trainer(model, options):
    """`train(adapters, orders, rate)`: curves of all seeds, by `vmap`."""
    forward = lj.adapt(model.apply)
    warm, steps = max(1, options.steps // 10), options.steps

    def loss(train, fixed, params, ids):
        bound = lj.bind(params, lj.Adapter(train, fixed))
        return loss_of(forward, bound, ids)

    def one(train, fixed, order, rate, params, rows, held):
        schedule = optax.warmup_cosine_decay_schedule(0.0, 1.0, warm, steps)
        tx = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam())

        def step(carry, at):
            train, state, i = carry
            value, grads = jax.value_and_grad(loss)(train, fixed, params, rows[at])
            updates, state = tx.update(grads, state, train)
            size = -rate * schedule(i)
            train = jax.tree.map(lambda p, u: p + size * u, train, updates)
            return (train, state, i + 1), value

        def chunk(carry, at):
            carry, values = jax.lax.scan(step, carry, at)
            return carry, (values, loss(carry[0], fixed, params, held))

        carry = train, tx.init(train), jnp.zeros((), jnp.int32)
        before = loss(train, fixed, params, held)
        _, (values, after) = jax.lax.scan(chunk, carry, order)
        return before, values.reshape(-1), after

    mapped = jax.vmap(one, in_axes=(0, 0, 0, None, None, None, None))
    return jax.jit(mapped)


def orders_of(count, options):
    """For each seed, the rows of each step: shape `(seeds, chunks, every, batch)`."""
    found = []
    for seed in range(options.seeds):
        rng, drawn = np.random.default_rng(1000 + seed), []
        while len(drawn) < options.steps * options.batch:
            drawn += rng.permutation(count).tolist()
        found.append(drawn[: options.steps * options.batch])
    shape = (options.seeds, -1, options.every, options.batch)
    return jnp.asarray(np.array(found).reshape(shape))


def compare(options):
    """All curves."""
    model, params = models.load(
        options.model, dtype=options.dtype, scan_layers=not options.unrolled
    )
    rows, held = (jnp.asarray(x) for x in rows_of(options.model, options.length))
    orders, train = orders_of(len(rows), options), trainer(model, options)
    plain = float(jax.jit(functools.partial(loss_of, model.apply))(params, held))
    out = {"base_loss": plain, "rows": len(rows), "held_out": len(held), "methods": {}}
    for method in options.methods:
        plan, stats, _, seconds = started(method, model, params, rows, options)
        keys = [jax.random.key(seed) for seed in range(options.seeds)]
        init = jax.jit(functools.partial(lj.init, plan, stats=stats))
        adapters = [init(params, key=key) for key in keys]
        stacked = jax.tree.map(lambda *x: jnp.stack(x), *adapters)
        found = {"seconds_to_start": seconds, "trainable": plan.trainable, "rates": {}}
        for rate in options.rates:
            begin = time.perf_counter()
            before, curve, after = jax.block_until_ready(
                train(*stacked, orders, jnp.float32(rate), params, rows, held)
            )
            # Every start leaves the model as it is.
            np.testing.assert_allclose(before, plain, rtol=1e-3)
            found["rates"][str(rate)] = {
                "train": np.round(np.asarray(curve, float), 5).tolist(),
                "held_out": np.round(np.asarray(after, float), 5).tolist(),
                "seconds": time.perf_counter() - begin,
            }
            last = np.asarray(curve)[:, -options.every :].mean()
            print(
                f"{method:>10} {rate:8.0e}  train {last:.4f}  held out "
                f"{np.asarray(after)[:, -1].mean():.4f}  "
                f"({found['rates'][str(rate)]['seconds']:.0f} s)",
                flush=True,
            )
        out["methods"][method] = found
        out |= {"machine": machine(), "options": vars(options)}
        if options.save:
            write(out, options)
    return out


def write(out, options):
    """The curves so far: a long run that is stopped keeps what it has."""
    with open(f"{options.out}/initializers_{options.save}.json", "w") as file:
        json.dump(out, file)


def at_best(found):
    """The rate of least held-out loss at the end, and its curves: `(seeds, steps)`."""

    def final(rate):
        last = np.array(found["rates"][rate]["held_out"])[:, -1].mean()
        return last if np.isfinite(last) else np.inf

    rate = min(found["rates"], key=final)
    return rate, *(np.array(found["rates"][rate][k]) for k in ("train", "held_out"))


def spread(values):
    """Mean and standard deviation over seeds."""
    return f"{values.mean():.4f} ± {values.std(ddof=1):.4f}"


def table(result):
    """A line for each initializer, as Markdown."""
    every = result["options"]["every"]
    lines = [
        "| initializer | best rate | training, first half | training, end | "
        "held out, end | held out at 3e-04 | start, s |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, found in result["methods"].items():
        rate, curves, held = at_best(found)
        same = np.array(found["rates"]["0.0003"]["held_out"])[:, -1]
        half = curves[:, : curves.shape[1] // 2].mean(axis=1)
        last = curves[:, -every:].mean(axis=1)
        cells = [method, f"{float(rate):.0e}"]
        cells += [spread(values) for values in (half, last, held[:, -1], same)]
        cells.append(f"{found['seconds_to_start']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result, path):
    """Curves at each initializer's best rate, and held-out losses over rates."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    every = result["options"]["every"]
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(15, 4.5))
    for method, found in result["methods"].items():
        rate, curves, held = at_best(found)
        smooth = curves.reshape(len(curves), -1, every).mean(axis=2)
        steps = every * np.arange(1, smooth.shape[1] + 1)
        for axes, values in ((left, smooth), (middle, held)):
            mean, sd = values.mean(axis=0), values.std(axis=0, ddof=1)
            axes.plot(steps, mean, label=f"{method} ({float(rate):.0e})")
            axes.fill_between(steps, mean - sd, mean + sd, alpha=0.2)
        rates = sorted(found["rates"], key=float)
        ends = [np.mean(found["rates"][r]["held_out"], axis=0)[-1] for r in rates]
        right.plot(list(map(float, rates)), ends, marker="o", label=method)
    left.set(xlabel="step", ylabel="nats per token", title="training")
    middle.set(xlabel="step", title="held out")
    low = min(line.get_ydata().min() for line in right.lines)
    right.set(xlabel="learning rate", xscale="log", ylim=(low - 0.05, low + 1))
    right.set(title="held out, at the end")
    left.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def parsed(arguments=None):
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(embedded.MODEL_DIR))
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rows", type=int, default=128, help="for statistics")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--unrolled", action="store_true")
    parser.add_argument("--show", metavar="NAME", help="what was saved before")
    parser.add_argument("--save", metavar="NAME")
    parser.add_argument("--out", default=str(RESULTS), help="where it is saved")
    return parser.parse_args(arguments)


def main(arguments=None):
    options = parsed(arguments)
    name = options.show or f"initializers_{options.save}"
    if options.show:
        with open(f"{options.out}/{name}.json") as file:
            result = json.load(file)
    else:
        result = compare(options)
    print(table(result))
    if options.save or options.show:
        plot(result, f"{options.out}/{name}.png")


if __name__ == "__main__":
    main()
