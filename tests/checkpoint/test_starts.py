"""Starting and frozen factors in files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import started
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax import checkpoint
from lorax_jax._errors import CheckpointError

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def make_started(make):
    """`make_started(family, scan=...)`: the same with starting factors."""
    import dataclasses

    def build(family="llama", frozen=(), **options):
        made = make(family, **options)
        adapter = started(made.plan, made.params, frozen)
        return dataclasses.replace(made, adapter=adapter)

    return build


def reload(made, folder, **options):
    options = {"names": made.names} | options
    made.save(folder, **options)
    return lj.load_adapter(folder, made.params)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_our_own_files_are_exact(make_started, equal, tmp_path, family, scan):
    made = make_started(family, scan=scan)
    loaded, receipt = reload(made, tmp_path, names=None)
    assert equal(loaded, made.adapter)
    assert [s.rank for s in receipt.plan] == [s.rank for s in made.plan]
    # And so is what is saved of what was loaded.
    lj.save_adapter(tmp_path / "again", loaded, plan=receipt.plan)
    again = (tmp_path / "again" / TENSORS).read_bytes()
    assert again == (tmp_path / TENSORS).read_bytes()


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_files_hold_plain_lora(make_started, tmp_path, scan, rslora):
    made = make_started(scan=scan, rslora=rslora)
    loaded, receipt = reload(made, tmp_path)
    tensors, names = load_file(tmp_path / TENSORS), checkpoint.NameMap.of(made.names)
    fields = json.loads((tmp_path / CONFIG).read_text())
    ranks = {2 * site.rank for site in made.plan}
    assert {x.shape[0] for key, x in tensors.items() if "lora_A" in key} == ranks
    assert fields["r"] in ranks and fields["init_lora_weights"] is True
    plain = lj.to_lora(made.adapter)
    for slot in made.plan.slots:
        if not slot.layers:
            (site,) = slot.sites
            key = f"base_model.model.{names.module(site.path)}"
            a, b = (tensors[f"{key}.lora_{n}.weight"] for n in "AB")
            train = plain.train[slot.name]
            np.testing.assert_array_equal(a, np.asarray(train["a"]).T)
            np.testing.assert_array_equal(b, np.asarray(train["b"]).T)
    # A0 and B come back bit for bit, the others to a rounding.
    for name, site in made.adapter.fixed.items():
        held, found = (
            {**x.fixed[name], **x.train[name]} for x in (made.adapter, loaded)
        )
        assert held.keys() == found.keys()
        for n in ("a0", "b", "scale", "rank"):
            np.testing.assert_array_equal(found[n], held[n])
        for n, other in (("a", "a0"), ("b0", "b")):
            size = np.maximum(np.abs(held[n]), np.abs(held[other]))
            off = np.abs(np.asarray(found[n]) - np.asarray(held[n]))
            assert (off <= float(jnp.finfo(jnp.float32).eps) * size).all()
        assert site.role == loaded.fixed[name].role
    assert [(s.rank, s.scale) for s in receipt.plan] == [
        (s.rank, s.scale) for s in made.plan
    ]
    np.testing.assert_allclose(made.logits(loaded), made.logits(), rtol=0, atol=1e-5)
    assert np.abs(made.logits(loaded) - made.logits(plain)).max() <= 1e-5


def test_without_the_metadata_it_is_the_plain_one(make_started, peft_made, tmp_path):
    for rslora in (False, True):
        made = make_started(rslora=rslora)
        folder = peft_made(made.save(tmp_path / "ours"), tmp_path / "theirs")
        loaded, receipt = lj.load_adapter(folder, made.params, names=made.names)
        plain = lj.to_lora(made.adapter)
        plan = lj.planning.fitted(made.plan, plain)
        assert [(s.rank, np.float32(s.scale)) for s in receipt.plan] == [
            (s.rank, np.float32(s.scale)) for s in plan
        ]
        for name, train in plain.train.items():
            for n, x in train.items():
                np.testing.assert_array_equal(loaded.train[name][n], x)
                assert n not in loaded.fixed[name]


def test_stacked_and_unrolled_models_write_one_file(make_started, tmp_path):
    for names in (None, "theirs"):
        files = []
        for scan in (False, True):
            made = make_started(scan=scan)
            folder = tmp_path / f"{names}{scan}"
            made.save(folder, names=names and made.names)
            files.append((folder / TENSORS).read_bytes())
        assert files[0] == files[1]


def test_a_start_that_nothing_moved_from(make_started, tmp_path):
    """The adapted function is the base's, bit for bit, before and after."""
    made = make_started()
    train = {
        name: {"a": site["a0"], "b": site["b0"]}
        for name, site in made.adapter.fixed.items()
    }
    still = made.adapter._replace(train=train)
    lj.save_adapter(tmp_path, still, plan=made.plan, names=made.names)
    loaded, _ = lj.load_adapter(tmp_path, made.params)
    base = np.asarray(jax.jit(made.model.apply)(made.params, IDS))
    np.testing.assert_array_equal(made.logits(loaded), base)


