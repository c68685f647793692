"""What `save_adapter` writes."""

import dataclasses
import errno
import json
import os
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax._errors import AdapterError, CheckpointError, ConfigError
from lorax_jax.adapters import Fixed
from lorax_jax.checkpoint import NameMap, _save

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tensors_of(folder):
    return load_file(folder / TENSORS)


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


def test_keys_shapes_and_values(make, tmp_path):
    made = make("llama")
    found = tensors_of(made.save(tmp_path))
    assert len(found) == 2 * len(made.plan)
    site = next(s for s in made.plan if s.path == "layers/1/mlp/up_proj/kernel")
    stem = "base_model.model.model.layers.1.mlp.up_proj"
    train = made.adapter.train[site.path]
    assert site.rank == 3
    np.testing.assert_array_equal(found[f"{stem}.lora_A.weight"], train["a"].T)
    np.testing.assert_array_equal(found[f"{stem}.lora_B.weight"], train["b"].T)


@pytest.mark.parametrize("family", ["llama", "tied", "gpt2"])
@pytest.mark.parametrize("peft", [True, False], ids=["modules", "paths"])
def test_a_stacked_model_writes_the_same_files(make, tmp_path, family, peft):
    for scan in (False, True):
        made = make(family, scan=scan)
        names = made.names if peft else None
        made.save(tmp_path / str(scan), names=names, params=made.params)
    for name in (TENSORS, CONFIG, "README.md"):
        one, other = ((tmp_path / s / name).read_bytes() for s in ("False", "True"))
        assert one == other, name


def test_the_configuration(make, tmp_path):
    made = make("llama", dropout=0.05)
    made.save(tmp_path, base_model_name_or_path="owner/name", task_type="CAUSAL_LM")
    text = (tmp_path / CONFIG).read_text()
    found = json.loads(text)
    assert text == json.dumps(found, indent=2, sort_keys=True) + "\n"
    assert len(found) == 41
    assert found["peft_type"] == "LORA" and found["task_type"] == "CAUSAL_LM"
    assert found["base_model_name_or_path"] == "owner/name"
    assert found["inference_mode"] is True and found["bias"] == "none"
    assert found["lora_dropout"] == 0.05
    assert (found["r"], found["lora_alpha"]) == (4, 7)
    assert isinstance(found["lora_alpha"], int)
    assert found["rank_pattern"] == {
        "layers.0.self_attn.q_proj": 2,
        "layers.1.mlp.up_proj": 3,
    }
    assert found["alpha_pattern"] == {"layers.1.mlp.up_proj": 5}
    assert sorted(found["target_modules"]) == sorted(
        "model." + site.path.removesuffix("/kernel").replace("/", ".")
        for site in made.plan
    )


def test_patterns_are_shortest_where_layers_agree(make, tmp_path):
    made = make(
        "llama", rules={r".*/up_proj/kernel": {"rank": 2}, r".*proj/kernel": {}}
    )
    found = config_of(made.save(tmp_path))
    assert found["rank_pattern"] == {"up_proj": 2} and found["alpha_pattern"] == {}


def test_conv1d_is_said_to_be_transposed(make, tmp_path):
    assert config_of(make("gpt2").save(tmp_path / "g"))["fan_in_fan_out"] is True
    assert config_of(make("llama").save(tmp_path / "l"))["fan_in_fan_out"] is False


@pytest.mark.parametrize("family", ["tied", "gpt2"])
def test_an_embedding(make, table_rule, tmp_path, family):
    rules = table_rule(family, tie="lookup")
    made = make(family, rules=rules)
    found = tensors_of(made.save(tmp_path))
    (name,) = made.adapter.train
    train = made.adapter.train[name]
    module = "transformer.wte" if family == "gpt2" else "model.embed_tokens"
    stem = f"base_model.model.{module}.lora_embedding_"
    assert set(found) == {f"{stem}A", f"{stem}B"}
    np.testing.assert_array_equal(found[f"{stem}A"], train["a"].T)  # (r, rows)
    np.testing.assert_array_equal(found[f"{stem}B"], train["b"].T)  # (width, r)
    assert config_of(tmp_path)["ensure_weight_tying"] is False
    assert config_of(tmp_path)["fan_in_fan_out"] is False


def test_a_shared_embedding_is_written_to_both_modules(make, table_rule, tmp_path):
    made = make("tied", rules=table_rule("tied", tie="shared"))
    found = tensors_of(made.save(tmp_path))
    train = made.adapter.train["embed_tokens/embedding"]
    np.testing.assert_array_equal(
        found["base_model.model.lm_head.lora_A.weight"], train["b"]
    )
    np.testing.assert_array_equal(
        found["base_model.model.lm_head.lora_B.weight"], train["a"]
    )
    config = config_of(tmp_path)
    assert config["ensure_weight_tying"] is True
    assert config["target_modules"] == ["model.embed_tokens", "lm_head"]


