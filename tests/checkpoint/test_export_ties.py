"""`export_merged` of models whose head shares the table of tokens."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from folders import config_of, same_bytes, tensors_of
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax import models
from lorax_jax._errors import CheckpointError

FAMILIES = ["llama", "tied", "gpt2"]


@pytest.mark.parametrize("use", ["lookup", "head"])
@pytest.mark.parametrize("family", ["tied", "gpt2"])
@pytest.mark.parametrize("form", ["adapter", "ours", "peft"])
def test_one_use_of_a_tied_table_unties_it(
    make, base_folder, peft_made, table_rule, tmp_path, family, use, form
):
    made = make(family, rules=table_rule(family, tie=use) | {r".*/0/mlp/.*kernel": {}})
    base, out = base_folder(made), tmp_path / "out"
    adapter, names = made.adapter, made.names
    if form != "adapter":
        adapter, names = made.save(tmp_path / "a"), None
    if form == "peft":
        adapter = peft_made(adapter, tmp_path / "b")
    done = lj.export_merged(base, adapter, out, names=names)
    assert done.untied and config_of(out)["tie_word_embeddings"] is False
    table = (
        "transformer.wte.weight" if family == "gpt2" else "model.embed_tokens.weight"
    )
    old, new = tensors_of(base), tensors_of(out)
    changed = {"lookup": table, "head": "lm_head.weight"}[use]
    kept = {"lookup": "lm_head.weight", "head": table}[use]
    assert new[kept].tobytes() == old[table].tobytes()
    assert new[changed].tobytes() != old[table].tobytes()
    assert changed in done.merged and kept not in done.merged
    model, params = models.load(out)
    ids = np.arange(7, dtype=np.int32)[None]
    bound = lj.bind(made.params, made.adapter)
    ours = lj.adapt(made.model.apply)(bound, ids)
    np.testing.assert_allclose(model.apply(params, ids), ours, atol=1e-5)


def test_a_shared_adapter_beside_one_of_the_head(
    make, base_folder, table_rule, tmp_path
):
    """The table gets the one, the head both."""
    shared = make("tied", rules=table_rule("tied", tie="shared"))
    head = make("tied", rules=table_rule("tied", tie="head"))
    base, out = base_folder(shared), tmp_path / "out"
    adapters = [shared.adapter, head.adapter]
    done = lj.export_merged(base, adapters, out, names=shared.names)
    assert done.untied
    model, params = models.load(out)
    ids = np.arange(7, dtype=np.int32)[None]
    ours = lj.adapt(shared.model.apply)(lj.bind(shared.params, *adapters), ids)
    np.testing.assert_allclose(model.apply(params, ids), ours, atol=1e-4, rtol=1e-5)


def test_a_redundant_copy_of_a_tied_table(make, base_folder, table_rule, tmp_path):
    """Some checkpoints hold the head although it is tied."""
    base = tmp_path / "base"
    made = make("tied", rules=table_rule("tied", tie="shared"))
    shutil.copytree(base_folder(made), base)
    tensors = tensors_of(base)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    lj.export_merged(base, made.adapter, tmp_path / "out", names=made.names)
    found = tensors_of(tmp_path / "out")
    table = "model.embed_tokens.weight"
    assert found["lm_head.weight"].tobytes() == found[table].tobytes()
    assert found[table].tobytes() != tensors[table].tobytes()
    assert config_of(tmp_path / "out")["tie_word_embeddings"] is True
    models.load(tmp_path / "out")  # which looks whether the two agree
    head = make("tied", rules=table_rule("tied", tie="head"))
    folder = head.save(tmp_path / "adapter")
    for adapter, names in ((head.adapter, made.names), (folder, None)):
        lj.export_merged(base, adapter, tmp_path / "head", names=names)
        found = tensors_of(tmp_path / "head")
        assert found[table].tobytes() == tensors[table].tobytes()
        assert found["lm_head.weight"].tobytes() != tensors[table].tobytes()
        assert config_of(tmp_path / "head")["tie_word_embeddings"] is False


def test_a_shared_adapter_on_an_untied_checkpoint(
    make, base_folder, table_rule, tmp_path
):
    """As PEFT does: each of the two modules gets its copy."""
    made = make("tied", rules=table_rule("tied", tie="shared"))
    untied = make("llama")
    base = base_folder(untied)
    folder = made.save(tmp_path / "a")
    done = lj.export_merged(base, folder, tmp_path / "out")
    assert set(done.merged) == {"model.embed_tokens.weight", "lm_head.weight"}
    old, new = tensors_of(base), tensors_of(tmp_path / "out")
    deltas = [new[name] - old[name] for name in done.merged]
    np.testing.assert_allclose(*deltas, atol=1e-5)


def test_a_checkpoint_without_its_head(make, base_folder, table_rule, tmp_path):
    made = make("gpt2")
    base = tmp_path / "base"
    shutil.copytree(base_folder(made), base)
    bare = {k.removeprefix("transformer."): v for k, v in tensors_of(base).items()}
    save_file(bare, base / "model.safetensors")
    wanted = models.to_hf(made.model, lj.merge(made.params, made.adapter))
    wanted = {k.removeprefix("transformer."): v for k, v in wanted.items()}
    folder = made.save(tmp_path / "a")
    for adapter, names in (
        (made.adapter, made.names),
        (folder, None),
        (folder, made.names),
    ):
        lj.export_merged(base, adapter, tmp_path / "out", names=names)
        assert same_bytes(tensors_of(tmp_path / "out"), wanted)
    head = make("gpt2", rules=table_rule("gpt2", tie="head"))
    with pytest.raises(CheckpointError, match="is a checkpoint without a head"):
        lj.export_merged(base, head.adapter, tmp_path / "other", names=made.names)
    assert not (tmp_path / "other").exists()


def test_a_model_that_has_no_head(tmp_path):
    """An encoder's table is not tied to anything."""
    table = np.ones((9, 4), np.float32)
    save_file(
        {"embeddings.word_embeddings.weight": table}, tmp_path / "model.safetensors"
    )
    (tmp_path / "config.json").write_text('{"architectures": ["BertModel"]}')
    params = {"table": jnp.asarray(table)}
    plan = lj.plan(
        lj.LoraConfig("table", rank=2, init=False),
        params,
        lambda p, i: p["table"][i],
        (jnp.zeros(3, int),),
    )
    adapter = lj.init(plan, params, key=jax.random.key(0))
    names = [("table", "embeddings.word_embeddings.weight", "same")]
    folder = tmp_path / "adapter"
    lj.save_adapter(folder, adapter, plan=plan, names=names)
    (folder / "adapter_model.safetensors").rename(folder / "old")
    save_file(load_file(folder / "old"), folder / "adapter_model.safetensors")
    base = tmp_path / "base"
    base.mkdir()
    for name in ("model.safetensors", "config.json"):
        (tmp_path / name).rename(base / name)
    done = lj.export_merged(base, folder, tmp_path / "out")
    assert done.merged == ("embeddings.word_embeddings.weight",) and not done.untied
    assert "tie_word_embeddings" not in config_of(tmp_path / "out")
