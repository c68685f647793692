"""Parts of a leaf and declared batch axes: what a rule may say, and what it may not."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import lorax_jax as lj
from lorax_jax._errors import ConfigError, PlanError

D, WIDTH, LAYERS = 8, 24, 3


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def plan(rule, shape=(D, WIDTH), fn=lambda p, x: x @ p["w"], x=(2, D), **options):
    config = lj.LoraConfig({"w": rule}, **{"rank": 2} | options)
    return lj.plan(config, {"w": struct(*shape)}, fn, (struct(*x),))


def scanned(rule, **options):
    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x @ w[:, :D], None), x, p["w"])[0]

    return plan(rule, (LAYERS, D, WIDTH), fn, **options)


def test_sites_and_table():
    parts = {"q": {1: (0, 8)}, "v": {-1: (16, 24), "rank": 4, "alpha": 2}}
    made = plan({"parts": parts, "rank": 3, "expect": 2})
    q, v = made
    assert (q.path, q.name, q.shape, q.rank, q.alpha) == ("w", "w@q", (8, 8), 3, 3)
    assert (v.path, v.name, v.shape, v.rank, v.alpha) == ("w", "w@v", (8, 8), 4, 2)
    assert q.trainable == 3 * 16 and made.trainable == 3 * 16 + 4 * 16
    assert made.matches == (("w", 2),)
    text = str(made)
    assert "w@q         1  8 x 8  0 -> 1        3" in text
    adapter = lj.init(made, {"w": jnp.ones((D, WIDTH))}, key=jax.random.key(0))
    shapes = jax.tree.map(jnp.shape, adapter.train)
    assert shapes == {
        "w@q": {"a": (8, 3), "b": (3, 8)},
        "w@v": {"a": (8, 4), "b": (4, 8)},
    }
    assert not jnp.array_equal(
        adapter.train["w@q"]["a"], adapter.train["w@v"]["a"][:, :3]
    )
    assert lj.count({"w": jnp.ones((D, WIDTH))}, adapter).trainable == made.trainable


def test_layers_of_a_stack_name_parts_of_their_own():
    q, v = {"q": {2: (0, 8)}}, {"v": {2: (16, 24)}}
    config = lj.LoraConfig(
        {"0/w": {"parts": q | v, "rank": 1}, "./w": {"parts": v}}, rank=2, layers=[0, 2]
    )

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x @ w[:, :D], None), x, p["w"])[0]

    made = lj.plan(config, {"w": struct(LAYERS, D, WIDTH)}, fn, (struct(2, D),))
    assert {s.name: s.rank for s in made} == {"0/w@q": 1, "0/w@v": 1, "2/w@v": 2}
    assert [slot.adapted for slot in made.slots] == [(0,), (0, 2)]
    assert [slot.name for slot in made.slots] == ["w@q", "w@v"]


def test_two_parts_of_one_name():
    rules = {
        "0/w": {"parts": {"q": {2: (0, 8)}}},
        "./w": {"parts": {"q": {2: (8, 16)}}},
    }
    config = lj.LoraConfig(rules, rank=2)

    def fn(p, x):
        return jax.lax.scan(lambda x, w: (x @ w[:, :D], None), x, p["w"])[0]

    with pytest.raises(PlanError, match="mean different parts by 'q'"):
        lj.plan(config, {"w": struct(LAYERS, D, WIDTH)}, fn, (struct(2, D),))


SPLIT = {"split": (2, 3, 4), "take": (None, (0, 2), None)}


@pytest.mark.parametrize(
    "parts, match",
    [
        ({"q": {2: (0, 8)}}, r"names axis 2, which is not there"),
        ({"q": {-3: (0, 8)}}, r"names axis -3, which is not there"),
        ({"q": {1: (0, 8), -1: (0, 8)}}, r"names axis 1 twice"),
        ({"q": {1: (16, 25)}}, r"takes 16:25 of axis 1, where there are 24 entries"),
        ({"q": {0: SPLIT}}, r"splits axis 0 of 8 entries into \(2, 3, 4\)"),
        (
            {"q": {1: SPLIT | {"take": (None, (0, 4), None)}}},
            r"takes 0:4 of axis 1 viewed as \(2, 3, 4\), where there are 3",
        ),
        ({"q": {1: (0, 9)}, "k": {1: (8, 16)}}, r"'q' and 'k' of 'w' .*in common"),
        ({"q": {1: SPLIT}, "k": {1: (4, 6)}}, r"'q' and 'k' of 'w' .*in common"),
        (
            {"q": {1: (0, 8), "rank": 9}},
            r"'w@q' of shape \(8, 8\).*'q': \{..., 'rank': 8",
        ),
    ],
)
def test_parts_that_do_not_fit(parts, match):
    with pytest.raises(PlanError, match=match):
        plan({"parts": parts})


def test_parts_that_only_touch():
    """Other boxes of the same axis, in another view."""
    parts = {"q": {1: SPLIT}, "k": {1: (8, 12)}}
    assert len(plan({"parts": parts})) == 2


def test_a_part_takes_all_layers():
    with pytest.raises(PlanError, match=r"names axis 0, whose .* such as '0/w': match"):
        scanned({"parts": {"q": {0: (0, 1)}}})


def test_parts_of_what_has_no_parts():
    def conv(p, x):
        return jax.lax.conv_general_dilated(
            x,
            p["w"],
            (1,),
            "SAME",
            dimension_numbers=("NWC", "WIO", "NWC"),
            feature_group_count=2,
        )

    rule = {"parts": {"q": {2: (0, 8)}}}
    with pytest.raises(PlanError, match="`parts` of 'w', the kernel of a grouped conv"):
        plan(rule, (3, 4, 8), conv, (2, 5, 8))
    with pytest.raises(
        PlanError, match="kernel of a grouped convolution, which has an"
    ):
        plan({"batch": 0}, (3, 4, 8), conv, (2, 5, 8))

    def tied(p, x):
        return jnp.take(p["w"], x.astype(int)[:, 0], axis=0) @ p["w"].T

    with pytest.raises(PlanError, match="which is looked up and also multiplied by"):
        plan({"parts": {"q": {1: (0, 4)}}, "tie": "head"}, (9, D), tied)


def test_magnitudes_of_a_part_of_the_inputs():
    parts = {"q": {0: (0, 4)}}
    with pytest.raises(PlanError, match=r"takes some of its inputs \(axes \(0,\)\)"):
        plan({"parts": parts, "dora": True})
    assert plan({"parts": parts}).slots[0].role.kind == "lora"


def projected(p, x):
    return jnp.einsum("bnh,nhd->bd", x, p["w"])


HEADS = {"shape": (2, 4, D), "fn": projected, "x": (3, 2, 4)}


def test_declared_batch_axes():
    made = plan({"batch": 0}, **HEADS)
    (site,) = made
    assert (site.role.inputs, site.role.outputs, site.role.batch) == ((1,), (2,), (0,))
    assert site.trainable == 2 * 2 * (4 + D)
    assert "[0] 1 -> 2" in str(made)
    assert plan({"batch": (-3,)}, **HEADS).slots == made.slots


@pytest.mark.parametrize(
    "batch, match",
    [
        (3, r"`batch` = \(3,\) of 'w', whose shape is \(2, 4, 8\): there is no axis 3"),
        ((0, 1), r"no input is left"),
        (2, r"no output is left"),
    ],
)
def test_batch_axes_that_do_not_fit(batch, match):
    with pytest.raises(PlanError, match=match):
        plan({"batch": batch}, **HEADS)


def test_a_stack_is_a_batch_axis_already():
    with pytest.raises(PlanError, match="axis 0 counts layers, which have factors"):
        scanned({"batch": 0})


def test_outputs_that_are_summed_over():
    with pytest.raises(
        PlanError, match="sums over axis 0 .* `dora` gives every output"
    ):
        plan({"batch": 0, "dora": True}, **HEADS)
    with pytest.raises(PlanError, match="sums over axis 0 .* `lora_bias` gives every"):
        plan({"batch": 0}, **HEADS, lora_bias=True)


def test_rules_of_layers_agree_about_batch():
    def fn(p, x):
        def step(x, w):
            return jnp.einsum("bd,dnh->bnh", x, w).reshape(-1, D), None

        return jax.lax.scan(step, x, p["w"])[0]

    config = lj.LoraConfig({"0/w": {"batch": 2}, "./w": {}}, rank=1)
    with pytest.raises(PlanError, match="Rules disagree about `batch` for the layers"):
        lj.plan(config, {"w": struct(LAYERS, D, 2, 4)}, fn, (struct(2, D),))


@pytest.mark.parametrize(
    "parts, match",
    [
        ([("q", {1: (0, 8)})], "is no dict from names of parts"),
        ({"rows": {1: (0, 8)}}, "'rows' cannot name a part"),
        ({"q/k": {1: (0, 8)}}, "'q/k' cannot name a part"),
        ({"lookup": {1: (0, 8)}}, "'lookup' cannot name a part"),
        ({3: {1: (0, 8)}}, "3 cannot name a part"),
        ({"q": {"rank": 2}}, "takes entries of no axis"),
        ({"q": (0, 8)}, "takes entries of no axis"),
        ({"q": {1: (0, 8), "tie": "head"}}, "has 'tie'. A part is a dict"),
        ({"q": {1: (8, 8)}}, r"= \(8, 8\) takes no entry"),
        ({"q": {1: (-8, 8)}}, r"= \(-8, 8\) takes no entry"),
        ({"q": {1: (0, 8, 0)}}, r"= \(0, 8, 0\) takes no entry"),
        ({"q": {1: (0, 8.0)}}, "is not what a part takes of an axis"),
        ({"q": {1: None}}, "is not what a part takes of an axis"),
        ({"q": {1: {"split": (2, 4)}}}, "an axis is viewed as several by"),
        ({"q": {1: {"split": 8, "take": ((0, 1),)}}}, "an axis is viewed as several"),
        (
            {"q": {1: {"split": (2, 4), "take": (None,)}}},
            "an axis is viewed as several",
        ),
        ({"q": {1: {"split": (2, 0), "take": (None, 0)}}}, "an axis is viewed as sev"),
        ({"q": {1: (0, 8), "rank": 0}}, r"\['parts'\]\['q'\]\['rank'\]` = 0"),
        ({"q": {1: (0, 8), "dropout": 1}}, r"\['q'\]\['dropout'\]` = 1"),
    ],
)
def test_parts_that_do_not_read(parts, match):
    with pytest.raises(ConfigError, match=match):
        lj.LoraConfig({"w": {"parts": parts}})


@pytest.mark.parametrize("batch", ["0", (0, 1.0), (True,)])
def test_batch_that_does_not_read(batch):
    with pytest.raises(ConfigError, match="axes of the weight are meant, integers"):
        lj.LoraConfig({"w": {"batch": batch}})


def test_a_config_with_parts_is_data():
    parts = {"q": {1: {"split": [2, 3, 4], "take": [None, 1, (0, 4, 2)]}, "rank": 4}}
    config = lj.LoraConfig({"w": {"parts": parts, "batch": [0, 1]}})
    assert hash(config) == hash(dataclasses.replace(config)) and config.rules[0].batch
    (part,) = config.rules[0].parts
    assert part.where[0].take == (None, (1, 2, 1), (0, 4, 2)) and part.rank == 4


def test_declared_roles_name_no_parts():
    role = plan({"parts": {"q": {1: (0, 8)}}}).slots[0].role
    config = lj.LoraConfig("w", rank=2)
    with pytest.raises(PlanError, match=r"must give each of the 2 axes"):
        lj.plan(config, {"w": struct(D, WIDTH)}, roles={"w": role})
    made = lj.plan(config, {"w": struct(D, WIDTH)}, roles={"w": role.leaf})
    assert made.slots[0].role == role.leaf
