"""Folders that nobody should have to trust."""

import json
import pickle
import time
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax._errors import CheckpointError, ConfigError, LoraxError
from lorax_jax.checkpoint._record import FIELD

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Bomb:
    """What a pickle can do when it is read."""

    def __reduce__(self):
        return (pytest.fail, ("the pickle was executed",))


def load(folder, made, **options):
    """Loads within 16 MiB and twenty seconds."""
    start = time.perf_counter()
    tracemalloc.start()
    try:
        return lj.load_adapter(folder, made.params, names=made.names, **options)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 16 << 20
        assert time.perf_counter() - start < 40


@pytest.fixture
def folder(make, peft_made, tmp_path):
    """An adapter as PEFT writes it."""
    return peft_made(make("llama").save(tmp_path / "a"), tmp_path / "b")


def reconfigure(folder, text=None, **fields):
    found = json.loads((folder / CONFIG).read_text()) | fields
    (folder / CONFIG).write_text(json.dumps(found) if text is None else text)


def test_a_pickle_is_never_opened(make, folder):
    (folder / TENSORS).unlink()
    (folder / "adapter_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(
        CheckpointError, match="a pickle, which runs code when it is read"
    ):
        load(folder, make("llama"))


def test_a_pickle_under_another_name(make, folder):
    (folder / TENSORS).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        load(folder, make("llama"))


def test_where_there_is_no_adapter(make, tmp_path):
    made = make("llama")
    with pytest.raises(CheckpointError, match="nowhere is no folder"):
        load(tmp_path / "nowhere", made)
    (tmp_path / "x").write_text("")
    with pytest.raises(
        CheckpointError, match=r"no adapter_model.safetensors; it holds \['x'\]"
    ):
        load(tmp_path, made)
    made.save(tmp_path / "default")
    with pytest.raises(CheckpointError, match="Did you mean .*default"):
        load(tmp_path, made)


REFUSED = {
    "alora_invocation_tokens": [1, 2],
    "arrow_config": {"top_k": 3},
    "kasa_config": {"beta": 1e-4},
    "megatron_config": {"a": 1},
    "monteclora_config": {"num_samples": 2},
    "use_bdlora": {"nblocks": 2},
    "use_qalora": True,
    "velora_config": {"num_groups": 4},
    "some_new_field": 1,
}


@pytest.mark.parametrize("field", REFUSED)
def test_what_is_not_known_is_refused_by_name(make, folder, field):
    reconfigure(folder, **{field: REFUSED[field]})
    with pytest.raises(CheckpointError, match=field):
        load(folder, make("llama"))
    with pytest.raises(ConfigError, match=field):
        lj.LoraConfig.from_peft(folder, make("llama").names)


@pytest.mark.parametrize(
    "ranges, match",
    [
        ([[0, 2], [1, 2]], "the parameters have no layers that are repeated so"),
        ([[0, 10**15]], "names more than 16,384 layers"),
        ([[2, 1]], "a range without layers"),
        (True, "are meant"),
    ],
)
def test_layers_that_are_not_so(make, folder, ranges, match):
    reconfigure(folder, layer_replication=ranges)
    with pytest.raises(CheckpointError, match=f"(?s)layer_replication.*{match}"):
        load(folder, make("llama"))


@pytest.mark.parametrize("init", ["pissa_niter_4", "corda", "lora_ga"])
def test_residuals_of_the_base_are_refused(make, folder, init):
    """Those whose start is not a function of the weight."""
    reconfigure(folder, init_lora_weights=init)
    with pytest.raises(CheckpointError, match="belong to a residual of the base"):
        load(folder, make("llama"))


@pytest.mark.parametrize(
    ("init", "match"),
    [
        ("loftq", "replaces the base by a quantized one"),
        ("PISSA", "which PEFT does not know"),
        ("pissa_niter_x", "which PEFT does not know"),
        (["pissa"], "which PEFT does not know"),
        (3, "which PEFT does not know"),
    ],
)
def test_starts_that_are_none(make, folder, init, match):
    reconfigure(folder, init_lora_weights=init)
    with pytest.raises(CheckpointError, match=match):
        load(folder, make("llama"))
    with pytest.raises(ConfigError, match=match):
        lj.LoraConfig.from_peft(folder, make("llama").names)


