"""`replicate`: what the new tree is, in every form that layers have."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from flax.core import FrozenDict

import lorax_jax as lj
from lorax_jax._errors import CheckpointError, ConfigError, PlanError, ReplicationError
from lorax_jax.replication import Replicated, layers_of, shared_layers

RANGES = ((0, 2), (1, 3))
SOURCES = [0, 1, 1, 2]


def layer(i):
    return {"w": jnp.full((2, 3), float(i)), "b": jnp.full(3, float(i))}


def taken(layers):
    return [float(one["b"][0]) for one in layers]


def test_a_list():
    params = {"layers": [layer(i) for i in range(3)], "head": jnp.ones(2)}
    deeper = lj.replicate(params, RANGES)
    assert type(deeper["layers"]) is list and len(params["layers"]) == 3
    assert all(
        new is params["layers"][i]
        for new, i in zip(deeper["layers"], SOURCES, strict=True)
    )
    assert deeper["head"] is params["head"]


def test_a_tuple_at_the_root():
    params = tuple(layer(i) for i in range(3))
    assert taken(lj.replicate(params, RANGES, layers="")) == SOURCES
    assert type(lj.replicate(params, RANGES, layers="")) is tuple


@pytest.mark.parametrize("kind", [dict, FrozenDict, nnx.State, collections.OrderedDict])
@pytest.mark.parametrize("key", [str, int])
def test_numbered_keys(kind, key):
    params = {"m": {"blocks": kind({key(i): layer(i) for i in range(12)})}}
    deeper = lj.replicate(params, ((0, 11), (2, 12)), layers="m/blocks")
    blocks = deeper["m"]["blocks"]
    assert type(blocks) is kind and list(blocks) == [key(i) for i in range(21)]
    assert taken(blocks[key(i)] for i in range(21)) == [*range(11), *range(2, 12)]
    assert blocks[key(20)]["w"] is params["m"]["blocks"][key(11)]["w"]


def test_numbers_within_keys():
    params = {"params": {**{f"h_{i}": layer(i) for i in range(3)}, "wte": jnp.ones(4)}}
    deeper = lj.replicate(params, RANGES, layers="params/h_{i}")["params"]
    assert sorted(deeper) == ["h_0", "h_1", "h_2", "h_3", "wte"]
    assert taken(deeper[f"h_{i}"] for i in range(4)) == SOURCES
    assert deeper["wte"] is params["params"]["wte"]


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_a_stack(axis):
    stack = jnp.moveaxis(jnp.arange(3 * 4 * 5.0).reshape(3, 4, 5), 0, axis)
    params = {"m": {"layers": {"w": stack, "kind": "dense"}}, "head": jnp.ones(2)}
    deeper = lj.replicate(params, RANGES, layers="m/layers", axis=axis)
    view = deeper["m"]["layers"]["w"]
    expected = jnp.take(stack, jnp.array(SOURCES), axis)
    assert isinstance(view, Replicated) and view.stack.array is stack
    assert view.shape == expected.shape and view.dtype == stack.dtype
    assert view.size == stack.size
    assert jnp.array_equal(view.dense(), expected)
    assert deeper["m"]["layers"]["kind"] == "dense"
    assert deeper["head"] is params["head"] and params["m"]["layers"]["w"] is stack


def test_plain_indexing():
    stack = jnp.arange(3 * 4 * 5.0).reshape(3, 4, 5)
    view = lj.replicate({"layers": {"w": stack}}, RANGES)["layers"]["w"]
    dense = view.dense()
    assert jnp.array_equal(view[3], dense[3])
    assert jnp.array_equal(view[-1, :, 2], dense[-1, :, 2])
    rows = np.array([[0], [3]])
    assert jnp.array_equal(view[rows, 1, [2, 0]], dense[rows, 1, [2, 0]])
    assert len([*view]) == 4 and jnp.array_equal([*view][2], dense[2])
    with pytest.raises(IndexError, match="4 layers, and none has number 4"):
        view[4]
    with pytest.raises(
        TypeError, match=r"picked by integers along axis 0.*\.dense\(\)"
    ):
        view[1:]


def test_boxes_and_types():
    params = {"layers": {"w": nnx.Param(jnp.ones((3, 2, 2)))}}
    view = lj.replicate(params, RANGES)["layers"]["w"]
    assert isinstance(view, nnx.Param) and view.get_raw_value().shape == (4, 2, 2)
    types_ = jax.eval_shape(lambda: {"layers": {"w": jnp.ones((3, 2, 2))}})
    for deeper in (
        lj.replicate(types_, RANGES),
        jax.eval_shape(lambda p: lj.replicate(p, RANGES), types_),
    ):
        assert deeper["layers"]["w"].shape == (4, 2, 2)


BAD = {
    "3": "pairs .first, end. of layers are meant",
    "'01'": "pairs .first, end. of layers are meant",
    "()": "is empty, and a model has at least one layer",
    "((0, 2), 1)": "holds 1, which is no pair",
    "((0, 1, 2),)": "holds .0, 1, 2., which is no pair",
    "((0, 1.5),)": "which is no pair",
    "((False, True),)": "which is no pair",
    "((-1, 2),)": "which is no pair .* of layers from 0 up",
    "((1, 1),)": "a range without layers",
    "((0, 10**12),)": "names more than 16,384 layers",
    "((0, 4),) * 5000": "names more than 16,384 layers",
    "((2, 0),)": "a range without layers: it begins at 2 and ends before 0",
}


@pytest.mark.parametrize("text", BAD)
def test_ranges_that_are_none(text):
    ranges = eval(text)
    with pytest.raises(ConfigError, match=f"`ranges`.*{BAD[text]}"):
        lj.replicate({"layers": [layer(0)]}, ranges)
    with pytest.raises(ConfigError, match=f"`layer_replication`.*{BAD[text]}"):
        lj.LoraConfig(layer_replication=ranges)


@pytest.mark.parametrize(
    "layers",
    [[layer(0)] * 3, {str(i): layer(i) for i in range(3)}, {"w": jnp.ones((3, 2))}],
    ids=["list", "dictionary", "stack"],
)
def test_ranges_beyond_the_layers(layers):
    match = r"holds \(2, 4\), and the model has 3 layers, 0 to 2"
    with pytest.raises(ConfigError, match=match):
        lj.replicate({"layers": layers}, ((0, 2), (2, 4)))


@pytest.mark.parametrize(
    "params, options, match",
    [
        (
            {"model": {"layers": [layer(0)]}},
            {},
            r"(?s)'layers' leads to no layers.*closest  model/layers",
        ),
        ({"layers": {}}, {}, "leads to no stack of layers along axis 0: there are no"),
        (
            {"layers": {"w": jnp.ones((3, 2)), "b": jnp.ones((2, 2))}},
            {},
            "leads to no stack .*'layers/.' has 2; 'layers/.' has 3",
        ),
        ({"layers": {"w": jnp.ones(3)}}, {"axis": 1}, "'layers/w' .* has no axis 1"),
        (
            {"h_0": layer(0), "h_2": layer(2)},
            {"layers": "h_{i}"},
            r"no dictionary with the keys h_0, h_1 and so on: found \['h_0', 'h_2'\]",
        ),
        ({"h": [layer(0)]}, {"layers": "h/b_{i}"}, "found <class 'list'>"),
    ],
)
def test_layers_that_are_none(params, options, match):
    with pytest.raises(ReplicationError, match=match):
        lj.replicate(params, ((0, 1),), **options)


def test_a_stack_is_replicated_once():
    deeper = lj.replicate({"layers": {"w": jnp.ones((3, 2, 2))}}, RANGES)
    with pytest.raises(ReplicationError, match="'layers/w' is replicated before"):
        lj.replicate(deeper, ((0, 1),))


# What a tree says about how it was made.


def unrolled(x, params):
    for i in range(len(params["layers"])):
        x = jnp.tanh(x @ params["layers"][str(i)]["w"])
    return x


@pytest.fixture
def square():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "layers": {str(i): {"w": jax.random.normal(keys[i], (4, 4))} for i in range(3)}
    }


def planned(params, **config):
    x = jnp.ones((2, 4))
    return lj.plan(
        lj.LoraConfig(".*w", rank=2, **config),
        params,
        fn=lambda p, x: unrolled(x, p),
        args=(x,),
    )


def test_what_unrolled_layers_show(square):
    deeper = lj.replicate(square, RANGES)
    assert layers_of(deeper, RANGES) == RANGES
    assert shared_layers(deeper) == RANGES and shared_layers(square) is None
    plan = planned(deeper, layer_replication=[[0, 2], [1, 3]])
    assert plan.config.layer_replication == RANGES and plan.repeated is None
    assert planned(deeper).config.layer_replication is None
    assert planned(deeper).repeated == RANGES
    # Types do not show which layers are one, only how many there are.
    types_ = jax.eval_shape(lambda: deeper)
    assert planned(types_, layer_replication=RANGES).config.layer_replication == RANGES
    # The shared layer counts once.
    assert plan.base == 3 * 16 and plan.base_bytes == 3 * 64
    adapter = lj.init(plan, deeper, key=jax.random.key(0))
    assert lj.count(deeper, adapter).total == 3 * 16 + 4 * 16


def test_plans_of_other_layers_are_refused(square):
    says = (
        r"have no layers that are repeated so\. Call  lj\.replicate\(params, \(\(0, 2"
    )
    with pytest.raises(PlanError, match=says):
        planned(square, layer_replication=RANGES)
    apart = jax.tree.map(jnp.copy, lj.replicate(square, RANGES))
    with pytest.raises(PlanError, match=says):
        planned(apart, layer_replication=RANGES)
    other = lj.replicate(square, ((0, 2), (0, 2)))
    with pytest.raises(PlanError, match=says):
        planned(other, layer_replication=RANGES)
    stacked = {"layers": {"w": jnp.ones((3, 4, 4))}}
    view = lj.replicate(stacked, RANGES)
    assert layers_of(view, None) == RANGES
    match = r"layers \[0, 1, 0, 1\], and 'layers/w' holds \[0, 1, 1, 2\]"
    with pytest.raises(ReplicationError, match=match):
        layers_of(view, ((0, 2), (0, 2)))
    with pytest.raises(ReplicationError, match="'layers/w' holds 4 layers"):
        layers_of(jax.eval_shape(lambda: view), ((0, 2),))


def test_layers_of_different_make(square):
    """Layers that do not hold the same leaves are unrolled ones too."""
    square["layers"]["1"]["extra"] = jnp.ones(2)
    square["layers"]["1"]["inner"] = {"0": jnp.ones(3), "1": jnp.ones(3)}
    deeper = lj.replicate(square, RANGES)
    assert layers_of(deeper, RANGES) == RANGES
    assert shared_layers(deeper) == RANGES


def test_files_that_say_no_ranges(square, tmp_path):
    deeper = lj.replicate(square, RANGES)
    plan = planned(deeper, layer_replication=RANGES)
    adapter = lj.init(plan, deeper, key=jax.random.key(0))
    names = [("layers/{i}/w", "layers.{i}.w.weight", "linear")]
    lj.save_adapter(tmp_path, adapter, plan=plan, names=names)
    file = tmp_path / "adapter_config.json"
    config = file.read_text()
    for text, match in (
        ("[[1, 0]]", "layer_replication.*a range without layers"),
        ('"all"', "layer_replication.*are meant"),
        ("[[0, 1]]", "disagree about layer_replication"),
    ):
        ranges = (
            "[\n    [\n      0,\n      2\n    ],\n    [\n      1,\n      3\n    ]\n  ]"
        )
        assert ranges in config
        file.write_text(config.replace(ranges, text))
        with pytest.raises(CheckpointError, match=match):
            lj.load_adapter(tmp_path, deeper)


def test_ranges_that_files_disagree_about(square, tmp_path):
    from lorax_jax.checkpoint._export import _replication

    for folder, ranges in (("a", RANGES), ("b", ((0, 3), (2, 3)))):
        deeper = lj.replicate(square, ranges)
        plan = planned(deeper, layer_replication=ranges)
        adapter = lj.init(plan, deeper, key=jax.random.key(0))
        lj.save_adapter(tmp_path / folder, adapter, plan=plan)
    folders = [tmp_path / "a", tmp_path / "b"]
    assert _replication(folders[:1], [[0, 2], [1, 3]]) == RANGES
    with pytest.raises(CheckpointError, match="repeated in different ways"):
        _replication(folders, None)


def test_bases_whose_layers_cannot_be_told():
    from lorax_jax.checkpoint._repeated import repeated

    class Folder(list):
        path = "base"

        def __init__(self, config, names):
            super().__init__(names)
            self.config = config

    with pytest.raises(CheckpointError, match="does not say how many there are"):
        repeated(Folder({}, ["layers.0.w"]), RANGES)
    with pytest.raises(CheckpointError, match="the model has 2 layers"):
        repeated(Folder({"n_layer": 2}, ["h.0.w", "h.1.w"]), RANGES)
    both = [f"{side}.{i}.w" for side in ("encoder", "decoder") for i in range(3)]
    with pytest.raises(CheckpointError, match="begin with encoder., decoder.: one"):
        repeated(Folder({"num_hidden_layers": 3}, both), RANGES)
