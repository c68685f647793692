"""What does it cost to start PiSSA, exact and randomized, beside PEFT?

All 28 linear layers of a Llama of width 1024 with 4 layers, rank 16, in float32, from a
model that is there to an adapter that is ready. PEFT decomposes layer by layer and
writes a residual into the base; here one program is compiled for each shape, and the
base is not touched.

First that both sides found the same: products of the exact factors, and of each side
the share of the best rank-16 energy that its factors hold (in the randomized case
PEFT's block has no columns to spare). Then time, both sides in turns; compilation
apart. With `--model`, the same shares for every linear weight of a folder of Hugging
Face's, e.g. SmolLM2-135M: the smallest over all, for each number of iterations; and
the time of both sides for all of them. Both run on the GPU where JAX has one.

    python benchmarks/decompositions.py [--rounds 3] [--model DIR] [--save NAME]
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from safetensors.torch import load_file
from timing import machine, median, save
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import lorax_jax as lj
from lorax_jax import models
from lorax_jax._linalg import residual, svd_random, svd_top

RANK, ALPHA, LAYERS, WIDTH, FFN = 16, 32, 4, 1024, 2816
ITERATIONS = (1, 2, 3, 4, 5, 6)
THEIR_ITERATIONS = (4, 8, 16, 32)
TORCH = "cuda" if jax.default_backend() == "gpu" else "cpu"


def theirs():
    """A random Llama in torch."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=FFN,
        num_hidden_layers=LAYERS,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=256,
    )
    return LlamaForCausalLM(config)


def linear_weights(model):
    """Their linear layers' weights as kernels: path -> `(d_in, d_out)`."""
    return {
        name: jnp.asarray(module.weight.detach().cpu().numpy().T)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name != "lm_head"
    }


def started(init, model):
    """PEFT's model with this initialization, and the seconds that it took."""
    model = model.to(TORCH)
    config = PeftConfig(
        r=RANK, lora_alpha=ALPHA, target_modules="all-linear", init_lora_weights=init
    )
    start = time.perf_counter()
    peft = get_peft_model(model, config)
    if TORCH == "cuda":
        torch.cuda.synchronize()
    return peft, time.perf_counter() - start


def planned(params, init):
    """A plan of all weights, and the program that starts them."""
    roles = {path: {"inputs": (0,), "outputs": (1,)} for path in params}
    config = lj.LoraConfig(".*", rank=RANK, alpha=ALPHA, init=init)
    return lj.plan(config, params, roles=roles)


def begun(plan, params):
    """Our adapter, and the seconds that it took."""
    start = time.perf_counter()
    adapter = jax.block_until_ready(lj.init(plan, params, key=jax.random.key(0)))
    return adapter, time.perf_counter() - start


def best_energy(w):
    """The largest energy that `RANK` directions hold, by LAPACK, in float64."""
    dense = np.asarray(w, np.float64)
    gram = dense.T @ dense if dense.shape[0] >= dense.shape[1] else dense @ dense.T
    return float(np.linalg.eigvalsh(gram)[-RANK:].sum())


def shares(params, products, best):
    """For each weight, the share of the best energy that a product's columns hold."""
    out = {}
    for path, w in params.items():
        basis = np.linalg.qr(products[path])[0]  # of what A spans
        out[path] = float(np.sum((basis.T @ np.asarray(w)) ** 2) / best[path])
    return out


def against_peft(init, params, best, rounds):
    """One initialization on both sides: what it finds and how long it takes."""
    plan = planned(params, init)
    jax.clear_caches()
    _, first = begun(plan, params)
    seconds: dict[str, list[float]] = {"peft": [], "lorax_jax": []}
    adapter = peft = None
    for _ in range(rounds):
        peft, took = started(init, theirs())
        seconds["peft"].append(took)
        adapter, took = begun(plan, params)
        seconds["lorax_jax"].append(took)
    modules = dict(peft.base_model.model.named_modules())
    a = {path: np.asarray(adapter.train[path]["a"]) for path in params}
    their_a, apart = {}, 0.0
    for path in params:
        down, up = (
            getattr(modules[path], name)["default"].weight.detach().cpu().numpy()
            for name in ("lora_A", "lora_B")
        )
        their_a[path] = down.T
        ours, found = a[path] @ np.asarray(adapter.train[path]["b"]), (up @ down).T
        apart = max(apart, float(np.abs(ours - found).max() / np.abs(found).max()))
    if init == "pissa":
        assert apart < 1e-2, apart  # of random weights, whose values lie close together
    return {
        "seconds": {side: median(values) for side, values in seconds.items()},
        "all_seconds": seconds,
        "first_call_seconds": first,
        "times_faster": median(seconds["peft"]) / median(seconds["lorax_jax"]),
        "products_apart": apart,
        "smallest_share": {
            "peft": min(shares(params, their_a, best).values()),
            "lorax_jax": min(shares(params, a, best).values()),
        },
    }


