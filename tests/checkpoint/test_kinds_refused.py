"""Files of adapters that are more than plain LoRA: what does not fit."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from kind_files import CASES, CONFIG, STEM, TENSORS, config_of
from safetensors.numpy import save_file

import lorax_jax as lj
from lorax_jax._errors import AdapterError, CheckpointError
from lorax_jax.adapters import Fixed
from lorax_jax.checkpoint import NameMap


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("two kinds", "have adapters of different kinds"),
        ("some leaves of a norm", r"of 'transformer.h.0.ln_1' only a part is: .*bias"),
        ("rows and factors", "has factors and trained rows"),
        ("one magnitude for both", "one magnitude for the lookup and the head"),
    ],
)
def test_what_peft_cannot_say(made_of, tmp_path, case, message):
    with pytest.raises(CheckpointError, match=f"(?s){message}.*our paths"):
        made_of(case).save(tmp_path)
    assert not list(tmp_path.iterdir())


def plain(whole, **params):
    """A plan for `q` and something trained whole, and its adapter."""
    config = lj.LoraConfig("q/kernel", rank=1, whole=whole)

    def fn(params, x):
        others = [leaf for name, leaf in params.items() if name != "q"]
        rest = sum(jnp.sum(leaf) for leaf in jax.tree.leaves(others))
        return x @ params["q"]["kernel"] + rest

    params = {"q": {"kernel": jnp.ones((3, 2))}} | params
    plan = lj.plan(config, params, fn=fn, args=(jnp.ones(3),))
    return params, plan, drawn(plan)


def test_names_that_peft_matches_too_much_by(tmp_path):
    head = {"kernel": jnp.ones((2, 2))}
    _, plan, adapter = plain("head/kernel", head=head, aux={"head": head})
    names = [
        ("q/kernel", "q.weight", "linear"),
        ("head/kernel", "head.weight", "linear"),
        ("aux/head/kernel", "aux.head.weight", "linear"),
    ]
    message = r"cannot name 'head' alone: it would take aux.head too"
    with pytest.raises(CheckpointError, match=message):
        lj.save_adapter(tmp_path, adapter, plan=plan, names=names)


def test_leaves_that_no_name_is_for(tmp_path):
    _, plan, adapter = plain("norm", norm=jnp.ones(2))
    names = [("q/kernel", "q.weight", "linear")]
    with pytest.raises(CheckpointError, match="no tensor for 'norm', which is trained"):
        lj.save_adapter(tmp_path, adapter, plan=plan, names=names)


def test_kernels_of_more_axes(tmp_path):
    params, plan, adapter = plain("v", v=jnp.ones((2, 3, 4)))
    names = [("q/kernel", "q.weight", "linear"), ("v", "v.weight", "linear")]
    with pytest.raises(CheckpointError, match="more than two axes, and which of them"):
        lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
    lj.save_adapter(tmp_path / "a", adapter, plan=plan)
    assert lj.load_adapter(tmp_path / "a", params)[1].sites == 2
    factors = {
        "base_model.model.q.lora_A.weight": np.ones((1, 3), np.float32),
        "base_model.model.q.lora_B.weight": np.ones((2, 1), np.float32),
        "base_model.model.v.weight": np.ones((12, 2), np.float32),
    }
    fields = {"peft_type": "LORA", "r": 1, "target_modules": ["q"]}
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / CONFIG).write_text(
        json.dumps(fields | {"modules_to_save": ["v"]})
    )
    save_file(factors, tmp_path / "b" / TENSORS, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="holds it whole with 2 axes: which"):
        lj.load_adapter(tmp_path / "b", params, names=names)


def test_dora_needs_values(made_of, tmp_path):
    made = made_of("dora")
    folder = made.save(tmp_path)
    types = jax.eval_shape(lambda: made.params)
    with pytest.raises(
        CheckpointError, match=r"norms of the base weight.*only its type"
    ):
        lj.load_adapter(folder, types)
    made = made_of("everything")
    loaded, _ = lj.load_adapter(
        made.save(tmp_path), jax.eval_shape(lambda: made.params)
    )
    assert set(loaded.train) == set(made.adapter.train)


def test_one_use_of_a_tied_table(made_of, peft_made, tmp_path):
    made = made_of("tied table")
    folder = made.save(tmp_path / "a")
    for i, module in enumerate(("lm_head", "model.embed_tokens")):
        other = peft_made(
            folder, tmp_path / str(i), lambda t, m=module: t.pop(f"{STEM}{m}.weight")
        )
        with pytest.raises(CheckpointError, match="whole in one of its uses"):
            lj.load_adapter(other, made.params, names=made.names)

    def change(tensors):
        tensors[f"{STEM}lm_head.weight"] = tensors[f"{STEM}lm_head.weight"] + 1

    other = peft_made(folder, tmp_path / "other", change)
    with pytest.raises(CheckpointError, match="is not the copy of .*embed_tokens"):
        lj.load_adapter(other, made.params, names=made.names)


@pytest.mark.parametrize(
    ("case", "key"),
    [
        ("dora", "model.layers.0.self_attn.q_proj.lora_magnitude_vector"),
        ("bias of B", "transformer.h.0.attn.c_attn.lora_B.bias"),
        ("all biases", "transformer.h.0.ln_1.bias"),
        ("biases of targets", "transformer.h.0.attn.c_attn.base_layer.bias"),
        ("head and norm", "model.norm.weight"),
        ("rows", "model.embed_tokens.token_adapter.trainable_tokens_delta"),
    ],
)
def test_what_is_missing_is_named(made_of, peft_made, tmp_path, case, key):
    made = made_of(case)
    folder = peft_made(
        made.save(tmp_path / "a"), tmp_path / "b", lambda t: t.pop(STEM + key)
    )
    with pytest.raises(CheckpointError, match=f"missing     {STEM}{key}"):
        lj.load_adapter(folder, made.params, names=made.names)
    _, receipt = lj.load_adapter(folder, made.params, names=made.names, strict=False)
    assert receipt.sites == receipt.expected - 1 == len(made.plan) - 1


@pytest.mark.parametrize(
    ("case", "change", "field"),
    [
        ("dora", {"use_dora": False}, "use_dora"),
        ("bias of B", {"lora_bias": False}, "lora_bias"),
        ("all biases", {"bias": "none"}, "bias"),
        ("head and norm", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("dora", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ("rows", {"trainable_token_indices": [2, 7]}, "trainable_token_indices"),
    ],
)
def test_an_edited_configuration(made_of, tmp_path, case, change, field):
    made = made_of(case)
    folder = made.save(tmp_path)
    (folder / CONFIG).write_text(json.dumps(config_of(folder) | change))
    with pytest.raises(CheckpointError, match=f"disagree about {field}"):
        lj.load_adapter(folder, made.params)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"modules_to_save": "lm_head"}, "a list of names of modules is meant"),
        ({"bias": "some"}, "`bias` = 'some'; one of"),
        ({"use_dora": 1}, "`use_dora` = 1, not true or false"),
        ({"trainable_token_indices": {"a": [-1]}}, "a list of row numbers"),
        ({"trainable_token_indices": [1, 1]}, "names a row twice"),
        ({"trainable_token_indices": {"wpe": [1]}}, "takes no module of `names`"),
    ],
)
def test_odd_configurations(made_of, peft_made, tmp_path, change, message):
    made = made_of("dora")
    folder = peft_made(made.save(tmp_path / "a"), tmp_path / "b", **change)
    with pytest.raises(CheckpointError, match=message):
        lj.load_adapter(folder, made.params, names=made.names)


def test_rows_of_one_use_of_a_tied_table(made_of, peft_made, tmp_path):
    made = made_of("rows of a tied table")
    for i, asked in enumerate(
        ({"lm_head": [1]}, {"lm_head": [1], "embed_tokens": [1, 9, 40]})
    ):
        folder = peft_made(
            made.save(tmp_path / "a"), tmp_path / str(i), trainable_token_indices=asked
        )
        with pytest.raises(CheckpointError, match="and the two are one table"):
            lj.load_adapter(folder, made.params, names=made.names)
    both = dict.fromkeys(("lm_head", "embed_tokens"), [1, 9, 40])
    folder = peft_made(tmp_path / "a", tmp_path / "c", trainable_token_indices=both)
    assert lj.load_adapter(folder, made.params, names=made.names)[1].sites


def test_an_input_embedding_that_cannot_be_told(peft_made, tmp_path):
    def fn(params, ids, x):
        both = jnp.take(params["t"], ids, axis=0) + jnp.take(params["p"], ids, axis=0)
        return both, x @ params["q"]

    params = {name: jnp.ones((5, 3)) for name in "tp"} | {"q": jnp.ones((3, 2))}
    config = lj.LoraConfig("q", rank=1, token_rows={"[tp]": [1]})
    plan = lj.plan(config, params, fn=fn, args=(jnp.arange(2), jnp.ones(3)))
    names = [(n, f"{n}.weight", "same") for n in "tpq"]
    folder = tmp_path / "a"
    lj.save_adapter(folder, drawn(plan), plan=plan, names=names)
    folder = peft_made(folder, tmp_path / "b", trainable_token_indices=[1])
    with pytest.raises(CheckpointError, match="does not say which of its tables"):
        lj.load_adapter(folder, params, names=names)
    loaded, _ = lj.load_adapter(
        folder, params, names=NameMap(names, tied="t"), strict=False
    )
    assert "t@rows" in loaded.train and "p@rows" not in loaded.train


@pytest.mark.parametrize(
    ("case", "other"),
    [("dora", {}), ("bias of B", {}), ("rows", {"token_rows": [2, 8]})],
)
def test_a_plan_of_another_kind(made_of, make, tmp_path, case, other):
    made = made_of(case)
    family, rules, _ = CASES[case]
    planned = make(family, rules=rules, **other)
    folder = made.save(tmp_path)
    with pytest.raises(CheckpointError, match=r"changed .* holds .*, and the plan has"):
        lj.load_adapter(folder, made.params, plan=planned.plan)


def test_arrays_of_another_plan(made_of, tmp_path):
    made = made_of("rows")
    name = "embed_tokens/embedding@rows"
    fixed = Fixed(made.adapter.fixed[name].role, {"ids": jnp.array([1, 2])})
    changed = made.adapter._replace(fixed=made.adapter.fixed | {name: fixed})
    with pytest.raises(AdapterError, match="not those of the plan"):
        lj.save_adapter(tmp_path, changed, plan=made.plan)
