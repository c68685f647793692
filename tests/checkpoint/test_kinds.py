"""Files of adapters that are more than plain LoRA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from kind_files import CASES, CONFIG, OURS, STEM, TENSORS, config_of, tensors_of
from safetensors.numpy import save_file

import lorax_jax as lj
from lorax_jax._errors import CheckpointError


@pytest.mark.parametrize("case", [*CASES, *OURS])
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_there_and_back_again(made_of, equal, tmp_path, case, scan):
    made = made_of(case, scan)
    for names in (None, made.names) if case in CASES else (None,):
        folder = made.save(tmp_path / str(names is None), names=names)
        loaded, receipt = lj.load_adapter(folder, made.params)
        assert equal(loaded, made.adapter)
        assert not receipt.problems
        assert receipt.sites == receipt.expected == len(made.plan)
        assert receipt.tensors == len(tensors_of(folder))
        assert receipt.plan.trainable == made.plan.trainable
        shapes = [
            {slot.name: slot.shapes() for slot in plan.slots}
            for plan in (receipt.plan, made.plan)
        ]
        assert shapes[0] == shapes[1]
        checked, told = lj.load_adapter(folder, made.params, plan=made.plan)
        assert equal(checked, made.adapter) and told.plan is made.plan
        # Saved again, the same file.
        again = tmp_path / "again"
        lj.save_adapter(again, loaded, plan=receipt.plan, names=names)
        assert (again / TENSORS).read_bytes() == (folder / TENSORS).read_bytes()
        assert config_of(again) == config_of(folder)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_without_the_metadata(made_of, peft_made, equal, tmp_path, case, scan):
    """PEFT's configuration says it all, as it must in PEFT's own files."""
    made = made_of(case, scan)
    folder = peft_made(made.save(tmp_path / "a"), tmp_path / "b")
    loaded, receipt = lj.load_adapter(folder, made.params, names=made.names)
    assert not receipt.problems and receipt.sites == len(made.plan)
    assert equal(loaded, made.adapter)
    made.save(tmp_path / "c")
    lj.save_adapter(tmp_path / "d", loaded, plan=receipt.plan, names=made.names)
    one, other = tensors_of(tmp_path / "c"), tensors_of(tmp_path / "d")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
    plan = lj.plan(
        lj.LoraConfig.from_peft(folder, made.names),
        made.params,
        fn=made.model.apply,
        args=(np.zeros((1, 3), np.int32),),
    )
    again, told = lj.load_adapter(folder, made.params, names=made.names, plan=plan)
    assert told.plan is plan and equal(again, made.adapter)


@pytest.mark.parametrize("case", [*CASES, *OURS])
def test_a_stacked_model_writes_the_same_files(made_of, tmp_path, case):
    for scan in (False, True):
        made = made_of(case, scan)
        names = made.names if case in CASES else None
        made.save(tmp_path / str(scan), names=names, params=made.params)
    for name in (TENSORS, CONFIG, "README.md"):
        one, other = ((tmp_path / s / name).read_bytes() for s in ("False", "True"))
        assert one == other, name


@pytest.mark.parametrize("case", CASES)
def test_unrolled_files_load_stacked(made_of, equal, tmp_path, case):
    folder = made_of(case).save(tmp_path)
    stacked = made_of(case, True)
    assert equal(lj.load_adapter(folder, stacked.params)[0], stacked.adapter)


def test_keys_and_configuration(made_of, tmp_path):
    found = tensors_of(made_of("dora").save(tmp_path / "1"))
    module = f"{STEM}model.layers.0.self_attn.q_proj"
    assert found[f"{module}.lora_magnitude_vector"].shape == (16,)
    config = config_of(tmp_path / "1")
    assert config["use_dora"] is True and config["modules_to_save"] is None

    found = tensors_of(made_of("dora table").save(tmp_path / "2"))
    assert found[f"{STEM}model.embed_tokens.lora_magnitude_vector"].shape == (16,)

    found = tensors_of(made_of("biases of targets").save(tmp_path / "3"))
    module = f"{STEM}transformer.h.1.attn.c_attn"
    assert found[f"{module}.lora_B.bias"].shape == (48,)
    assert found[f"{module}.base_layer.bias"].shape == (48,)
    config = config_of(tmp_path / "3")
    assert (config["bias"], config["lora_bias"]) == ("lora_only", True)

    found = tensors_of(made_of("all biases").save(tmp_path / "4"))
    assert f"{STEM}transformer.h.0.ln_1.bias" in found
    assert f"{STEM}transformer.h.1.mlp.c_fc.base_layer.bias" in found
    assert f"{STEM}transformer.h.0.mlp.c_fc.bias" in found
    assert config_of(tmp_path / "4")["bias"] == "all"

    made = made_of("head and norm")
    found = tensors_of(made.save(tmp_path / "5"))
    kernel = made.adapter.train["lm_head/kernel"]["whole"]
    assert np.array_equal(found[f"{STEM}lm_head.weight"], kernel.T)
    config = config_of(tmp_path / "5")
    assert config["modules_to_save"] == ["lm_head", "model.norm"]

    found = tensors_of(made_of("tied table").save(tmp_path / "6"))
    one, other = (found[f"{STEM}{m}.weight"] for m in ("model.embed_tokens", "lm_head"))
    assert np.array_equal(one, other)
    config = config_of(tmp_path / "6")
    assert config["modules_to_save"] == ["model.embed_tokens", "lm_head"]
    assert config["ensure_weight_tying"] is True

    made = made_of("rows")
    found = tensors_of(made.save(tmp_path / "7"))
    key = f"{STEM}model.embed_tokens.token_adapter.trainable_tokens_delta"
    rows = made.adapter.train["embed_tokens/embedding@rows"]["rows"]
    assert np.array_equal(found[key], rows)
    config = config_of(tmp_path / "7")
    assert config["trainable_token_indices"] == {"model.embed_tokens": [2, 7]}


def test_keys_of_our_paths(made_of, tmp_path):
    made = made_of("everything")
    found = tensors_of(made.save(tmp_path, names=None))
    assert "ln_f/scale" in found and "h/0/ln_1/bias" in found
    assert "wte/embedding.token_adapter.trainable_tokens_delta" in found
    found = tensors_of(made_of("dora").save(tmp_path, names=None))
    assert "layers/0/self_attn/q_proj/kernel.lora_magnitude_vector" in found


def test_the_card(made_of, tmp_path):
    made_of("everything").save(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "`ln_f/scale`" in text and "`h/*/ln_1/bias`" in text
    assert "Trained rows of tables: 1." in text
    made_of("dora").save(tmp_path / "d")
    assert "A DoRA adapter" in (tmp_path / "d" / "README.md").read_text()


def test_sixteen_bits(made_of, equal, tmp_path):
    made = made_of("everything", True)
    train = jax.tree.map(lambda x: x.astype(jnp.bfloat16), made.adapter.train)
    adapter = made.adapter._replace(train=train)
    lj.save_adapter(tmp_path, adapter, plan=made.plan, names=made.names)
    assert equal(lj.load_adapter(tmp_path, made.params)[0], adapter)


def test_a_magnitude_of_its_own_dtype(made_of, tmp_path):
    folder = made_of("dora").save(tmp_path)
    tensors = {
        key: x.astype(np.float16) if key.endswith("vector") else x
        for key, x in tensors_of(folder).items()
    }
    made = made_of("dora", True)
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    loaded, _ = lj.load_adapter(folder, made.params, names=made.names)
    train = loaded.train["layers/self_attn/q_proj/kernel"]
    assert (train["a"].dtype, train["magnitude"].dtype) == (jnp.float32, jnp.float16)


def test_old_metadata_and_plain_lora_are_version_one(make, made_of, tmp_path):
    from safetensors import safe_open

    for made, version in ((make("llama"), 1), (made_of("dora"), 2)):
        made.save(tmp_path)
        with safe_open(tmp_path / TENSORS, "np") as file:
            record = json.loads(file.metadata()["lorax_jax"])
        assert record["version"] == version
        plain = version == 1
        assert all(("kind" in site) is not plain for site in record["sites"])


def test_a_weight_that_is_not_trained_on_may_differ(made_of, tmp_path):
    """A new head is drawn anew: the copy takes its place."""
    made = made_of("head and norm")
    folder = made.save(tmp_path, params=made.params)
    fresh = made.params | {"lm_head": {"kernel": made.params["lm_head"]["kernel"] + 1}}
    loaded, receipt = lj.load_adapter(folder, fresh)
    assert not receipt.problems
    one = lj.merge(made.params, made.adapter)
    other = lj.merge(fresh, loaded)
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_dora_is_unmoved_where_a_layer_is_left_out(made_of):
    made = made_of("dora", True)
    slot = next(
        s for s in made.plan.slots if s.role.path == "layers/mlp/up_proj/kernel"
    )
    assert slot.sites[0] is None
    train = made.adapter.train[slot.name]
    moved = made.adapter.train | {
        slot.name: train | {"magnitude": train["magnitude"].at[0].set(3.0)}
    }
    one = lj.merge(made.params, made.adapter)
    other = lj.merge(made.params, made.adapter._replace(train=moved))
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))


def test_some_layers_of_stacks_within_stacks(tmp_path):
    leaf = {"w": jnp.ones((3, 3)), "b": jnp.ones(3)}
    params = {str(i): {str(j): leaf for j in range(2)} for i in range(2)}

    def fn(params, x):
        for layers in params.values():
            for layer in layers.values():
                x = x @ layer["w"] + layer["b"]
        return x

    config = lj.LoraConfig(".*/w", rank=1, whole="0/1/b")
    plan = lj.plan(config, params, fn=fn, args=(jnp.ones(3),))
    lj.save_adapter(tmp_path, drawn(plan), plan=plan)
    stacked = jax.tree.map(lambda x: jnp.ones((2, 2, *x.shape)), leaf)
    with pytest.raises(
        CheckpointError, match="whole for some of its layers, which are"
    ):
        lj.load_adapter(tmp_path, stacked)


def test_factors_alone_make_an_adapter(made_of, peft_made, tmp_path):
    made = made_of("head and norm")

    def change(tensors):
        for key in [key for key in tensors if ".lora_" in key]:
            del tensors[key]

    folder = peft_made(made.save(tmp_path / "a"), tmp_path / "b", change)
    with pytest.raises(CheckpointError, match="No factors of .* fit the parameters"):
        lj.load_adapter(folder, made.params, names=made.names, strict=False)
