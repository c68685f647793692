"""Random models on both sides: Transformers' in torch, and the same ones here."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np
from drawn import drawn

import lorax_jax as lj
from lorax_jax import models

_TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
_LLAMA = _TOKENS | {
    "model_type": "llama",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
}
_GPT2 = _TOKENS | {
    "model_type": "gpt2",
    "vocab_size": 97,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.1,
}
CONFIGS = {
    "llama": _LLAMA,
    "tied": _LLAMA | {"tie_word_embeddings": True},
    "gpt2": _GPT2,
}
FAMILIES = tuple(CONFIGS)

IDS = np.random.default_rng(0).integers(2, 97, (2, 12)).astype(np.int32)


# Ranks and alphas by layer and by kind of weight.
RULES = {
    r"(layers|h)/1/mlp/.*kernel": {"rank": 3, "alpha": 5},
    r"(layers/2/self_attn/(q|k)_proj|h/2/attn/c_attn)/kernel": {"rank": 2},
    r"(layers|h)/0/.*/(o_proj|c_proj)/kernel": {"alpha": 1},
    "all-linear": {},
}


def table_of(family):
    """The path of a family's table of tokens."""
    return "wte/embedding" if family == "gpt2" else "embed_tokens/embedding"


@dataclasses.dataclass(frozen=True)
class Twin:
    """One model on both sides."""

    family: str
    folder: Path
    theirs: Any
    models: dict[bool, tuple[models.Model, Any]]

    def fresh(self):
        """Their model, to be changed as PEFT does."""
        return load_theirs(self.folder)

    def ours(self, scan=False):
        """Our model and parameters."""
        return self.models[scan]


def load_theirs(folder):
    """A saved model in torch, in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


def make_twin(family, folder):
    """A random model, saved by Transformers and loaded here."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**CONFIGS[family])
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # biases and norms start at 0 and 1: move them
        for leaf in model.parameters():
            leaf.add_(0.05 * torch.randn_like(leaf))
    model.save_pretrained(folder)
    both = {scan: models.load(folder, scan_layers=scan) for scan in (False, True)}
    return Twin(family, folder, load_theirs(folder), both)


def draw(plan, params=None):
    """Random arrays, the same for a stacked tree and an unrolled one."""
    return drawn(plan, params, size=0.1)


def logits(model, params, adapter=None):
    """What our model gives for `IDS`."""
    if adapter is None:
        return np.asarray(model.apply(params, IDS))
    return np.asarray(lj.adapt(model.apply)(lj.bind(params, adapter), IDS))


def their_logits(model):
    """What theirs gives."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(IDS).long()).logits.float().numpy()


def equal(one, other):
    """Whether two trees are bit-equal."""
    left, right = jax.tree.flatten(one), jax.tree.flatten(other)
    return left[1] == right[1] and all(
        x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(left[0], right[0], strict=True)
    )


def modules_of(model):
    """Rank, alpha and scale of everything that PEFT adapts, by name."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and module.r:
            name = name.removeprefix("base_model.model.").replace(".base_layer", "")
            parameter = getattr(module, "parameter_name", None)
            name += "" if parameter is None else f".{parameter}"
            numbers = module.r, module.lora_alpha, module.scaling
            found[name] = tuple(one["default"] for one in numbers)
    return found


def sites_of(plan, names):
    """The same of a plan."""
    return {
        names.parameter(s.path) or names.module(s.path): (s.rank, s.alpha, s.scale)
        for s in plan
    }
