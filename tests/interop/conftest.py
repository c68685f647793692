"""Random torch models and the same ones here; skipped where torch or PEFT is absent."""

import dataclasses
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

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


@pytest.fixture(scope="session", autouse=True)
def live():
    """The originals; everything here is skipped without them."""
    torch = pytest.importorskip("torch", reason="the originals need torch")
    pytest.importorskip("peft", reason="the originals need PEFT")
    pytest.importorskip("transformers", reason="the originals need Transformers")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def their_warnings(relaxed):
    """What torch, Transformers and PEFT warn about is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclasses.dataclass(frozen=True)
class Twin:
    """One model on both sides."""

    family: str
    folder: Path
    theirs: Any
    models: dict[bool, tuple[models.Model, Any]]

    def fresh(self):
        """Their model, to be changed as PEFT does."""
        return _load_theirs(self.folder)

    def ours(self, scan=False):
        """Our model and parameters."""
        return self.models[scan]


def _load_theirs(folder):
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    ).eval()


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """`twin(family)`: a random model, saved by Transformers and loaded here."""
    made = {}

    def make(family):
        if family not in made:
            import torch
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(0)
            config = AutoConfig.for_model(**CONFIGS[family])
            model = AutoModelForCausalLM.from_config(config)
            with torch.no_grad():  # biases and norms start at 0 and 1: move them
                for leaf in model.parameters():
                    leaf.add_(0.05 * torch.randn_like(leaf))
            folder = tmp_path_factory.mktemp(family)
            model.save_pretrained(folder)
            both = {s: models.load(folder, scan_layers=s) for s in (False, True)}
            made[family] = Twin(family, folder, _load_theirs(folder), both)
        return made[family]

    return make


def table_of(family):
    """The path of a family's table of tokens."""
    return "wte/embedding" if family == "gpt2" else "embed_tokens/embedding"


# Ranks and alphas by layer and by kind of weight.
RULES = {
    r"(layers|h)/1/mlp/.*kernel": {"rank": 3, "alpha": 5},
    r"(layers/2/self_attn/(q|k)_proj|h/2/attn/c_attn)/kernel": {"rank": 2},
    r"(layers|h)/0/.*/(o_proj|c_proj)/kernel": {"alpha": 1},
    "all-linear": {},
}


@pytest.fixture(scope="session")
def adapted():
    """`adapted(twin, scan, rules, **config)`: a plan and an adapter that acts."""
    made = {}

    def make(twin, scan=False, rules=None, **config):
        key = twin.family, scan, repr(rules), repr(config)
        if key not in made:
            model, params = twin.ours(scan)
            config = {"rank": 4, "alpha": 7, "init": False} | config
            whole = lj.LoraConfig(RULES if rules is None else rules, **config)
            plan = lj.plan(whole, params, fn=model.apply, args=(IDS,))
            made[key] = plan, _draw(plan)
        return made[key]

    return make


def _draw(plan):
    """Random factors, the same for a stacked tree and an unrolled one."""
    train, fixed = {}, {}
    for slot in plan.slots:
        a, b = np.zeros(slot.shape_a(), "f"), np.zeros(slot.shape_b(), "f")
        for i, site in enumerate(slot.sites):
            if site is not None:
                at = np.unravel_index(i, slot.layers) if slot.layers else ()
                draw = np.random.default_rng([ord(c) for c in site.path])
                size = 0.1 if site.role.lookup or site.use else 0.3
                a[at][..., : site.rank] = draw.normal(0, size, (*slot.inputs, site.rank))
                b[at][: site.rank] = draw.normal(0, size, (site.rank, *slot.outputs))
        train[slot.name] = {"a": jnp.asarray(a), "b": jnp.asarray(b)}
        values = {
            "scale": [0 if site is None else site.scale for site in slot.sites],
            "rank": [0 if site is None else site.rank for site in slot.sites],
        }
        kinds = {"scale": jnp.float32, "rank": jnp.int32}
        arrays = {
            name: jnp.asarray(found, kinds[name]).reshape(slot.layers)
            for name, found in values.items()
        }
        fixed[slot.name] = lj.adapters.Fixed(slot.role, arrays)
    return lj.Adapter(train, fixed)


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
