"""Arguments, results, names, dtypes: what `adapt` must leave as it was."""

import functools

import jax
import jax.numpy as jnp
import pytest
from helpers import Counter, assert_close, equations, made_shapes, random_adapter

import lorax_jax as lj
from lorax_jax._errors import TransformError
from lorax_jax.adapters import Adapted, Role

ROLE = Role("w", (0,), (1,))


@pytest.fixture
def params(key):
    return {"w": jax.random.normal(key, (8, 6)), "b": jnp.ones(6)}


@pytest.fixture
def adapter(key, params):
    return random_adapter(key, params, [ROLE])


@pytest.fixture
def bound(params, adapter):
    return lj.bind(params, adapter)


@pytest.fixture
def x(key):
    return jax.random.normal(key, (4, 8))


def linear(params, x):
    return x @ params["w"] + params["b"][None]


def test_arguments_that_are_no_arrays_stay_what_they_are(bound, x):
    seen = []

    def fn(params, x, *, train, mode="a", depth=(2, "deep"), none=None, act=jnp.tanh):
        seen.append((train, mode, depth, none, act))
        assert isinstance(train, bool) and depth == (2, "deep") and none is None
        return act(x @ params["w"]) if train else x @ params["w"]

    adapted = lj.adapt(fn)
    off, on = adapted(bound, x, train=False), adapted(bound, x, train=True)
    assert_close(on, jnp.tanh(off))
    assert seen == [(t, "a", (2, "deep"), None, jnp.tanh) for t in (False, True)]


def test_static_arguments_are_told_apart_by_type(bound, x):
    counted = Counter(lambda params, x, n: x @ params["w"] * float(n))
    adapted = lj.adapt(lambda params, x, n: counted(params, x, n))
    for n in (1, True, 1.0, 1):
        assert_close(adapted(bound, x, n), adapted(bound, x, 1))
    assert counted.calls == 3


def test_unhashable_arguments_are_allowed(bound, x):
    class Unhashable:
        __hash__ = None
        factor = 2.0

    adapted = lj.adapt(lambda params, x, o: x @ params["w"] * o.factor)
    assert_close(
        adapted(bound, x, Unhashable()), 2.0 * (adapted(bound, x, Unhashable)) / 2.0
    )


def test_results_of_every_kind(bound, x):
    def fn(params, x):
        y = x @ params["w"]
        return {
            "y": y,
            "none": None,
            "pair": (y.sum(), "label"),
            "n": 3,
            "w": params["w"],
        }

    out = lj.adapt(fn)(bound, x)
    assert out["none"] is None and out["pair"][1] == "label" and out["n"] == 3
    assert isinstance(out["w"], Adapted) and out["w"].base is bound["w"].base


def test_weights_may_stand_anywhere_in_the_arguments(bound, x):
    def fn(batch, *, model):
        return batch["x"] @ model[0]["w"]

    got = lj.adapt(fn)({"x": x}, model=[bound])
    assert_close(got, lj.adapt(linear)(bound, x) - 1.0)


def test_keys_are_traced(bound, x, key):
    def fn(params, x, key):
        return x @ params["w"] + jax.random.normal(key, (4, 6))

    counted = Counter(fn)
    adapted = lj.adapt(lambda *args: counted(*args))
    one, two = adapted(bound, x, key), adapted(bound, x, jax.random.key(1))
    assert counted.calls == 1 and not jnp.allclose(one, two)


def test_without_adapted_weights_the_function_itself_is_called(params, x):
    counted = Counter(linear)
    adapted = lj.adapt(counted.__call__)
    for _ in range(2):
        adapted(params, x)
    assert counted.calls == 2  # as an eager function is, no trace involved


def test_the_signature_and_name_are_kept():
    def model_apply(params, x):
        """Doc."""

    adapted = lj.adapt(model_apply)
    assert adapted.__name__ == "model_apply" and adapted.__doc__ == "Doc."
    lj.adapt(functools.partial(model_apply, x=1))  # has no name: no matter


def test_name_stacks_survive(bound, x):
    """A profile of the adapted model reads as the model's does."""

    def fn(params, x):
        with jax.named_scope("block"):
            h = jax.jit(lambda w, x: x @ w)(params["w"], x)
            with jax.named_scope("activation"):
                return jnp.tanh(h)

    text = jax.jit(lj.adapt(fn)).lower(bound, x).as_text(debug_info=True)
    assert "block/activation/tanh" in text
    assert "block" in text and "lora_down" in text and "lora_up" in text


def test_an_operation_without_rule_says_everything(bound, x):
    def fn(params, x):
        return x @ jnp.sort(params["w"])

    with pytest.raises(TransformError) as caught:
        lj.adapt(fn)(bound, x)
    text = str(caught.value)
    assert "`sort` cannot use an adapted weight" in text
    assert "weight  w, shape (8, 6)" in text
    assert "test_adapt.py" in text  # the line in the model
    assert "adapt(fn, materialize=('sort',))" in text


def test_materialize_builds_the_dense_weight_where_allowed(params, adapter, bound, x):
    def fn(params, x):
        return x @ jnp.sort(params["w"])

    expected = fn(lj.merge(params, adapter), x)
    for allowed in ("allow", "sort", ["sort"]):
        assert_close(lj.adapt(fn, materialize=allowed)(bound, x), expected)
    with pytest.raises(TransformError, match="sort"):
        lj.adapt(fn, materialize="cumsum")(bound, x)


