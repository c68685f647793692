"""What `bind`, `init` and `adapt` say to arguments that they cannot use."""

import jax
import jax.numpy as jnp
import pytest
from helpers import random_adapter

import lorax_jax as lj
from lorax_jax._errors import AdapterError, CheckpointError, TransformError
from lorax_jax.adapters import Role

PARAMS = {"w": jnp.ones((8, 6))}


def fn(params, x):
    return x @ params["w"]


@pytest.fixture
def plan():
    return lj.plan(lj.LoraConfig("w", rank=2), PARAMS, fn, (jnp.ones(8),))


@pytest.fixture
def adapter(key):
    return random_adapter(key, PARAMS, [Role("w", (0,), (1,))])


@pytest.mark.parametrize("wrong", [0, jnp.ones(2), jax.random.split(jax.random.key(0))])
def test_what_is_no_key(plan, adapter, wrong):
    with pytest.raises(AdapterError, match=r"`init\(..., key=\)` is .* one PRNG key"):
        lj.init(plan, PARAMS, key=wrong)
    with pytest.raises(AdapterError, match=r"`bind\(..., key=\)` is .* one PRNG key"):
        lj.bind(PARAMS, adapter, key=wrong)


def test_keys_of_the_old_style(plan):
    old = lj.init(plan, PARAMS, key=jax.random.PRNGKey(3))
    new = lj.init(plan, PARAMS, key=jax.random.key(3))
    assert (old.train["w"]["a"] == new.train["w"]["a"]).all()


@pytest.mark.parametrize("weight", ["a", float("nan"), float("inf"), None])
def test_multipliers_that_are_no_numbers(adapter, weight):
    with pytest.raises(AdapterError, match="`weights` holds .*finite number"):
        lj.bind(PARAMS, adapter, weights=[weight])


def test_train_and_fixed_the_wrong_way_round(adapter):
    with pytest.raises(AdapterError, match=r"The order is `Adapter\(train, fixed\)`"):
        lj.bind(PARAMS, lj.Adapter(adapter.fixed, adapter.train))


def test_adapting_what_is_no_function():
    with pytest.raises(TransformError, match="`adapt` got 3, which is no function"):
        lj.adapt(3)  # pyright: ignore


def test_values_that_are_being_traced(plan, adapter, tmp_path):
    with pytest.raises(CheckpointError, match="is being traced, and has no values"):
        jax.jit(lambda a: lj.save_adapter(tmp_path, a, plan=plan))(adapter)
    assert not list(tmp_path.iterdir())
    with pytest.raises(AdapterError, match="`safe` and `report` look at values"):
        jax.jit(lambda a: lj.merge(PARAMS, a, report=True))(adapter)
