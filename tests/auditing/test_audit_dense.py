"""Dense updates and gradients of the base's size are found, at the model's line."""

import jax
import jax.numpy as jnp
import pytest
from audited import NAMES, OUT, WIDTH, build, layer, line_of, model, model_scanned

import lorax_jax as lj
from lorax_jax._errors import AuditError
from lorax_jax.adapters import LowRank


def test_what_adapt_is_allowed_to_build_is_found(stack, each):
    def prepare(w):
        return jnp.sort(w)

    fn = model(stack, each, prepare)
    params, adapter, x = build(model(stack, each))
    report = lj.audit(lj.adapt(fn, materialize="allow"), params, adapter, x)
    dense = report["no dense update"]
    assert dense.passed is False
    assert dense.source.startswith(line_of(prepare, "jnp.sort"))
    assert dense.source.endswith(
        "(test_what_adapt_is_allowed_to_build_is_found.<locals>.prepare)"
    )
    assert "'layers' from A and B" in dense.detail and "'head'" not in dense.detail
    assert report["no base-size gradient"].passed is False
    assert "'layers'" in report["no base-size gradient"].detail
    assert not report.refusal
    with pytest.raises(AuditError, match="fails: no dense update, no base-size"):
        report.raise_if_failed()


def test_what_adapt_refuses_is_found_and_said(stack, each):
    fn = model(stack, each, jnp.sort)
    params, adapter, x = build(model(stack, each))
    report = lj.audit(fn, params, adapter, x)
    assert report["no dense update"].passed is False
    assert "`sort` cannot use an adapted weight" in report.refusal


def test_a_merge_inside_is_found(stack, each):
    """The adapter is closed over, and merged: its factors are known all the same."""
    plain = model(stack, each)
    params, adapter, x = build(plain)

    def merging(params, x):
        return plain(lj.merge(params, adapter), x)

    # Given plain parameters to merge into, it is the adapter's own dense update.
    report = lj.audit(lj.adapt(merging, materialize="allow"), params, adapter, x)
    dense = report["no dense update"]
    assert dense.passed is False
    assert dense.source.startswith(line_of(merging, "lj.merge"))
    assert "'layers'" in dense.detail and "'head'" in dense.detail


def test_an_adapter_merged_from_an_argument_is_found():
    def merging(params, adapter, x):
        return x @ lj.merge({"head": params["head"]}, adapter)["head"]

    params, adapter, x = build(model_scanned())
    head = lj.Adapter({"head": adapter.train["head"]}, {"head": adapter.fixed["head"]})
    params = {"head": params["head"]}
    report = lj.audit(merging, params, head, head, x)
    assert "`add` cannot use an adapted weight" in report.refusal
    assert report["no dense update"].passed is False
    assert report["no dense update"].source.startswith(line_of(merging, "lj.merge"))


@pytest.mark.parametrize("order", ["product", "sum"])
def test_an_adapter_that_builds_its_update_is_found(stack, each, monkeypatch, order):
    """A kind of adapter that multiplies A by B first, by `dot_general` or by hand."""

    def delta(self, x, op, like):
        a, b = self.a.array, self.scale.array * self.b.array
        if order == "product":
            update = a @ b
        else:
            update = (a[:, :, None] * b[None]).sum(1)
        return x @ update

    monkeypatch.setattr(LowRank, "delta", delta)
    fn = model(stack, each)
    params, adapter, x = build(fn)
    report = lj.audit(fn, params, adapter, x)
    assert [check.name for check in report.failed] == list(NAMES[:2])
    maker = "dot_general" if order == "product" else "reduce_sum"
    assert f"`{maker}` builds float32[16,16] of 'layers'" in (
        report["no dense update"].detail
    )
    assert report["no dense update"].source.startswith(line_of(layer, "x @ w"))


def test_a_gradient_of_the_base_is_found_without_a_dense_update(
    stack, each, monkeypatch
):
    """A derivative that takes `dA = (x^T dy) B^T` in the wrong order."""

    @jax.custom_vjp
    def thin(x, a, b):
        return (x @ a) @ b

    def forward(x, a, b):
        return thin(x, a, b), (x, a, b)

    def backward(saved, dy):
        x, a, b = saved
        whole = x.T @ dy
        return (dy @ b.T) @ a.T, whole @ b.T, a.T @ whole

    thin.defvjp(forward, backward)

    def delta(self, x, op, like):
        return thin(x, self.a.array, self.scale.array * self.b.array)

    monkeypatch.setattr(LowRank, "delta", delta)

    fn = model(stack, each)
    params, adapter, x = build(fn)
    report = lj.audit(fn, params, adapter, x)
    assert [check.name for check in report.failed] == ["no base-size gradient"]
    found = report["no base-size gradient"]
    # A derivative has no line of its own in the model, but that of what it derives.
    assert "float32[16,16]" in found.detail and "float32[16,12]" in found.detail
    assert line_of(layer, "x @ w") in found.detail
    assert found.source.startswith(line_of(fn, 'params["head"]'))


def test_experts_are_weights_too():
    """One expert's dense update, picked by an index that depends on the data."""
    experts, x = jnp.ones((4, WIDTH, OUT)), jnp.ones((5, WIDTH))

    def good(params, x):
        return jnp.einsum("td,edf->etf", x, params["w"])

    def bad(params, x):
        best = jnp.argmax(x.sum(0)) % 4
        return x @ jnp.sort(params["w"][best])

    # An axis that the consumer carries through is an adapter-batch axis.
    role = lj.adapters.Role("w", (1,), (2,), (0,))
    factors = {"a": jnp.ones((4, WIDTH, 3)), "b": jnp.ones((4, 3, OUT))}
    arrays = {"scale": jnp.float32(1), "rank": jnp.int32(3)}
    adapter = lj.Adapter({"w": factors}, {"w": lj.adapters.Fixed(role, arrays)})
    params = {"w": experts}
    assert lj.audit(good, params, adapter, x).ok
    report = lj.audit(bad, params, adapter, x)
    assert "builds float32[16,12] of 'w'" in report["no dense update"].detail
    assert report["no dense update"].source.startswith(line_of(bad, "jnp.sort"))