def test_the_head_of_a_tied_table(make, table_rule, tmp_path):
    made = make("tied", rules=table_rule("tied", tie="head"))
    found = tensors_of(made.save(tmp_path))
    train = made.adapter.train["embed_tokens/embedding@head"]
    assert {k.split("lm_head")[0] for k in found} == {"base_model.model."}
    np.testing.assert_array_equal(
        found["base_model.model.lm_head.lora_A.weight"], train["a"].T
    )


def test_an_embedding_of_an_untied_model_is_one_module(make, table_rule, tmp_path):
    made = make("llama", rules=table_rule("llama"))
    assert config_of(made.save(tmp_path))["target_modules"] == ["model.embed_tokens"]


def test_without_names_the_keys_are_paths(make, tmp_path):
    made = make("llama", scan=True)
    found = tensors_of(made.save(tmp_path, names=None))
    assert "layers/1/mlp/up_proj/kernel.lora_A.weight" in found
    assert found["layers/1/mlp/up_proj/kernel.lora_A.weight"].shape == (3, 16)
    assert config_of(tmp_path)["peft_type"] == "LORAX_JAX"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_stored_is_saved(make, tmp_path, dtype):
    made = make("llama", dtype="float32")
    adapter = made.adapter._replace(
        train=jax.tree.map(lambda x: x.astype(dtype), made.adapter.train)
    )
    lj.save_adapter(tmp_path, adapter, plan=made.plan, names=made.names)
    with safe_open(tmp_path / TENSORS, framework="np") as file:
        codes = {file.get_slice(key).get_dtype() for key in file.keys()}
    assert codes == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}


def test_the_file_is_as_large_as_the_adapter(make, tmp_path):
    made = make("llama", scan=True)
    made.save(tmp_path)
    data = sum(tensor.nbytes for tensor in tensors_of(tmp_path).values())
    assert data == 4 * made.plan.trainable


def test_a_rescaled_adapter_keeps_its_scale(make, tmp_path):
    for rslora in (False, True):
        made = make("llama", rslora=rslora)
        fixed = {
            name: Fixed(f.role, dict(f) | {"scale": f["scale"] * np.float32(1 / 3)})
            for name, f in made.adapter.fixed.items()
        }
        adapter = made.adapter._replace(fixed=fixed)
        folder = tmp_path / str(rslora)
        lj.save_adapter(folder, adapter, plan=made.plan, names=made.names)
        loaded, _ = lj.load_adapter(folder, made.params)
        assert {n: float(f["scale"]) for n, f in loaded.fixed.items()} == {
            n: float(f["scale"]) for n, f in fixed.items()
        }


def test_several_axes_are_flattened(tmp_path):
    params = {"q": jnp.ones((6, 2, 3)), "o": jnp.ones((2, 3, 5))}

    def fn(p, x):
        return jnp.einsum("bnh,nhd->bd", jnp.einsum("bi,inh->bnh", x, p["q"]), p["o"])

    plan = lj.plan(lj.LoraConfig(["q", "o"], rank=2), params, fn, (jnp.ones((1, 6)),))
    adapter = lj.init(plan, params, key=jax.random.key(0))
    names = [("q", "attn.q.weight", "linear"), ("o", "attn.o.weight", "linear")]
    lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
    found = tensors_of(tmp_path)
    assert {k[17:]: v.shape for k, v in found.items()} == {
        "attn.q.lora_A.weight": (2, 6),
        "attn.q.lora_B.weight": (6, 2),
        "attn.o.lora_A.weight": (2, 6),
        "attn.o.lora_B.weight": (5, 2),
    }
    loaded, receipt = lj.load_adapter(tmp_path, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, adapter))
    assert receipt.plan.slots[0].role == plan.slots[0].role
    with pytest.raises(CheckpointError, match="which of its axes.*Give the `plan`"):
        stripped = tmp_path / "stripped"
        stripped.mkdir()
        from safetensors.numpy import save_file

        save_file(found, stripped / TENSORS)
        (stripped / CONFIG).write_text((tmp_path / CONFIG).read_text())
        lj.load_adapter(stripped, params, names=names)
    loaded, _ = lj.load_adapter(stripped, params, names=names, plan=plan)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, adapter))


def experts():
    params = {"w": jnp.ones((3, 4, 5))}

    def fn(p, x):
        return jnp.einsum("etd,edf->etf", x, p["w"])

    plan = lj.plan(
        lj.LoraConfig("w", rank=2, init=False), params, fn, (jnp.ones((3, 2, 4)),)
    )
    return params, plan, lj.init(plan, params, key=jax.random.key(0))


