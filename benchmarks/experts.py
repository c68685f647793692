"""What does an adapter on a layer of experts cost, in the three forms that models use?

Eight experts, two of them for every token, adapted at rank 8:

- `dispatch`: one-hot products bring the tokens to their experts, `dot_general`s with a
  batch axis run the experts, one-hot products bring the results back;
- `ragged`: tokens are sorted by expert and `ragged_dot` runs the experts. On a CPU JAX
  lowers it densely, every expert on every row, with the model's weights and with A and
  B alike;
- `gather`: every token takes copies of its experts' weights, as when decoding few.

First that all forms agree with each other, with the merged weights and with PEFT's
`target_parameters` on the same layer; then operations, as XLA counts them, beside those
that factors need, and time, forward and with gradients. PEFT adds the dense product of
A and B to the weights of all experts before it runs the layer.

    python benchmarks/experts.py [--rounds 30] [--save experts]
"""

import argparse
import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax import lax
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from timing import facts, in_turns, median, save

import lorax_jax as lj

EXPERTS, TOP, RANK, SCALE = 8, 2, 8, 2.0


def route(params, x):
    """Weights and experts of every token, shapes `(tokens, TOP)`."""
    weights, experts = lax.top_k(jax.nn.softmax(x @ params["router"]), TOP)
    return weights / weights.sum(-1, keepdims=True), experts


def dispatch(params, x, capacity):
    """The layer with one-hot products; tokens beyond the capacity would be dropped."""
    weights, experts = route(params, x)
    chosen = jax.nn.one_hot(experts.reshape(-1), EXPERTS)  # (tokens * TOP, experts)
    place = (jnp.cumsum(chosen, 0) - 1) * chosen
    slots = jax.nn.one_hot(place.sum(-1), capacity)
    there = chosen[:, :, None] * slots[:, None, :]
    there = there.reshape(len(x), TOP, EXPERTS, capacity)
    inputs = jnp.einsum("tkec,td->ecd", there, x)
    hidden = jax.nn.silu(jnp.einsum("ecd,edf->ecf", inputs, params["up"]))
    out = jnp.einsum("ecf,efd->ecd", hidden, params["down"])
    return jnp.einsum("tkec,ecd,tk->td", there, out, weights)


