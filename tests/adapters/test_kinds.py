"""What binding and merging refuse, kind by kind, and what they make of a bias of B."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, draw

import lorax_jax as lj
from lorax_jax._errors import AdapterError, TransformError
from lorax_jax.adapters import Fixed


def fn(params, ids, x):
    """A table seen twice, a linear layer with a bias, a norm."""
    h = jnp.take(params["table"], ids, axis=0) * params["norm"]["scale"][None]
    y = h @ params["q"]["kernel"] + params["q"]["bias"][None]
    return y, x @ params["table"].T


@pytest.fixture
def params(key):
    keys = jax.random.split(key, 4)
    return {
        "table": draw(keys[0], (9, 6)),
        "norm": {"scale": jnp.ones(6)},
        "q": {"kernel": draw(keys[1], (6, 4)), "bias": draw(keys[2], (4,))},
    }


@pytest.fixture
def args(key):
    return jnp.array([0, 3, 8, 3]), draw(key, (2, 6))


@pytest.fixture
def make(params, args, key):
    def build(**config):
        plan = lj.plan(lj.LoraConfig("q/kernel", rank=2, **config), params, fn, args)
        adapter = lj.init(plan, params, key=key)
        shift = [
            x + 0.3 * jax.random.normal(jax.random.fold_in(key, i), x.shape)
            for i, x in enumerate(jax.tree.leaves(adapter.train))
        ]
        tree = jax.tree.structure(adapter.train)
        return adapter._replace(train=jax.tree.unflatten(tree, shift))

    return build


EVERY = {
    "dora": {"dora": True},
    "bias of B": {"lora_bias": True},
    "whole": {"whole": ["norm/scale", "q/bias"]},
    "rows": {"token_rows": [8, 3]},
}


@pytest.mark.parametrize("kind", EVERY)
def test_merged_and_bound_agree(make, params, args, kind):
    adapter = make(**EVERY[kind])
    bound = lj.adapt(fn)(lj.bind(params, adapter), *args)
    assert_close(fn(lj.merge(params, adapter), *args), bound)
    assert not np.allclose(bound[0], fn(params, *args)[0])


def test_a_bias_of_b_is_scaled(make, params, args):
    adapter = make(lora_bias=True, alpha=6)
    train = adapter.train["q/kernel"]
    merged = lj.merge(params, adapter)
    shift = merged["q"]["bias"] - params["q"]["bias"]
    np.testing.assert_allclose(shift, 3.0 * train["bias"], rtol=1e-5, atol=1e-6)
    twice = lj.merge(params, adapter, adapter, weights=[0.5, 0.25])
    np.testing.assert_allclose(
        twice["q"]["bias"] - params["q"]["bias"],
        2.25 * train["bias"],
        rtol=1e-5,
        atol=1e-6,
    )
    bound = lj.bind(params, adapter, adapter, weights=[0.5, 0.25])
    assert_close(fn(twice, *args), lj.adapt(fn)(bound, *args))


def test_a_bias_of_b_meets_a_bias_trained_whole(make, params, args):
    adapter = make(lora_bias=True, bias="lora_only")
    assert set(adapter.train) == {"q/kernel", "q/bias"}
    bound = lj.adapt(fn)(lj.bind(params, adapter), *args)
    assert_close(fn(lj.merge(params, adapter), *args), bound)


@pytest.mark.parametrize("bias", [None, "ones"])
def test_a_bias_of_b_needs_one_of_the_layer(make, params, bias):
    adapter = make(lora_bias=True)
    other = {"kernel": params["q"]["kernel"]}
    if bias is not None:
        other["bias"] = jnp.ones(3)
    message = r"has a bias of B, and the model has no 'q/bias' of 4 entries"
    with pytest.raises(AdapterError, match=message):
        lj.merge(params | {"q": other}, adapter)


@pytest.mark.parametrize(
    ("kind", "what"),
    [("dora", "DoRA"), ("whole", "a leaf trained whole"), ("rows", "trained rows")],
)
def test_what_has_no_multiple(make, params, kind, what):
    adapter = make(**EVERY[kind])
    lj.bind(params, adapter, weights=[1])
    for weight in (0.5, jnp.float32(1)):
        with pytest.raises(
            AdapterError, match=f"where the adapter is {what}: that has"
        ):
            lj.bind(params, adapter, weights=[weight])


def test_two_of_what_there_is_one_of(make, params):
    whole, rows = make(whole="table"), make(token_rows=[1])
    with pytest.raises(AdapterError, match="'table', and each would replace the other"):
        lj.bind(params, rows, rows)
    table = lj.Adapter({"table": whole.train["table"]}, {"table": whole.fixed["table"]})
    with pytest.raises(AdapterError, match="'table' is trained whole, and adapted"):
        lj.bind(params, rows, table)
    lj.bind(params, whole, make())  # one whole, the other beside it


def test_shapes_that_do_not_fit(make, params):
    wide = params | {"table": jnp.ones((9, 7)), "norm": {"scale": jnp.ones(7)}}
    wide["q"] = {"kernel": jnp.ones((6, 4)), "bias": jnp.ones(5)}
    rows, whole = make(token_rows=[1]), make(bias="lora_only")
    with pytest.raises(
        AdapterError, match=r"rows of 'table' of shape \(1, 6\).*\(1, 7\)"
    ):
        lj.bind(wide, rows)
    with pytest.raises(AdapterError, match=r"'q/bias' whole, with the shape \(4,\)"):
        lj.bind(wide, whole)
    layers = Fixed(
        dataclasses.replace(
            whole.fixed["q/bias"].role, batch=(0,), outputs=(), stack=1
        ),
        {"layers": jnp.array([0, 2])},
    )
    some = whole._replace(fixed=whole.fixed | {"q/bias": layers})
    with pytest.raises(AdapterError, match=r"whole, with the shape \(4,\); .* \(2,\)"):
        lj.bind(params, some)


def test_arrays_of_a_kind(make, params):
    dora = make(dora=True)
    train, fixed = dora.train["q/kernel"], dora.fixed["q/kernel"]

    def bind(train, fixed):
        lj.bind(params, lj.Adapter({"q/kernel": train}, {"q/kernel": fixed}))

    odd = Fixed(dataclasses.replace(fixed.role, kind="vera"), dict(fixed))
    with pytest.raises(AdapterError, match="of the kind 'vera'. Known: .*dora.*rows"):
        bind(train, odd)
    less = {name: x for name, x in fixed.items() if name != "norm"}
    with pytest.raises(AdapterError, match=r"lacks \['norm'\]"):
        bind(train, Fixed(fixed.role, less))
    with pytest.raises(AdapterError, match=r"lacks \['magnitude'\]"):
        bind({"a": train["a"], "b": train["b"]}, fixed)
    plain = Fixed(dataclasses.replace(fixed.role, kind="lora"), less)
    with pytest.raises(AdapterError, match=r"holds \['magnitude'\], of which .*'lora'"):
        bind(train, plain)


def test_a_table_that_is_no_array_or_not_floating(make, params):
    rows = make(token_rows=[1])
    with pytest.raises(AdapterError, match="hold 'x' at 'table', which is no array"):
        lj.bind(params | {"table": "x"}, rows)
    with pytest.raises(AdapterError, match="'table' has the dtype int32"):
        lj.bind(params | {"table": jnp.ones((9, 6), jnp.int32)}, rows)


ONES = jnp.ones((2, 6))
REFUSED = {
    "part of a table": ("rows", lambda p: ONES @ p["table"][2:].T, "a part of a table"),
    "rows scaled one by one": (
        "rows",
        lambda p: ONES @ (p["table"] * jnp.arange(9.0)[:, None]).T,
        "scaled one by one",
    ),
    "regrouped rows": (
        "rows",
        lambda p: jnp.ones((2, 18)) @ p["table"].reshape(3, 18).T,
        "regrouped",
    ),
    "bias of a rescaled weight": (
        "bias of B",
        lambda p: ONES @ (2.0 * p["q"]["kernel"]),
        "B has a bias, and the weight is rescaled",
    ),
    "bias of a part": (
        "bias of B",
        lambda p: ONES[:, 1:] @ p["q"]["kernel"][1:],
        "B has a bias, and a part of the inputs",
    ),
    "bias of a transposed use": (
        "bias of B",
        lambda p: jnp.ones((2, 4)) @ p["q"]["kernel"].T,
        "B has a bias, and",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_uses_that_a_kind_has_no_form_for(make, params, case):
    kind, use, message = REFUSED[case]
    bound = lj.bind(params, make(**EVERY[kind]))
    with pytest.raises(TransformError, match=message):
        lj.adapt(use)(bound)


def test_columns_of_a_table_with_trained_rows(make, params):
    adapter = make(**EVERY["rows"])

    def use(params, columns=(1, 4), **mode):
        taken = jnp.take(params["table"], jnp.array(columns), axis=1, **mode)
        return ONES[:, : len(columns)] @ taken.T

    bound, merged = lj.bind(params, adapter), lj.merge(params, adapter)
    assert_close(lj.adapt(use)(bound), use(merged))
    beyond = lj.adapt(use)(bound, (99,))
    assert np.isnan(beyond).all() and np.isnan(use(merged, (99,))).all()
    clipped = {"columns": (99,), "mode": "clip"}
    assert_close(lj.adapt(use)(bound, **clipped), use(merged, **clipped))
    with pytest.raises(TransformError, match="trained rows are filled in"):
        lj.adapt(use)(bound, (99,), mode="fill", fill_value=0)


def test_the_whole_copy_keeps_its_own_dtype(make, params, args):
    """Small steps are not lost in a copy of a base in sixteen bits."""
    low = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    adapter = make(whole="q/bias")
    assert adapter.train["q/bias"]["whole"].dtype == jnp.float32
    bound = lj.bind(low, adapter)
    assert bound["q"]["bias"].dtype == jnp.bfloat16
