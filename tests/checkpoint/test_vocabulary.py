"""Adapters of a vocabulary that grew: their files, their bases, their tokenizers."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from drawn import drawn
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from tiny_folder import write_tokenizer

import lorax_jax as lj
from lorax_jax import models
from lorax_jax._errors import CheckpointError

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
BEFORE, TO = 41, 46  # five new tokens
NEW = tuple(range(BEFORE, TO))
IDS = np.array([[1, 41, 2, 45, 40, 43]], np.int32)
FAMILIES = ["llama", "tied", "gpt2"]
RULES = {r"(layers|h)/./(self_attn/q_proj|attn/c_attn)/kernel": {}}


@dataclasses.dataclass(frozen=True)
class Grown:
    """A grown model with an adapter, as `conftest.Made`."""

    base: object
    model: object
    params: object
    growth: lj.Growth
    plan: object
    adapter: object

    def save(self, folder, **options):
        options = {
            "names": self.model.names,
            "params": self.params,
            "grown": self.growth,
        } | options
        lj.save_adapter(folder, self.adapter, plan=self.plan, **options)
        return folder

    def logits(self, adapter=None):
        bound = lj.bind(self.params, self.adapter if adapter is None else adapter)
        return np.asarray(lj.adapt(self.model.apply)(bound, IDS))


@pytest.fixture(scope="module")
def grown(make):
    """`grown(family, scan=..., rows=..., **how)`."""
    done = {}

    def build(family="llama", *, scan=False, dtype="float32", rows=True, **how):
        key = family, scan, dtype, rows, repr(how)
        if key not in done:
            base = make(family, scan=scan, dtype=dtype)
            bigger = models.grow(base.model, base.params, to=TO, **how)
            token_rows = bigger.growth.token_rows if rows else ()
            rules = RULES if rows else RULES | {".*(wte|embed_tokens)/embedding": {}}
            config = lj.LoraConfig(
                rules, rank=2, tie=None if rows else "shared", token_rows=token_rows
            )
            plan = lj.plan(config, bigger.params, bigger.model.apply, (IDS,))
            done[key] = Grown(base, *bigger, plan, drawn(plan, bigger.params))
        return done[key]

    return build


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("names", [True, False], ids=["peft", "paths"])
def test_five_tokens_cost_five_rows(grown, tmp_path, family, names):
    """The file is its header and the adapter's leaves; no table is in it."""
    one = grown(family, multiple=16)
    folder = one.save(tmp_path, **({} if names else {"names": None}))
    leaves = [x for group in one.adapter.train.values() for x in group.values()]
    size = sum(np.asarray(leaf).nbytes for leaf in leaves)
    with open(folder / TENSORS, "rb") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
    assert (folder / TENSORS).stat().st_size == header + size
    rows = [x for name, x in load_file(folder / TENSORS).items() if "delta" in name]
    assert [x.shape for x in rows] == [(5, 16)] * (2 if family == "llama" else 1)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [{}, {"multiple": 16}, {"init": "zeros", "multiple": 8}, {"init": "normal"}],
    ids=["mean", "padded", "zeros", "normal"],
)
def test_the_base_grows_alike(grown, base_folder, equal, tmp_path, family, how):
    one = grown(family, **how)
    folder = one.save(tmp_path / "a", base_model_name_or_path=base_folder(one.base))
    assert lj.checkpoint.read_growth(folder) == one.growth
    loaded = models.load_adapted(folder)
    assert loaded.model == one.model and not loaded.receipt.problems
    assert equal(loaded.params, one.params) and equal(loaded.adapter, one.adapter)
    scanned = models.load_adapted(folder, scan_layers=True)
    bound = lj.bind(scanned.params, scanned.adapter)
    logits = lj.adapt(scanned.model.apply)(bound, IDS)
    np.testing.assert_allclose(logits, one.logits(), atol=1e-5)


