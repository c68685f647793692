"""The exam: every kind of adapter, on every form of base, in every layout."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import pytest
from bases import FORMS
from helpers import Counter, assert_close, made_shapes, primitives
from kinds import KINDS, dense
from layouts import LAYOUTS, ROWS

import lorax_jax as lj
from lorax_jax._errors import TransformError


@dataclasses.dataclass
class Case:
    """One sheet of the exam: parameters, adapters, an input and the right answer."""

    layout: object
    kind: object
    form: object

    def __post_init__(self):
        keys = jax.random.split(jax.random.key(7), 3)
        weight = jax.random.normal(keys[0], self.layout.weight) / 2.0
        self.params = {
            "w": self.form.make(weight, self.layout.role),
            "other": jnp.ones(2),
        }
        plain = {"w": self.form.dense(self.params["w"]), "other": jnp.ones(2)}
        self.adapters = self.kind.adapters(keys[1], plain, self.layout.role)
        if self.layout.ids:
            self.x = jax.random.randint(keys[2], self.layout.x, 0, ROWS)
        else:
            self.x = jax.random.normal(keys[2], self.layout.x)
        self.dense = {**plain, "w": dense(plain["w"], self.adapters)}
        self.plain = plain
        # A product in bfloat16 is as exact as bfloat16 is.
        self.dtype = jnp.bfloat16 if self.layout.name == "cast" else jnp.float32
        role = self.layout.role
        summed = math.prod(role.sizes(self.layout.weight, role.inputs))
        self.length = max(*self.layout.weight, summed)

    def fn(self, params, x):
        return self.layout.fn(params["w"], x)

    def bound(self, adapters=None):
        return self.kind.bind(self.params, adapters or self.adapters)

    def close(self, actual, expected, factor=1.0):
        factor *= self.layout.depth
        assert_close(
            actual, expected, dtype=self.dtype, length=self.length, factor=factor
        )


def _cases():
    for form in FORMS:
        for kind in KINDS:
            for layout in LAYOUTS:
                # Forms of base and kinds of adapter know nothing of each other: a
                # packed base takes the exam with one kind.
                if (
                    layout.name not in form.refuses
                    and layout.name not in kind.refuses
                    and kind.takes(layout)
                    and form.takes(layout)
                    and (form is FORMS[0] or kind is KINDS[0])
                ):
                    name = f"{form.name}-{kind.name}-{layout.name}"
                    yield pytest.param(layout, kind, form, id=name)


@pytest.fixture
def case(request):
    return Case(*request.param)


def _exam(wanted=lambda layout, kind, form: True):
    """A question of the exam, for the cases that are `wanted`."""
    cases = [p for p in _cases() if wanted(*p.values)]
    cases = [pytest.param(p.values, id=p.id) for p in cases]
    return pytest.mark.parametrize("case", cases, indirect=True)


def _alone(layout, kind, form):
    return kind.alone and form is FORMS[0]


exam = _exam()
exam_of_one = _exam(_alone)
exam_of_maps = _exam(lambda *case: _alone(*case) and case[0].maps)
exam_of_types = _exam(lambda layout, kind, form: kind.alone)


@exam
def test_answer(case):
    """Eagerly, under `jit`, and when called again: the dense model's answer."""
    expected = case.fn(case.dense, case.x)
    adapted = lj.adapt(case.fn)
    case.close(adapted(case.bound(), case.x), expected)
    case.close(jax.jit(adapted)(case.bound(), case.x), expected)


@exam
def test_gradients(case):
    """Gradients of A and B are those through the dense matrix, built the slow way."""

    def loss(out):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out))

    def factored(trains):
        adapters = [
            lj.Adapter(train, adapter.fixed)
            for train, adapter in zip(trains, case.adapters, strict=True)
        ]
        return loss(lj.adapt(case.fn)(case.bound(adapters), case.x))

    def slow(trains):
        adapters = [
            lj.Adapter(train, adapter.fixed)
            for train, adapter in zip(trains, case.adapters, strict=True)
        ]
        return loss(case.fn({"w": dense(case.plain["w"], adapters)}, case.x))

    trains = [adapter.train for adapter in case.adapters]
    with jax.numpy_rank_promotion("allow"):
        expected = jax.jit(case.layout.grad(slow))(trains)
    case.close(jax.jit(case.layout.grad(factored))(trains), expected, factor=8)


