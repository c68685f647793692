"""Every check passes for good steps; captured constants are found; what is said."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from audited import (
    LAYERS,
    NAMES,
    OUT,
    WIDTH,
    build,
    layer,
    line_of,
    model,
    model_scanned,
)
from drawn import started

import lorax_jax as lj
from lorax_jax._errors import AuditError
from lorax_jax.auditing._report import answer

# A step that is right


def test_a_good_step_passes(stack, each):
    """As many tokens as features: activations have the shape of weights."""
    fn = model(stack, each)
    params, adapter, x = build(fn)
    before = jax.tree.map(np.array, (params, adapter, x))
    report = lj.audit(fn, params, adapter, x)
    assert report.ok, str(report)
    assert report.raise_if_failed() is report
    assert tuple(check.name for check in report.checks) == NAMES
    assert all(check.passed for check in report.checks)
    same = jax.tree.map(np.array_equal, before, (params, adapter, x))
    assert jax.tree.all(same)


@pytest.mark.parametrize("frozen", [(), ("a",), ("b",)])
def test_starting_and_frozen_factors_pass(stack, each, frozen):
    fn = model(stack, each)
    params, _, x = build(fn)
    plan = lj.plan(lj.LoraConfig(["layers", "head"], rank=6), params, fn, (x,))
    report = lj.audit(fn, params, started(plan, frozen=frozen), x)
    assert report.ok, str(report)
    assert all(check.passed for check in report.checks)


@pytest.mark.parametrize("scan, remat", [(False, None), (True, "full")])
def test_whole_models_pass(scan, remat, relaxed):
    config = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    net = lj.models.from_config(
        config, scan_layers=scan, remat=remat, dtype=jnp.bfloat16
    )
    params = net.init(jax.random.key(0))
    # Sequences as long as the model is wide, as wide as the vocabulary is large.
    ids = jax.random.randint(jax.random.key(1), (1, 32), 0, 32)
    plan = lj.plan(lj.LoraConfig("all-linear", rank=3), params, net.apply, (ids,))
    adapter = lj.init(plan, params, key=jax.random.key(2))

    def loss(params, ids):
        logits = net.apply(params, ids).astype(jnp.float32)
        return -jax.nn.log_softmax(logits)[0, :-1, 0].mean()

    lj.audit(loss, params, adapter, ids).raise_if_failed()


def test_attention_scores_of_a_weights_shape_are_no_gradients():
    """One head, as many positions as features: their cotangents are sums as well."""

    def attention(params, x):
        q, k, v = (x @ params["layers"][i] for i in range(LAYERS))
        return jax.nn.softmax(q @ k.T / 4) @ v @ params["head"]

    params, adapter, x = build(attention)
    lj.audit(attention, params, adapter, x).raise_if_failed()


def test_an_adapted_function_is_taken_as_it_is(stack):
    fn = model(stack, layer)
    params, adapter, x = build(fn)
    assert lj.audit(lj.adapt(fn), params, adapter, x).ok
    assert lj.audit(jax.jit(lj.adapt(fn)), params, adapter, x).ok


def test_arguments_go_through():
    def fn(params, x, *, activation, scale):
        return activation(x @ params["head"]) * scale

    params, adapter, x = build(model_scanned())
    del adapter.train["layers"], adapter.fixed["layers"]
    lj.audit(
        fn, params, adapter, x, activation=jnp.tanh, scale=jnp.float32(2)
    ).raise_if_failed()


def test_types_are_enough_for_all_but_the_gradients(stack, each):
    fn = model(stack, each)
    params, adapter, x = build(fn)
    report = lj.audit(fn, *jax.eval_shape(lambda: (params, adapter, x)))
    assert report.ok
    passed = {check.name: check.passed for check in report.checks}
    assert passed == dict.fromkeys(NAMES, True) | {"no zero gradient": None}
    assert "types" in report["no zero gradient"].detail
    bad = model(stack, each, jnp.sort)
    report = lj.audit(bad, *jax.eval_shape(lambda: (params, adapter, x)))
    assert [check.name for check in report.failed] == list(NAMES[:2])


# Constants


def test_a_captured_table_is_found(stack, each):
    table = jnp.ones((64, WIDTH))

    def prepare(x):
        return x + table[:1]

    def fn(params, x):
        return model(stack, each)(params, prepare(x))

    params, adapter, x = build(fn)
    report = lj.audit(fn, params, adapter, x, max_constant=4095)
    assert [check.name for check in report.failed] == ["no large constant"]
    found = report["no large constant"]
    assert "an array that is no argument, 64 x 16 float32, 4,096 bytes" in found.detail
    assert found.source.startswith(line_of(prepare, "table[:1]"))
    assert lj.audit(fn, params, adapter, x, max_constant=4096).ok


def test_a_captured_parameter_is_named():
    params, adapter, x = build(
        lambda params, x: x @ params["layers"][0] @ params["head"]
    )
    captured = params["head"]
    fn = jax.jit(lambda params, x: x @ params["layers"][0] @ captured)
    del adapter.train["head"], adapter.fixed["head"]
    report = lj.audit(fn, params, adapter, x, max_constant=100)
    assert "the parameter 'head', 16 x 12" in report["no large constant"].detail
    assert report["no dense update"].passed


def test_numpy_arrays_are_captured_too():
    mask = np.tril(np.ones((WIDTH, WIDTH), np.float32))

    def fn(params, x):
        return (x * mask) @ params["layers"][0] @ params["head"]

    params, adapter, x = build(fn)
    report = lj.audit(fn, params, adapter, x, max_constant=1000)
    assert "16 x 16 float32, 1,024 bytes" in report["no large constant"].detail
    assert report["no large constant"].source.startswith(line_of(fn, "mask"))


# The report


def test_the_report_reads_well():
    fn = model_scanned()
    params, adapter, x = build(fn)
    text = str(lj.audit(fn, params, adapter, x))
    lines = text.splitlines()
    assert lines[0].split() == ["check", "answer", "detail"]
    assert set(lines[1]) == {"-"}
    for name, line in zip(NAMES, lines[2:8], strict=True):
        assert line.startswith(f"{name} ") and " yes " in line
    assert lines[8].startswith("flops ") and "x frozen" in lines[8]
    assert lines[9] == str(lj.count(params, adapter))
    report = lj.audit(lambda p, x: fn(jax.tree.map(jnp.sort, p), x), params, adapter, x)
    text = str(report)
    assert "no dense update        NO       `" in text
    assert f"\n{' ' * 32}  at {__file__}" in text


def test_costs_are_the_compilers():
    """Two layers in a row: the least that each step has to multiply."""

    def fn(params, x):
        x = jnp.tanh(x @ params["up"])
        return jnp.tanh(x @ params["down"])

    n, d, f, r = 5, WIDTH, OUT, 3
    params = {"up": jnp.ones((d, f)) / d, "down": jnp.ones((f, d)) / f}
    x = jnp.ones((n, d))
    plan = lj.plan(lj.LoraConfig(".*", rank=r), params, fn, (x,))
    adapter = lj.init(plan, params, key=jax.random.key(0))
    costs = lj.audit(fn, params, adapter, x).costs
    # Frozen: both products forward, one back.
    dense = 3 * 2 * n * d * f
    assert dense < costs.frozen_flops < 1.5 * dense
    # For both adapters together, a sum of `in` and of `out` is d + f: two thin products
    # forward, the gradients of A and of B, the cotangent of x A; and that of the upper
    # x. The frozen step has two additions and two sums in their place.
    thin = 5 * 2 * n * r * (d + f) + 2 * n * r * f
    shifts = 2 * n * (d + f)
    assert thin - shifts < costs.flops - costs.frozen_flops < 1.5 * thin
    weights = 2 * 4 * d * f
    assert costs.bytes > costs.frozen_bytes > weights
    assert costs.count == lj.count(params, adapter)


def test_a_function_without_a_gradient_is_refused():
    fn = lambda params, x: (x @ params["head"]).argmax(-1)  # noqa: E731
    params, adapter, x = build(model_scanned())
    with pytest.raises(AuditError, match="returns nothing floating"):
        lj.audit(fn, params, adapter, x)


def test_an_adapter_that_does_not_fit_is_refused():
    params, adapter, x = build(model_scanned())
    params = {"head": params["head"]}
    with pytest.raises(lj._errors.AdapterError, match="'layers', which the param"):
        lj.audit(model_scanned(), params, adapter, x)


def test_many_findings_are_counted():
    found = [(f"finding {i % 10}", f"line {i % 10}") for i in range(20)]
    check = answer("a promise", found, "nothing")
    assert check.passed is False and check.source == "line 0"
    assert check.detail.count("finding") == 8
    assert check.detail.endswith("... (10 in all)")
    assert answer("a promise", [], "nothing") == lj.auditing.Check(
        "a promise", True, "nothing"
    )


def test_checks_are_found_by_name():
    fn = model_scanned()
    report = lj.audit(fn, *jax.eval_shape(lambda: build(fn)))
    assert report[NAMES[2]] is report.checks[2]
    with pytest.raises(KeyError, match="'dense'; the checks are .*no dense update"):
        report["dense"]
