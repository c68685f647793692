"""Tiny models with adapters, and the files that they make."""

import dataclasses
import json
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from kind_files import CASES, OURS
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax import models

_LLAMA = {
    "model_type": "llama",
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
}
_GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 41,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 16,
    "initializer_range": 0.1,
}
CONFIGS = {
    "llama": _LLAMA,
    "tied": _LLAMA | {"tie_word_embeddings": True},
    "gpt2": _GPT2,
}

# Ranks and scales that differ from layer to layer, and a layer left out.
RULES = {
    r"(layers|h)/1/mlp/(up_proj|c_fc)/kernel": {"rank": 3, "alpha": 5},
    r"(layers|h)/0/(self_attn/q_proj|attn/c_proj)/kernel": {"rank": 2},
    r"(layers|h)/1/(self_attn/.*|attn/.*)/kernel": {},
    r"(layers|h)/\d/mlp/.*/kernel": {},
}


@dataclasses.dataclass(frozen=True)
class Made:
    """A model, an adapter for it, and its plan."""

    model: models.Model
    params: Any
    plan: lj.Plan
    adapter: lj.Adapter

    @property
    def names(self):
        return self.model.names

    def save(self, folder, **options):
        """Saves the adapter with the model's names."""
        options = {"names": self.names} | options
        lj.save_adapter(folder, self.adapter, plan=self.plan, **options)
        return folder

    def logits(self, adapter=None):
        """What the adapted model gives."""
        bound = lj.bind(self.params, self.adapter if adapter is None else adapter)
        return np.asarray(jax.jit(lj.adapt(self.model.apply))(bound, IDS))


IDS = np.random.default_rng(0).integers(0, 41, (2, 7)).astype(np.int32)


@pytest.fixture(scope="session")
def make():
    """`make(family, scan=..., rules=..., dtype=..., **config)` -> `Made`."""
    made, bases = {}, {}

    def build(family="llama", *, scan=False, rules=None, dtype="float32", **config):
        rules = RULES if rules is None else rules
        key = family, scan, dtype, repr(rules), repr(sorted(config.items()))
        if key not in made:
            if (family, scan, dtype) not in bases:
                bases[family, scan, dtype] = _model(family, scan, dtype)
            model, params = bases[family, scan, dtype]
            whole = {"rank": 4, "alpha": 7, "init": False} | config
            plan = lj.plan(
                lj.LoraConfig(rules, **whole), params, fn=model.apply, args=(IDS,)
            )
            made[key] = Made(model, params, plan, drawn(plan, params))
        return made[key]

    return build


def _model(family, scan, dtype):
    """A model with drawn parameters, stacked or not the same ones."""
    model = models.from_config(CONFIGS[family], scan_layers=scan, dtype=dtype)
    unrolled = models.from_config(CONFIGS[family], dtype=dtype)
    draw = np.random.default_rng(0)
    params = jax.tree.map(
        lambda x: jnp.asarray(draw.normal(0, 0.1, x.shape), x.dtype),
        unrolled.abstract(),
    )
    if scan:
        name = "h" if "wte" in params else "layers"
        layers = params[name].values()
        params = params | {name: jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}
    return model, params


@pytest.fixture(scope="session")
def table_rule():
    """The rule that adapts a family's embedding."""
    return lambda family, **over: {
        ("wte" if family == "gpt2" else "embed_tokens") + "/embedding": over
    }


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory):
    """`base_folder(made, shards=1)`: the model as Transformers would save it."""
    written = {}

    def write(made, shards=1):
        key = id(made.params), shards
        if key not in written:
            folder = tmp_path_factory.mktemp("base")
            write_base(folder, made, shards)
            written[key] = folder
        return written[key]

    return write


def write_base(folder, made, shards=1):
    """Writes a model's folder."""
    tensors = models.to_hf(made.model, made.params)
    config = CONFIGS["gpt2" if "wte" in made.params else "llama"]
    tied = made.model.config.tie_word_embeddings
    dtype = str(jnp.dtype(made.model.dtype))
    config = config | {"dtype": dtype, "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.json").write_text("{}")
    (folder / "LICENSE").write_text("MIT")
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    where = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = dict(list(tensors.items())[i::shards])
        save_file(part, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="session")
def peft_made():
    """`peft_made(folder, to)`: the files without our metadata, as PEFT writes them."""

    def strip(folder, to, change=None, **config):
        shutil.copytree(folder, to, dirs_exist_ok=True)
        tensors = load_file(folder / "adapter_model.safetensors")
        if change is not None:
            change(tensors)
        save_file(tensors, to / "adapter_model.safetensors", metadata={"format": "pt"})
        if config:
            path = to / "adapter_config.json"
            path.write_text(json.dumps(json.loads(path.read_text()) | config))
        return to

    return strip


@pytest.fixture(scope="session")
def equal():
    """Whether two trees are bit-equal, structure and dtypes included."""

    def same(one, other):
        left, right = jax.tree.flatten(one), jax.tree.flatten(other)
        return left[1] == right[1] and all(
            x.dtype == y.dtype and np.array_equal(np.asarray(x), np.asarray(y))
            for x, y in zip(left[0], right[0], strict=True)
        )

    return same


@pytest.fixture
def made_of(make):
    """`made_of("dora", scan=True)`: a model with an adapter of one of `kinds`."""

    def build(case, scan=False):
        family, rules, config = (CASES | OURS)[case]
        return make(family, scan=scan, rules=rules, **config)

    return build
