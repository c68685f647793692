"""What does DoRA cost over LoRA, here and with PEFT?

The same random Llama on both sides, the same A, B and magnitudes on all of its linear
layers, the same AdamW. First that loss and gradients of DoRA agree with PEFT's; then
the time of a train step with LoRA and with DoRA, all four taking turns; and the bytes
that the compiled forward pass holds beside its arguments, for LoRA and for DoRA.

    python benchmarks/dora.py [--rounds 20] [--save dora]
"""

import argparse
import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model, set_peft_model_state_dict
from timing import facts, in_turns, median, save
from transformers import LlamaConfig, LlamaForCausalLM

import lorax_jax as lj
from lorax_jax import models

RANK, ALPHA, RATE = 16, 32, 1e-3


def base_model(folder, width, layers):
    """Writes a random Llama in float32."""
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=width,
        intermediate_size=3 * width,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)


class Ours:
    """One kind of adapter on the model here: its loss, and a train step."""

    def __init__(self, model, params, ids, *, dora):
        config = lj.LoraConfig("all-linear", rank=RANK, alpha=ALPHA, dora=dora)
        plan = lj.plan(config, params, model.apply, (ids,))
        train, self.fixed = lj.init(plan, params, key=jax.random.key(1))
        # B moves off zero, so that every gradient is there.
        keys = jax.random.split(jax.random.key(2), len(train))
        for key, arrays in zip(keys, train.values(), strict=True):
            arrays["b"] = 0.05 * jax.random.normal(key, arrays["b"].shape)
        self.params, self.train = params, train
        forward = lj.adapt(model.apply)

        def logits(train, fixed, params, ids):
            return forward(lj.bind(params, lj.Adapter(train, fixed)), ids)

        def loss(train, fixed, params, ids):
            each = optax.softmax_cross_entropy_with_integer_labels(
                logits(train, fixed, params, ids)[:, :-1], ids[:, 1:]
            )
            return each.mean()

        tx = optax.adamw(RATE)

        def step(train, state, fixed, params, ids):
            value, grads = jax.value_and_grad(loss)(train, fixed, params, ids)
            updates, state = tx.update(grads, state, train)
            return optax.apply_updates(train, updates), state, value

        arguments = (self.fixed, params, ids)
        self.forward = jax.jit(logits).lower(train, *arguments).compile()
        self.loss = jax.jit(jax.value_and_grad(loss))
        state = tx.init(train)
        program = jax.jit(step).lower(train, state, *arguments).compile()
        self.facts = facts(program) | {"forward": facts(self.forward)}
        self.step = functools.partial(program, train, state, *arguments)


class Theirs:
    """The same with PEFT."""

    def __init__(self, folder, ours, ids, *, dora):
        base = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
        config = PeftConfig(
            r=RANK, lora_alpha=ALPHA, target_modules="all-linear", use_dora=dora
        )
        self.model = get_peft_model(base, config).train()
        state = {}
        for path, arrays in ours.train.items():
            at = "base_model.model.model." + path.removesuffix("/kernel").replace(
                "/", "."
            )
            for name in "ab":
                values = np.array(arrays[name]).T.copy()
                state[f"{at}.lora_{name.upper()}.weight"] = torch.from_numpy(values)
            if dora:
                values = torch.from_numpy(np.array(arrays["magnitude"]))
                state[f"{at}.lora_magnitude_vector"] = values
        found = set_peft_model_state_dict(self.model, state)
        assert not found.unexpected_keys, found.unexpected_keys
        self.ids = torch.from_numpy(np.array(ids)).long()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=RATE)

    def loss(self):
        logits = self.model(self.ids, use_cache=False).logits[:, :-1]
        return torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), self.ids[:, 1:].flatten()
        )

    def step(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        self.optimizer.step()
        return float(loss.detach())


def compare(ours, theirs):
    """Relative differences of the loss and of the worst gradient."""
    value, grads = ours.loss(ours.train, ours.fixed, ours.params, ids_of(theirs))
    loss = theirs.loss()
    loss.backward()
    found = {
        name.removeprefix("base_model.model.model."): p.grad.numpy()
        for name, p in theirs.model.named_parameters()
        if p.grad is not None
    }
    worst = 0.0
    endings = {"a": "lora_A", "b": "lora_B", "magnitude": "lora_magnitude_vector"}
    for path, arrays in grads.items():
        at = path.removesuffix("/kernel").replace("/", ".")
        for name, mine in arrays.items():
            other = found.pop(f"{at}.{endings[name]}.default.weight")
            other = other.T if name in "ab" else other
            scale = np.abs(other).max()
            worst = max(worst, float(np.abs(np.array(mine) - other).max() / scale))
    assert not found, list(found)
    theirs.optimizer.zero_grad()
    difference = abs(float(value) / float(loss.detach()) - 1)
    return {"loss_difference": difference, "gradient_error": worst}


def ids_of(theirs):
    return jnp.asarray(theirs.ids.numpy(), jnp.int32)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--save", default=None, help="name of the results file")
    args = parser.parse_args()
    ids = jax.random.randint(jax.random.key(0), (args.batch, args.length), 0, 512)
    with tempfile.TemporaryDirectory() as folder:
        base_model(folder, args.width, args.layers)
        model, params = models.load(folder)
        sides, results = {}, {"arguments": vars(args)}
        for name, dora in (("lora", False), ("dora", True)):
            ours = Ours(model, params, ids, dora=dora)
            theirs = Theirs(folder, ours, ids, dora=dora)
            found = compare(ours, theirs)
            assert found["loss_difference"] < 1e-5, found
            assert found["gradient_error"] < 1e-4, found
            results[name] = {"agreement": found, "program": ours.facts}
            sides |= {f"lorax_jax {name}": ours.step, f"PEFT {name}": theirs.step}
    seconds = in_turns(sides, args.rounds)
    rows = {s: {"seconds": median(v), "all_seconds": v} for s, v in seconds.items()}
    results["steps"] = rows
    for library in ("lorax_jax", "PEFT"):
        lora, dora = (rows[f"{library} {n}"]["seconds"] for n in ("lora", "dora"))
        results[f"{library} dora over lora"] = dora / lora
        print(
            f"{library:10} LoRA {1e3 * lora:7.1f} ms  DoRA {1e3 * dora:7.1f} ms  "
            f"x{dora / lora:.3f}"
        )
    held = {
        n: results[n]["program"]["forward"]["temporary_bytes"] for n in ("lora", "dora")
    }
    smallest = 4 * args.width * args.width // 2
    print(
        f"forward holds {held['lora']:,} bytes with LoRA, {held['dora']:,} with DoRA; "
        f"the smallest adapted weight is {smallest:,} bytes"
    )
    if args.save:
        print(save(args.save, results))


if __name__ == "__main__":
    main()