@pytest.mark.parametrize("init", ["pissa", "olora", "lora_ga", "mica"])
def test_a_start_that_was_edited(make, tmp_path, init):
    """Our tensors are for the base itself, and B of this adapter is trained."""
    made = make("llama")
    folder = made.save(tmp_path / "a")
    reconfigure(folder, init_lora_weights=init)
    with pytest.raises(CheckpointError, match="disagree about init_lora_weights"):
        load(folder, made)


@pytest.mark.parametrize("init", [True, False, None, "gaussian", "eva", "orthogonal"])
def test_other_starts_are_plain_lora(make, folder, init):
    reconfigure(folder, init_lora_weights=init)
    assert not load(folder, make("llama"))[1].problems


def test_every_problem_is_named_at_once(make, folder):
    reconfigure(folder, use_qalora=True, use_bdlora=True, megatron_config={"a": 1})
    with pytest.raises(
        CheckpointError, match=r"(?s)megatron_config.*use_bdlora.*use_qalora"
    ):
        load(folder, make("llama"))


CONFIGS = {
    "no JSON": ("{", "is not JSON"),
    "deep": ('{"a": ' + "[" * 100_000, "(nests too deeply|is not JSON)"),
    "twice": ('{"peft_type": "LORA", "r": 4, "r": 8}', "repeats the key 'r'"),
    "list": ("[]", "holds a list, not a JSON object"),
    "NaN": ('{"peft_type": "LORA", "lora_alpha": NaN}', "holds NaN"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_hostile_configurations(make, folder, case):
    text, message = CONFIGS[case]
    reconfigure(folder, text)
    with pytest.raises(CheckpointError, match=message):
        load(folder, make("llama"))


FIELDS = {
    "peft_type": (["IA3", None, 3], "`peft_type` = .*only 'LORA' is read"),
    "r": ([0, -1, 10**9, 10**40, 1.5, "8", True, None], "a rank is an integer from 1"),
    "lora_alpha": (["8", True, [], 10**400, None], "no finite number"),
    "lora_dropout": ([1.0, -0.1, 2], "a probability"),
    "use_rslora": ([1, "yes"], "not true or false"),
    "rank_pattern": ([[1], "x", {"q_proj": 0}, {"q_proj": 10**9}], "rank|no object"),
    "alpha_pattern": ([{"q_proj": "x"}, {"q_proj": None}], "no finite number"),
    "target_modules": ([3, [1], {"a": 1}], "a regex or a list of names is meant"),
    "target_parameters": (["w", [1], {"a": 1}, [""], 3], "a list of names of param"),
    "layers_to_transform": (["1", [1.5]], "indices and names are meant"),
    "layers_pattern": ([[3]], "indices and names are meant"),
}


@pytest.mark.parametrize("field", FIELDS)
def test_fields_of_the_wrong_kind(make, folder, field):
    values, message = FIELDS[field]
    before = (folder / CONFIG).read_text()
    for value in values:
        (folder / CONFIG).write_text(before)
        reconfigure(folder, **{field: value})
        if field == "target_modules" and isinstance(value, dict):
            continue  # its keys are names
        with pytest.raises(CheckpointError, match=message):
            load(folder, make("llama"))


PATTERNS = {
    "(a+)+$": "a repeat inside a repeat",
    "(.*)*x": "a repeat inside a repeat",
    "(a|a)*x": "a choice inside a repeat|not an acceptable regex|matches",
    "(x|y.)+z": "a choice inside a repeat",
    ".*.*.*.*.*.*.*.*.*z": "repeats could take forever",
    r"(q)\1": "it refers back to a group",
    "x" * 3000: "longer than 2,000 characters",
    "(": "not an acceptable regex",
    "(" * 900 + ")" * 900: "not an acceptable regex|too",
    "x{100000}": "a repeat inside a repeat|not an acceptable regex",
}


@pytest.mark.parametrize("pattern", PATTERNS, ids=range(len(PATTERNS)))
def test_patterns_that_never_end(make, folder, pattern):
    reconfigure(folder, rank_pattern={pattern: 3})
    try:
        load(folder, make("llama"))
    except CheckpointError:
        pass
    else:
        assert pattern == "(a|a)*x", "not refused"


def test_very_many_patterns(make, folder):
    reconfigure(folder, rank_pattern={f"m{i}": 3 for i in range(20_000)})
    with pytest.raises(CheckpointError, match="has 20,001 patterns; more than 10,000"):
        load(folder, make("llama"))


def test_patterns_that_take_their_time(make, folder, monkeypatch):
    from lorax_jax._peft import _patterns

    monkeypatch.setattr(_patterns.Patterns, "LIMIT", 0.02)
    slow = {f".*.*.*.*z{i}": 3 for i in range(200)}
    reconfigure(folder, rank_pattern=slow)
    with pytest.raises(CheckpointError, match="take longer than 0.02 s to match"):
        load(folder, make("llama"))


def test_no_path_of_the_configuration_is_followed(make, folder, tmp_path):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "config.json").write_text("boom")
    reconfigure(
        folder,
        base_model_name_or_path="../secret",
        revision="../../secret",
        auto_mapping={"base_model_class": "os.system", "parent_library": "../secret"},
    )
    assert not load(folder, make("llama"))[1].problems


def test_names_that_are_paths(make, folder):
    tensors = load_file(folder / TENSORS)
    one = next(iter(tensors.values()))
    for name in (
        "../../x.lora_A.weight",
        "/etc/passwd",
        "a\0b",
        ".lora_A.weight",
        "x" * 5000,
    ):
        save_file(tensors | {name: one}, folder / TENSORS)
        with pytest.raises(CheckpointError, match="unexpected"):
            load(folder, make("llama"))
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", CONFIG, TENSORS]


def test_a_rank_that_no_weight_needs(make, folder):
    """One layer of a stack would pad all others."""
    made = make("llama", scan=True)
    tensors = load_file(folder / TENSORS)
    stem = "base_model.model.model.layers.1.mlp.up_proj.lora_"
    tensors[f"{stem}A.weight"] = np.zeros((5000, 16), np.float32)
    tensors[f"{stem}B.weight"] = np.zeros((24, 5000), np.float32)
    save_file(tensors, folder / TENSORS)
    pattern = {"layers.0.self_attn.q_proj": 2, "layers.1.mlp.up_proj": 5000}
    reconfigure(folder, rank_pattern=pattern)
    with pytest.raises(
        CheckpointError, match="has rank 5,000, and no weight of its shape"
    ):
        load(folder, made, strict=False)


def test_a_header_full_of_keys(make, folder):
    empty = np.zeros((0, 1), np.float32)
    tensors = {f"base_model.model.m{i}.lora_A.weight": empty for i in range(3000)}
    save_file(load_file(folder / TENSORS) | tensors, folder / TENSORS)
    with pytest.raises(CheckpointError, match=r"unexpected .*\n(.*\n)+.*and 2980 more"):
        load(folder, make("llama"))


RECORDS = {
    "no JSON": ("{", "is not JSON"),
    "no object": ("[]", "has `version` = None"),
    "version": ('{"version": 4}', "has metadata of version 4"),
    "keys": ('{"version": 1, "keys": "x", "sites": []}', "has `keys` = 'x'"),
    "layers": (
        '{"version": 2, "keys": "peft", "sites": [], "rslora": false, '
        '"layer_replication": [[0, 99999]]}',
        r"has `layer_replication` = \[\[0, 99999\]\]",
    ),
    "deep": ("[" * 100_000, "(nests too deeply|is not JSON)"),
}


@pytest.mark.parametrize("case", RECORDS)
def test_hostile_metadata(make, folder, case):
    text, message = RECORDS[case]
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={FIELD: text})
    with pytest.raises(CheckpointError, match=message):
        load(folder, make("llama"))