def errors(params):
    """How far exact triplets are from LAPACK's, the largest of all weights."""
    top = jax.jit(lambda w: svd_top(w, RANK))
    worst = {"residual": 0.0, "values": 0.0}
    for w in params.values():
        found = top(w)
        exact = np.linalg.svd(np.asarray(w), compute_uv=False)
        off = np.abs(np.asarray(found.s) - exact[:RANK]).max() / exact[0]
        worst["residual"] = max(worst["residual"], float(residual(w, found)))
        worst["values"] = max(worst["values"], float(off))
    return worst


def of_folder(folder, rounds):
    """All linear weights of a saved model: the smallest shares, and what it takes."""
    tensors = load_file(Path(folder) / "model.safetensors")
    weights = [
        value.float().numpy()
        for name, value in tensors.items()
        if value.ndim == 2 and "layers." in name
    ]
    smallest: dict[str, float] = {}

    def seen(name, left, w, best):
        share = float(np.sum((np.asarray(left).T @ w) ** 2)) / best
        smallest[name] = min(share, smallest.get(name, 2.0))

    top = jax.jit(lambda w: svd_top(w, RANK).u)
    random = jax.jit(
        lambda w, key: {
            n: svd_random(w, RANK, iterations=n, key=key).u for n in ITERATIONS
        }
    )
    for i, w in enumerate(weights):
        best = best_energy(w)
        for n, left in random(w, jax.random.fold_in(jax.random.key(0), i)).items():
            seen(f"pissa_niter_{n}", left, w, best)
        seen("pissa", top(w), w, best)
        for n in THEIR_ITERATIONS:
            left = torch.svd_lowrank(torch.tensor(w).to(TORCH), RANK, niter=n)[0]
            seen(f"PEFT's pissa_niter_{n}", left.cpu().numpy(), w, best)
    seconds: dict[str, list[float]] = {}
    model, params = models.load(folder, dtype="float32", scan_layers=True)
    plans = {}
    for init in ["pissa", *(f"pissa_niter_{n}" for n in ITERATIONS)]:
        config = lj.LoraConfig("all-linear", rank=RANK, alpha=ALPHA, init=init)
        ids = jax.ShapeDtypeStruct((1, 8), "int32")
        plans[init] = lj.plan(config, params, model.apply, (ids,))
        seconds[f"{init}, first call"] = [begun(plans[init], params)[1]]
    for _ in range(rounds):
        for init, plan in plans.items():
            seconds.setdefault(init, []).append(begun(plan, params)[1])
        for n in THEIR_ITERATIONS:
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            took = started(f"pissa_niter_{n}", model)[1]
            seconds.setdefault(f"PEFT's pissa_niter_{n}", []).append(took)
    return {
        "weights": len(weights),
        "smallest_share": smallest,
        "seconds": {name: median(values) for name, values in seconds.items()},
        "all_seconds": seconds,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--exact-rounds", type=int, default=1)
    parser.add_argument("--model", help="a folder with model.safetensors")
    parser.add_argument("--note", default="", help="kept beside the results")
    parser.add_argument("--save", metavar="NAME")
    args = parser.parse_args()
    params = linear_weights(theirs())
    best = {path: best_energy(w) for path, w in params.items()}
    results = {"note": args.note, "sites": len(params), "errors": errors(params)}
    print("exact triplets against LAPACK:", results["errors"], flush=True)
    for init in [f"pissa_niter_{n}" for n in ITERATIONS] + ["olora", "pissa"]:
        slow = init in ("pissa", "olora")
        rounds = args.exact_rounds if slow else args.rounds
        row = results[init] = against_peft(init, params, best, rounds)
        took, held = row["seconds"], row["smallest_share"]
        print(
            f"{init:14} PEFT {took['peft']:7.2f} s, here {took['lorax_jax']:6.2f} s "
            f"({row['times_faster']:.1f} x; first call {row['first_call_seconds']:.1f} "
            f"s); share held {held['peft']:.4f} and {held['lorax_jax']:.4f}",
            flush=True,
        )
    peft4 = results["pissa_niter_4"]["seconds"]["peft"]
    results["times_faster_than_peft_niter_4"] = {
        f"pissa_niter_{n}": peft4 / results[f"pissa_niter_{n}"]["seconds"]["lorax_jax"]
        for n in ITERATIONS
    }
    print("against PEFT's pissa_niter_4:", results["times_faster_than_peft_niter_4"])
    if args.model:
        found = results["model"] = of_folder(args.model, args.rounds)
        print(f"{found['weights']} weights of {args.model}:")
        for name, took in found["seconds"].items():
            held = found["smallest_share"].get(name)
            print(f"  {name:28} {took:6.2f} s" + (f", {held:.4f}" if held else ""))
    print(machine())
    if args.save:
        print(save(args.save, results))


if __name__ == "__main__":
    main()