IDS = np.random.default_rng(0).integers(0, 41, (2, 7)).astype(np.int32)


def test_sixteen_bits(make_started, equal, tmp_path):
    made = make_started()
    half = jax.tree.map(
        lambda x: x.astype(jnp.bfloat16) if x.ndim > 1 else x, made.adapter
    )
    for names in (None, made.names):
        lj.save_adapter(tmp_path, half, plan=made.plan, names=names)
        loaded, _ = lj.load_adapter(tmp_path, made.params)
        assert loaded.train[next(iter(loaded.train))]["a"].dtype == jnp.bfloat16
        assert names is not None or equal(loaded, half)


def test_layers_without_a_start(make_started, make, tmp_path):
    """A layer whose starting factors are zero is written as plain LoRA."""
    made = make_started(scan=True)
    fixed = {}
    for name, site in made.adapter.fixed.items():
        zero = {n: site[n].at[1].set(0) for n in ("a0", "b0")}
        fixed[name] = type(site)(site.role, {**site, **zero})
    lj.save_adapter(
        tmp_path, made.adapter._replace(fixed=fixed), plan=made.plan, names=made.names
    )
    tensors, names = load_file(tmp_path / TENSORS), checkpoint.NameMap.of(made.names)
    for site in made.plan:
        shape = tensors[
            f"base_model.model.{names.module(site.path)}.lora_A.weight"
        ].shape
        assert shape[0] == (site.rank if "/1/" in site.path else 2 * site.rank)
    stacked, _ = lj.load_adapter(tmp_path, made.params)
    other = make("llama")
    unrolled, _ = lj.load_adapter(tmp_path, other.params)
    assert "a0" in unrolled.fixed["layers/0/mlp/up_proj/kernel"]
    assert "a0" not in unrolled.fixed["layers/1/mlp/up_proj/kernel"]
    np.testing.assert_allclose(
        made.logits(stacked), other.logits(unrolled), rtol=0, atol=1e-5
    )


def test_dora_and_bias_of_b(make_started, equal, tmp_path):
    for config in ({"dora": True}, {"lora_bias": True}):
        made = make_started(**config)
        loaded, _ = reload(made, tmp_path, names=None)
        assert equal(loaded, made.adapter)
        loaded, _ = reload(made, tmp_path)
        np.testing.assert_allclose(made.logits(loaded), made.logits(), atol=1e-5)


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_parts_of_a_module(make_started, equal, tmp_path, scan):
    parts = {"q": {-1: (0, 16), "rank": 2}, "v": {-1: (32, 48), "rank": 3}}
    rules = {".*/c_attn/kernel": {"parts": parts}, ".*/c_fc/kernel": {}}
    made = make_started("gpt2", scan=scan, rules=rules, alpha=None)
    loaded, _ = reload(made, tmp_path, names=None)
    assert equal(loaded, made.adapter)
    loaded, _ = reload(made, tmp_path)
    assert all("a0" in site for site in loaded.fixed.values())
    np.testing.assert_allclose(made.logits(loaded), made.logits(), atol=1e-5)
    shape = load_file(tmp_path / TENSORS)[
        "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"
    ].shape
    assert shape[0] == 2 * (2 + 3)


@pytest.mark.parametrize("tie", ["shared", "lookup", "head"])
def test_tied_tables(make_started, table_rule, tmp_path, tie):
    rules = table_rule("tied", tie=tie, rank=3) | {".*/q_proj/kernel": {}}
    made = make_started("tied", rules=rules)
    loaded, _ = reload(made, tmp_path)
    assert all("a0" in site for site in loaded.fixed.values())
    np.testing.assert_allclose(made.logits(loaded), made.logits(), atol=1e-5)


