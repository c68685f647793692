"""`grow`: rows for new tokens, and nothing else."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import lorax_jax as lj
from lorax_jax._errors import GrowthError

V, D = 6, 4

# Name -> shape of a leaf and the axis that counts tokens.
LAYOUTS = {
    "table": ((V, D), 0),
    "kernel": ((D, V), 1),
    "bias": ((V,), 0),
    "stacked tables": ((3, V, D), 1),
    "stacked kernels": ((3, D, V), -1),
    "stacked biases": ((3, V), 1),
}


def values(shape, dtype="float32"):
    return jnp.asarray(np.random.default_rng(0).normal(size=shape), dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_new_rows_are_means(layout, dtype):
    shape, axis = LAYOUTS[layout]
    params = {"t": values(shape, dtype), "other": values((2, V))}
    new, growth = lj.grow(params, {"t": axis}, to=V + 2)
    assert new["other"] is params["other"]
    assert new["t"].dtype == dtype and growth.after == V + 2
    old, rest = jnp.split(new["t"], [V], axis)
    assert np.array_equal(old, params["t"]) and rest.shape[axis] == 2
    mean = np.asarray(params["t"], np.float32).mean(axis, keepdims=True)
    # A rounding of the sum for each of V terms, and one to the dtype.
    eps = V * np.finfo("f").eps + float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(
        np.asarray(rest, np.float32),
        np.broadcast_to(mean, rest.shape),
        rtol=4 * eps,
        atol=eps * np.abs(params["t"]).max().item(),
    )
    assert params["t"].shape == shape


def test_zeros_and_normal():
    params = {"t": values((4000, 2)) * jnp.array([[1.0, 9.0]]) + 5.0}
    zeros, _ = lj.grow(params, {"t": 0}, to=4002, init="zeros")
    assert not np.asarray(zeros["t"][4000:]).any()
    drawn, growth = lj.grow(params, {"t": 0}, to=8000, init="normal", seed=3)
    rows = np.asarray(drawn["t"][4000:])
    # Of 4,000 draws: means within 5 standard errors, deviations likewise.
    sigma = np.asarray(params["t"]).std(0)
    assert (np.abs(rows.mean(0) - 5.0) < 5 * sigma * (2 / 4000) ** 0.5).all()
    assert (np.abs(rows.std(0) / sigma - 1) < 5 * 8000**-0.5).all()
    again, _ = lj.grow(params, growth)
    assert np.array_equal(again["t"], drawn["t"])
    other, _ = lj.grow(params, {"t": 0}, to=8000, init="normal", seed=4)
    assert not np.array_equal(other["t"], drawn["t"])


def test_a_multiple():
    new, growth = lj.grow(
        {"a/b": {"t": values((V, D))}}, {"a~1b/t": 0}, to=7, multiple=4
    )
    assert new["a/b"]["t"].shape == (8, D)
    assert (growth.before, growth.to, growth.after) == (V, 7, 8)
    assert growth.token_rows == {"a\\~1b/t": (6,)}  # the eighth is no token's


def test_nothing_new():
    params = {"t": values((V, D))}
    new, growth = lj.grow(params, {"t": 0}, to=V)
    assert new["t"] is params["t"] and growth.token_rows == {}


def test_types_boxes_tracers_and_host_arrays():
    boxed = {"t": nnx.Param(values((V, D)))}
    types = jax.eval_shape(lambda: boxed)
    new, growth = lj.grow(types, {"t": 0}, to=9)
    assert jax.tree.leaves(new)[0] == jax.ShapeDtypeStruct((9, D), jnp.float32)
    inside = jax.jit(lambda tree: lj.grow(tree, growth)[0])(boxed)
    outside, _ = lj.grow(boxed, growth)
    assert isinstance(outside["t"], nnx.Param)
    assert np.allclose(jax.tree.leaves(inside)[0], jax.tree.leaves(outside)[0])
    host = {"t": np.asarray(values((V, D)))}
    assert isinstance(lj.grow(host, growth)[0]["t"], np.ndarray)


def test_a_sharding_is_kept():
    mesh = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    params = {"t": jax.device_put(values((V, D)), sharding)}
    new, _ = lj.grow(params, {"t": 0}, to=7, multiple=2)
    assert new["t"].sharding == sharding and new["t"].shape == (8, D)
    with pytest.raises(GrowthError, match="'t' is divided over devices.*`multiple=64`"):
        lj.grow(params, {"t": 0}, to=7)


@pytest.fixture
def model():
    """An untied model whose head has a bias, and a linear layer."""
    params = {
        "embed": values((V, D)),
        "mid": values((D, D)),
        "head": {"kernel": values((D, V)), "bias": values((V,))},
    }

    def fn(params, ids):
        x = params["embed"][ids] @ params["mid"]
        return x @ params["head"]["kernel"] + params["head"]["bias"][None]

    return params, fn, (jnp.arange(3),)


def test_axes_are_read_off_the_function(model):
    params, fn, args = model
    paths = ["embed", "head/kernel", "head/bias"]
    new, growth = lj.grow(params, paths, to=8, fn=fn, args=args)
    assert [(t.path, t.axis) for t in growth.tables] == [
        *zip(paths, (0, 1, 0), strict=True)
    ]
    assert growth.token_rows == {"embed": (6, 7), "head/kernel": (6, 7)}
    before, after = fn(params, *args), fn(new, *args)
    np.testing.assert_allclose(after[:, :V], before, atol=1e-5)
    np.testing.assert_allclose(after[:, V], before.mean(1), atol=1e-5)
    only, _ = lj.grow(params, "head/bias", to=8)  # a vector has one axis
    assert only["head"]["bias"].shape == (8,)


def test_new_rows_are_trained(model, key):
    params, fn, _ = model
    new, growth = lj.grow(params, {"embed": 0, "head/kernel": 1, "head/bias": 0}, to=8)
    ids = jnp.array([1, 7])
    config = lj.LoraConfig("mid", rank=2, token_rows=growth.token_rows)
    plan = lj.plan(config, new, fn, (ids,))
    assert plan.trainable == 2 * (D + D) + 2 * 2 * D  # two rows of each table
    adapter = lj.init(plan, new, key=key)
    forward = lj.adapt(fn)

    def loss(train):
        out = forward(lj.bind(new, lj.Adapter(train, adapter.fixed)), ids)
        return (out**2).sum()

    grads = jax.grad(loss)(adapter.train)
    seen = np.abs(grads["embed@rows"]["rows"]).sum(1) > 0
    assert seen.tolist() == [False, True]  # token 6 is not in the text
    assert (np.abs(grads["head/kernel@rows"]["rows"]).sum(1) > 0).all()


REFUSED = {
    "path": ({"emb": 0}, {}, "names 'emb', which is no leaf.*Closest: embed"),
    "shrinking": ({"embed": 0}, {"to": 5}, "`to` = 5, and the tables count 6"),
    "axis": ({"embed": 2}, {}, r"\['embed'\]` = 2 is no axis of.*\(6, 4\)"),
    "no axis": ("embed", {}, "Which axis of 'embed'.* no axis is given.*'embed': 0"),
    "a wrong axis": ({"embed": 0, "head/kernel": 0}, {}, "(?s)different.*kernel: 4"),
    "nothing": ({}, {}, "`tables` is empty"),
    "init": ({"embed": 0}, {"init": "ones"}, "`init` = 'ones'; one of mean, zeros"),
    "multiple": ({"embed": 0}, {"multiple": 0}, "`multiple` = 0 must be at least 1"),
    "to": ({"embed": 0}, {"to": 7.5}, "`to` = 7.5; an integer is meant"),
    "no to": ({"embed": 0}, {"to": None}, "`to` is missing"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(model, case):
    tables, options, message = REFUSED[case]
    with pytest.raises(GrowthError, match=message):
        lj.grow(model[0], tables, **{"to": 8} | options)


def test_what_the_function_does_not_tell(model):
    params, _, args = model
    with pytest.raises(GrowthError, match="neither looks it up along one axis"):
        lj.grow(params, "mid", to=8, fn=lambda p, x: x + p["mid"], args=(1.0,))


def test_integers_adapted_trees_and_other_bases(model, key):
    params, fn, args = model
    with pytest.raises(GrowthError, match="'t' has the dtype int8.*before it is quant"):
        lj.grow({"t": jnp.ones((V, D), jnp.int8)}, {"t": 0}, to=8)
    plan = lj.plan(lj.LoraConfig("mid", rank=1), params, fn, args)
    bound = lj.bind(params, lj.init(plan, params, key=key))
    with pytest.raises(GrowthError, match="'mid' is adapted: the tree comes from"):
        lj.grow(bound, {"embed": 0}, to=8)
    grown, growth = lj.grow(params, {"embed": 0}, to=8)
    with pytest.raises(GrowthError, match=r"'embed' has the shape \(8, 4\); with 6"):
        lj.grow(grown, growth)
    with pytest.raises(GrowthError, match="which says how far, and `to` = 9"):
        lj.grow(params, growth, to=9)
