"""Files of adapters that are more than plain LoRA."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax._errors import AdapterError, CheckpointError
from lorax_jax.adapters import Fixed
from lorax_jax.checkpoint import NameMap

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
STEM = "base_model.model."

RULES = {
    r"(layers|h)/1/mlp/(up_proj|c_fc)/kernel": {"rank": 3, "alpha": 5},
    r"(layers|h)/\d/(self_attn/q_proj|attn/c_attn)/kernel": {},
}
TABLE = {"embed_tokens/embedding": {}}

# Name -> family, rules and arguments of `LoraConfig`, for what PEFT can say.
CASES = {
    "dora": ("llama", RULES, {"dora": True}),
    "dora gpt2": ("gpt2", RULES, {"dora": True, "rslora": True}),
    "dora table": ("llama", RULES | TABLE, {"dora": True}),
    "dora head": ("tied", RULES | {"embed.*": {"tie": "head"}}, {"dora": True}),
    "bias of B": ("gpt2", RULES, {"lora_bias": True}),
    "all biases": ("gpt2", RULES, {"bias": "all"}),
    "biases of targets": ("gpt2", RULES, {"bias": "lora_only", "lora_bias": True}),
    "head and norm": ("llama", RULES, {"whole": ["lm_head/kernel", "norm/scale"]}),
    "norms": ("gpt2", RULES, {"whole": ".*/ln_1/.*"}),
    "some norms": ("llama", RULES, {"whole": "layers/1/input_layernorm/scale"}),
    "tied table": ("tied", RULES, {"whole": "embed_tokens/embedding"}),
    "everything": (
        "gpt2",
        RULES,
        {"bias": "all", "whole": "ln_f/.*", "token_rows": {"wte/.*": [3]}},
    ),
    "rows": ("llama", RULES, {"token_rows": [7, 2]}),
    "rows of a tied table": ("tied", RULES, {"token_rows": [1, 40, 9]}),
    "rows of a head": ("llama", RULES, {"token_rows": {"lm_head/kernel": [4, 5]}}),
}
# And for what only our own files can.
OURS = {
    "two kinds": ("llama", {r".*q_proj.*": {"dora": True}, r".*v_proj.*": {}}, {}),
    "some leaves of a norm": ("gpt2", RULES, {"whole": ".*/ln_1/scale"}),
    "rows and factors": ("llama", RULES | TABLE, {"token_rows": [1]}),
    "one magnitude for both": (
        "tied",
        {"embed.*": {"tie": "shared"}} | RULES,
        {"dora": True},
    ),
}


def tensors_of(folder):
    return load_file(folder / TENSORS)


def config_of(folder):
    return json.loads((folder / CONFIG).read_text())


@pytest.fixture
def made_of(make):
    def build(case, scan=False):
        family, rules, config = (CASES | OURS)[case]
        return make(family, scan=scan, rules=rules, **config)

    return build


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


# --- Merging without the model --------------------------------------------------------


@pytest.mark.parametrize("case", CASES)
def test_exported_as_merged(made_of, peft_made, base_folder, tmp_path, case):
    """The bytes of `merge`, from an adapter and from either kind of folder."""
    from lorax_jax import models

    made = made_of(case)
    base = base_folder(made)
    own = made.save(tmp_path / "own", params=made.params)
    theirs = peft_made(own, tmp_path / "theirs")
    wanted = None
    if case != "dora head":  # which no one matrix holds
        merged = lj.merge(made.params, made.adapter)
        wanted = models.to_hf(made.model, merged)
    for i, (adapter, names) in enumerate(
        [(made.adapter, made.names), (own, None), (theirs, None), (own, made.names)]
    ):
        out = tmp_path / f"out{i}"
        done = lj.export_merged(base, adapter, out, names=names)
        found = load_file(out / "model.safetensors")
        if wanted is None:
            wanted = found
            assert done.untied and "lm_head.weight" in found
            continue
        assert found.keys() == wanted.keys()
        assert [k for k in found if not np.array_equal(found[k], wanted[k])] == []
        assert not done.untied or case == "dora head"


def test_a_bias_of_b_without_a_bias(make, base_folder, tmp_path):
    made = make("llama", rules=RULES, lora_bias=True)
    with pytest.raises(AdapterError, match=r"no model.layers.*bias to merge it into"):
        lj.export_merged(
            base_folder(made), made.adapter, tmp_path / "out", names=made.names
        )


def test_a_copy_has_no_multiple(made_of, base_folder, tmp_path):
    made = made_of("head and norm")
    base, out = base_folder(made), tmp_path / "out"
    with pytest.raises(AdapterError, match=r"`weights` multiplies .*trained whole"):
        lj.export_merged(base, made.adapter, out, names=made.names, weights=0.5)
    with pytest.raises(AdapterError, match="trained whole, and adapted by another"):
        lj.export_merged(base, [made.adapter] * 2, out, names=made.names)


# --- What does not fit ----------------------------------------------------------------


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


def test_dora_of_a_table_whose_head_gets_its_own(make, base_folder, tmp_path):
    shared = make("tied", rules={"embed.*": {"tie": "shared"}} | RULES, dora=True)
    head = make("tied", rules={"embed.*": {"tie": "head"}} | RULES)
    with pytest.raises(AdapterError, match="DoRA for the lookup and the head, and by"):
        lj.export_merged(
            base_folder(shared),
            [shared.adapter, head.adapter],
            tmp_path / "out",
            names=shared.names,
        )
    done = lj.export_merged(
        base_folder(shared), shared.adapter, tmp_path / "out", names=shared.names
    )
    assert not done.untied


def test_whole_kernels_of_more_axes_are_not_exported(make, base_folder, tmp_path):
    from lorax_jax.adapters import Role

    made = make("llama")
    path = "layers/0/self_attn/q_proj/kernel"
    role = Role(path, (), (0, 1, 2), kind="whole")
    adapter = lj.Adapter(
        {path: {"whole": jnp.ones((16, 4, 4))}}, {path: Fixed(role, {})}
    )
    with pytest.raises(AdapterError, match="how its axes make a matrix is not known"):
        lj.export_merged(base_folder(made), adapter, tmp_path / "out", names=made.names)


def test_factors_alone_make_an_adapter(made_of, peft_made, tmp_path):
    made = made_of("head and norm")

    def change(tensors):
        for key in [key for key in tensors if ".lora_" in key]:
            del tensors[key]

    folder = peft_made(made.save(tmp_path / "a"), tmp_path / "b", change)
    with pytest.raises(CheckpointError, match="No factors of .* fit the parameters"):
        lj.load_adapter(folder, made.params, names=made.names, strict=False)


@pytest.mark.parametrize(
    "case", ["dora", "dora gpt2", "both biases of B", "everything"]
)
def test_exported_in_sixteen_bits(make, base_folder, tmp_path, case):
    """One rounding, that of `merge`; blocks and gains included."""
    from lorax_jax import models

    extra = {"both biases of B": ("gpt2", RULES, {"bias": "all", "lora_bias": True})}
    family, rules, config = (CASES | extra)[case]
    made = make(family, rules=rules, dtype="bfloat16", **config)
    merged = lj.merge(made.params, made.adapter)
    wanted = models.to_hf(made.model, merged)
    lj.export_merged(
        base_folder(made), made.adapter, tmp_path / "out", names=made.names
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert [k for k in wanted if not np.array_equal(found[k], wanted[k])] == []


@pytest.mark.parametrize("case", ["dora", "dora table", "rows", "rows of a head"])
def test_exported_in_blocks(made_of, base_folder, tmp_path, monkeypatch, case):
    """Blocks share the gains of whole columns, and each has its own rows."""
    from lorax_jax import models
    from lorax_jax.checkpoint import _stream

    monkeypatch.setattr(_stream, "_WHOLE", 1)
    monkeypatch.setattr(_stream, "_FEWEST_ROWS", 6)
    made = made_of(case)
    lj.export_merged(
        base_folder(made), made.adapter, tmp_path / "out", names=made.names
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = models.to_hf(made.model, lj.merge(made.params, made.adapter))
    for key in wanted:  # so small blocks may differ in their last bits
        np.testing.assert_allclose(found[key], wanted[key], rtol=1e-6, atol=1e-7)
