"""Programs that are easy to misread."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import assert_close, random_adapter

import lorax_jax as lj
from lorax_jax._errors import AdapterError, PlanError, TransformError
from lorax_jax.adapters import Role

D = 6


def struct(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def paths(config, params, fn, *args):
    return [site.path for site in lj.plan(config, params, fn, args)]


def test_projections_into_a_residual_stream_are_no_heads():
    """As wide as a table has rows, and on the way to the result: but never alone."""
    params = {
        "tokens": struct(20, D),
        "positions": struct(D, D),
        "w": [struct(D, D) for _ in range(2)],
    }

    def fn(params, ids, positions):
        x = jnp.take(params["tokens"], ids, axis=0)
        x = x + jnp.take(params["positions"], positions, axis=0)
        for w in params["w"]:
            x = x + jnp.tanh(x) @ w
        return x

    ids = struct(2, 3, dtype=jnp.int32)
    assert paths(lj.LoraConfig("all-linear", rank=2), params, fn, ids, ids) == [
        "w/0",
        "w/1",
    ]


def test_a_weight_rescaled_by_a_parameter(key):
    params = {"w": jax.random.normal(key, (4, D)), "g": jnp.arange(1.0, D + 1)}
    x = jnp.ones((3, 4))

    def fn(params, x):
        return x @ (params["w"] * params["g"][None])

    config = lj.LoraConfig("w", rank=2, init=False)
    adapter = lj.init(lj.plan(config, params, fn, (x,)), params, key=key)
    got = lj.adapt(fn)(lj.bind(params, adapter), x)
    assert_close(got, fn(lj.merge(params, adapter), x))
    with pytest.raises(PlanError, match="only mul reads it"):
        lj.plan(lj.LoraConfig("g"), params, fn, (x,))


def test_nested_stacks_count_outer_first():
    params = {"s": {"w": struct(2, 3, D, D)}}

    def fn(params, x):
        def inner(x, w):
            return jnp.tanh(x @ w), None

        def outer(x, p):
            return jax.lax.scan(inner, x, p["w"])[0], None

        return jax.lax.scan(outer, x, params["s"])[0]

    found = paths(lj.LoraConfig("s/w", rank=2), params, fn, struct(4, D))
    assert found == [f"s/{i}/{j}/w" for i in range(2) for j in range(3)]


def _stack(n):
    return {"up": {"w": struct(n, D, D)}, "down": {"w": struct(n, D, D)}}


@pytest.mark.parametrize("how", ["scanned", "indexed"])
def test_two_stacks_of_one_length_stay_apart(how):
    params = {"encoder": _stack(3), "decoder": _stack(3)}

    def body(x, p):
        return jnp.tanh(x @ p["up"]["w"]) @ p["down"]["w"], None

    @jax.jit
    def run(stack, x):
        return jax.lax.scan(body, x, stack)[0]

    def fn(params, x):
        for name in ("encoder", "decoder"):
            if how == "scanned":
                x = run(params[name], x)
            else:
                for i in range(3):
                    layer = jax.tree.map(lambda w, i=i: w[i], params[name])
                    x, _ = body(x, layer)
        return x

    found = paths(lj.LoraConfig("all-linear", rank=2), params, fn, struct(4, D))
    assert "decoder/0/up/w" in found and "encoder/2/down/w" in found


def test_layers_are_counted_behind_a_name():
    params = [{"emb": struct(9, D)}, {"layers": [struct(D, D) for _ in range(3)]}]

    def fn(params, ids):
        x = jnp.take(params[0]["emb"], ids, axis=0)
        for w in params[1]["layers"]:
            x = jnp.tanh(x @ w)
        return x.sum()

    ids = struct(2, dtype=jnp.int32)
    config = lj.LoraConfig("all-linear", rank=2, layers=1)
    assert paths(config, params, fn, ids) == ["1/layers/1"]


@pytest.mark.parametrize("dtype", ["int8", "complex64"])
def test_weights_that_are_not_floating_are_refused(dtype):
    params = {"w": jnp.ones((4, D), dtype)}

    def fn(params, x):
        return x @ params["w"].real.astype(jnp.float32)

    with pytest.raises(
        (PlanError, TransformError), match=f"dtype {dtype}|only real reads"
    ):
        lj.plan(lj.LoraConfig("w", rank=1), params, fn, (struct(2, 4),))
    role = Role("w", (0,), (1,))
    with pytest.raises(AdapterError, match=f"'w' has the dtype {dtype}"):
        lj.bind(params, random_adapter(jax.random.key(0), {"w": struct(4, D)}, [role]))


def test_a_box_of_two_arrays():
    params = {"q": nnx.Param({"w": jnp.ones((4, D)), "v": jnp.ones((D, 3))})}

    def fn(params, x):
        return x @ params["q"]["w"] @ params["q"]["v"]

    found = paths(lj.LoraConfig("all-linear", rank=1), params, fn, struct(2, 4))
    assert sorted(found) == ["q/v", "q/w"]


def test_a_stack_read_whole_as_well_is_one_site():
    params = {"w": struct(3, D, D)}

    def fn(params, x):
        x = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]
        return jnp.einsum("bd,ldf->blf", x, params["w"])

    plan = lj.plan(
        lj.LoraConfig("w", rank=2, tie="shared"), params, fn, (struct(2, D),)
    )
    assert [site.path for site in plan] == ["w"]


def test_weights_handed_to_a_device_beside_other_values(key):
    params = {"w": jax.random.normal(key, (4, D))}
    x = jnp.ones((3, 4))

    def fn(params, x):
        w, x = jax.device_put((params["w"], x))
        w, x = jax.lax.optimization_barrier((w, x))
        return x @ w

    config = lj.LoraConfig("w", rank=2, init=False)
    adapter = lj.init(lj.plan(config, params, fn, (x,)), params, key=key)
    got = lj.adapt(fn)(lj.bind(params, adapter), x)
    assert_close(got, x @ lj.merge(params, adapter)["w"])


def test_a_thousand_rules_compile_once():
    params = {str(i): struct(2, 2) for i in range(1000)}
    rules = {str(i): {"rank": 1} for i in range(1000)}
    roles = {name: {"inputs": (0,), "outputs": (1,)} for name in params}
    assert len(lj.plan(lj.LoraConfig(rules), params, roles=roles)) == 1000


def test_raw_mistakes_get_clear_errors(key):
    params = {"w": jnp.ones((4, D))}
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    x = jnp.ones((3, 4))
    plan = lj.plan(lj.LoraConfig("w", rank=2), params, fn, (x,))
    adapter = lj.init(plan, params, key=key)
    with pytest.raises(PlanError, match="is no `LoraConfig`"):
        lj.plan("all-linear", params, fn, (x,))
    with pytest.raises(PlanError, match="in a tuple: `args=\\(x,\\)`"):
        lj.plan(lj.LoraConfig("w"), params, fn, x)
    with pytest.raises(PlanError, match="must give each of the 2 axes"):
        lj.plan(lj.LoraConfig("w"), params, roles={"w": (0, 1)})
    with pytest.raises(TransformError, match="used in a plain function"):
        x @ lj.bind(params, adapter)["w"]
    with pytest.raises(TransformError, match="Is 'error' or 'allow' meant"):
        lj.adapt(fn, materialize="eror")
    with pytest.raises(TransformError, match="`materialize` = True"):
        lj.adapt(fn, materialize=True)
    with pytest.raises(AdapterError, match="has the shape \\(2,\\)"):
        lj.bind(params, adapter, weights=[jnp.ones(2)])
    lacking = lj.Adapter({"w": {"a": adapter.train["w"]["a"]}}, adapter.fixed)
    with pytest.raises(AdapterError, match="lacks \\['b'\\]"):
        lj.bind(params, lacking)
    with pytest.raises(AdapterError, match="which is no array"):
        lj.bind({"w": 1.0}, adapter)
    with pytest.raises(AdapterError, match="inside `jit` there are none"):
        jax.jit(lambda p: lj.merge(p, adapter, safe=True))(params)


def test_old_style_keys_and_repeated_binding(key):
    params = {"w": jnp.zeros((64, 64))}
    config = lj.LoraConfig("w", rank=4, dropout=0.5, init=False)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    x = jnp.ones((2, 64))
    adapter = lj.init(lj.plan(config, params, fn, (x,)), params, key=key)
    old = jax.random.key_data(jax.random.key(3))
    run = lambda *a: lj.adapt(fn)(lj.bind(*a, key=old), x)  # noqa: E731
    once = lj.adapt(fn)(lj.bind(params, adapter, adapter, key=old), x)
    twice = lj.adapt(fn)(
        lj.bind(lj.bind(params, adapter, key=old), adapter, key=old), x
    )
    np.testing.assert_allclose(once, twice, rtol=1e-5)
    assert not np.allclose(once, 2 * run(params, adapter))
