"""Adapters written here, opened by PEFT."""

import numpy as np
import pytest
import twins
from safetensors.numpy import load_file
from twins import IDS

import lorax_jax as lj

# Logits of order 2 in float32; measured, at most 2e-6.
TOLERANCE = 1e-5

# What is adapted beside the linear layers.
EXTRAS = {
    "llama": [None, "embedding"],
    "tied": [None, "shared", "lookup", "head"],
    "gpt2": [None, "shared", "lookup", "head"],
}
CASES = [(family, extra) for family, extras in EXTRAS.items() for extra in extras]


def rules_of(family, extra):
    more = {}
    if extra == "embedding":
        more = {twins.table_of(family): {"rank": 5}, "lm_head/kernel": {"rank": 6}}
    elif extra is not None:
        more = {twins.table_of(family): {"tie": extra, "rank": 5}}
    return more | twins.RULES


def open_in_peft(twin, folder, monkeypatch):
    """Their model with our adapter, and what PEFT says about its keys."""
    import peft

    results = []
    real = peft.PeftModel.load_adapter

    def load_adapter(self, *args, **kwargs):
        results.append(real(self, *args, **kwargs))
        return results[-1]

    monkeypatch.setattr(peft.PeftModel, "load_adapter", load_adapter)
    model = peft.PeftModel.from_pretrained(twin.fresh(), folder)
    monkeypatch.undo()
    return model, results[0]


@pytest.mark.parametrize(("family", "extra"), CASES)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_keys_and_logits(
    twin, adapted, tmp_path, monkeypatch, record_property, family, extra, scan
):
    import peft

    pair = twin(family)
    rslora = extra in ("head", "embedding")
    plan, adapter = adapted(pair, scan, rules_of(family, extra), rslora=rslora)
    model, params = pair.ours(scan)
    lj.save_adapter(tmp_path, adapter, plan=plan, names=model.names, params=params)
    theirs, result = open_in_peft(pair, tmp_path, monkeypatch)
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key] == []
    # Every tensor arrived, bit for bit, and there are no others.
    state = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    written = load_file(tmp_path / "adapter_model.safetensors")
    assert set(state) == set(written)
    assert all(np.array_equal(state[key].numpy(), written[key]) for key in written)
    ours = twins.logits(model, params, adapter)
    difference = np.abs(ours - twins.their_logits(theirs)).max()
    record_property("max_abs_difference", float(difference))
    assert difference <= TOLERANCE
    assert np.abs(ours - twins.logits(model, params)).max() > 0.1  # it acts


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_parts_of_a_fused_module(twin, adapted, tmp_path, monkeypatch, scan):
    """Queries and values of GPT-2's `c_attn` are one LoRA of it there."""
    pair = twin("gpt2")
    parts = {"q": {-1: (0, 32), "rank": 2}, "v": {-1: (64, 96), "rank": 3}}
    rules = {".*/c_attn/kernel": {"parts": parts}, ".*/c_fc/kernel": {}}
    plan, adapter = adapted(pair, scan, rules, alpha=None)
    model, params = pair.ours(scan)
    lj.save_adapter(tmp_path, adapter, plan=plan, names=model.names)
    theirs, result = open_in_peft(pair, tmp_path, monkeypatch)
    assert result.unexpected_keys == []
    assert [key for key in result.missing_keys if "lora_" in key] == []
    ours = twins.logits(model, params, adapter)
    assert np.abs(ours - twins.their_logits(theirs)).max() <= TOLERANCE
    assert np.abs(ours - twins.logits(model, params)).max() > 0.1  # it acts


@pytest.mark.parametrize("family", twins.FAMILIES)
def test_ranks_and_scales_are_those_of_the_plan(
    twin, adapted, tmp_path, monkeypatch, family
):
    pair = twin(family)
    for rslora in (False, True):
        plan, adapter = adapted(pair, rslora=rslora)
        names = lj.checkpoint.NameMap.of(pair.ours()[0].names)
        lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
        theirs, _ = open_in_peft(pair, tmp_path, monkeypatch)
        found = {
            name.removeprefix("base_model.model."): (
                module.r["default"],
                module.scaling["default"],
            )
            for name, module in theirs.named_modules()
            if hasattr(module, "lora_A")
        }
        assert found == {names.module(s.path): (s.rank, s.scale) for s in plan}


def test_sixteen_bits(twin, adapted, tmp_path, monkeypatch):
    import jax
    import jax.numpy as jnp

    pair = twin("llama")
    plan, adapter = adapted(pair)
    model, params = pair.ours()
    adapter = adapter._replace(
        train=jax.tree.map(lambda x: x.astype(jnp.bfloat16), adapter.train)
    )
    lj.save_adapter(tmp_path, adapter, plan=plan, names=model.names)
    theirs, result = open_in_peft(pair, tmp_path, monkeypatch)
    assert result.unexpected_keys == []
    ours = twins.logits(model, params, adapter)
    assert np.abs(ours - twins.their_logits(theirs)).max() <= TOLERANCE


def test_it_can_be_trained_on(twin, adapted, tmp_path):
    import peft
    import torch

    pair = twin("gpt2")
    plan, adapter = adapted(pair)
    lj.save_adapter(tmp_path, adapter, plan=plan, names=pair.ours()[0].names)
    model = peft.PeftModel.from_pretrained(pair.fresh(), tmp_path, is_trainable=True)
    ids = torch.tensor(IDS).long()
    model(ids, labels=ids).loss.backward()
    grads = [p.grad.abs().sum() for n, p in model.named_parameters() if "lora_" in n]
    assert len(grads) == 2 * len(plan) and all(grad > 0 for grad in grads)


def test_a_folder_of_paths_is_refused_by_peft(twin, adapted, tmp_path):
    import peft

    pair = twin("llama")
    plan, adapter = adapted(pair)
    lj.save_adapter(tmp_path, adapter, plan=plan)
    with pytest.raises((KeyError, ValueError), match="LORAX_JAX"):
        peft.PeftModel.from_pretrained(pair.fresh(), tmp_path)


@pytest.mark.parametrize("family", twins.FAMILIES)
@pytest.mark.parametrize("extra", [None, "shared", "lookup", "head"])
def test_merged_models_in_transformers(
    twin, adapted, tmp_path, record_property, family, extra
):
    if family == "llama" and extra is not None:
        extra = "embedding"
    pair = twin(family)
    plan, adapter = adapted(pair, True, rules_of(family, extra))
    model, params = pair.ours(True)
    unmerged = twins.logits(model, params, adapter)
    lj.save_adapter(tmp_path / "a", adapter, plan=plan, names=model.names)
    lj.export_merged(pair.folder, adapter, tmp_path / "1", names=model.names)
    lj.export_merged(pair.folder, tmp_path / "a", tmp_path / "2", max_shard_size="20KB")
    for out in ("1", "2"):
        merged = twins.load_theirs(tmp_path / out)
        difference = np.abs(unmerged - twins.their_logits(merged)).max()
        record_property("max_abs_difference", float(difference))
        assert difference <= TOLERANCE
        assert merged.config.tie_word_embeddings is (
            family != "llama" and extra in (None, "shared")
        )
