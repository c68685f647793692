"""Values of a configuration that are none, each with the name of its field."""

import jax.numpy as jnp
import numpy as np
import pytest

import lorax_jax as lj
from lorax_jax.errors import ConfigError, PlanError

WRONG = [
    ({"dora": "no"}, "`dora` = 'no'; `True` or `False` is meant"),
    ({"rslora": "x"}, "`rslora` = 'x'"),
    ({"lora_bias": "no"}, "`lora_bias` = 'no'"),
    ({"dtype": None}, "`dtype` = None cannot hold"),
    ({"dtype": "foo"}, "`dtype` = foo cannot hold"),
    ({"layers": 1.5}, "`layers` holds 1.5"),
    ({"whole": 3}, "`whole` holds 3"),
    ({"exclude": 3}, "`exclude` holds 3"),
    ({"token_rows": np.ones((2, 2), int)}, "`token_rows` holds array"),
    ({"token_rows": [1.0]}, "`token_rows` holds 1.0"),
    ({"targets": {"w": {"dora": "x"}}}, r"`targets\['w'\]\['dora'\]` = 'x'"),
    ({"targets": {"w": {"expect": True}}}, r"\['expect'\]` = True; a number of sites"),
    ({"targets": {"w": {"parts": {}}}}, "so no part would be adapted"),
]


@pytest.mark.parametrize("fields, match", WRONG, ids=lambda x: str(x)[:30])
def test_refused_when_it_is_written(fields, match):
    with pytest.raises(ConfigError, match=match):
        lj.LoraConfig(**{"targets": "w"} | fields)


def test_rows_may_be_an_array():
    assert lj.LoraConfig("w", token_rows=jnp.array([4, 1])).token_rows == (
        (None, (1, 4)),
    )


@pytest.mark.parametrize("init", ["gausian", ["foo"]])
@pytest.mark.parametrize("inside", [False, True])
def test_initializers_that_are_none(init, inside):
    part = {"q": {1: (0, 2), "init": init}}
    rule = {"parts": part} if inside else {"init": init}
    fn = lambda params, x: x @ params["w"]  # noqa: E731
    config = lj.LoraConfig({"w": rule}, rank=1)
    with pytest.raises(PlanError, match="`init` = .* is no initializer"):
        lj.plan(config, {"w": jnp.ones((3, 4))}, fn, (jnp.ones(3),))


def test_a_bias_of_b_for_each_expert():
    fn = lambda params, x: jnp.einsum("btd,ekd->btek", x, params["w"])  # noqa: E731
    config = lj.LoraConfig({"w": {"batch": 0}}, rank=1, lora_bias=True)
    with pytest.raises(PlanError, match="has factors for each expert or batch entry"):
        lj.plan(config, {"w": jnp.ones((2, 4, 3))}, fn, (jnp.ones((2, 5, 3)),))


@pytest.mark.parametrize(
    "tables, kwargs, match",
    [
        (3, {"to": 8}, "`tables` has 3: None; paths of leaves are meant"),
        ({3: 0}, {"to": 8}, "`tables` has 3: 0"),
        ({"e": "0"}, {"to": 8}, "`tables` has 'e': '0'"),
        ({"e": 0}, {"to": 10**12}, "`to` = 1000000000000 must be less than"),
        ({"e": 0}, {"to": 8, "multiple": 10**12}, "`multiple` = .* must be less"),
        ({"e": 0}, {"to": 8, "seed": 10**30}, "`seed` = .* must be less"),
    ],
)
def test_growth_that_is_none(tables, kwargs, match):
    with pytest.raises(lj.errors.GrowthError, match=match):
        lj.grow({"e": jnp.ones((6, 2))}, tables, **kwargs)


def test_repeated_layers_do_not_keep_tables_from_growing():
    params = {"e": jnp.ones((6, 2)), "layers": {"w": jnp.ones((2, 3, 3))}}
    deeper = lj.replicate(params, ((0, 2), (1, 2)))
    grown, _ = lj.grow(deeper, {"e": 0}, to=8)
    assert grown["e"].shape == (8, 2)
    assert grown["layers"]["w"].stack.array is params["layers"]["w"]


@pytest.mark.parametrize("wrong", [{"layers": 3}, {"axis": "0"}])
def test_layers_that_are_no_path(wrong):
    params = {"layers": {"w": jnp.ones((2, 3, 3))}}
    with pytest.raises(lj.errors.ReplicationError, match="the path of the layers and"):
        lj.replicate(params, ((0, 2),), **wrong)
