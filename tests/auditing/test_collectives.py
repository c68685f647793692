"""Sharded steps exchange what the frozen step does, or the audit says what more."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lorax_jax as lj
from lorax_jax.auditing import _collectives

BATCH, WIDTH, HIDDEN, RANK = 32, 16, 24, 4
SPECS = {"up": P(None, "model"), "down": P("model", None)}


def unrolled(params, x):
    x = jnp.tanh(x @ params["up"])
    return jnp.tanh(x @ params["down"])


def scanned(params, x):
    def body(x, w):
        return unrolled(w, x), None

    stacked = jax.tree.map(lambda w: w[None], params)
    return jax.lax.scan(jax.checkpoint(body), x, stacked)[0]


@pytest.fixture(params=[unrolled, scanned], ids=["unrolled", "scanned"])
def fn(request):
    return request.param


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((2, 4), ("data", "model"), axis_types=(AxisType.Auto,) * 2)


def build(fn, mesh, a=None, b=None):
    """Tensor and data parallel; A and B where the base's axes are, unless said."""

    def put(x, spec):
        return jax.device_put(x, NamedSharding(mesh, spec))

    keys = jax.random.split(jax.random.key(0), 3)
    params = {
        "up": jax.random.normal(keys[0], (WIDTH, HIDDEN)) / 4,
        "down": jax.random.normal(keys[1], (HIDDEN, WIDTH)) / 4,
    }
    x = jax.random.normal(keys[2], (BATCH, WIDTH))
    config = lj.LoraConfig(["up", "down"], rank=RANK)
    plan = lj.plan(config, params, unrolled, (x,))
    train, fixed = lj.init(plan, params, key=keys[0])
    for name, (first, last) in SPECS.items():
        train[name]["a"] = put(train[name]["a"], a or P(first, None))
        train[name]["b"] = put(train[name]["b"], b or P(None, last))
    params = {name: put(w, SPECS[name]) for name, w in params.items()}
    adapter = lj.Adapter(train, put(fixed, P()))
    return params, adapter, put(x, P("data", None))


def test_factors_that_lie_as_the_base_does_cost_no_exchange(fn, mesh):
    report = lj.audit(fn, *build(fn, mesh))
    assert report.ok, str(report)
    assert report["no extra collective"].detail.startswith("8 devices exchange what")


def test_types_with_shardings_are_enough(fn, mesh):
    types = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
        build(fn, mesh),
    )
    report = lj.audit(fn, *types)
    assert report.ok, str(report)
    assert report["no extra collective"].detail.startswith("8 devices exchange what")


def test_a_factor_that_must_be_gathered_is_found(fn, mesh):
    """Split along the rank, A and B must come together for every product."""
    report = lj.audit(fn, *build(fn, mesh, P(None, "model"), P("model", None)))
    found = report["no extra collective"]
    assert [check.name for check in report.failed] == ["no extra collective"]
    assert "which the frozen step does not have" in found.detail
    assert "(unrolled)" in found.source and __file__ in found.source


def test_a_gathered_factor_is_named_with_its_shape(mesh):
    """B split along an axis that the model wants whole."""

    def fn(params, x):
        y = x @ params["w"]
        return jnp.tanh(jax.lax.with_sharding_constraint(y, NamedSharding(mesh, P())))

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    params = {"w": put(jnp.ones((WIDTH, HIDDEN)) / WIDTH)}
    x = put(jnp.ones((8, WIDTH)))
    plan = lj.plan(lj.LoraConfig("w", rank=RANK), params, fn, (x,))
    train, fixed = lj.init(plan, params, key=jax.random.key(0))
    train["w"] = {"a": put(train["w"]["a"]), "b": put(train["w"]["b"])}
    adapter = lj.Adapter(train, put(fixed))
    assert lj.audit(fn, params, adapter, x).ok
    train["w"]["b"] = put(train["w"]["b"], None, "model")
    found = lj.audit(fn, params, adapter, x)["no extra collective"]
    assert found.passed is False
    assert "`all-gather` of f32[" in found.detail
    assert found.source.startswith(f"{__file__}:") and found.source.endswith("fn)")


def test_one_device_has_nothing_to_exchange():
    params, x = {"w": jnp.ones((WIDTH, HIDDEN)) / WIDTH}, jnp.ones((8, WIDTH))
    fn = lambda params, x: jnp.tanh(x @ params["w"])  # noqa: E731
    plan = lj.plan(lj.LoraConfig("w", rank=RANK), params, fn, (x,))
    adapter = lj.init(plan, params, key=jax.random.key(0))
    found = lj.audit(fn, params, adapter, x)["no extra collective"]
    assert found.passed and found.detail == "one device"


PROGRAM = """HloModule jit_step, num_partitions=8

FileNames
1 "/home/me/model.py"
2 "{machinery}"

FunctionNames
1 "attend"
2 "dot"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=12 end_line=12 column=4 end_column=9}}
2 {{file_name_id=2 function_name_id=2 line=99 end_line=99 column=4 end_column=9}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}

%body (x: f32[4,2]) -> f32[4,8] {{
  %s = (f32[4,2], f32[4,8]) all-gather-start(%x), metadata={{stack_frame_id=2}}
  %d = f32[4,8]{{1,0}} all-gather-done(%s), metadata={{stack_frame_id=2}}
  %r = (bf16[], f32[3]{{0}}) all-reduce(%d, %d), to_apply=%add
  %g = f32[3]{{0}} get-tuple-element(%r), index=1
}}
"""


def test_programs_are_read_as_accelerators_write_them():
    """Asynchronous halves count once, tuples array by array."""
    found = _collectives._collectives(PROGRAM.format(machinery=_collectives.__file__))
    line = "/home/me/model.py:12 (attend)"
    assert found == [
        (("all-gather", "f32", (4, 8)), line),
        (("all-reduce", "bf16", ()), "(unknown line)"),
        (("all-reduce", "f32", (3,)), "(unknown line)"),
    ]
