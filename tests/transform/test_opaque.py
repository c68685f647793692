"""Kernels, foreign code and solvers: refused with the reason, dense on request."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, random_adapter
from jax import lax
from jax.experimental import io_callback, pallas

import lorax_jax as lj
from lorax_jax._errors import TransformError
from lorax_jax.adapters import Role
from lorax_jax.transform._registry import RULES
from lorax_jax.transform.table import README, renewed, table


@pytest.fixture
def params(key):
    return {"w": jax.random.normal(key, (8, 8)) / 4 + 2 * jnp.eye(8)}


@pytest.fixture
def adapter(key, params):
    return random_adapter(key, params, [Role("w", (0,), (1,))])


@pytest.fixture
def x(key):
    return jax.random.normal(key, (8,))


def kernel(params, x):
    def body(w, x, y):
        y[...] = x[...] @ w[...]

    out = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pallas.pallas_call(body, out_shape=out, interpret=True)(params["w"], x)


def callback(params, x):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda w, x: np.asarray(x) @ w, like, params["w"], x)


def effectful(params, x):
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return io_callback(lambda w, x: np.asarray(x) @ w, like, params["w"], x)


def printed(params, x):
    jax.debug.print("{}", params["w"])
    return x @ params["w"]


def watched(params, x):
    jax.debug.callback(lambda w: None, params["w"])
    return x @ params["w"]


def solve(params, x):
    w = params["w"]
    solver = lambda mv, b: jnp.linalg.solve(jax.jacobian(mv)(b), b)  # noqa: E731
    return lax.custom_linear_solve(lambda v: w @ v, x, solver, solver)


KERNEL, CALLBACK = "an opaque kernel computes", "a callback hands the dense matrix"
CASES = [
    (kernel, "pallas_call", KERNEL),
    (callback, "pure_callback", CALLBACK),
    (effectful, "io_callback", CALLBACK),
    (printed, "debug_print", CALLBACK),
    (watched, "debug_callback", CALLBACK),
    (solve, "custom_linear_solve", "it has derivatives of its own"),
]


@pytest.mark.parametrize("fn, name, reason", CASES, ids=lambda x: str(x)[:20])
def test_refused_with_the_reason_and_dense_on_request(
    params, adapter, x, fn, name, reason, capfd
):
    bound = lj.bind(params, adapter)
    with pytest.raises(TransformError, match=f"`{name}` cannot use .*: {reason}"):
        lj.adapt(fn)(bound, x)
    got = lj.adapt(fn, materialize=(name,))(bound, x)
    assert_close(got, fn(lj.merge(params, adapter), x), factor=8)
    jax.effects_barrier()


def test_a_foreign_function_is_refused(params, adapter, x):
    def fn(params, x):
        out = jax.ShapeDtypeStruct(x.shape, x.dtype)
        return jax.ffi.ffi_call("mine", out)(params["w"], x)

    with pytest.raises(TransformError, match=f"`ffi_call` cannot use .*: {KERNEL}"):
        lj.adapt(fn)(lj.bind(params, adapter), x)


def test_a_root_is_refused(params, adapter, x):
    """It is a function with a derivative of its own: as such, or as a primitive."""

    def fn(params, x):
        return lax.custom_root(
            lambda v: params["w"] @ v - x,
            x,
            lambda f, v: v,
            lambda g, y: jnp.linalg.solve(jax.jacobian(g)(y), y),
        )

    with pytest.raises(TransformError, match="derivatives? of its own"):
        lj.adapt(fn)(lj.bind(params, adapter), x)


def test_opaque_calls_that_no_weight_enters_stay(params, adapter, x):
    def fn(params, x):
        return kernel({"w": jnp.eye(8)}, x @ params["w"])

    got = lj.adapt(fn)(lj.bind(params, adapter), x)
    assert_close(got, fn(lj.merge(params, adapter), x))


def test_the_table_lists_every_rule_and_is_up_to_date():
    assert renewed(README.read_text()) == README.read_text(), (
        "python -m lorax_jax.transform.table"
    )
    lines = table().splitlines()[2:]
    assert len(lines) == len(RULES)
    assert any("`pallas_call` | refuses" in line for line in lines)
