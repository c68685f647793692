"""`jit`, `remat` and functions with derivatives of their own."""

import jax
import jax.numpy as jnp
import pytest
from helpers import Counter, assert_close, equations, primitives, random_adapter
from jax._src.ad_checkpoint import saved_residuals

import lorax_jax as lj
from lorax_jax._errors import TransformError
from lorax_jax.adapters import Role

ROLE = Role("w", (0,), (1,))


@pytest.fixture
def params(key):
    return {"w": jax.random.normal(key, (8, 6)), "v": jax.random.normal(key, (6, 8))}


@pytest.fixture
def adapter(key, params):
    return random_adapter(key, params, [ROLE])


@pytest.fixture
def x(key):
    return jax.random.normal(key, (4, 8))


def named(jaxpr, name):
    return [e for e in equations(jaxpr) if e.params.get("name") == name]


def test_unadapted_inner_calls_stay_the_calls_they_were(params, adapter, x):
    @jax.jit
    def untouched(v, h):
        return h @ v

    def fn(params, x):
        return untouched(params["v"], x @ params["w"])

    before = named(jax.make_jaxpr(fn)(params, x), "untouched")[0]
    after = named(
        jax.make_jaxpr(lj.adapt(fn))(lj.bind(params, adapter), x), "untouched"
    )[0]
    assert after.params["jaxpr"] is before.params["jaxpr"]


def test_adapted_inner_jits_keep_their_name(params, adapter, x):
    @jax.jit
    def projection(w, x):
        return x @ w

    def fn(params, x):
        return projection(params["w"], x)

    jaxpr = jax.make_jaxpr(lj.adapt(fn))(lj.bind(params, adapter), x)
    (call,) = named(jaxpr, "projection")
    assert primitives(call.params["jaxpr"])["dot_general"] == 3


def test_one_trace_for_layers_that_differ_in_values_alone(key, x):
    """Paths are for messages: they do not keep layers from sharing a trace."""

    @jax.jit
    def layer(w, x):
        return jnp.tanh(x @ w)

    def fn(params, x):
        for name in ("w0", "w1", "w2"):
            x = layer(params[name], x)
        return x

    params = {f"w{i}": jnp.eye(8) * (i + 1) for i in range(3)}
    roles = [Role(name, (0,), (1,)) for name in params]
    bound = lj.bind(params, random_adapter(key, params, roles))
    calls = named(jax.make_jaxpr(lj.adapt(fn))(bound, x), "layer")
    assert len(calls) == 3
    assert len({id(call.params["jaxpr"]) for call in calls}) == 1


def plainly(w, x):
    return jnp.tanh(x @ w)


def scanned(w, x):
    return jax.lax.scan(lambda c, x: (c, plainly(w, x)), 0.0, x[None])[1][0]


@pytest.mark.parametrize("block", [plainly, jax.jit(plainly), scanned])
def test_remat_policy_saves_the_thin_product_only(params, adapter, x, block):
    """A policy that saves products saves `x W` and `x A`, and recomputes `(x A) B`."""
    policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable

    def fn(params, x):
        return jax.checkpoint(block, policy=policy)(params["w"], x).sum()

    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return lj.adapt(fn)(bound, x)

    residuals = saved_residuals(loss, adapter.train)
    shapes = [aval.shape for aval, source in residuals if "argument" not in source]
    shapes = [shape[-2:] for shape in shapes]
    assert shapes.count((4, 3)) == 1  # x A
    assert shapes.count((4, 6)) == 1  # x W, and not (x A) B beside it


def test_remat_without_policy_stays_so(params, adapter, x):
    def fn(params, x):
        return jax.checkpoint(lambda w, x: jnp.tanh(x @ w))(params["w"], x).sum()

    jaxpr = jax.make_jaxpr(lj.adapt(fn))(lj.bind(params, adapter), x)
    (call,) = [e for e in equations(jaxpr) if "prevent_cse" in e.params]
    assert call.params["policy"] is None and call.params["prevent_cse"] is True


def test_custom_derivatives_that_no_weight_enters_are_rebound(params, adapter, x):
    def fn(params, x):
        return jax.nn.silu(jax.nn.relu(x @ params["w"])).sum()

    def loss(train):
        return lj.adapt(fn)(lj.bind(params, lj.Adapter(train, adapter.fixed)), x)

    merged = lj.merge(params, adapter)
    assert_close(loss(adapter.train), fn(merged, x))
    assert primitives(jax.make_jaxpr(loss)(adapter.train))["custom_jvp_call"] >= 1


@jax.custom_vjp
def straight_through(w):
    """Rounds, and lets gradients through as if it did not."""
    return jnp.round(w)


straight_through.defvjp(lambda w: (jnp.round(w), None), lambda _, g: (2.0 * g,))


def rounded(params, x):
    return x @ straight_through(params["w"])


def test_a_weight_that_enters_a_custom_derivative_is_refused(params, adapter, x):
    with pytest.raises(TransformError, match="(?s)`w`.*derivative of its own.*custom="):
        lj.adapt(rounded)(lj.bind(params, adapter), x)


def test_custom_materialize_keeps_the_rule(params, adapter, x):
    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return lj.adapt(rounded, custom="materialize")(bound, x).sum()

    merged = lj.merge(params, adapter)
    assert_close(loss(adapter.train), rounded(merged, x).sum())
    grads = jax.grad(loss)(adapter.train)["w"]
    # The rule doubles gradients: dB = s A^T (2 x^T 1).
    a, scale = adapter.train["w"]["a"], adapter.fixed["w"]["scale"]
    assert_close(grads["b"], scale * a.T @ (2.0 * x.T @ jnp.ones((4, 6))), factor=4)


def test_custom_primal_differentiates_the_body(params, adapter, x):
    @jax.custom_vjp
    def project(w, x):
        return x @ w

    project.defvjp(
        lambda w, x: (x @ w, (w, x)),
        lambda res, g: (100.0 * res[1].T @ g, g @ res[0].T),
    )

    def fn(params, x):
        return project(params["w"], x).sum()

    def loss(train, **options):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return lj.adapt(fn, **options)(bound, x)

    grads = jax.grad(lambda t: loss(t, custom="primal"))(adapter.train)["w"]
    a, scale = adapter.train["w"]["a"], adapter.fixed["w"]["scale"]
    assert_close(grads["b"], scale * a.T @ (x.T @ jnp.ones((4, 6))), factor=4)


def test_an_unknown_option_is_refused():
    with pytest.raises(TransformError, match="`custom` = 'maybe'"):
        lj.adapt(rounded, custom="maybe")


def test_a_function_that_closes_over_a_tracer_is_traced_anew(params, adapter, x):
    """No cache may hold a value of another trace."""
    held = []
    counted = Counter(lambda params, x: x @ params["w"] + held[0])
    adapted = lj.adapt(lambda params, x: counted(params, x))

    @jax.jit
    def outer(adapter, shift):
        held[:] = [shift]
        return adapted(lj.bind(params, adapter), x)

    for shift in (jnp.zeros(()), jnp.ones(6)[None]):
        expected = x @ lj.merge(params, adapter)["w"] + shift
        assert_close(outer(adapter, shift), expected)
