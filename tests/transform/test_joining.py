"""Weights that a model puts together: one term along batch axes, zeros along others."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, equations, random_adapter
from jax import lax

import lorax_jax as lj
from lorax_jax._errors import TransformError
from lorax_jax.adapters import Adapted, LowRank, Role, Term

D, LAYERS = 6, 4
NAMES = [f"w{i}" for i in range(LAYERS)]


@pytest.fixture
def params(key):
    keys = jax.random.split(key, LAYERS)
    pairs = zip(NAMES, keys, strict=True)
    return {name: jax.random.normal(key, (D, D)) / 2 for name, key in pairs}


@pytest.fixture
def x(key):
    return jax.random.normal(key, (3, D))


def role(name, inputs=(0,), outputs=(1,)):
    return Role(name, inputs, outputs)


def scanned(params, x):
    stack = jnp.stack([params[name] for name in NAMES])
    return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]


def unrolled(params, x):
    for name in NAMES:
        x = jnp.tanh(x @ params[name])
    return x


def test_a_stack_of_layers_has_one_term(key, params, x):
    """The work of a layer is that of the unrolled model: two thin products."""
    adapter = random_adapter(key, params, [role(name) for name in NAMES])
    bound = lj.bind(params, adapter)
    assert_close(
        lj.adapt(scanned)(bound, x), unrolled(lj.merge(params, adapter), x), factor=8
    )
    jaxpr = jax.make_jaxpr(lj.adapt(scanned))(bound, x)
    products = [e for e in equations(jaxpr) if e.primitive.name == "dot_general"]
    assert len(products) == 3
    stacked = lj.adapt(lambda p: jnp.stack([p[name] for name in NAMES], axis=1))(bound)
    assert isinstance(stacked, Adapted) and len(stacked.terms) == 1


def test_ranks_and_scales_may_differ_and_some_may_have_no_adapter(key, params, x):
    first = random_adapter(key, params, [role("w0")], rank=2, scale=0.5)
    third = random_adapter(key, params, [role("w2")], rank=5, scale=-2.0)
    again = random_adapter(key, params, [role("w2")], rank=1)
    adapters = [first, third, again]

    def loss(trains, fn):
        pairs = zip(trains, adapters, strict=True)
        bound = lj.bind(params, *[lj.Adapter(t, a.fixed) for t, a in pairs])
        return (lj.adapt(fn)(bound, x) ** 2).sum()

    trains = [adapter.train for adapter in adapters]
    got = jax.jit(jax.value_and_grad(lambda t: loss(t, scanned)))(trains)
    expected = jax.jit(jax.value_and_grad(lambda t: loss(t, unrolled)))(trains)
    assert_close(got, expected, factor=8)


@pytest.mark.parametrize("write", ["stack", "update", "set"])
def test_every_layer_keeps_its_dropout(key, params, x, write):
    """A stacked layer drops what it drops alone: its key is stacked with it."""
    config = lj.LoraConfig("w.*", rank=2, dropout=0.5, init=False)
    adapter = lj.init(lj.plan(config, params, unrolled, (x,)), params, key=key)
    bound = lj.bind(params, adapter, key=key)

    def written(params, x):
        stack = jnp.zeros((LAYERS, D, D))
        for i, name in enumerate(NAMES):
            if write == "set":
                stack = stack.at[i].set(params[name])
            else:
                stack = lax.dynamic_update_slice(stack, params[name][None], (i, 0, 0))
        return lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, stack)[0]

    fn = scanned if write == "stack" else written
    got = lj.adapt(fn)(bound, x)
    assert_close(got, lj.adapt(unrolled)(bound, x), factor=8)
    assert not np.allclose(got, lj.adapt(unrolled)(lj.bind(params, adapter), x))


def test_dropout_on_some_only_is_refused_along_a_new_axis(key, params, x):
    rules = {"w0": {"dropout": 0.5}, "w.*": {}}
    config = lj.LoraConfig(rules, rank=2)
    adapter = lj.init(lj.plan(config, params, unrolled, (x,)), params, key=key)
    with pytest.raises(TransformError, match="are joined have dropout on some only"):
        lj.adapt(scanned)(lj.bind(params, adapter, key=key), x)


def test_factors_along_different_axes_stay_apart(key, x):
    """Experts of one layout beside experts of another: a term each, with zeros."""
    params = {"w": jnp.ones((2, D, D)), "v": jnp.ones((1, D, D))}
    roles = [Role("w", (1,), (2,), (0,)), Role("v", (2,), (1,), (0,))]

    def fn(params, x):
        both = jnp.concatenate([params["w"], params["v"].swapaxes(1, 2)])
        swapped = jnp.concatenate([params["w"], params["v"]])
        out = jnp.einsum("bd,edf->ebf", x, both)
        return out, jnp.einsum("bd,edf->ebf", x, swapped)

    adapter = random_adapter(key, params, roles)
    got = lj.adapt(fn)(lj.bind(params, adapter), x)
    assert_close(got, fn(lj.merge(params, adapter), x), factor=4)

    def stacked(params, x):
        return x @ jnp.stack([params["w"][0], params["v"][0]])[1]

    with pytest.raises(TransformError, match="joined have factors that run along diff"):
        lj.adapt(stacked)(lj.bind(params, adapter), x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Other(Term):
    """A kind of adapter that nobody has taught to be joined."""

    inner: LowRank

    def act(self, x, op, inner):
        return self.inner.act(x, op, inner)

    def dense(self, weight):
        return self.inner.dense(weight)

    def looks_up(self, axis):
        return False


@pytest.mark.parametrize(
    "others, reason",
    [(("w0",), "Other cannot be joined"), (("w1",), "adapters of different kinds")],
)
def test_kinds_that_cannot_be_joined_are_refused(key, params, x, others, reason):
    bound = lj.bind(params, random_adapter(key, params, [role(n) for n in NAMES]))
    for name in others:
        weight = bound[name]
        bound[name] = Adapted(weight.base, (Other(weight.terms[0]),), weight.origin)
    with pytest.raises(TransformError, match=reason):
        lj.adapt(scanned)(bound, x)


SEVERAL = "smaller than the weight on several axes"


@pytest.mark.parametrize(
    "write, reason",
    [
        (lambda w, v: lax.dynamic_update_slice(v, w[:2, :2], (0, 0)), SEVERAL),
        (lambda w, v: lax.dynamic_update_slice(w, v[:2, :2], (0, 0)), SEVERAL),
        (lambda w, v: w.at[0, 1].set(1.0), "lies along several axes"),
        (lambda w, v: w.at[:2, jnp.array([0, 1])].set(1.0), "several axes"),
        (lambda w, v: w.at[jnp.array([0, 1])].set(v[:2]), "indices may repeat"),
    ],
)
def test_writes_without_a_description_are_refused(key, params, x, write, reason):
    bound = lj.bind(params, random_adapter(key, params, [role("w0")]))
    with pytest.raises(TransformError, match=reason):
        lj.adapt(lambda p, x: x @ write(p["w0"], p["w1"]))(bound, x)


def test_what_is_written_out_of_range_is_dropped_as_it_was(key, params, x):
    """`set` drops it, `dynamic_update_slice` moves it inside."""

    def fn(params, x):
        w = params["w0"].at[D + 1 : D + 2].set(params["w1"][:1])
        w = w.at[D - 1 : D + 3].set(0.0)
        return x @ lax.dynamic_update_slice(w, params["w1"][:2], (D - 1, 0))

    adapter = random_adapter(key, params, [role("w0"), role("w1")])
    got = lj.adapt(fn)(lj.bind(params, adapter), x)
    assert_close(got, fn(lj.merge(params, adapter), x), factor=4)
