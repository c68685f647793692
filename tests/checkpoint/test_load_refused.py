"""What `load_adapter` refuses, and names."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import reconfigure, rewrite
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax._errors import CheckpointError
from lorax_jax._names import NameMap

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
FAMILIES = ["llama", "tied", "gpt2"]


def _delete(tensors, key, draw):
    del tensors[key]


def _rename(tensors, key, draw):
    tensors[key + draw(st.sampled_from(["x", ".weight", ".default"]))] = tensors.pop(
        key
    )


def _add(tensors, key, draw):
    tensors[draw(st.sampled_from(["", PREFIX])) + "stray.lora_A.weight"] = tensors[key]


def _grow(tensors, key, draw):
    axis = draw(st.integers(0, 1))
    tensors[key] = np.concatenate([tensors[key]] * 2, axis)


def _turn(tensors, key, draw):
    tensors[key] = tensors[key][None]


def _cast(tensors, key, draw):
    dtype = draw(
        st.sampled_from([np.float16, ml_dtypes.bfloat16, np.int32, np.float64])
    )
    tensors[key] = tensors[key].astype(dtype)


def _poison(tensors, key, draw):
    tensors[key] = tensors[key].copy()
    tensors[key].flat[-1] = draw(st.sampled_from([np.nan, np.inf, -np.inf]))


@pytest.mark.parametrize("writer", ["ours", "peft"])
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_whatever_is_changed_is_named(make, peft_made, tmp_path_factory, writer, data):
    scan = data.draw(st.booleans())
    family = data.draw(st.sampled_from(FAMILIES))
    made = make(family, scan=scan)
    folder = made.save(tmp_path_factory.mktemp("fuzz"), params=made.params)
    ways = [_delete, _rename, _add, _grow, _turn, _cast, _poison]
    way = data.draw(st.sampled_from(ways))
    key = data.draw(st.sampled_from(sorted(load_file(folder / TENSORS))))
    rewrite(folder, lambda t: way(t, key, data.draw), metadata=writer == "ours")
    named = "stray.lora_A.weight" if way is _add else key
    plan = data.draw(st.sampled_from([None, made.plan]))
    arguments = {"names": made.names, "plan": plan}
    with pytest.raises(CheckpointError, match=re.escape(named)):
        lj.load_adapter(folder, made.params, **arguments)
    _, receipt = lj.load_adapter(folder, made.params, strict=False, **arguments)
    assert any(named in line for line in receipt.problems)
    assert named in str(receipt)
    lost = 0 if way is _add else 1
    assert receipt.sites == len(made.plan) - lost and receipt.expected >= receipt.sites


@pytest.mark.parametrize("writer", ["ours", "peft"])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_both_tensors_of_a_site_are_missing(make, tmp_path, writer, scan):
    made = make("llama", scan=scan)
    folder = made.save(tmp_path)
    stem = f"{PREFIX}model.layers.1.mlp.up_proj.lora_"

    def change(tensors):
        for key in [key for key in tensors if key.startswith(stem)]:
            del tensors[key]

    rewrite(folder, change, metadata=writer == "ours")
    with pytest.raises(CheckpointError, match=f"missing     {stem}A.weight\n"):
        lj.load_adapter(folder, made.params, names=made.names)
    _, receipt = lj.load_adapter(folder, made.params, names=made.names, strict=False)
    assert receipt.missing == (f"{stem}A.weight", f"{stem}B.weight")
    assert (receipt.sites, receipt.expected) == (len(made.plan) - 1, len(made.plan))


def test_what_is_known_about_a_key_is_said(make, tmp_path):
    made = make("llama")
    folder = made.save(tmp_path)
    stem = f"{PREFIX}model.layers.1.mlp.up_proj.lora_"
    one = np.ones(3, np.float32)
    rewrite(folder, lambda t: t.update({f"{stem}magnitude_vector": one}))
    with pytest.raises(CheckpointError, match=r"magnitude_vector \(DoRA's magnitude\)"):
        lj.load_adapter(folder, made.params)


def test_nothing_fits(make, tmp_path):
    made, other = make("llama"), make("gpt2")
    folder = made.save(tmp_path)
    for strict in (True, False):
        with pytest.raises(
            CheckpointError, match="(does not fit|No factors of .* fit)"
        ):
            lj.load_adapter(folder, other.params, strict=strict)


def test_another_base_of_the_same_shape(make, tmp_path):
    made = make("llama")
    folder = made.save(tmp_path, params=made.params)
    other = jax.tree.map(lambda x: x * 1.05, made.params)
    message = "layers/0/mlp/down_proj/kernel is not the weight that the adapter was"
    with pytest.raises(CheckpointError, match=message):
        lj.load_adapter(folder, other)
    _, receipt = lj.load_adapter(folder, other, strict=False)
    assert len(receipt.changed) == receipt.sites == len(made.plan)
    for dtype in (jnp.bfloat16, jnp.float16):  # the same base, loaded in another dtype
        same = jax.tree.map(lambda x, dtype=dtype: x.astype(dtype), made.params)
        assert not lj.load_adapter(folder, same)[1].problems


def test_a_plan_that_says_otherwise(make, tmp_path):
    made, other = make("llama"), make("llama", rules={".*/mlp/.*kernel": {}})
    folder = made.save(tmp_path)
    with pytest.raises(CheckpointError) as caught:
        lj.load_adapter(folder, made.params, plan=other.plan, names=made.names)
    text = str(caught.value)
    assert "unexpected" in text and "self_attn.q_proj.lora_A" in text
    assert "up_proj has rank 3 and scale 1.66667, the plan 4 and 1.75" in text
    fewer = make("llama", rules={".*/1/mlp/down_proj/kernel": {}})
    folder = fewer.save(tmp_path / "fewer")
    for names in (None, made.names):
        with pytest.raises(CheckpointError, match="missing .*layers.0.mlp.down_proj"):
            lj.load_adapter(folder, made.params, plan=other.plan, names=names)


def test_a_plan_of_another_model(make, tmp_path):
    made = make("llama")
    folder = made.save(tmp_path)
    for other in (make("gpt2"), make("llama", scan=True)):
        with pytest.raises(CheckpointError, match="The plan has .* no such leaf. Give"):
            lj.load_adapter(folder, made.params, plan=other.plan)
    wider = jax.tree.map(lambda x: jnp.concatenate([x, x], -1), made.params)
    with pytest.raises(CheckpointError, match=r"shape \(24, 16\), and `params` has"):
        lj.load_adapter(folder, wider, plan=made.plan)


def test_a_plan_with_other_axes(tmp_path):
    params = {"w": jnp.ones((4, 4))}
    axes = {"inputs": (0,), "outputs": (1,)}, {"inputs": (1,), "outputs": (0,)}
    one, other = (
        lj.plan(lj.LoraConfig("w", rank=1), params, roles={"w": role}) for role in axes
    )
    adapter = lj.init(one, params, key=jax.random.key(0))
    lj.save_adapter(tmp_path, adapter, plan=one)
    with pytest.raises(
        CheckpointError, match=r"w has the axes .*, the plan .*inputs=\(1,\)"
    ):
        lj.load_adapter(tmp_path, params, plan=other)


def test_an_edited_configuration_is_noticed(make, tmp_path):
    made = make("llama")
    folder = reconfigure(made.save(tmp_path), lora_alpha=64)
    with pytest.raises(CheckpointError, match="disagree about .*: rank .* One of them"):
        lj.load_adapter(folder, made.params)


def test_names_are_needed_for_what_others_wrote(make, peft_made, tmp_path):
    made = make("llama")
    folder = peft_made(made.save(tmp_path / "a"), tmp_path / "b")
    with pytest.raises(CheckpointError, match="which module is which parameter"):
        lj.load_adapter(folder, made.params)
    (folder / CONFIG).unlink()
    with pytest.raises(
        CheckpointError, match="has no adapter_config.json, so the ranks"
    ):
        lj.load_adapter(folder, made.params, names=made.names)


def test_a_path_that_may_mean_two_leaves(tmp_path):
    params = {"a": {"1": {"w": jnp.ones((4, 4))}}}
    plan = lj.plan(
        lj.LoraConfig("a/1/w", rank=1),
        params,
        lambda p, x: x @ p["a"]["1"]["w"],
        (jnp.ones(4),),
    )
    adapter = lj.init(plan, params, key=jax.random.key(0))
    names = NameMap([("a/1/w", "a.w.weight", "linear")])
    lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
    stacked = {"a": {"w": jnp.ones((2, 4, 4))}}
    assert list(lj.load_adapter(tmp_path, stacked)[0].train) == ["a/w"]
    assert lj.load_adapter(tmp_path, stacked)[0].fixed["a/w"]["rank"].tolist() == [0, 1]
    too_few = {"a": {"w": jnp.ones((1, 4, 4))}}
    with pytest.raises(
        CheckpointError, match="unexpected  base_model.model.a.w.lora_A"
    ):
        lj.load_adapter(tmp_path, too_few)


def test_an_ambiguous_layer_asks_for_the_plan(tmp_path):
    params = {"a": [None, {"b": [{"w": jnp.ones((4, 4))}]}]}
    plan = lj.plan(
        lj.LoraConfig("a/1/b/0/w", rank=1),
        params,
        lambda p, x: x @ p["a"][1]["b"][0]["w"],
        (jnp.ones(4),),
    )
    adapter = lj.init(plan, params, key=jax.random.key(0))
    lj.save_adapter(tmp_path, adapter, plan=plan)
    both = {
        "a": {
            "b": {"0": {"w": jnp.ones((2, 4, 4))}},
            "1": {"b": {"w": jnp.ones((1, 4, 4))}},
        }
    }
    with pytest.raises(CheckpointError, match="may be a layer of .*Give the `plan`"):
        lj.load_adapter(tmp_path, both)
