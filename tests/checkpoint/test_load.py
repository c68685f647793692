"""`load_adapter`: everything, bit for bit, wherever it was written."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from folders import reconfigure, rewrite
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax import models
from lorax_jax._errors import CheckpointError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX = "base_model.model."
FAMILIES = ["llama", "tied", "gpt2"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("with_plan", [False, True], ids=["alone", "plan"])
@pytest.mark.parametrize("writer", ["ours", "paths", "peft"])
def test_round_trips_are_bit_equal(
    make, peft_made, equal, tmp_path, family, scan, with_plan, writer
):
    made = make(family, scan=scan, dropout=0.1)
    names = None if writer == "paths" else made.names
    folder = made.save(tmp_path / "a", names=names, params=made.params)
    names = None
    if writer == "peft":
        folder, names = peft_made(folder, tmp_path / "b"), made.names
    plan = made.plan if with_plan else None
    loaded, receipt = lj.load_adapter(folder, made.params, plan=plan, names=names)
    assert equal(loaded, made.adapter)
    assert receipt.problems == () and receipt.ignored == ()
    assert receipt.sites == receipt.expected == len(made.plan)
    assert receipt.tensors == 2 * len(made.plan)
    assert receipt.leaves == len(made.adapter.train)
    assert [s.path for s in receipt.plan] == [s.path for s in made.plan]
    facts = ("rank", "alpha", "scale", "dropout", "shape", "role", "part", "leaf")
    for one, other in zip(receipt.plan, made.plan, strict=True):
        assert [getattr(one, f) for f in facts] == [getattr(other, f) for f in facts]
    assert (receipt.plan is made.plan) == with_plan


@pytest.mark.parametrize("family", FAMILIES)
def test_an_unrolled_file_fits_a_stacked_model_and_back(make, equal, tmp_path, family):
    unrolled, scanned = make(family), make(family, scan=True)
    unrolled.save(tmp_path / "u")
    scanned.save(tmp_path / "s")
    assert equal(lj.load_adapter(tmp_path / "u", scanned.params)[0], scanned.adapter)
    assert equal(lj.load_adapter(tmp_path / "s", unrolled.params)[0], unrolled.adapter)


def test_a_loaded_adapter_saves_the_same_file(make, peft_made, tmp_path):
    made = make("llama", scan=True)
    first = made.save(tmp_path / "a", params=made.params)
    for source in (first, peft_made(first, tmp_path / "b")):
        loaded, receipt = lj.load_adapter(source, made.params, names=made.names)
        again = tmp_path / "again" / source.name
        lj.save_adapter(
            again, loaded, plan=receipt.plan, names=made.names, params=made.params
        )
        assert (again / TENSORS).read_bytes() == (first / TENSORS).read_bytes()
        assert (again / CONFIG).read_text() == (first / CONFIG).read_text()


@pytest.mark.parametrize("tie", ["shared", "lookup", "head"])
@pytest.mark.parametrize("family", ["tied", "gpt2"])
@pytest.mark.parametrize("writer", ["ours", "peft"])
def test_tied_embeddings(
    make, table_rule, peft_made, equal, tmp_path, family, tie, writer
):
    made = make(family, rules=table_rule(family, tie=tie) | {".*/0/.*mlp/.*kernel": {}})
    folder, names = made.save(tmp_path / "a"), None
    if writer == "peft":
        folder, names = peft_made(folder, tmp_path / "b"), made.names
    for plan in (None, made.plan):
        loaded, receipt = lj.load_adapter(folder, made.params, names=names, plan=plan)
        assert equal(loaded, made.adapter)
        again = tmp_path / str(plan is None)
        lj.save_adapter(again, loaded, plan=receipt.plan, names=made.names)
        assert load_file(again / TENSORS).keys() == load_file(folder / TENSORS).keys()


def test_a_shared_embedding_counts_four_tensors(make, table_rule, tmp_path):
    made = make("tied", rules=table_rule("tied", tie="shared"))
    _, receipt = lj.load_adapter(made.save(tmp_path), made.params)
    assert (receipt.sites, receipt.tensors, receipt.leaves) == (1, 4, 1)
    assert "shared" in str(receipt.plan.config.rules)


def test_a_shared_embedding_whose_copies_differ(make, table_rule, tmp_path):
    made = make("tied", rules=table_rule("tied", tie="shared"))
    folder = made.save(tmp_path)
    key = f"{PREFIX}lm_head.lora_A.weight"
    rewrite(folder, lambda tensors: tensors.update({key: tensors[key] + 1}))
    with pytest.raises(CheckpointError, match=f"{key} is not the transpose of"):
        lj.load_adapter(folder, made.params)


def test_independent_adapters_of_both_uses(make, table_rule, peft_made, tmp_path):
    """PEFT without `ensure_weight_tying`: each of the two modules has its own."""
    made = make("tied", rules=table_rule("tied", tie="shared"))
    head_a = f"{PREFIX}lm_head.lora_A.weight"

    def change(tensors):
        tensors[head_a] = tensors[head_a] + 1

    folder = peft_made(
        made.save(tmp_path / "a"), tmp_path / "b", change, ensure_weight_tying=False
    )
    loaded, receipt = lj.load_adapter(folder, made.params, names=made.names)
    assert list(loaded.train) == [
        "embed_tokens/embedding@head",
        "embed_tokens/embedding@lookup",
    ]
    table = np.asarray(made.params["embed_tokens"]["embedding"])
    found = load_file(folder / TENSORS)
    lookup = found[f"{PREFIX}model.embed_tokens.lora_embedding_A"].T @ (
        found[f"{PREFIX}model.embed_tokens.lora_embedding_B"].T
    )
    head = (found[f"{PREFIX}lm_head.lora_B.weight"] @ found[head_a]).astype(np.float32)
    scale = receipt.plan.slots[0].sites[0].scale
    untied = models.from_config(
        {"model_type": "llama", "tie_word_embeddings": False}
        | {f: getattr(made.model.config, f) for f in ("vocab_size", "hidden_size")}
        | {"intermediate_size": 24, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2}
    )
    params = made.params | {
        "embed_tokens": {"embedding": jnp.asarray(table + scale * lookup)},
        "lm_head": {"kernel": jnp.asarray((table + scale * head).T)},
    }
    ids = jnp.arange(6)[None]
    ours = lj.adapt(made.model.apply)(lj.bind(made.params, loaded), ids)
    np.testing.assert_allclose(ours, untied.apply(params, ids), atol=1e-4, rtol=1e-4)
    # Both uses go out and come back as they were.
    lj.save_adapter(tmp_path / "c", loaded, plan=receipt.plan, names=made.names)
    assert load_file(tmp_path / "c" / TENSORS).keys() == found.keys()
    reconfigure(folder, ensure_weight_tying=True)
    with pytest.raises(CheckpointError, match="have one adapter, and .* holds two"):
        lj.load_adapter(folder, made.params, names=made.names)


def test_an_untied_embedding_adapts_the_weight(
    make, table_rule, peft_made, equal, tmp_path
):
    made = make("llama", rules=table_rule("llama") | {"lm_head/kernel": {}})
    folder = peft_made(made.save(tmp_path / "a"), tmp_path / "b")
    assert equal(
        lj.load_adapter(folder, made.params, names=made.names)[0], made.adapter
    )


def test_types_are_enough(make, equal, tmp_path):
    made = make("llama")
    types = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), made.params)
    folder = made.save(tmp_path, params=made.params)
    assert equal(lj.load_adapter(folder, types)[0], made.adapter)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_the_stored_dtype_is_kept(make, tmp_path, dtype):
    made = make("llama", scan=True)

    def change(tensors):
        for name in tensors:
            tensors[name] = tensors[name].astype(dtype)

    folder = made.save(tmp_path)
    rewrite(folder, change)
    loaded, receipt = lj.load_adapter(folder, made.params)
    assert {x.dtype for x in jax.tree.leaves(loaded.train)} == {np.dtype(dtype)}
    assert receipt.plan.config.dtype == dtype


def test_a_copy_of_the_bases_embedding_is_known(make, table_rule, peft_made, tmp_path):
    made = make("tied", rules=table_rule("tied", tie="lookup"))
    table = np.asarray(made.params["embed_tokens"]["embedding"])
    copy = f"{PREFIX}model.embed_tokens.base_layer.weight"

    folder = peft_made(
        made.save(tmp_path / "a"), tmp_path / "b", lambda t: t.update({copy: table})
    )
    _, receipt = lj.load_adapter(folder, made.params, names=made.names)
    assert receipt.ignored == (f"{copy} (a copy of the base's)",)
    assert f"ignored     {copy}" in str(receipt)
    folder = peft_made(folder, tmp_path / "c", lambda t: t.update({copy: table + 1}))
    with pytest.raises(CheckpointError, match=re.escape(copy)):
        lj.load_adapter(folder, made.params, names=made.names)


Q0, Q1 = (f"model.layers.{i}.self_attn.q_proj" for i in (0, 1))

# Fields to change, what is noticed with a name table, and whether it is without one.
EDITS = {
    "fewer": (
        {"target_modules": [Q0]},
        "model.layers.0.mlp.up_proj has factors, and adapter_config.json does not",
        True,
    ),
    "a suffix that takes more": (
        {"target_modules": ["q_proj", "k_proj"]},
        "model.layers.0.self_attn.k_proj has no factors, and adapter_config.json",
        True,
    ),
    "another module": (
        {"target_modules": [Q0, "lm_head"]},
        "lm_head (has no factors|is no module of the file), and",
        True,
    ),
    "a regex of more": (
        {"target_modules": r".*(1\..*|0\.mlp\..*|0\.self_attn\.q)_proj|lm_head"},
        "lm_head has no factors, and",
        False,
    ),
    "a regex of fewer": (
        {"target_modules": r".*layers\.0\..*_proj"},
        "model.layers.1.self_attn.q_proj has factors, and",
        True,
    ),
    "layers": (
        {"layers_to_transform": [0]},
        "layers.1.self_attn.q_proj has factors, and `layers_to_transform` leaves it",
        True,
    ),
    "excluded": (
        {"exclude_modules": ["layers.1.self_attn.q_proj"]},
        "layers.1.self_attn.q_proj has factors, and adapter_config.json does not",
        True,
    ),
    "all-linear": (
        {"target_modules": "all-linear"},
        "model.layers.0.self_attn.k_proj has no factors, and",
        False,
    ),
    "nothing": (
        {"target_modules": None},
        "model.layers.0.self_attn.q_proj has factors, and",
        True,
    ),
    "parameters": (
        {"target_parameters": ["k_proj.weight"]},
        "model.layers.0.self_attn.k_proj.weight has no factors, and",
        False,
    ),
}


@pytest.mark.parametrize("edit", EDITS)
@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_edited_targets_are_noticed(make, tmp_path, edit, scan):
    made = make("llama", scan=scan)
    change, message, always = EDITS[edit]
    folder = made.save(tmp_path)
    lj.load_adapter(folder, made.params, names=made.names)  # as it was written
    reconfigure(folder, **change)
    with pytest.raises(CheckpointError, match=rf"changed +.*{message}"):
        lj.load_adapter(folder, made.params, names=made.names)
    if always:
        with pytest.raises(CheckpointError, match="changed +.*, and"):
            lj.load_adapter(folder, made.params)
    else:
        lj.load_adapter(folder, made.params)
    _, receipt = lj.load_adapter(folder, made.params, names=made.names, strict=False)
    assert receipt.changed and receipt.sites == len(made.plan)


def test_the_metadata_is_enough(make, equal, tmp_path):
    made = make("tied", scan=True, rslora=True)
    folder = made.save(tmp_path)
    (folder / CONFIG).unlink()
    loaded, receipt = lj.load_adapter(folder, made.params)
    assert equal(loaded, made.adapter) and receipt.plan.config.rslora


def test_without_the_prefix(make, peft_made, equal, tmp_path):
    """What `inject_adapter_in_model` saves."""

    def change(tensors):
        for key in list(tensors):
            tensors[key.removeprefix(PREFIX)] = tensors.pop(key)

    made = make("llama")
    folder = peft_made(made.save(tmp_path / "a"), tmp_path / "b", change)
    loaded, _ = lj.load_adapter(folder, made.params, names=made.names)
    assert equal(loaded, made.adapter)


def test_a_stack_that_is_not_in_front(tmp_path, equal):
    params = {"layers": {"w": jnp.ones((4, 3, 4))}}  # (in, layer, out)

    def fn(p, x):
        w = jnp.moveaxis(p["layers"]["w"], 1, 0)
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    rules = {r"layers/1/w": {"rank": 2}, r"layers/2/w": {"rank": 1}}
    plan = lj.plan(lj.LoraConfig(rules, init=False), params, fn, (jnp.ones(4),))
    adapter = lj.init(plan, params, key=jax.random.key(0))
    assert plan.slots[0].role.stacked == (1,)
    lj.save_adapter(tmp_path, adapter, plan=plan, params=params)
    loaded, receipt = lj.load_adapter(tmp_path, params)
    assert equal(loaded, adapter)
    assert [site.path for site in receipt.plan] == ["layers/1/w", "layers/2/w"]


def test_stacks_within_a_stack(tmp_path, equal):
    params = {"a": {"b": {"w": jnp.ones((2, 3, 4, 4))}}}

    def fn(p, x):
        def outer(x, ws):
            return jax.lax.scan(lambda x, w: (x @ w, None), x, ws)[0], None

        return jax.lax.scan(outer, x, p["a"]["b"]["w"])[0]

    rules = {r"a/b/[01]/[02]/w": {"rank": 2}, r"a/b/1/1/w": {"rank": 1}}
    plan = lj.plan(lj.LoraConfig(rules, init=False), params, fn, (jnp.ones(4),))
    adapter = lj.init(plan, params, key=jax.random.key(0))
    assert plan.slots[0].role.stacked == (0, 1)
    lj.save_adapter(tmp_path, adapter, plan=plan, params=params)
    loaded, receipt = lj.load_adapter(tmp_path, params)
    assert equal(loaded, adapter)
    assert [s.path for s in receipt.plan] == [s.path for s in plan]
    assert lj.plan(receipt.plan.config, params, fn, (jnp.ones(4),)).slots[0].sites[0]
