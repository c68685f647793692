"""Every check passes for good steps and fails for bad ones, at the model's line."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import started
from jax import lax

import lorax_jax as lj
from lorax_jax._errors import AuditError
from lorax_jax.adapters import LowRank
from lorax_jax.auditing import _zeros
from lorax_jax.auditing._report import answer

WIDTH, OUT, LAYERS = 16, 12, 3
NAMES = (
    "no dense update",
    "no base-size gradient",
    "no large constant",
    "no wider activation",
    "no extra collective",
    "no zero gradient",
)


def new_layer():
    """A function that nothing has traced before."""

    def layer(w, x):
        return jnp.tanh(x @ w)

    return layer


layer = new_layer()
FORMS = {
    "plain": lambda layer: layer,
    "jit": jax.jit,
    "remat": lambda layer: jax.jit(jax.checkpoint(layer)),
}


@pytest.fixture(params=FORMS)
def each(request):
    """The layer, in one of the forms that it may take."""
    return FORMS[request.param](new_layer())


@pytest.fixture(params=["unrolled", "scanned"])
def stack(request):
    """A function that runs a layer over stacked weights, and gives the result."""

    def unrolled(apply, w, x):
        for i in range(LAYERS):
            x = apply(w[i], x)
        return x

    def scanned(apply, w, x):
        return lax.scan(lambda x, w: (apply(w, x), None), x, w)[0]

    return {"unrolled": unrolled, "scanned": scanned}[request.param]


def build(fn, dtype=jnp.float32, *, tokens=WIDTH, rank=5):
    """Parameters, adapter and input for `fn`, with as many tokens as features."""
    keys = jax.random.split(jax.random.key(0), 4)
    params = {
        "layers": jax.random.normal(keys[0], (LAYERS, WIDTH, WIDTH), dtype) / 4,
        "head": jax.random.normal(keys[1], (WIDTH, OUT), dtype) / 4,
    }
    x = jax.random.normal(keys[2], (tokens, WIDTH), dtype)
    config = lj.LoraConfig(["layers", "head"], rank=rank)
    plan = lj.plan(config, params, fn, (x,))
    return params, lj.init(plan, params, key=keys[3]), x


def model(stack, apply, prepare=lambda w: w):
    """A stack of layers and a head; `prepare` is what is done to each layer's w."""

    def fn(params, x):
        x = stack(lambda w, x: apply(prepare(w), x), params["layers"], x)
        return x @ params["head"]

    return fn


def line_of(fn, text):
    """`file:line` of the first line of `fn` that holds `text`."""
    lines, first = inspect.getsourcelines(fn)
    at = next(i for i, line in enumerate(lines) if text in line)
    return f"{inspect.getsourcefile(fn)}:{first + at} "


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


# Dense updates and gradients of the base's size


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


# Widths


def test_bfloat16_stays_bfloat16(stack, each):
    fn = model(stack, each)
    params, adapter, x = build(fn, jnp.bfloat16)
    assert adapter.train["head"]["a"].dtype == jnp.float32
    assert lj.audit(fn, params, adapter, x)["no wider activation"].passed


def test_a_base_that_widens_is_not_blamed(stack):
    def wide(w, x):
        y = (x @ w).astype(jnp.float32)
        return (y / (1 + jnp.abs(y))).astype(jnp.bfloat16)

    fn = model(stack, wide)
    params, adapter, x = build(fn, jnp.bfloat16)
    assert lj.audit(fn, params, adapter, x).ok


def widened(self, x, op, inner):
    """A kind of adapter that forgets its output's dtype."""
    y = inner(x).astype(jnp.float32)
    return y + self.delta(x.astype(jnp.float32), op, y)


def test_an_adapter_that_widens_inside_is_blamed(stack, each, monkeypatch):
    """In every layer, although it is cast back; what follows is not blamed."""

    def act(self, x, op, inner):
        return widened(self, x, op, inner).astype(jnp.bfloat16)

    monkeypatch.setattr(LowRank, "act", act)
    fn = model(stack, each)
    params, adapter, x = build(fn, jnp.bfloat16)
    report = lj.audit(fn, params, adapter, x)
    assert [check.name for check in report.failed] == ["no wider activation"]
    found = report["no wider activation"]
    assert found.source.startswith(line_of(layer, "x @ w"))
    assert "makes float32[16,16] where the base has 16 bits" in found.detail