def sites(change):
    """Metadata of which one site's fields are changed."""

    def write(record):
        for name, value in change.items():
            place = record["sites"][0]
            if name.startswith("part."):
                place, name = place["part"], name[5:]
            place[name] = value

    return write


def twice(record):
    record["sites"].append(record["sites"][0])


CHANGES = {
    "rank 0": (sites({"rank": 0}), "has rank, scale and dropout"),
    "rank 1e9": (sites({"rank": 10**9}), "has rank, scale and dropout"),
    "rank true": (sites({"rank": True}), "has `rank` = True"),
    "rank 2.5": (sites({"rank": 2.5}), "has `rank` = 2.5"),
    "scale": (sites({"scale": 1e38}), "has `scale`"),
    "scale text": (sites({"scale": "1"}), "has `scale`"),
    "dropout": (sites({"dropout": 1.0}), "has rank, scale and dropout"),
    "use": (sites({"use": "both"}), "has `use` = 'both'"),
    "path": (sites({"path": 3}), "has `path` = 3"),
    "unknown path": (sites({"path": "nothing"}), "unexpected"),
    "number path": (sites({"path": "layers/³/q"}), "unexpected"),
    "endless path": (sites({"path": "/".join("1" * 300)}), "unexpected"),
    "long number": (sites({"path": "layers/" + "9" * 5000}), "unexpected"),
    "key": (sites({"key": "../../x"}), "missing"),
    "key of another": (
        sites({"key": "model.layers.1.mlp.up_proj"}),
        "some of them twice",
    ),
    "twice": (twice, "some of them twice"),
    "axes": (sites({"part.inputs": [0, 1]}), "has shape and axes"),
    "no axes": (sites({"part.inputs": []}), "has shape and axes"),
    "far axes": (sites({"part.inputs": [7]}), "has shape and axes"),
    "negative axes": (sites({"part.inputs": [-1]}), "has `inputs`"),
    "many axes": (sites({"part.shape": [1] * 99}), "has `shape`"),
    "other axes": (
        sites({"part.inputs": [1], "part.outputs": [0]}),
        "misshapen|is \\(",
    ),
    "stack": (sites({"part.stack": [0, 0]}), "has shape and axes"),
    "far stack": (sites({"part.stack": [7]}), "has shape and axes"),
    "base": (sites({"base": "zz"}), "is not the weight that"),
    "kind": (sites({"kind": "vera"}), "has `kind` = 'vera'"),
    "a kind with rank": (sites({"kind": "whole"}), "has rank, scale and dropout"),
    "another kind": (sites({"kind": "dora"}), "missing .*lora_magnitude_vector"),
    "a bias of DoRA's": (sites({"kind": "dora", "bias": True}), "has a bias of B in"),
    "another bias": (sites({"bias": True}), "missing .*lora_B.bias"),
    "axes of a copy": (sites({"kind": "whole", "rank": 0}), "has shape and axes"),
    "no ids": (sites({"kind": "rows", "rank": 0}), "has `ids` = None"),
    "empty ids": (sites({"kind": "rows", "rank": 0, "ids": []}), "has `ids` = "),
    "unsorted ids": (
        sites({"kind": "rows", "rank": 0, "ids": [2, 1]}),
        r"has `ids` = \(2, 1\)",
    ),
    "rows of a stack": (
        sites({"kind": "rows", "rank": 0, "ids": [1], "part.stack": [0]}),
        "has shape and axes",
    ),
    "biases": (lambda record: record.update(bias="some"), "has `bias` = 'some'"),
    "sites": (lambda record: record.update(sites={}), "has `sites`"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_changed_metadata(make, tmp_path, case):
    change, message = CHANGES[case]
    made = make("llama")
    folder = made.save(tmp_path, params=made.params)
    (folder / CONFIG).unlink()
    with safe_open(folder / TENSORS, framework="np") as file:
        record = json.loads(file.metadata()[FIELD])
    change(record)
    text = json.dumps(record)
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={FIELD: text})
    with pytest.raises(CheckpointError, match=message):
        load(folder, made)


def test_every_error_is_one_of_ours(make, folder):
    """A sweep over single fields: never an error of another kind."""
    before = json.loads((folder / CONFIG).read_text())
    values = [
        None,
        True,
        -1,
        0,
        1e300,
        "x",
        "",
        [],
        {},
        [[]],
        {"": 0},
        ["a", 1],
        [None],
    ]
    for field in before:
        for value in values:
            reconfigure(folder, json.dumps(before | {field: value}))
            try:
                load(folder, make("llama"))
            except LoraxError:
                pass


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_any_metadata_is_an_error_or_read(make, tmp_path_factory, data):
    """Whatever one of its values becomes: never an error of another kind."""
    made = make("llama", scan=data.draw(st.booleans()))
    folder = made.save(tmp_path_factory.mktemp("meta"))
    with safe_open(folder / TENSORS, framework="np") as file:
        record = json.loads(file.metadata()[FIELD])
    place = record
    while True:
        keys = range(len(place)) if isinstance(place, list) else sorted(place)
        key = data.draw(st.sampled_from(list(keys)))
        deeper = isinstance(place[key], dict | list) and len(place[key])
        if not deeper or data.draw(st.booleans()):
            break
        place = place[key]
    place[key] = data.draw(_JSON)
    text = json.dumps(record)
    save_file(load_file(folder / TENSORS), folder / TENSORS, metadata={FIELD: text})
    try:
        lj.load_adapter(folder, made.params, strict=data.draw(st.booleans()))
    except LoraxError:
        pass