def test_experts_have_paths_but_no_modules(tmp_path):
    params, plan, adapter = experts()
    with pytest.raises(CheckpointError, match="'w' has factors for each of 3 experts"):
        names = [("w", "mlp.w.weight", "same")]
        lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
    assert not list(tmp_path.iterdir())
    lj.save_adapter(tmp_path, adapter, plan=plan)
    assert tensors_of(tmp_path)["w.lora_A.weight"].shape == (3, 2, 4)
    loaded, _ = lj.load_adapter(tmp_path, params)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, adapter))


def test_a_module_whose_name_ends_anothers_gets_a_regex(tmp_path):
    params = {"q": jnp.ones((4, 4)), "x": {"q": jnp.ones((4, 4))}}
    plan = lj.plan(
        lj.LoraConfig("q", rank=1),
        params,
        lambda p, x: x @ p["q"] @ p["x"]["q"],
        (jnp.ones(4),),
    )
    adapter = lj.init(plan, params, key=jax.random.key(0))
    names = [("q", "q.weight", "linear"), ("x/q", "x.q.weight", "linear")]
    lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
    assert config_of(tmp_path)["target_modules"] == "(?:q)"


def test_names_that_look_like_keys(tmp_path, equal):
    words = ["weight", "lora_A", "default", "lora_B.weight", "base_model.model", "7"]
    params = {f"p{i}": jnp.ones((4, 4)) for i in range(len(words))}

    def fn(p, x):
        for name in sorted(p):
            x = x @ p[name]
        return x

    plan = lj.plan(lj.LoraConfig("p.", rank=2, init=False), params, fn, (jnp.ones(4),))
    adapter = lj.init(plan, params, key=jax.random.key(0))
    names = [
        (f"p{i}", f"{word}.{word}.m{i}.{word}.weight", "linear")
        for i, word in enumerate(words)
    ]
    lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
    loaded, _ = lj.load_adapter(tmp_path, params)
    assert equal(loaded, adapter)
    from safetensors.numpy import save_file

    save_file(tensors_of(tmp_path), tmp_path / TENSORS)  # without our metadata
    loaded, receipt = lj.load_adapter(tmp_path, params, names=names)
    assert equal(loaded, adapter) and not receipt.problems


def test_the_model_card(make, tmp_path):
    made = make("llama")
    made.save(tmp_path, base_model_name_or_path="owner/name")
    text = (tmp_path / "README.md").read_text()
    assert text.startswith("---\nbase_model: owner/name\nlibrary_name: peft\ntags:\n")
    assert "rank 2 to 4" in text and "`q_proj`" in text
    (tmp_path / "README.md").write_text("mine")
    made.save(tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    made.save(tmp_path / "local", base_model_name_or_path="/some/folder")
    assert "base_model:" not in (tmp_path / "local" / "README.md").read_text()


class _Tokenizer:
    def save_pretrained(self, folder):
        with open(os.path.join(folder, "tokenizer.json"), "w") as file:
            file.write("{}")


def test_a_tokenizer_goes_along(make, tmp_path):
    made = make("llama")
    made.save(tmp_path / "x", tokenizer=_Tokenizer())
    assert (tmp_path / "x" / "tokenizer.json").read_text() == "{}"
    (tmp_path / "x" / "weights.bin").write_text("")
    made.save(tmp_path / "y", tokenizer=tmp_path / "x")
    assert sorted(p.name for p in (tmp_path / "y").iterdir()) == [
        "README.md",
        CONFIG,
        TENSORS,
        "tokenizer.json",
    ]
    with pytest.raises(CheckpointError, match="no `save_pretrained` and is no folder"):
        made.save(tmp_path / "z", tokenizer=3)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="holds no tokenizer's files"):
        made.save(tmp_path / "z", tokenizer=tmp_path / "empty")
    assert not (tmp_path / "z").exists()


def test_what_is_no_adapter_of_the_plan(make, tmp_path):
    made, other = make("llama"), make("llama", rules={".*/mlp/.*kernel": {}})
    with pytest.raises(AdapterError, match="not one of the plan: they differ about"):
        lj.save_adapter(tmp_path, other.adapter, plan=made.plan)
    with pytest.raises(AdapterError, match="not one of the plan"):
        lj.save_adapter(tmp_path, made.adapter.train, plan=made.plan)
    higher = make("llama", rules={k: {} for k in (".*/[01]/.*kernel",)}, rank=3)
    wider = make("llama", rules={k: {} for k in (".*/[01]/.*kernel",)}, rank=4)
    with pytest.raises(AdapterError, match=r"not those of the plan.\n  plan .*ranks"):
        lj.save_adapter(tmp_path, higher.adapter, plan=wider.plan)
    name = next(iter(made.adapter.fixed))
    fixed = made.adapter.fixed[name]
    turned = dataclasses.replace(fixed.role, inputs=(1,), outputs=(0,))
    changed = made.adapter._replace(
        fixed=made.adapter.fixed | {name: Fixed(turned, dict(fixed))}
    )
    with pytest.raises(AdapterError, match="axes of .* are not the plan's"):
        lj.save_adapter(tmp_path, changed, plan=made.plan)
    assert not list(tmp_path.iterdir())


