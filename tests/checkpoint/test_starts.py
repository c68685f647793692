"""Starting and frozen factors in files."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import started
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax import checkpoint, initializers
from lorax_jax._errors import CheckpointError, LoraxError
from lorax_jax.checkpoint._record import FIELD

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(scope="module")
def make_started(make):
    """`make_started(family, scan=...)`: the same with starting factors."""

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


def started_with(plan, init):
    """The plan as if another initializer had been asked for."""
    slots = []
    for slot in plan.slots:
        sites = [s and dataclasses.replace(s, init=init) for s in slot.sites]
        slots.append(dataclasses.replace(slot, sites=tuple(sites)))
    return dataclasses.replace(plan, slots=tuple(slots))


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "mica"])
def test_the_initializers_name(make_started, make, tmp_path, init):
    made = make_started(frozen=("b",) if init == "mica" else ())
    plan = started_with(made.plan, init)
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


# --- Metadata that was changed --------------------------------------------------------


def change(folder, edit):
    """Writes the tensors again with metadata that `edit` changed in place."""
    with safe_open(folder / TENSORS, framework="np") as file:
        record = json.loads(file.metadata()[FIELD])
    edit(record)
    metadata = {FIELD: json.dumps(record)}
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata=metadata)


def site(**fields):
    return lambda record: record["sites"][0].update(fields)


CHANGES = {
    "apart": (site(start="apart"), "has starting or frozen factors = "),
    "no start": (site(start=None), "disagree about .*rank"),
    "another start": (site(start="both"), "has `start` = 'both'"),
    "a number": (site(start=3), "has `start` = 3"),
    "version": (lambda r: r.update(version=2), "has starting or frozen factors = "),
    "a rank": (site(rank=3), "disagree about .*rank"),
    "all frozen": (site(frozen=["a", "b"]), "has `frozen` = "),
    "frozen text": (site(frozen="b"), "has `frozen` = 'b'"),
    "frozen scale": (site(frozen=["scale"]), "has `frozen` = "),
    "a start of rows": (
        site(start="joined", kind="rows", rank=0, ids=[1]),
        "has starting factors in a site of the kind = 'rows'",
    ),
    "no init": (site(init=3), "has `init` = 3"),
    "endless init": (site(init="x" * 1000), "has `init` = 'xxx"),
    "options": (site(init={"class": "Start", "a": 1}), "has `init` = "),
    "a class of others": (site(init={"class": "dataclasses"}), "has `init` = "),
    "options of none": (site(init={"a": [1]}), "has `init` = "),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_metadata(make_started, tmp_path, case):
    edit, message = CHANGES[case]
    made = make_started()
    made.save(tmp_path)
    change(tmp_path, edit)
    with pytest.raises(CheckpointError, match=message):
        lj.load_adapter(tmp_path, made.params)


def test_apart_is_not_joined(make_started, tmp_path):
    made = make_started()
    made.save(tmp_path, names=None)
    change(tmp_path, site(start="joined"))
    with pytest.raises(CheckpointError, match="has starting or frozen factors = "):
        lj.load_adapter(tmp_path, made.params)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_value_is_an_error_or_read(make_started, tmp_path_factory, data):
    made = make_started(scan=data.draw(st.booleans()))
    folder = tmp_path_factory.mktemp("meta")
    made.save(folder, names=data.draw(st.sampled_from([None, made.names])))
    field = data.draw(st.sampled_from(["start", "frozen", "init", "rank", "ranks"]))
    values = st.none() | st.integers() | st.sampled_from(["joined", "apart", "b"])
    value = data.draw(values | st.lists(values, max_size=3))
    change(folder, site(**{field: value}))
    try:
        lj.load_adapter(folder, made.params, strict=data.draw(st.booleans()))
    except LoraxError:
        pass


@dataclasses.dataclass(frozen=True)
class Directions:
    """Options as an initializer may have them."""

    direction: str = "ArB2r"
    gamma: float = 16


def test_options_of_an_initializer(make_started, make, tmp_path, monkeypatch):
    monkeypatch.setattr(initializers, "Directions", Directions, raising=False)
    known = initializers.method("kaiming")
    monkeypatch.setattr(
        initializers, "method", lambda name: {Directions("ArBr", 9): known}[name]
    )
    made, init = make_started(), Directions("ArBr", 9)
    plan = started_with(made.plan, init)
    lj.save_adapter(tmp_path, made.adapter, plan=plan, names=made.names)
    _, receipt = lj.load_adapter(tmp_path, made.params)
    assert {site.init for site in receipt.plan} == {init}
    # Values that its class, or what it is registered for, does not take.
    for wrong in ({"class": "Directions", "gamma": 1}, {"class": "Directions", "x": 1}):
        change(tmp_path, site(init=wrong))
        with pytest.raises(CheckpointError, match="has `init` = "):
            lj.load_adapter(tmp_path, made.params)


def test_merged_exports_of_parts(make_started, base_folder, tmp_path):
    parts = {"q": {-1: (0, 16), "rank": 2}, "v": {-1: (32, 48), "rank": 3}}
    made = make_started(
        "gpt2", rules={".*/c_attn/kernel": {"parts": parts}}, alpha=None
    )
    base = base_folder(made)
    made.save(tmp_path / "a")
    merged = lj.models.to_hf(made.model, lj.merge(made.params, made.adapter))
    for i, names in enumerate((made.names, None)):
        out = tmp_path / f"out{i}"
        lj.export_merged(base, tmp_path / "a", out, names=names)
        for name, tensor in load_file(out / "model.safetensors").items():
            np.testing.assert_allclose(tensor, merged[name], rtol=0, atol=1e-6)