def test_frozen_factors_stay_frozen(make_started, equal, tmp_path):
    for frozen in ("a", "b"):
        made = make_started(frozen=(frozen,))
        for names in (None, made.names):
            loaded, _ = reload(made, tmp_path, names=names)
            assert equal(loaded, made.adapter)
            assert all(frozen in site for site in loaded.fixed.values())
        fields = json.loads((tmp_path / CONFIG).read_text())
        assert fields["init_lora_weights"] is True  # not said to be MiCA


def test_layers_of_a_stack_freeze_alike(make_started, tmp_path):
    made = make_started(frozen=("b",))
    name = "layers/1/mlp/up_proj/kernel"
    train, site = dict(made.adapter.train), made.adapter.fixed[name]
    train[name] = train[name] | {"b": site["b"]}
    rest = {n: x for n, x in site.items() if n != "b"}
    fixed = made.adapter.fixed | {name: type(site)(site.role, rest)}
    lj.save_adapter(tmp_path, lj.Adapter(train, fixed), plan=made.plan)
    assert "b" in lj.load_adapter(tmp_path, made.params)[0].train[name]
    stacked = make_started(scan=True)
    with pytest.raises(CheckpointError, match="freezes factors of some layers"):
        lj.load_adapter(tmp_path, stacked.params)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "mica"])
def test_the_initializers_name(make_started, make, tmp_path, init):
    import dataclasses

    made = make_started(frozen=("b",) if init == "mica" else ())
    slots = []
    for slot in made.plan.slots:
        sites = [s and dataclasses.replace(s, init=init) for s in slot.sites]
        slots.append(dataclasses.replace(slot, sites=tuple(sites)))
    plan = dataclasses.replace(made.plan, slots=tuple(slots))
    lj.save_adapter(tmp_path, made.adapter, plan=plan, names=made.names)
    for scan in (False, True):
        _, receipt = lj.load_adapter(tmp_path, make(scan=scan).params)
        assert {site.init for site in receipt.plan} == {init}
        assert receipt.plan.config.init == init
    fields = json.loads((tmp_path / CONFIG).read_text())
    # PEFT freezes B where it reads "mica", and draws nothing anew.
    assert fields["init_lora_weights"] == (init if init == "mica" else True)


def test_a_given_plan(make_started, tmp_path):
    made = make_started(scan=True)
    made.save(tmp_path)
    loaded, receipt = lj.load_adapter(tmp_path, made.params, plan=made.plan)
    assert receipt.plan is made.plan and not receipt.problems
    np.testing.assert_allclose(made.logits(loaded), made.logits(), atol=1e-5)


@pytest.mark.parametrize("form", ["adapter", "ours", "theirs", "no names"])
def test_merged_exports(make_started, base_folder, tmp_path, form):
    made = make_started()
    base = base_folder(made)
    folder = made.save(tmp_path / "a", names=None if form == "ours" else made.names)
    adapter = made.adapter if form == "adapter" else folder
    names = None if form == "no names" else made.names
    lj.export_merged(base, adapter, tmp_path / "out", names=names)
    exported = load_file(tmp_path / "out" / "model.safetensors")
    if form != "adapter":
        loaded, _ = lj.load_adapter(folder, made.params)
    merged = lj.merge(made.params, made.adapter if form == "adapter" else loaded)
    wanted = lj.models.to_hf(made.model, merged)
    for name, tensor in exported.items():
        np.testing.assert_allclose(tensor, wanted[name], rtol=0, atol=1e-6)


def test_fingerprints_and_vocabularies_know_them(make_started, tmp_path):
    made = make_started()
    made.save(tmp_path, params=made.params)
    lj.load_adapter(tmp_path, made.params)
    other = jax.tree.map(lambda x: 1.5 * x, made.params)
    with pytest.raises(CheckpointError, match="not the weight that the adapter was"):
        lj.load_adapter(tmp_path, other)
    assert checkpoint.read_growth(tmp_path) is None


def test_old_releases_are_told(make_started, make, tmp_path):
    from lorax_jax.checkpoint._safetensors import Reader

    for made, version in ((make_started(), 3), (make(), 1)):
        made.save(tmp_path)
        with Reader(tmp_path / TENSORS, header=1 << 20, tensors=1000) as file:
            assert json.loads(file.metadata["lorax_jax"])["version"] == version


def test_counts(make_started, make):
    plain, begun, frozen = make(), make_started(), make_started(frozen=("b",))
    counts = [lj.count(made.params, made.adapter) for made in (plain, begun, frozen)]
    assert counts[0] == counts[1]
    assert counts[2].total == counts[0].total
    held = sum(x["b"].size for x in plain.adapter.train.values())
    assert counts[2].trainable == counts[0].trainable - held