def test_arrays_of_no_kind(make, tmp_path):
    made = make("llama")
    name = next(iter(made.adapter.train))
    train = made.adapter.train | {
        name: made.adapter.train[name] | {"magnitude": jnp.ones(3)}
    }
    with pytest.raises(AdapterError, match=r"not those of the plan.*\n.*\n.*magnitude"):
        lj.save_adapter(tmp_path, made.adapter._replace(train=train), plan=made.plan)


def test_values_beyond_the_rank_are_not_dropped_silently(make, tmp_path):
    made = make("llama", scan=True)
    name = "layers/mlp/up_proj/kernel"
    site = made.adapter.train[name]
    train = made.adapter.train | {name: {"a": site["a"] + 1, "b": site["b"]}}
    made_up = made.adapter._replace(train=train)
    lj.save_adapter(tmp_path, made_up, plan=made.plan)  # B is zero there: no effect
    train[name] = {"a": site["a"] + 1, "b": site["b"] + 1}
    with pytest.raises(AdapterError, match="has rank 3, and its arrays are not zero"):
        lj.save_adapter(tmp_path, made_up, plan=made.plan)


def test_names_without_the_module(make, tmp_path):
    made = make("llama")
    names = [entry for entry in made.names if "up_proj" not in entry[0]]
    with pytest.raises(
        CheckpointError, match="has no module for 'layers/0/mlp/up_proj"
    ):
        made.save(tmp_path, names=names)
    with pytest.raises(ConfigError, match="`names` is a dict"):
        made.save(tmp_path, names={"a": "b"})


def test_a_tied_head_in_the_table_of_an_untied_model(make, table_rule, tmp_path):
    made = make("tied", rules=table_rule("tied", tie="head"))
    names = make("llama").names
    with pytest.raises(
        CheckpointError, match="has the head, 'lm_head', at 'lm_head/ker"
    ):
        made.save(tmp_path, names=names)


def test_a_shared_table_that_the_names_do_not_know(make, table_rule, tmp_path):
    made = make("tied", rules=table_rule("tied", tie="shared"))
    names = NameMap(made.names, tied=None)
    with pytest.raises(
        CheckpointError, match=r"Say so: `NameMap\(names, tied='embed_to"
    ):
        made.save(tmp_path, names=names)
    made.save(tmp_path, names=NameMap(made.names, tied="embed_tokens/embedding"))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_factors_that_are_not_finite(make, tmp_path, dtype, value):
    """Loading would refuse them, so saving does."""
    made = make("llama")
    train = jax.tree.map(lambda x: x.astype(dtype), made.adapter.train)
    name = next(iter(train))
    train[name]["a"] = train[name]["a"].at[0].set(value)
    adapter = lj.Adapter(train, made.adapter.fixed)
    with pytest.raises(AdapterError, match="hold NaN or infinity, and no file"):
        lj.save_adapter(tmp_path / "a", adapter, plan=made.plan)
    assert not (tmp_path / "a").exists()


def test_a_dtype_that_files_do_not_have(make, tmp_path):
    made = make("llama")
    train = jax.tree.map(lambda x: x.astype(jnp.float8_e4m3fn), made.adapter.train)
    with pytest.raises(CheckpointError, match="float8_e4m3fn arrays are not written"):
        lj.save_adapter(tmp_path, made.adapter._replace(train=train), plan=made.plan)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(make, tmp_path, monkeypatch):
    made = make("llama")
    made.save(tmp_path / "x")
    before = {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()}

    def full(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(_save.Writer, "write", full)
    with pytest.raises(CheckpointError, match="The disk is full: .* as it was"):
        make("llama", rank=3).save(tmp_path / "x")
    assert {p.name: p.read_bytes() for p in (tmp_path / "x").iterdir()} == before
    assert os.listdir(tmp_path) == ["x"]


def test_a_disk_that_is_full_before(make, tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=re.escape("and its disk has 1,000 free")):
        make("llama").save(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_an_adapter_spread_over_processes_says_so(make, tmp_path):
    class Remote:
        is_fully_addressable = False
        shape = ()

    made = make("llama")
    name = next(iter(made.adapter.fixed))
    fixed = made.adapter.fixed[name]
    far = Fixed(fixed.role, dict(fixed) | {"rank": Remote()})
    adapter = made.adapter._replace(fixed=made.adapter.fixed | {name: far})
    with pytest.raises(CheckpointError, match="Gather it first"):
        lj.save_adapter(tmp_path, adapter, plan=made.plan)
