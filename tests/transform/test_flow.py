"""Marks travel with values, not with shapes, through every kind of body."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from lorax_jax.transform import Flow

X = jnp.ones(3)


def marks(fn, *args, **kwargs):
    """What each result of `fn` is computed from, its arguments named a, b, c, ..."""
    jaxpr = jax.make_jaxpr(fn)(*args)
    flow = Flow(**kwargs)
    names = [{name} for name in "abcdef"[: len(args)]]
    return ["".join(sorted(m)) for m in flow.run(jaxpr, names)], flow.visits


def test_operations_mix_and_constants_do_not():
    assert marks(lambda a, b, c: (a * b + 1, c, X), X, X, X)[0] == ["ab", "c", ""]


def test_captured_arrays_are_asked_about():
    array = jnp.arange(3.0)
    const = lambda value: frozenset("x") if value is array else frozenset("?")  # noqa: E731
    for wrap in (lambda f: f, jax.jit, jax.checkpoint):
        assert marks(wrap(lambda a: a + array), X, const=const)[0] == ["ax"]


def with_derivative(fn):
    fn = jax.custom_vjp(fn)
    fn.defvjp(lambda *args: (fn(*args), None), lambda _, dy: dy)
    return fn


@pytest.mark.parametrize("wrap", [jax.jit, jax.checkpoint, with_derivative])
def test_calls_are_looked_into(wrap):
    found, visits = marks(wrap(lambda a, b: (jnp.sin(a), jnp.cos(b))), X, X)
    assert found == ["a", "b"]
    assert [visit.primitive for visit in visits] == ["sin", "cos"]


def test_loops_turn_until_nothing_changes():
    """c reaches a's place after three turns; the body is visited once all the same."""

    def body(carry, x):
        a, b, c = carry
        return (a + b, b + c, c), a * x

    def scanned(a, b, c, d):
        return lax.scan(body, (a, b, c), jnp.stack([d, d]))

    found, visits = marks(scanned, X, X, X, X)
    assert found == ["abc", "bc", "c", "abcd"]
    assert [v.primitive for v in visits].count("mul") == 1

    def looped(a, b, c):
        turn = lambda _, carry: body(carry, 1.0)[0]  # noqa: E731
        return lax.fori_loop(0, 5, turn, (a, b, c))

    assert marks(looped, X, X, X)[0][:3] == ["abc", "bc", "c"]


def test_branches_are_alternatives():
    """What chooses is not what the value is made of."""

    def fn(a, b, c):
        return lax.cond(c > 0, jnp.sin, lambda x: x + b, a)

    assert marks(fn, X, X, 1.0)[0] == ["ab"]
    assert marks(lambda a, b, c: jnp.where(c > 0, a, b), X, X, 1.0)[0] == ["ab"]


def test_one_index_picks_and_many_look_up():
    stack = jnp.ones((4, 3))
    pick = lambda a, b: lax.dynamic_index_in_dim(a, b)  # noqa: E731
    assert marks(pick, stack, 2)[0] == ["a"]
    assert marks(lambda a, b: a[b], stack, jnp.array([0, 2]))[0] == ["ab"]
    put = lambda a, b, c: lax.dynamic_update_index_in_dim(a, b, c, 0)  # noqa: E731
    assert marks(put, stack, X, 1)[0] == ["ab"]


def test_barriers_hand_each_value_on():
    assert marks(lambda a, b: lax.optimization_barrier((a, b)), X, X)[0] == ["a", "b"]


def test_more_marks_can_be_given_on_the_way():
    def emit(visit):
        return frozenset("!") if visit.primitive == "sin" else frozenset()

    found, visits = marks(lambda a, b: (jnp.cos(jnp.sin(a)), b * 2), X, X, emit=emit)
    assert found == ["!a", "b"]
    assert [sorted(visit.operands[0]) for visit in visits] == [["a"], ["!", "a"], ["b"]]


def test_lines_and_scopes_of_enclosing_calls():
    @jax.jit
    def inner(x):
        with jax.named_scope("here"):
            return jnp.sort(x)

    with jax.named_scope("there"):
        _, visits = marks(lambda a: inner(a), X)
    (visit,) = visits
    assert visit.primitive == "sort"
    assert visit.source.endswith(
        "(test_lines_and_scopes_of_enclosing_calls.<locals>.inner)"
    )
    assert "here" in visit.scopes