@exam_of_types
def test_dtypes(case):
    """Results have the dense model's dtype and shape, whatever the factors' dtype."""
    if case.form.name != "dense":
        params = case.params
    else:
        params = {"w": case.params["w"].astype(jnp.bfloat16)}
    x = case.x if case.layout.ids else case.x.astype(jnp.bfloat16)
    if case.form.name != "dense":
        x = case.x
    adapted = jax.eval_shape(lj.adapt(case.fn), lj.bind(params, *case.adapters), x)
    dense = {"w": jnp.zeros(case.params["w"].shape, params["w"].dtype)}
    expected = jax.eval_shape(case.fn, dense, x)
    assert adapted == expected


@exam_of_one
def test_no_dense_delta(case):
    """Nothing of the weight's shape is computed from A and B."""
    jaxpr = jax.make_jaxpr(lj.adapt(case.fn))(case.bound(), case.x)
    plain = jax.make_jaxpr(case.fn)(case.plain, case.x)
    if case.form.name == "dense":
        for shape in _weight_shapes(case):
            assert made_shapes(jaxpr)[shape] <= made_shapes(plain)[shape]


def _weight_shapes(case):
    """The weight's shape, and that of its slices: but not shapes of the results."""
    outs = jax.eval_shape(case.fn, case.plain, case.x)
    taken = {leaf.shape for leaf in jax.tree.leaves(outs)} | {case.x.shape}
    shape = case.layout.weight
    shapes = {shape, shape[1:], shape[::-1]} - taken
    return {shape for shape in shapes if len(shape) > 1}  # vectors are no matrices


@exam_of_types
def test_no_recompilation(case):
    """Other values of A, B, scale and weight: the same compiled program."""
    adapted = lj.adapt(case.fn)
    traced = Counter(lambda params, x: adapted(params, x))
    step = jax.jit(traced)
    for i in range(3):
        adapters = jax.tree.map(lambda x, i=i: x * (i + 1), case.adapters)
        weights = None
        if case.kind.name in ("lora", "two_lora"):  # others have no multiple
            weights = [jnp.float32(i)] * len(adapters)
        step(lj.bind(case.params, *adapters, weights=weights), case.x)
    assert traced.calls == 1


@exam_of_one
def test_eager_call_traces_once(case):
    """An eager call finds the trace of the call before."""
    counted = Counter(case.fn)
    adapted = lj.adapt(lambda params, x: counted(params, x))
    for _ in range(3):
        adapted(case.bound(), case.x)
    assert counted.calls == 1


@exam_of_maps
def test_vmap_over_adapters(case):
    """A leading axis on the adapters alone: one base, many adapters."""
    many = jax.tree.map(lambda x: jnp.stack([x, 2 * x]), case.adapters)
    adapted = lj.adapt(case.fn)

    def run(adapters, x):
        return adapted(case.bound(adapters), x)

    got = jax.vmap(run, in_axes=(0, None))(many, case.x)
    for i, factor in enumerate((1, 2)):
        one = jax.tree.map(lambda x, f=factor: f * x, case.adapters)
        row = jax.tree.map(lambda leaf, i=i: leaf[i], got)
        case.close(row, run(one, case.x), factor=8)


@exam_of_maps
def test_vmap_over_inputs(case):
    """A leading axis on the input alone."""
    many = jnp.stack([case.x, case.x[::-1]])
    adapted = lj.adapt(case.fn)
    got = jax.vmap(adapted, in_axes=(None, 0))(case.bound(), many)
    for i in range(2):
        row = jax.tree.map(lambda leaf, i=i: leaf[i], got)
        case.close(row, adapted(case.bound(), many[i]))


@pytest.mark.parametrize(
    "layout", [la for la in LAYOUTS if not la.maps], ids=lambda layout: layout.name
)
def test_what_jax_cannot_map(layout):
    """JAX maps no ragged product over one of its arguments: not the model's either."""
    case = Case(layout, KINDS[0], FORMS[0])
    many = jnp.stack([case.x, case.x])
    for fn, params in ((case.fn, case.plain), (lj.adapt(case.fn), case.bound())):
        with pytest.raises(NotImplementedError, match="ragged_dot vmap"):
            jax.vmap(fn, in_axes=(None, 0))(params, many)


