"""Experts of a real architecture: `target_parameters` of Transformers' Mixtral."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from moes import CONFIG, LAYERS, TENSORS, TOLERANCE, far, peft_model
from safetensors.numpy import load_file
from twins import modules_of, sites_of

import lorax_jax as lj
from lorax_jax.checkpoint import NameMap

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.15,  # outputs of order 1
}
MLP = "model.layers.{i}.mlp"
MIXTRAL_NAMES = NameMap(
    [
        ("layers/{i}/gate", f"{MLP}.gate.weight", "linear"),
        ("layers/{i}/gate_up", f"{MLP}.experts.gate_up_proj", "linear"),
        ("layers/{i}/down", f"{MLP}.experts.down_proj", "same"),
    ],
    parameters=[f"{MLP}.gate.weight"],
)


def mixtral_blocks(params, x):
    """Mixtral's mixtures of experts, one on top of the other."""

    def block(x, p):
        scores, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["gate"]), 2)  # (t, 2)
        scores = scores / scores.sum(-1, keepdims=True)
        share = (jax.nn.one_hot(chosen, 4) * scores[..., None]).sum(1)  # (t, experts)
        each = jnp.broadcast_to(x, (4, *x.shape))
        gate, up = jnp.split(jnp.einsum("etd,edm->etm", each, p["gate_up"]), 2, -1)
        each = jnp.einsum("etm,edm->etd", jax.nn.silu(gate) * up, p["down"])
        return x + jnp.einsum("te,etd->td", share, each), None

    return jax.lax.scan(block, x, params["layers"])[0]


@pytest.fixture(scope="module")
def mixtral():
    """Transformers' model and our parameters, stacked."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**MIXTRAL)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    layers = [layer.mlp for layer in theirs.model.layers]
    stack = lambda leaves: jnp.stack([jnp.asarray(x.detach()) for x in leaves])  # noqa: E731
    params = {
        "gate": stack(layer.gate.weight.T for layer in layers),
        "gate_up": stack(layer.experts.gate_up_proj.mT for layer in layers),
        "down": stack(layer.experts.down_proj for layer in layers),
    }
    return theirs, {"layers": params}


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_mixtral(mixtral, targets, tmp_path, record_property):
    """The experts of a real architecture, which Transformers keeps in one parameter."""
    import copy

    import torch

    theirs, params = mixtral
    model = peft_model(
        copy.deepcopy(theirs),
        target_modules=[],
        target_parameters=[*targets, "gate.weight"],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"gate": 4, "gate.weight": 5},
    )
    model.save_pretrained(tmp_path / "a")
    x = np.random.default_rng(0).normal(0, 1, (7, 16)).astype(np.float32)
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    del fields["alpha_pattern"]["gate"]  # takes nothing, and PEFT does not mind
    config = lj.LoraConfig.from_peft(fields, MIXTRAL_NAMES)
    plan = lj.plan(config, params, mixtral_blocks, (x,))
    assert sites_of(plan, MIXTRAL_NAMES) == modules_of(model)
    adapter, receipt = lj.load_adapter(
        tmp_path / "a", params, names=MIXTRAL_NAMES, plan=plan
    )
    assert not receipt.problems

    def run(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return lj.adapt(mixtral_blocks)(bound, jnp.asarray(x))

    out = torch.from_numpy(x)[None]
    for layer in model.base_model.model.model.layers:
        out = out + layer.mlp(out)
    torch.sin(out).sum().backward()
    worst = far(run(adapter.train), out[0].detach().numpy())
    assert far(mixtral_blocks(params, x), out[0].detach().numpy()) > 0.01  # it acts
    grads = jax.grad(lambda train: jnp.sin(run(train)).sum())(adapter.train)
    for name, train in (("b", adapter.train), ("g", grads)):
        one = lj.Adapter(train, adapter.fixed)
        lj.save_adapter(tmp_path / name, one, plan=plan, names=MIXTRAL_NAMES)
    theirs, ours, found = (load_file(tmp_path / name / TENSORS) for name in "abg")
    assert theirs.keys() == ours.keys() == found.keys()
    assert all(np.array_equal(theirs[key], ours[key]) for key in ours)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            gradient = parameter.grad.numpy()
            worst = max(worst, far(found[name.replace(".default", "")], gradient))
    record_property("max_relative_difference", float(worst))
    assert worst <= TOLERANCE


def test_ours_in_mixtral(mixtral, tmp_path):
    """Transformers 5 takes our folder as it is: nothing is converted or lost."""
    import copy

    import peft

    theirs, params = mixtral
    config = lj.LoraConfig("layers/.*", rank=2, init=False)
    x = np.ones((7, 16), np.float32)
    plan = lj.plan(config, params, mixtral_blocks, (x,))
    adapter = drawn(plan, params)
    lj.save_adapter(tmp_path, adapter, plan=plan, names=MIXTRAL_NAMES)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path)
    assert modules_of(model) == sites_of(plan, MIXTRAL_NAMES)
    state = peft.get_peft_model_state_dict(model)
    written = load_file(tmp_path / TENSORS)
    assert state.keys() == written.keys()
    assert all(np.array_equal(state[key].numpy(), written[key]) for key in written)
