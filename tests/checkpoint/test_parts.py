"""Files of adapters on parts of a fused leaf, and of declared batch axes."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax import models
from lorax_jax._errors import AdapterError, CheckpointError, ConfigError

# GPT-2's kernel (16, 48) holds the query, the key and the value projections.
Q, V = {-1: (0, 16)}, {-1: (32, 48)}
C_ATTN = r"h/./attn/c_attn/kernel"
TENSORS = "adapter_model.safetensors"


@pytest.fixture(params=[False, True], ids=["unrolled", "scanned"])
def scan(request):
    return request.param


def rules(**v):
    """The queries and values of both layers, at ranks of their own, and an MLP."""
    parts = {"q": Q, "v": {**V, **v}}
    return {C_ATTN: {"rank": 2, "alpha": 4, "parts": parts}, r"h/1/mlp/c_fc/kernel": {}}


ALIKE = rules(rank=3, alpha=6)  # one scale, 2
UNLIKE = rules(rank=3)


def flat_grouped():
    """A model of one interleaved kernel, a declared batch axis, and their plan."""
    params = {
        "qkv": jax.random.normal(jax.random.key(0), (8, 2 * 5 * 4)),
        "o": jax.random.normal(jax.random.key(1), (2, 12, 8)),
    }

    def fn(params, x):
        y = (x @ params["qkv"]).reshape(-1, 2, 5, 4)
        q = jnp.tanh(y[:, :, :3]) * y[:, :, 3:4] + y[:, :, 4:]
        return jnp.einsum("tnh,nhd->td", q.reshape(-1, 2, 12), params["o"])

    def part(*middle):
        return {1: {"split": (2, 5, 4), "take": (None, middle, None)}}

    parts = {"q": part(0, 3), "v": part(4, 5) | {"rank": 3}}
    rules = {"qkv": {"parts": parts}, "o": {"batch": 0, "dropout": 0.25}}
    plan = lj.plan(
        lj.LoraConfig(rules, rank=2, init=False), params, fn, (jnp.ones((6, 8)),)
    )
    return params, fn, plan, lj.init(plan, params, key=jax.random.key(2))


def test_round_trip_without_names(tmp_path, equal):
    params, fn, plan, adapter = flat_grouped()
    lj.save_adapter(tmp_path, adapter, plan=plan, params=params)
    keys = set(load_file(tmp_path / TENSORS))
    assert "qkv@q.lora_A.weight" in keys and "o.lora_B.weight" in keys
    loaded, receipt = lj.load_adapter(tmp_path, params)
    assert equal(loaded, adapter)
    assert str(receipt).startswith("3 of 3 sites loaded from 6 tensors into 2")
    # What it says of itself plans the same adapter again.
    again = lj.plan(receipt.plan.config, params, fn, (jnp.ones((6, 8)),))
    assert [s.role for s in again.slots] == [s.role for s in receipt.plan.slots]
    assert {s.name: s.rank for s in again} == {s.name: s.rank for s in plan}
    _, receipt = lj.load_adapter(tmp_path, params, plan=plan)
    assert receipt.plan is plan


def test_stacked_and_unrolled_write_one_file(make, tmp_path, equal):
    one, stack = (make("gpt2", rules=UNLIKE, scan=scan) for scan in (False, True))
    one.save(tmp_path / "one", names=None, params=one.params)
    loaded, receipt = lj.load_adapter(tmp_path / "one", stack.params)
    assert {slot.shape for slot in receipt.plan.slots} == {(2, 16, 48), (2, 16, 64)}
    lj.save_adapter(tmp_path / "two", loaded, plan=receipt.plan, params=stack.params)
    names = [TENSORS, "adapter_config.json"]
    first, second = (
        [(tmp_path / f / n).read_bytes() for n in names] for f in ("one", "two")
    )
    assert first == second
    again, _ = lj.load_adapter(tmp_path / "two", one.params)
    assert equal(again, one.adapter)


def test_peft_sees_one_lora_of_the_module(make, scan, tmp_path, equal, peft_made):
    made = make("gpt2", rules=ALIKE, scan=scan)
    folder = made.save(tmp_path / "parts", params=made.params)
    tensors = load_file(folder / TENSORS)
    down, up = (
        tensors[f"base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight"]
        for x in "AB"
    )
    assert down.shape == (5, 16) and up.shape == (48, 5)
    assert not up[16:, :2].any() and not up[:32, 2:].any() and up[32:, 2:].all()
    fields = json.loads((folder / "adapter_config.json").read_text())
    found = lj.LoraConfig.from_peft(fields, made.names)
    assert {
        (rule.rank or found.rank, rule.alpha or found.alpha) for rule in found.rules
    } == {
        (5, 10),
        (4, 7),
    }
    # Our metadata gives the parts back.
    loaded, receipt = lj.load_adapter(folder, made.params)
    assert equal(loaded, made.adapter)
    assert receipt.tensors == 6 and receipt.sites == 5
    # Without it the file is what PEFT makes of it: a LoRA of the whole leaf.
    plain, _ = lj.load_adapter(
        peft_made(folder, tmp_path / "peft"), made.params, names=made.names
    )
    assert not any("@" in name for name in plain.train)
    for x, y in zip(
        jax.tree.leaves(lj.merge(made.params, plain)),
        jax.tree.leaves(lj.merge(made.params, made.adapter)),
        strict=True,
    ):
        np.testing.assert_allclose(x, y, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_export_is_the_merge(make, base_folder, tmp_path, dtype):
    made = make("gpt2", rules=UNLIKE, dtype=dtype)
    base = base_folder(made)
    wanted = models.to_hf(made.model, lj.merge(made.params, made.adapter))
    paths = made.save(tmp_path / "paths", names=None)
    for i, adapter in enumerate((made.adapter, paths)):
        out = tmp_path / str(i)
        lj.export_merged(base, adapter, out, names=made.names)
        found = load_file(out / "model.safetensors")
        assert {k: v.tobytes() for k, v in found.items()} == {
            k: v.tobytes() for k, v in wanted.items()
        }


def test_export_of_a_folder_that_peft_sees(make, scan, base_folder, tmp_path):
    made = make("gpt2", rules=ALIKE, scan=scan)
    folder = made.save(tmp_path / "parts")
    plain = make("gpt2", rules=ALIKE)
    wanted = models.to_hf(made.model, lj.merge(made.params, made.adapter))
    for names in (None, made.names):
        out = tmp_path / f"out-{names is None}"
        lj.export_merged(base_folder(plain), folder, out, names=names)
        found = load_file(out / "model.safetensors")
        for name in wanted:
            np.testing.assert_allclose(found[name], wanted[name], atol=1e-6)


def test_what_peft_has_no_place_for(make, tmp_path, base_folder):
    made = make("gpt2", rules=UNLIKE)
    with pytest.raises(CheckpointError, match=r"different scales \(q 2, v 1.333"):
        made.save(tmp_path / "a")
    dora = make("gpt2", rules=ALIKE, dora=True)
    with pytest.raises(CheckpointError, match="a part of a leaf with magnitudes"):
        dora.save(tmp_path / "b")
    with pytest.raises(AdapterError, match="magnitudes for some of the leaf's outputs"):
        lj.export_merged(
            base_folder(dora), dora.adapter, tmp_path / "c", names=dora.names
        )
    bias = make("gpt2", rules=ALIKE, lora_bias=True)
    with pytest.raises(CheckpointError, match="a part of a leaf with a bias of B"):
        bias.save(tmp_path / "d")
    assert not list(tmp_path.iterdir())
    params, _, plan, adapter = flat_grouped()
    names = [("qkv", "qkv.weight", "linear"), ("o", "o.weight", "linear")]
    with pytest.raises(CheckpointError, match="indices of a declared batch axis"):
        lj.save_adapter(tmp_path / "e", adapter, plan=plan, names=names)


@pytest.mark.parametrize("kind", [{"dora": True}, {"lora_bias": True}])
def test_other_kinds_round_trip(make, scan, tmp_path, equal, kind):
    made = make("gpt2", rules=UNLIKE, scan=scan, **kind)
    made.save(tmp_path, names=None, params=made.params)
    loaded, receipt = lj.load_adapter(tmp_path, made.params)
    assert equal(loaded.train, made.adapter.train)
    assert [s.role for s in receipt.plan.slots] == [s.role for s in made.plan.slots]


def test_peft_has_no_word_for_them(make):
    names = make("gpt2", rules=ALIKE).names
    with pytest.raises(ConfigError, match=r"has `parts`, for which PEFT's"):
        lj.LoraConfig(ALIKE).to_peft(names)
    with pytest.raises(ConfigError, match=r"has `batch`, for which PEFT's"):
        lj.LoraConfig({C_ATTN: {"batch": 0}}).to_peft(names)


def edited(folder, change):
    """The folder with its metadata changed."""
    from safetensors import safe_open

    with safe_open(folder / TENSORS, "np") as file:
        metadata = json.loads(file.metadata()["lorax_jax"])
    tensors = load_file(folder / TENSORS)
    change(metadata, tensors)
    header = {"format": "pt", "lorax_jax": json.dumps(metadata)}
    save_file(tensors, folder / TENSORS, metadata=header)
    return folder


def part_of(metadata, name):
    return next(s for s in metadata["sites"] if s["part"].get("name") == name)


def test_the_version_tells_older_releases(make, tmp_path):
    def check(metadata, tensors):
        assert metadata["version"] == 2
        assert part_of(metadata, "q")["part"]["view"] == [None, [[48, 0, 16, 1]]]

    edited(make("gpt2", rules=ALIKE).save(tmp_path), check)


@pytest.mark.parametrize(
    "change, match",
    [
        (lambda q: q["part"]["view"].pop(), "shape and axes"),
        (lambda q: q["part"]["view"][1][0].pop(), "`view`"),
        (lambda q: q["part"]["view"][1][0].__setitem__(1, 9), "shape and axes"),
        (lambda q: q["part"]["view"].__setitem__(1, []), "`view`"),
        (lambda q: q["part"]["view"][1][0].__setitem__(2, True), "`view`"),
        (lambda q: q["part"].pop("name"), "shape and axes"),
        (lambda q: q.__setitem__("ranks", [4, 5]), "`ranks`"),
        (lambda q: q.__setitem__("ranks", [1, 5]), "ranks of a module to none"),
        (lambda q: q.__setitem__("ranks", [0, 2, 5]), "`ranks`"),
        (lambda q: q["part"]["view"][1][0].__setitem__(0, 50), "are viewed as"),
    ],
)
def test_metadata_that_was_changed(make, tmp_path, change, match):
    made = make("gpt2", rules=ALIKE)
    folder = made.save(tmp_path)
    edited(folder, lambda metadata, tensors: change(part_of(metadata, "q")))
    with pytest.raises(CheckpointError, match=match):
        lj.load_adapter(folder, made.params)


def test_values_outside_of_the_parts_are_refused(make, tmp_path):
    made = make("gpt2", rules=ALIKE)

    def spill(metadata, tensors):
        key = "base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"
        tensors[key][20, 0] = 1.0  # a key's, which nobody adapts

    folder = edited(made.save(tmp_path), spill)
    with pytest.raises(CheckpointError, match=r"c_attn holds values outside of its pa"):
        lj.load_adapter(folder, made.params)