def ragged(params, x):
    """The layer with tokens sorted by expert."""
    weights, experts = route(params, x)
    flat = experts.reshape(-1)
    order = jnp.argsort(flat)
    sizes = jnp.bincount(flat, length=EXPERTS)
    rows = x[order // TOP]
    hidden = jax.nn.silu(lax.ragged_dot(rows, params["up"], sizes))
    out = lax.ragged_dot(hidden, params["down"], sizes)
    out = out[jnp.argsort(order)].reshape(len(x), TOP, -1)
    return jnp.einsum("tkd,tk->td", out, weights)


def gather(params, x):
    """The layer with a copy of its experts' weights for every token."""
    weights, experts = route(params, x)
    flat = experts.reshape(-1)
    rows = jnp.repeat(x, TOP, axis=0)
    hidden = jax.nn.silu(jnp.einsum("nd,ndf->nf", rows, params["up"][flat]))
    out = jnp.einsum("nf,nfd->nd", hidden, params["down"][flat])
    return jnp.einsum("tkd,tk->td", out.reshape(len(x), TOP, -1), weights)


class Experts(torch.nn.Module):
    """The same experts in torch, one after the other, as Transformers runs them."""

    is_transposed = True  # (experts, d_in, d_out)

    def __init__(self, params):
        super().__init__()
        for name in ("up", "down"):
            value = torch.from_numpy(np.array(params[name]))
            setattr(self, name, torch.nn.Parameter(value))

    def forward(self, x, weights, experts):
        out = torch.zeros_like(x)
        up, down = self.up, self.down  # PEFT adds its change when they are read
        for e in range(EXPERTS):
            token, k = torch.where(experts == e)
            hidden = torch.nn.functional.silu(x[token] @ up[e])
            out.index_add_(0, token, (hidden @ down[e]) * weights[token, k, None])
        return out


class Layer(torch.nn.Module):
    """Router and experts."""

    def __init__(self, params):
        super().__init__()
        self.router = torch.nn.Parameter(torch.from_numpy(np.array(params["router"])))
        self.experts = Experts(params)

    def forward(self, x):
        weights, experts = torch.softmax(x @ self.router, -1).topk(TOP)
        return self.experts(x, weights / weights.sum(-1, keepdim=True), experts)


def peft_of(params, adapter):
    """PEFT's model with our A and B in it.

    Its A is `(experts * rank, d_in)`, expert by expert; its B `(d_out, rank * experts)`
    with the expert running fastest.
    """
    config = PeftConfig(
        r=RANK,
        lora_alpha=SCALE * RANK,
        target_modules=[],
        target_parameters=["experts.up", "experts.down"],
    )
    model = get_peft_model(Layer(params), config)
    ours = adapter.train
    with torch.no_grad():
        for module in model.modules():
            name = getattr(module, "parameter_name", None)
            if name is not None:
                a, b = (np.array(ours[name][factor]) for factor in ("a", "b"))
                a = a.transpose(0, 2, 1).reshape(EXPERTS * RANK, -1)
                b = b.transpose(2, 1, 0).reshape(b.shape[2], -1)
                module.lora_A["default"].weight.copy_(torch.from_numpy(a))
                module.lora_B["default"].weight.copy_(torch.from_numpy(b))
    return model


def needed(rows, d, f, gradients):
    """Operations of the factors: two products a weight, and thrice that to train.

    Backwards there are as many to A, to B and, for each factor, to what it multiplied.
    """
    forward = 2 * 2 * rows * RANK * (d + f)
    return 3 * forward if gradients else forward


def measure(fn, params, adapter, x, rows, rounds):
    """One form: adapted and not, forward and with gradients."""
    merged = lj.merge(params, adapter)
    adapted = lj.adapt(fn)

    def forward(params, train, x):
        return adapted(lj.bind(params, lj.Adapter(train, adapter.fixed)), x)

    def plain(params, train, x):
        del train
        return fn(params, x)

    def with_gradients(fn, argnums):
        def loss(params, train, x):
            return jnp.sin(fn(params, train, x)).sum()

        return jax.grad(loss, argnums)

    expected = fn(merged, x)
    got = forward(params, adapter.train, x)
    error = float(jnp.abs(got - expected).max() / jnp.abs(expected).max())
    acts = float(jnp.abs(fn(params, x) - expected).max() / jnp.abs(expected).max())
    assert error < 1e-5 < acts, (error, acts)
    out = {"relative_error": error, "effect": acts}
    kinds = {
        "forward": (plain, forward),
        "gradients": (with_gradients(plain, 2), with_gradients(forward, (1, 2))),
    }
    d, f = params["up"].shape[1:]
    for kind, sides in kinds.items():
        programs = {
            side: jax.jit(call).lower(params, adapter.train, x).compile()
            for side, call in zip(("plain", "adapted"), sides, strict=True)
        }
        calls = {
            side: functools.partial(program, params, adapter.train, x)
            for side, program in programs.items()
        }
        seconds = in_turns(calls, rounds)
        row = {side: facts(program) for side, program in programs.items()}
        for side, values in seconds.items():
            row[side] |= {"seconds": median(values), "all_seconds": values}
        added = row["adapted"]["flops"] - row["plain"]["flops"]
        factors = needed(rows, d, f, kind == "gradients")
        row |= {
            "added_flops": added,
            "factored_flops": factors,
            "flops_ratio": row["adapted"]["flops"] / row["plain"]["flops"],
            "allowed_flops_ratio": 1 + factors / row["plain"]["flops"],
            "time_ratio": row["adapted"]["seconds"] / row["plain"]["seconds"],
        }
        out[kind] = row
    return expected, out


def measure_peft(params, adapter, x, expected, rounds):
    """The same in torch: the layer, and PEFT's around it."""
    sides = {"plain": Layer(params).requires_grad_(False)}
    sides["adapted"] = peft_of(params, adapter)
    inputs = torch.from_numpy(np.array(x))
    with torch.no_grad():
        theirs = sides["adapted"](inputs).numpy()
    error = float(np.abs(theirs - expected).max() / np.abs(expected).max())
    assert error < 1e-5, error
    out = {"relative_error": error}

    def forward(model):
        with torch.no_grad():
            model(inputs)

    def gradients(model):
        leaf = inputs.clone().requires_grad_()
        torch.sin(model(leaf)).sum().backward()

    for kind, call in (("forward", forward), ("gradients", gradients)):
        seconds = {side: [] for side in sides}
        for i in range(rounds + 2):
            for side, model in sides.items():
                start = time.perf_counter()
                call(model)
                if i >= 2:
                    seconds[side].append(time.perf_counter() - start)
        row = {s: {"seconds": median(v), "all_seconds": v} for s, v in seconds.items()}
        ratio = row["adapted"]["seconds"] / row["plain"]["seconds"]
        out[kind] = row | {"time_ratio": ratio}
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--few", type=int, default=32, help="tokens of `gather`")
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--save", default=None, help="name of the results file")
    args = parser.parse_args()
    keys = iter(jax.random.split(jax.random.key(0), 5))
    d, f = args.width, args.hidden

    def draw(*shape):
        return jax.random.normal(next(keys), shape) / np.sqrt(shape[-2])

    params = {
        "router": draw(d, EXPERTS),
        "up": draw(EXPERTS, d, f),
        "down": draw(EXPERTS, f, d),
    }
    x = jax.random.normal(next(keys), (args.tokens, d))
    # Room for the busiest expert, so that no form drops a token.
    experts = route(params, x)[1].reshape(-1)
    capacity = -(-int(jnp.bincount(experts).max()) // 8) * 8
    config = lj.LoraConfig("up|down", rank=RANK, alpha=SCALE * RANK, init=False)
    plan = lj.plan(config, params, ragged, (x,))
    adapter = lj.init(plan, params, key=next(keys))

    few = x[: args.few]
    forms = {
        "dispatch": (
            functools.partial(dispatch, capacity=capacity),
            x,
            EXPERTS * capacity,
        ),
        # On a CPU every expert multiplies every row.
        "ragged": (ragged, x, EXPERTS * TOP * args.tokens),
        "gather": (gather, few, TOP * args.few),
    }
    results = {"arguments": vars(args), "capacity": capacity}
    answers = {}
    for name, (fn, inputs, rows) in forms.items():
        answers[name], row = measure(fn, params, adapter, inputs, rows, args.rounds)
        results[name] = row
        for kind in ("forward", "gradients"):
            found = row[kind]
            print(
                f"{name:9} {kind:9} flops x{found['flops_ratio']:.4f} (factors alone "
                f"x{found['allowed_flops_ratio']:.4f})  time "
                f"x{found['time_ratio']:.3f} ({1e3 * found['adapted']['seconds']:.1f} "
                f"ms against {1e3 * found['plain']['seconds']:.1f})",
                flush=True,
            )
    for other, mine in (("ragged", slice(None)), ("gather", slice(args.few))):
        wanted = answers["dispatch"][mine]
        error = jnp.abs(answers[other] - wanted).max() / jnp.abs(wanted).max()
        assert error < 1e-5, (other, error)
    expected = np.asarray(answers["ragged"])
    results["peft"] = measure_peft(params, adapter, x, expected, args.rounds)
    for kind in ("forward", "gradients"):
        row = results["peft"][kind]
        print(
            f"PEFT      {kind:9} time x{row['time_ratio']:.3f} "
            f"({1e3 * row['adapted']['seconds']:.1f} ms against "
            f"{1e3 * row['plain']['seconds']:.1f})"
        )
    if args.save:
        print(save(args.save, results))


if __name__ == "__main__":
    main()