def test_a_base_that_has_grown_already(grown, base_folder, tmp_path):
    one = grown("tied")
    folder = one.save(tmp_path / "a")
    lj.export_merged(base_folder(one.base), folder, tmp_path / "grown", weights=None)
    bigger = tmp_path / "grown"
    tensors = load_file(bigger / "model.safetensors")
    tensors["model.embed_tokens.weight"] = np.asarray(
        one.params["embed_tokens"]["embedding"]
    )
    for name, value in models.to_hf(one.model, one.params).items():
        tensors[name] = value
    save_file(tensors, bigger / "model.safetensors", metadata={"format": "pt"})
    loaded = models.load_adapted(folder, base=bigger)
    assert loaded.model.config.vocab_size == TO and not loaded.receipt.problems
    lj.export_merged(bigger, folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = models.to_hf(one.model, lj.merge(one.params, one.adapter))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_parameters_that_did_not_grow(grown, base_folder, tmp_path):
    one = grown("llama")
    folder = one.save(tmp_path / "a")
    with pytest.raises(
        CheckpointError,
        match=r"grew from 41 tokens to 46, and 'embed_tokens/embedding' counts 41 here"
        r".*`params, _ = lj.grow\(params, lj.checkpoint.read_growth\('.*'\)\)`; `lj",
    ):
        lj.load_adapter(folder, one.base.params, names=one.model.names)
    again, _ = lj.grow(one.base.params, lj.checkpoint.read_growth(folder))
    _, receipt = lj.load_adapter(folder, again, names=one.model.names)
    assert not receipt.problems
    untold = one.save(tmp_path / "b", grown=None)
    assert lj.checkpoint.read_growth(untold) is None
    with pytest.raises(
        CheckpointError, match=r"trains row 45 of .*, which has 41 here.* tables, to="
    ):
        lj.load_adapter(untold, one.base.params, names=one.model.names)
    assert not lj.load_adapter(untold, again, names=one.model.names)[1].problems


def test_what_grown_may_be(grown, tmp_path):
    one = grown("llama")
    with pytest.raises(CheckpointError, match="`grown` is a GrownModel; a `Growth` is"):
        one.save(tmp_path, grown=models.grow(one.base.model, one.base.params, to=46))
    other = dataclasses.replace(one.growth, to=50)
    with pytest.raises(CheckpointError, match="grew to 50 tokens, and its shape is"):
        one.save(tmp_path, grown=other)


def ours(**change):
    def write(record):
        record["grown"] |= change

    return write


CHANGES = {
    "no object": (lambda r: r.update(grown=[1]), r"has `grown` = \[1\]"),
    "no tables": (ours(tables=[]), "has `grown`"),
    "tables": (ours(tables=3), "has `tables` = 3"),
    "shrinking": (ours(to=5), "has `grown`"),
    "endless": (ours(to=1 << 40), "has `grown`"),
    "a huge multiple": (ours(multiple=1 << 40), "has `grown`"),
    "init": (ours(init="ones"), "has `init` = 'ones'"),
    "axis": (
        ours(tables=[{"path": "embed_tokens/embedding", "axis": 2, "ndim": 2}]),
        "has `grown`",
    ),
    "turned": (
        ours(
            tables=[
                {"path": "b", "axis": 0, "ndim": 1, "name": "b", "turned": True},
            ]
        ),
        "has `grown`",
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_metadata(grown, tmp_path, case):
    change, message = CHANGES[case]
    folder = grown("llama").save(tmp_path)
    with safe_open(folder / TENSORS, framework="np") as file:
        record = json.loads(file.metadata()["lorax_jax"])
    assert record["version"] == 2
    change(record)
    metadata = {"lorax_jax": json.dumps(record)}
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata=metadata)
    with pytest.raises(CheckpointError, match=message):
        lj.checkpoint.read_growth(folder)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("form", ["peft", "paths", "memory", "theirs"])
def test_exports(grown, base_folder, peft_made, tmp_path, family, dtype, form):
    """The bytes of a merge in memory, whichever way the adapter is given."""
    one = grown(family, dtype=dtype, **({} if form == "theirs" else {"multiple": 16}))
    names = None if form in ("peft", "theirs") else one.model.names
    adapter, more = one.adapter, {"grown": one.growth}
    if form != "memory":
        options = {"names": None} if form == "paths" else {}
        adapter, more = one.save(tmp_path / "a", **options), {}
    if form == "theirs":
        adapter = peft_made(adapter, tmp_path / "theirs")
    base = base_folder(one.base, 3)
    lj.export_merged(base, adapter, tmp_path / "out", names=names, **more)
    found = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        found |= load_file(path)
    wanted = models.to_hf(one.model, lj.merge(one.params, one.adapter))
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].tobytes() == value.tobytes(), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == one.growth.after


def test_an_export_in_another_dtype(grown, base_folder, tmp_path):
    """Rows that nobody trained are converted as the rest is."""
    one = grown("llama", rows=False, multiple=16)
    folder = one.save(tmp_path / "a")
    lj.export_merged(base_folder(one.base), folder, tmp_path / "o", dtype="bfloat16")
    found = load_file(tmp_path / "o" / "model.safetensors")
    head = np.asarray(one.params["lm_head"]["kernel"]).T
    assert found["lm_head.weight"].shape == (48, 16)
    assert np.array_equal(found["lm_head.weight"], head.astype("bfloat16"))


def test_factors_on_a_table_that_grew(grown, base_folder, tmp_path):
    one = grown("tied", rows=False)
    folder = one.save(tmp_path / "a", base_model_name_or_path=base_folder(one.base))
    loaded = models.load_adapted(folder)
    assert not loaded.receipt.problems and loaded.model.config.vocab_size == TO
    lj.export_merged(base_folder(one.base), folder, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = models.to_hf(one.model, lj.merge(one.params, one.adapter))
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)


def test_a_stored_copy_of_a_tied_head_grows_too(grown, base_folder, tmp_path):
    one = grown("tied")
    base = shutil.copytree(base_folder(one.base), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})
    lj.export_merged(base, one.save(tmp_path / "a"), tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found["lm_head.weight"].shape == (TO, 16)
    both = (found["lm_head.weight"], found["model.embed_tokens.weight"])
    assert np.array_equal(*both)
    models.load(tmp_path / "out")


def test_exports_that_cannot_be(grown, base_folder, make, tmp_path):
    one, other = grown("llama"), grown("llama", multiple=16)
    base = base_folder(one.base)
    a, b = one.save(tmp_path / "a"), other.save(tmp_path / "b")
    with pytest.raises(CheckpointError, match="vocabularies that grew differently"):
        lj.export_merged(base, [a, b], tmp_path / "out")
    larger = models.grow(one.base.model, one.base.params, to=43)
    folder = tmp_path / "43"
    shutil.copytree(base, folder)
    tensors = models.to_hf(larger.model, larger.params)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="from 41 tokens to 46, and .* counts 43"):
        lj.export_merged(folder, a, tmp_path / "out")
    paths = one.save(tmp_path / "paths", names=None)
    with pytest.raises(
        CheckpointError, match="Which tensor of .* is not known. Give `n"
    ):
        lj.export_merged(base, paths, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_tokenizer_goes_along(grown, base_folder, tmp_path):
    """It is saved beside the adapter, and merged with it; the base keeps its own."""
    one = grown("tied")
    write_tokenizer(tmp_path / "tokenizer")
    tokenizer = models.tokenizer(tmp_path / "tokenizer")
    tokenizer.add_tokens(["<tool>", "</tool>"])
    folder = one.save(tmp_path / "a", tokenizer=tokenizer)
    assert {"tokenizer.json", "tokenizer_config.json", TENSORS, CONFIG} <= {
        path.name for path in folder.iterdir()
    }
    base = base_folder(one.base)
    lj.export_merged(base, folder, tmp_path / "out")
    for place in (folder, tmp_path / "out"):
        ids = models.tokenizer(place)("cat<tool>").input_ids
        assert ids == tokenizer("cat<tool>").input_ids
    assert (tmp_path / "out" / "LICENSE").read_text() == "MIT"
    # One that trains no rows leaves the base's tokenizer alone, unless told otherwise.
    plain = one.base.save(tmp_path / "plain", tokenizer=tokenizer)
    lj.export_merged(base, plain, tmp_path / "kept")
    assert (tmp_path / "kept" / "tokenizer.json").read_text() == "{}"
    lj.export_merged(base, plain, tmp_path / "told", tokenizer=plain)
    assert len(models.tokenizer(tmp_path / "told")) == len(tokenizer)


def test_a_tokenizer_that_fails_leaves_nothing(grown, tmp_path):
    class Broken:
        def save_pretrained(self, folder):
            raise RuntimeError("no space in the tokenizer's head")

    with pytest.raises(RuntimeError, match="no space"):
        grown("tied").save(tmp_path / "a", tokenizer=Broken())
    assert not (tmp_path / "a").exists() and not list(tmp_path.iterdir())
