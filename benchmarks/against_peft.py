"""Fine-tunes SmolLM2-135M here and with PEFT, from the same start on the same data.

The same folder, the same A and B, the same batches, AdamW with the same numbers. First
that the losses agree, step by step; then tokens per second on this machine, the steps
of the two sides taken in turns.

    python benchmarks/fetch_smollm2.py
    python benchmarks/against_peft.py --model benchmarks/cache/smollm2 [--steps 100]

The instruction set is made of the entries of the packaged Devil's Dictionary: a word is
asked for, its definition is the answer, and the answer alone is scored.
"""

import argparse
import re
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model, set_peft_model_state_dict
from timing import median, save
from transformers import AutoModelForCausalLM, AutoTokenizer

import lorax_jax as lj
from lorax_jax import embedded, models

ADAM = {
    "learning_rate": 1e-3,
    "b1": 0.9,
    "b2": 0.999,
    "eps": 1e-8,
    "weight_decay": 0.01,
}
RANK, ALPHA = 8, 16
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")


def batches(tokenizer, steps, batch, length):
    """Token ids and loss weights, shapes `(steps, batch, length)`."""
    text = Path(embedded.ADAPT_TEXT).read_text()
    entries = re.findall(r"^([A-Z][A-Z'\-]+), (?:n|adj|v\.[ti])\. (.+)$", text, re.M)
    ids = np.zeros((steps, batch, length), np.int32)
    weights = np.zeros((steps, batch, length), np.float32)
    order = np.random.default_rng(0).permutation(len(entries))
    for i in range(steps * batch):
        word, meaning = entries[order[i % len(entries)]]
        ask = [{"role": "user", "content": f"Define the word {word.lower()}."}]
        prompt = tokenizer.apply_chat_template(
            ask, tokenize=False, add_generation_prompt=True
        )
        start = tokenizer(prompt)["input_ids"]
        end = tokenizer(meaning + "<|im_end|>")["input_ids"]
        row = (start + end)[:length]
        at = divmod(i, batch)
        ids[at][: len(row)] = row
        weights[at][len(start) : len(row)] = 1.0
    return ids, weights


class Ours:
    """One side: a step, and what it needs."""

    def __init__(self, folder, key):
        self.model, self.params = models.load(folder)
        config = lj.LoraConfig(
            rf".*/({'|'.join(TARGETS)})/kernel", rank=RANK, alpha=ALPHA
        )
        ids = jnp.zeros((1, 8), jnp.int32)
        self.plan = lj.plan(config, self.params, self.model.apply, (ids,))
        self.adapter = lj.init(self.plan, self.params, key=key)
        tx = optax.adamw(**ADAM)
        self.train, self.state = self.adapter.train, tx.init(self.adapter.train)
        forward = lj.adapt(self.model.apply)

        @jax.jit
        def step(train, state, fixed, params, ids, weights):
            def loss(train):
                bound = lj.bind(params, lj.Adapter(train, fixed))
                logits = forward(bound, ids)[:, :-1].astype(jnp.float32)
                each = optax.softmax_cross_entropy_with_integer_labels(
                    logits, ids[:, 1:]
                )
                return (each * weights[:, 1:]).sum() / weights[:, 1:].sum()

            value, grads = jax.value_and_grad(loss)(train)
            updates, state = tx.update(grads, state, train)
            return optax.apply_updates(train, updates), state, value

        self._step = step

    def step(self, ids, weights):
        self.train, self.state, value = self._step(
            self.train, self.state, self.adapter.fixed, self.params, ids, weights
        )
        return float(value)


class Theirs:
    """The other side, from the same factors."""

    def __init__(self, folder, adapter):
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = PeftConfig(r=RANK, lora_alpha=ALPHA, target_modules=list(TARGETS))
        self.model = get_peft_model(base, config)
        state = {}
        for path, factors in adapter.train.items():
            module = "model." + path.removesuffix("/kernel").replace("/", ".")
            for name in "ab":
                key = f"base_model.model.{module}.lora_{name.upper()}.weight"
                state[key] = torch.tensor(np.asarray(factors[name]).T.copy())
        found = set_peft_model_state_dict(self.model, state)
        assert not found.unexpected_keys, found.unexpected_keys
        self.optimizer = torch.optim.AdamW(
            [p for p in self.model.parameters() if p.requires_grad],
            lr=ADAM["learning_rate"],
            betas=(ADAM["b1"], ADAM["b2"]),
            eps=ADAM["eps"],
            weight_decay=ADAM["weight_decay"],
        )
        self.model.train()

    def step(self, ids, weights):
        ids = torch.tensor(ids, dtype=torch.long)
        weights = torch.tensor(weights)[:, 1:]
        logits = self.model(ids, use_cache=False).logits[:, :-1].float()
        each = torch.nn.functional.cross_entropy(
            logits.transpose(1, 2), ids[:, 1:], reduction="none"
        )
        loss = (each * weights).sum() / weights.sum()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="benchmarks/cache/smollm2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--length", type=int, default=96)
    parser.add_argument("--save", default=None, help="name of the results file")
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids, weights = batches(tokenizer, args.steps, args.batch, args.length)
    ours = Ours(args.model, jax.random.key(0))
    theirs = Theirs(args.model, ours.adapter)
    sides = {"lorax_jax": ours, "peft": theirs}
    losses = {name: [] for name in sides}
    seconds = {name: [] for name in sides}
    for i in range(args.steps):
        for name, side in sides.items():
            start = time.perf_counter()
            losses[name].append(side.step(ids[i], weights[i]))
            seconds[name].append(time.perf_counter() - start)
        if i % 10 == 0:
            print(i, {name: round(values[-1], 4) for name, values in losses.items()})
    a, b = (np.array(losses[name]) for name in sides)
    worst = float(np.abs(a / b - 1).max())
    tokens = args.batch * args.length
    rates = {name: tokens / median(values[2:]) for name, values in seconds.items()}
    print(f"largest difference of the losses at any step: {100 * worst:.3f} %")
    print(f"first and last ten losses: {a[:10].mean():.4f} {a[-10:].mean():.4f}")
    for name, rate in rates.items():
        print(f"{name:10} {rate:8.1f} tokens/s (first step {seconds[name][0]:.1f} s)")
    if args.save:
        results = {
            "arguments": vars(args) | {"model": "SmolLM2-135M-Instruct"},
            "losses": losses,
            "seconds": seconds,
            "largest_relative_difference": worst,
            "tokens_per_second": rates,
        }
        print(save(args.save, results))


if __name__ == "__main__":
    main()
