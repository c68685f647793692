"""How long does EVA take on SmolLM2-135M, here and with PEFT, and in how much memory?

The same sequences, batches, rank and rho on both sides, float32, on the CPU; each form
in a process of its own, so that its peak memory is its own: `prepare`'s covariances
(with four times the sequences too), `capturing.eva`, which goes as PEFT does, and PEFT.
First that the leading directions agree: PEFT's incremental components lie in the span
of the exact ones.

    python benchmarks/fetch_smollm2.py
    python benchmarks/eva.py --model benchmarks/cache/smollm2 --save eva
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

SITE = "layers.{}.self_attn.o_proj"  # fed by no other weight's input


def parsed():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="benchmarks/cache/smollm2")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--side", choices=("covariance", "settle", "peft"))
    parser.add_argument(
        "--resume", action="store_true", help="take what a run that was stopped found"
    )
    parser.add_argument("--note", default="", help="kept beside the results")
    parser.add_argument("--save", metavar="NAME")
    return parser.parse_args()


def batches_of(options):
    """The embedded text: arrays `(batch, length)`."""
    from lorax_jax import embedded, models

    text = models.tokenizer(options.model)(embedded.ADAPT_TEXT.read_text())
    ids = np.asarray(text["input_ids"], np.int32)
    count = options.sequences
    ids = ids[: count * options.length].reshape(-1, options.batch, options.length)
    return list(ids)


def here(options, batches):
    """Seconds, with tracing and compiling, and directions by layer."""
    import jax

    import lorax_jax as lj
    from lorax_jax import capturing, models

    model, params = models.load(options.model, dtype="float32", scan_layers=True)
    config = lj.LoraConfig("all-linear", rank=options.rank, init="eva")
    plan = lj.plan(config, params, model.apply, (batches[0],))
    start = time.perf_counter()
    if options.side == "covariance":
        new, stats = lj.prepare(plan, params, model.apply, batches, rho=2.0)
    else:
        found = capturing.eva(plan, params, model.apply, batches, rho=2.0)
        new, stats = found.plan, found.states
    gathered = time.perf_counter()
    adapter = lj.init(new, params, key=jax.random.key(0), stats=stats)
    jax.block_until_ready(adapter)
    seconds = [gathered - start, time.perf_counter() - gathered]
    a = np.asarray(adapter.train["layers/self_attn/o_proj/kernel"]["a"])
    return seconds, {SITE.format(i): a[i].T for i in range(len(a))}


def with_peft(options, batches):
    """The same with PEFT."""
    import torch
    from peft import (
        EvaConfig,
        LoraConfig,
        get_peft_model,
        initialize_lora_eva_weights,
    )
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    config = LoraConfig(
        r=options.rank,
        lora_alpha=options.rank,
        target_modules="all-linear",
        init_lora_weights="eva",
        eva_config=EvaConfig(rho=2.0),
        task_type="CAUSAL_LM",
    )
    loader = [
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for ids in map(torch.from_numpy, (x.astype(np.int64) for x in batches))
    ]
    model = get_peft_model(model, config, low_cpu_mem_usage=True)
    start = time.perf_counter()
    initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    seconds = [time.perf_counter() - start]
    found = {}
    for name, module in model.named_modules():
        if name.endswith("self_attn.o_proj") and hasattr(module, "lora_A"):
            weight = module.lora_A["default"].weight.detach().numpy()
            found[name[name.index("layers.") :]] = weight
    return seconds, found


def one_side(options):
    """Runs one side and prints what it found."""
    batches = batches_of(options)
    run = with_peft if options.side == "peft" else here
    seconds, found = run(options, batches)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    np.savez(place(options.side, options.sequences, "npz"), **found)
    place(options.side, options.sequences, "json").write_text(
        json.dumps({"seconds": seconds, "peak_gb": peak})
    )


def place(side, sequences, suffix):
    """Where a side keeps what it found."""
    return Path(tempfile.gettempdir()) / f"eva_{side}_{sequences}.{suffix}"


def within(one, other):
    """How much of the rows of `one` lies in the span of those of `other`: 1 is all."""
    basis = np.linalg.qr(other.T)[0]
    return float(np.sum((one @ basis) ** 2) / np.sum(one**2))


def main():
    options = parsed()
    if options.side:
        one_side(options)
        return
    result = {}
    for sequences in (options.sequences, 4 * options.sequences):
        sides = ("covariance", "settle", "peft")
        for side in sides if sequences == options.sequences else sides[:1]:
            shown = ["--model", options.model, "--side", side]
            shown += ["--sequences", str(sequences), "--length", str(options.length)]
            kept = place(side, sequences, "json")
            if not (options.resume and kept.exists()):
                subprocess.run([sys.executable, __file__, *shown], check=True)
            result[f"{side} {sequences}"] = found = json.loads(kept.read_text())
            print(side, sequences, found, flush=True)
    exact, theirs = (
        np.load(place(side, options.sequences, "npz"))
        for side in ("covariance", "peft")
    )
    few = {name: min(len(theirs[name]), 8) for name in theirs.files}
    shares = [within(theirs[n][: few[n]], exact[n]) for n in theirs.files if n in exact]
    result["peft's leading 8 directions within ours, least"] = min(shares)
    print(f"PEFT's leading directions lie in ours to {min(shares):.4f} at least")
    if options.save:
        from timing import save

        said = ("sequences", "length", "batch", "rank", "note")
        given = {name: getattr(options, name) for name in said}
        save(options.save, {"options": given, "found": result})


if __name__ == "__main__":
    main()
