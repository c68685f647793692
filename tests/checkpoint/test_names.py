"""`NameMap`: there and back, whatever the names hold."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lorax_jax._errors import ConfigError
from lorax_jax._names import NameMap

# Words that careless code cuts out of the middle of a name, or reads as something else.
_WORDS = st.sampled_from(
    [
        "weight",
        "lora_A",
        "lora_B",
        "default",
        "base_model",
        "model",
        "w1",
        "0",
        "10",
        "layers2",
        "a.b",
        "x+y",
        "(q|k)",
        "~0",
        "~1",
    ]
)
_PATHS = st.lists(_WORDS, min_size=1, max_size=4)


@st.composite
def _tables(draw):
    """A table in which entry `n` is told apart by its last word."""
    entries = []
    for n in range(draw(st.integers(1, 5))):
        ours, theirs = draw(_PATHS), draw(_PATHS)
        if draw(st.booleans()):
            ours.insert(draw(st.integers(0, len(ours))), "{i}")
            theirs.insert(draw(st.integers(0, len(theirs))), "{i}")
        layout = draw(st.sampled_from(["linear", "same"]))
        entries.append(
            ("/".join([*ours, f"leaf{n}"]), ".".join([*theirs, f"m{n}.weight"]), layout)
        )
    return entries


@settings(max_examples=300, deadline=None)
@given(_tables(), st.integers(0, 2000), st.data())
def test_there_and_back(table, layer, data):
    names = NameMap.of(table)
    ours, theirs, layout = data.draw(st.sampled_from(table))
    path, tensor = (side.replace("{i}", str(layer)) for side in (ours, theirs))
    assert names.tensor(path) == tensor
    assert names.path(tensor) == path
    assert names.module(path) == tensor.removesuffix(".weight")
    assert names.module_path(tensor.removesuffix(".weight")) == path
    assert names.layout(path) == layout


def test_an_index_is_written_in_one_way():
    names = NameMap.of([("h/{i}/w", "h.{i}.w.weight", "same")])
    assert names.tensor("h/10/w") == "h.10.w.weight"
    for path in ("h/010/w", "h/-1/w", "h/1.0/w", "h/x/w", "h//w", "h/1/w/", "xh/1/w"):
        assert names.tensor(path) is None


def test_a_bias_is_no_module():
    names = NameMap.of([("w/bias", "w.bias", "same"), ("w/kernel", "w.weight", "same")])
    assert names.module("w/bias") is None
    assert names.module("w/kernel") == "w"
    assert names.tensor("w/bias") == "w.bias"


def test_what_is_written_out_wins_over_an_index():
    names = NameMap.of(
        [("h/0/w", "first.weight", "same"), ("h/{i}/w", "h.{i}.w.weight", "same")]
    )
    assert names.tensor("h/0/w") == "first.weight"
    assert names.tensor("h/1/w") == "h.1.w.weight"
    with pytest.raises(ConfigError, match="belongs to another entry"):
        names.path("h.0.w.weight")


def test_coercion_keeps_a_name_map():
    names = NameMap([("w", "w.weight", "same")], head="out")
    assert NameMap.of(names) is names
    assert NameMap.of([["w", "w.weight", "same"]]).entries == names.entries
    assert hash(names) == hash(NameMap([("w", "w.weight", "same")], head="out"))


@pytest.mark.parametrize(
    ("entries", "kwargs", "tied"),
    [
        ([("e/embedding", "model.embed_tokens.weight", "same")], {}, "e/embedding"),
        ([("e/embedding", "tok.weight", "same")], {}, "e/embedding"),
        ([("e/embedding", "model.embed_tokens.weight", "same")], {"tied": None}, None),
        (
            [("e", "wte.weight", "same"), ("p", "wpe.weight", "same")],
            {},
            "e",
        ),
        ([("e/x", "a.weight", "same"), ("p/x", "b.weight", "same")], {}, None),
        (
            [
                ("e", "wte.weight", "same"),
                ("lm_head/kernel", "lm_head.weight", "linear"),
            ],
            {},
            None,
        ),
        (
            [
                ("e", "wte.weight", "same"),
                ("lm_head/kernel", "lm_head.weight", "linear"),
            ],
            {"head": "out"},
            "e",
        ),
    ],
)
def test_which_embedding_the_head_is_tied_to(entries, kwargs, tied):
    assert NameMap(tuple(entries), **kwargs).tied == tied


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([], "`names` is empty"),
        ([("a", "b")], r"holds \('a', 'b'\). An entry is \(path, tensor name"),
        ([("a", "b", "transposed")], "with layout 'linear', 'conv' or 'same'"),
        ([("a", "", "same")], "An entry is"),
        ([("a/{i}", "b", "same")], "placeholders differ"),
        ([("a/{i}", "b.{j}", "same")], "placeholders differ"),
        ([("a/{i}/{i}", "b.{i}.{i}", "same")], "repeats a placeholder"),
        ([("a/{i}{j}", "b.{i}.{j}", "same")], "cannot be told apart"),
        ([("a", "b", "same"), ("a", "c", "same")], "lists the path 'a' twice"),
        ([("a", "c", "same"), ("b", "c", "same")], "lists the tensor name 'c' twice"),
        ("a table", "`names` is a str, not a table"),
        (3, "`names` is a int, not a table"),
    ],
)
def test_refusals(entries, message):
    with pytest.raises(ConfigError, match=message):
        NameMap.of(entries)


def test_ambiguous_patterns_are_refused_when_asked():
    table = [("{i}/{j}", "x.{i}.{j}", "same"), ("{i}/1", "y.{i}", "same")]
    with pytest.raises(
        ConfigError, match=re.escape("'3/1' fits '{i}/{j}' and '{i}/1'")
    ):
        NameMap.of(table).tensor("3/1")


def test_the_closest_names():
    names = NameMap.of(
        [("a", "model.norm.weight", "same"), ("b", "lm_head.weight", "same")]
    )
    assert names.closest("norm.weight", 1) == ["model.norm.weight"]


def test_its_entries_are_what_it_iterates_over():
    entries = [("h/{i}/w", "h.{i}.w.weight", "same"), ("n", "n.weight", "same")]
    assert list(NameMap(tuple(entries))) == entries


# --- Bare parameters ------------------------------------------------------------------

MOE = NameMap(
    [
        ("l/{i}/gate", "m.{i}.gate.weight", "linear"),
        ("l/{i}/q", "m.{i}.q.weight", "linear"),
        ("l/{i}/b", "m.{i}.q.bias", "same"),
        ("l/{i}/up", "m.{i}.experts.up", "linear"),
        ("l/{i}/down", "m.{i}.experts.down", "linear"),
        ("l/{i}/each/{e}/w", "m.{i}.each.{e}.w", "linear"),
    ],
    parameters="m.{i}.gate.weight",
    is_transposed=["m.{i}.experts"],
)


def test_which_tensors_are_bare():
    assert MOE.parameter("l/3/up") == "m.3.experts.up"
    assert MOE.parameter("l/3/gate") == "m.3.gate.weight"
    assert MOE.parameter("l/3/q") is MOE.parameter("l/3/b") is None
    assert MOE.parameter("nowhere") is None
    assert [m.name for m in MOE.expand(1)] == ["m.0.q"]
    found = [t.name for t in MOE.expand_parameters(1)]
    assert found == ["m.0.gate.weight", "m.0.experts.up", "m.0.experts.down"]


def test_a_modules_tensors_keep_their_order():
    assert MOE.tensors_of("m.12.experts") == ["m.12.experts.up", "m.12.experts.down"]
    assert MOE.tensors_of("m.x.experts") == []
    assert MOE.reads_transposed("m.12.experts") and not MOE.reads_transposed("m.12.q")


@pytest.mark.parametrize("field", ["parameters", "is_transposed"])
def test_bare_parameters_are_those_of_the_table(field):
    with pytest.raises(
        ConfigError, match=rf"`{field}` of `names` has 'm.0.gat'.*m\.{{i}}"
    ):
        NameMap(MOE.entries, **{field: ["m.0.gat"]})