def test_an_adapter_that_hands_on_a_wider_result_is_blamed(each, monkeypatch):
    """Only where it begins: the tanh that goes on in float32 is not to blame."""

    def fn(params, x):
        return each(params["head"], x)

    monkeypatch.setattr(LowRank, "act", widened)
    params, adapter, x = build(model_scanned(), jnp.bfloat16)
    del adapter.train["layers"], adapter.fixed["layers"]
    report = lj.audit(fn, params, adapter, x)
    assert [check.name for check in report.failed] == ["no wider activation"]
    found = report["no wider activation"]
    assert found.source.startswith(line_of(layer, "x @ w"))
    assert "makes float32[16,12] where" in found.detail and "tanh" not in found.detail


# Gradients of zeros


def test_a_stopped_input_is_found(stack, each):
    """Nothing below a `stop_gradient` learns; what lies above it does."""

    def fn(params, x):
        x = stack(each, params["layers"], x)
        return jnp.tanh(lax.stop_gradient(x) @ params["head"])

    params, adapter, x = build(model(stack, each))
    report = lj.audit(fn, params, adapter, x)
    assert [check.name for check in report.failed] == ["no zero gradient"]
    found = report["no zero gradient"]
    assert found.source.startswith(line_of(layer, "x @ w"))
    assert found.detail.count("is zero") == 2 and "'head'" not in found.detail


def test_one_stopped_layer_is_found():
    def fn(params, x):
        for i in range(LAYERS):
            w = params["layers"][i]
            x = x @ (lax.stop_gradient(w) if i == 1 else w)
        return jnp.tanh(x) @ params["head"]

    params, adapter, x = build(model_scanned())
    found = lj.audit(fn, params, adapter, x)["no zero gradient"]
    assert "the gradient of a of 'layers', layer 1 of 3, is zero" in found.detail
    assert "the gradient of b of 'layers', layer 1 of 3, is zero" in found.detail


def test_layers_that_are_left_out_have_no_gradient():
    fn = model_scanned()
    params, _, x = build(fn)
    config = lj.LoraConfig("2/layers", rank=3)
    adapter = lj.init(lj.plan(config, params, fn, (x,)), params, key=jax.random.key(0))
    assert lj.audit(fn, params, adapter, x).ok


def test_the_gradient_of_a_leaf_that_is_trained_whole_is_wanted():
    fn = model_scanned()
    params, _, x = build(fn)
    config = lj.LoraConfig("layers", rank=3, whole="head")
    adapter = lj.init(lj.plan(config, params, fn, (x,)), params, key=jax.random.key(0))
    assert lj.audit(fn, params, adapter, x).ok


def test_a_weight_that_is_not_used_is_found():
    params, adapter, x = build(model_scanned())

    def fn(params, x):
        return jnp.tanh(x @ params["head"])

    found = lj.audit(fn, params, adapter, x)["no zero gradient"]
    assert found.passed is False and found.source == "(never used)"


def test_padded_ranks_have_gradients_where_they_are_true(stack):
    fn = model(stack, layer)
    params, _, x = build(fn)
    targets = {"0/layers": {"rank": 1}, "[12]/layers": {"rank": 4}}
    plan = lj.plan(lj.LoraConfig(targets), params, model_scanned(), (x,))
    adapter = lj.init(plan, params, key=jax.random.key(1))
    assert lj.audit(fn, params, adapter, x).ok
    # The run starts from random B within each layer's true rank only.
    started = _zeros._started(adapter.train["layers"], adapter.fixed["layers"])
    assert (started["b"][0, 1:] == 0).all() and (started["b"][0, 0] != 0).all()
    assert (started["b"][1:] != 0).all()
    assert np.array_equal(started["a"], adapter.train["layers"]["a"])


def model_scanned():
    return model(
        lambda apply, w, x: lax.scan(lambda x, w: (apply(w, x), None), x, w)[0], layer
    )


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