@exam_of_one
def test_under_remat_and_scan(case):
    """Inside the caller's own `checkpoint` and `scan`, values and gradients stay."""
    adapted = lj.adapt(case.fn)

    def total(params, x):
        return sum(
            jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(adapted(params, x))
        )

    def scanned(train):
        adapters = [
            lj.Adapter(t, a.fixed) for t, a in zip(train, case.adapters, strict=True)
        ]
        bound = case.bound(adapters)
        body = jax.checkpoint(lambda bound, x: total(bound, x))
        many = jnp.stack([case.x, case.x])
        return jax.lax.scan(lambda c, x: (c + body(bound, x), None), 0.0, many)[0]

    def plain(train):
        adapters = [
            lj.Adapter(t, a.fixed) for t, a in zip(train, case.adapters, strict=True)
        ]
        return 2 * total(case.bound(adapters), case.x)

    trains = [adapter.train for adapter in case.adapters]
    case.close(jax.jit(scanned)(trains), jax.jit(plain)(trains))
    got = jax.jit(case.layout.grad(scanned))(trains)
    case.close(got, jax.jit(case.layout.grad(plain))(trains), factor=8)


@exam
def test_merge(case):
    """Merging gives the dense weight, and never touches the base."""
    before = jax.tree.leaves(case.params)
    merged = lj.merge(case.params, *case.adapters)
    assert_close(merged["w"], case.dense["w"], length=case.length)
    assert all(
        x is y for x, y in zip(before, jax.tree.leaves(case.params), strict=True)
    )


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_roles_are_read_off_the_program(layout):
    """Role inference finds what was written by hand, on types alone."""
    w = jax.ShapeDtypeStruct(layout.weight, jnp.float32)
    x = jax.ShapeDtypeStruct(layout.x, jnp.int32 if layout.ids else jnp.float32)
    config = lj.LoraConfig({r"(.*/)?w": layout.rule}, rank=2, tie="shared")
    plan = lj.plan(config, {"w": w}, lambda p, x: layout.fn(p["w"], x), (x,))
    assert plan.slots[0].role == layout.role


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_nothing_adapted_changes_nothing(layout):
    """With nothing adapted, the jaxpr of `adapt(fn)` is `fn`'s."""
    w = jnp.ones(layout.weight)
    x = jnp.ones(layout.x, jnp.int32 if layout.ids else jnp.float32)
    assert str(jax.make_jaxpr(lj.adapt(layout.fn))(w, x)) == str(
        jax.make_jaxpr(layout.fn)(w, x)
    )


@pytest.mark.parametrize(
    "layout, kind, form",
    [(la, KINDS[0], f) for f in FORMS for la in LAYOUTS if la.name in f.refuses]
    + [(la, k, FORMS[0]) for k in KINDS for la in LAYOUTS if la.name in k.refuses],
    ids=lambda x: x.name,
)
def test_refused_combinations_are_refused_clearly(layout, kind, form):
    """What a base or a kind cannot do raises, naming the operation and the weight."""
    case = Case(layout, kind, form)
    with pytest.raises(TransformError, match="cannot use an adapted weight"):
        lj.adapt(case.fn)(case.bound(), case.x)


def test_counts_of_primitives():
    """Adapting one leaf leaves every equation that does not depend on it as it was."""

    def fn(params, x):
        h = jax.nn.gelu(x @ params["w1"])
        return jnp.sort(h @ params["w2"]) + jnp.cos(x).sum()

    params = {"w1": jnp.ones((4, 4)), "w2": jnp.ones((4, 4))}
    x = jnp.ones((2, 4))
    plan = lj.plan(lj.LoraConfig("w2", rank=1), params, fn, (x,))
    bound = lj.bind(params, lj.init(plan, params, key=jax.random.key(0)))
    before = primitives(jax.make_jaxpr(fn)(params, x))
    after = primitives(jax.make_jaxpr(lj.adapt(fn))(bound, x))
    extra = after - before
    assert not before - after
    assert set(extra) == {"dot_general", "mul", "add"} and extra["dot_general"] == 2