def test_a_cast_to_integers_is_refused(bound, x):
    def fn(params, x):
        return x @ params["w"].astype(jnp.int8).astype(x.dtype)

    with pytest.raises(TransformError, match="a cast to int8 is quantization"):
        lj.adapt(fn)(bound, x)


def test_a_product_of_two_adapted_weights_is_refused(key, x):
    params = {"w": jnp.ones((8, 6)), "v": jnp.ones((6, 8))}
    roles = [ROLE, Role("v", (0,), (1,))]
    bound = lj.bind(params, random_adapter(key, params, roles))
    with pytest.raises(TransformError, match="several of its operands are adapted"):
        lj.adapt(lambda p, x: x @ (p["w"] @ p["v"]))(bound, x)


def test_bfloat16_models_never_see_float32(key):
    """Factors in float32, activations in bfloat16: none leaves a layer in float32."""
    params = {"w": jnp.ones((8, 6), jnp.bfloat16)}
    bound = lj.bind(params, random_adapter(key, params, [ROLE]))
    x = jnp.ones((5, 8), jnp.bfloat16)
    jaxpr = jax.make_jaxpr(lj.adapt(lambda p, x: jnp.tanh(x @ p["w"])))(bound, x)
    wide = [
        var.aval.shape
        for eqn in equations(jaxpr)
        for var in eqn.outvars
        if var.aval.dtype == jnp.float32
    ]
    # Only B with the scale folded in, of shape (rank, out), before its cast.
    assert all(shape in [(3, 6), ()] for shape in wide)


def test_stop_gradient_holds_for_the_adapter_too(params, adapter, x):
    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        fn = lj.adapt(lambda p, x: (x @ jax.lax.stop_gradient(p["w"])).sum())
        return fn(bound, x)

    grads = jax.grad(loss)(adapter.train)
    assert all(not leaf.any() for leaf in jax.tree.leaves(grads))


def test_no_gradient_of_the_base_exists(key):
    """The train step computes nothing of a weight's shape: scanned and unrolled."""
    layers, d, f = 3, 16, 40
    params = {"up": jnp.ones((layers, d, f)), "down": jnp.ones((layers, f, d))}
    roles = [Role(name, (1,), (2,), (0,), stack=1) for name in params]
    adapter = random_adapter(key, params, roles)
    x = jnp.ones((5, d))

    def scanned(params, x):
        def body(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"], None

        return jax.lax.scan(body, x, params)[0].sum()

    def unrolled(params, x):
        for i in range(layers):
            x = x + jnp.tanh(x @ params["up"][i]) @ params["down"][i]
        return x.sum()

    for fn in (scanned, unrolled):

        def loss(train, params, fn=fn):
            return lj.adapt(fn)(lj.bind(params, lj.Adapter(train, adapter.fixed)), x)

        jaxpr = jax.make_jaxpr(jax.grad(loss))(adapter.train, params)
        shapes = {(d, f), (f, d), (layers, d, f), (layers, f, d)}
        made = [
            eqn.primitive.name
            for eqn in equations(jaxpr)
            for var in eqn.outvars
            if var.aval.shape in shapes
        ]
        # Slices and transposes of the base itself, and calls that hand it on.
        assert set(made) <= {"transpose", "dynamic_slice", "slice", "squeeze", "jit"}


def test_filled_rows_stay_as_filled(key):
    """Ids out of range along an axis that no factor holds: none can be zero there."""
    params = {"w": jax.random.normal(key, (4, 5))}

    def fn(params, x):
        many = jnp.broadcast_to(params["w"], (3, 4, 5))
        ids = jnp.array([0, 7])
        some = jnp.take(many, ids, axis=0, mode="fill", fill_value=0.0)
        return jnp.einsum("bd,ndf->bnf", x, some)

    bound = lj.bind(params, random_adapter(key, params, [Role("w", (0,), (1,))]))
    with pytest.raises(TransformError, match="padded axis is one that no factor runs"):
        lj.adapt(fn)(bound, jnp.ones((2, 4)))


def test_results_that_nobody_reads_are_not_computed(key):
    """A scan that stacks its weights again, inside a `jit` and around a `remat`."""
    w = jax.random.normal(key, (3, 4, 4))

    @jax.jit
    def run(w, x):
        @jax.checkpoint
        def layer(x, w):
            return jnp.tanh(x @ w), w

        return jax.lax.scan(layer, x, w)

    def fn(params, x):
        y, again = run(params["w"], x)
        del again  # as `nnx.scan` has the state of its layers
        return y

    params, x = {"w": w}, jnp.ones((2, 4))
    role = Role("w", (1,), (2,), (0,), 1)
    adapter = random_adapter(key, params, [role])
    adapted = lj.adapt(fn)
    bound = lj.bind(params, adapter)
    assert_close(adapted(bound, x), fn(lj.merge(params, adapter), x), factor=8)
    jaxpr = jax.make_jaxpr(adapted)(bound, x)
    assert not [shape for shape in made_shapes(jaxpr) if shape in ((4, 4), (3, 4, 4))]
    # Where somebody does read it, the stack would be dense.
    with pytest.raises(TransformError, match="a scan stacks an adapted weight"):
        lj.adapt(lambda params, x: run(params["w"], x))(bound, x)
