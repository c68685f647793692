"""The exam: every kind of adapter, on every form of base, in every layout."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bases import FORMS
from helpers import Counter, assert_close, made_shapes, numbers, on_device, primitives
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
        weight = numbers(keys[0], self.layout.weight, scale=0.5)
        self.params = {
            "w": self.form.make(weight, self.layout.role),
            "other": jnp.ones(2),
        }
        self.plain = {"w": self.form.dense(self.params["w"]), "other": jnp.ones(2)}
        self.adapters = self.kind.adapters(keys[1], self.plain, self.layout.role)
        if self.layout.ids:
            self.x = jax.random.randint(keys[2], self.layout.x, 0, ROWS)
        else:
            self.x = numbers(keys[2], self.layout.x)
        # A product in bfloat16 is as exact as bfloat16 is.
        self.dtype = jnp.bfloat16 if self.layout.name == "cast" else jnp.float32
        role = self.layout.role
        summed = math.prod(role.sizes(self.layout.weight, role.inputs))
        self.length = max(*self.layout.weight, summed)
        self.trains = [adapter.train for adapter in self.adapters]

    def adapters_of(self, trains):
        """The adapters with other values."""
        return [
            lj.Adapter(train, adapter.fixed)
            for train, adapter in zip(trains, self.adapters, strict=True)
        ]

    def adapted(self, trains):
        """The adapted model's results for these values of A and B."""
        return lj.adapt(self.fn)(self.bound(self.adapters_of(trains)), self.x)

    def slow(self, trains):
        """The same by the dense weight, built the slow way."""
        w = dense(self.plain["w"], self.adapters_of(trains))
        return self.fn({**self.plain, "w": w}, self.x)

    def graded(self, fn):
        """`fn(trains) -> results` as `trains -> (gradients of a loss, results)`."""

        def loss(trains):
            out = fn(trains)
            # Of small numbers: the sine of large ones is all rounding error.
            leaves = jax.tree.leaves(out)
            return sum(jnp.sum(jnp.sin(leaf / 8)) for leaf in leaves), out

        return self.layout.grad(loss, has_aux=True)

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
exam_of_lora = _exam(lambda *case: _alone(*case) and case[1] is KINDS[0])
exam_of_maps = _exam(lambda *case: _alone(*case) and case[0].maps)
exam_of_types = _exam(lambda layout, kind, form: kind.alone)


@exam
def test_answers_and_gradients(case):
    """Those of the dense weight, built the slow way; and merging builds it too."""

    # Two programs, for a compiler takes its time over each.
    @jax.jit
    def slow(trains):
        weight = dense(case.plain["w"], case.adapters_of(trains))
        return case.graded(case.slow)(trains), weight

    @jax.jit
    def fast(trains, params):
        before = jax.tree.leaves(params)
        merged = lj.merge(params, *case.adapters_of(trains))
        after = jax.tree.leaves(params)
        assert all(x is y for x, y in zip(before, after, strict=True))
        return case.graded(case.adapted)(trains), merged["w"]

    with jax.numpy_rank_promotion("allow"):
        (grads, answer), weight = slow(case.trains)
    (got_grads, got), merged = fast(case.trains, case.params)
    case.close(got, answer)
    case.close(got_grads, grads, factor=8)
    assert_close(merged, weight, length=case.length)


@exam_of_one
def test_under_remat_and_scan(case):
    """Inside the caller's own `checkpoint` and `scan`, values and gradients stay."""

    def scanned(trains):
        many = jnp.stack([case.x, case.x])
        adapted = lj.adapt(case.fn)

        @jax.checkpoint
        def body(bound, x):
            return adapted(bound, x)

        bound = case.bound(case.adapters_of(trains))
        return jax.lax.scan(lambda c, x: (c, body(bound, x)), None, many)[1]

    def twice(trains):
        once = case.adapted(trains)
        return jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), once)

    @jax.jit
    def both(trains):
        return case.graded(twice)(trains), case.graded(scanned)(trains)

    (grads, answer), (got_grads, got) = both(case.trains)
    case.close(got, answer)
    case.close(got_grads, grads, factor=8)


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


def _times(x, number):
    """By NumPy, which compiles nothing."""
    return on_device(np.asarray(x) * np.asarray(number, x.dtype), x.dtype)


@exam_of_types
def test_no_recompilation(case):
    """Other values of A, B, scale and weight: the same compiled program."""
    adapted = lj.adapt(case.fn)
    traced = Counter(lambda params, x: adapted(params, x))
    step = jax.jit(traced)
    for i in range(3):
        adapters = jax.tree.map(lambda x, i=i: _times(x, i + 1), case.adapters)
        weights = None
        if case.kind.name in ("lora", "two_lora"):  # others have no multiple
            weights = [jnp.float32(i)] * len(adapters)
        step.trace(lj.bind(case.params, *adapters, weights=weights), case.x)
    assert traced.calls == 1


@exam_of_lora
def test_eager_calls(case):
    """Eager calls give the compiled answer, and share one trace."""
    counted = Counter(case.fn)
    adapted = lj.adapt(lambda params, x: counted(params, x))
    for _ in range(2):
        found = adapted(case.bound(), case.x)
    assert counted.calls == 1
    case.close(found, jax.jit(case.adapted)(case.trains))


@exam_of_maps
def test_vmap_over_adapters(case):
    """A leading axis on the adapters alone: one base, many adapters."""
    many = jax.tree.map(lambda x: np.stack([x, 2 * x]), case.trains)
    for got, wanted in _mapped_and_in_turn(case.adapted, many):
        case.close(got, wanted, factor=8)


def _mapped_and_in_turn(fn, *args):
    """Pairs of results, for each row of the last argument: by `vmap`, and alone."""
    *same, many = args
    axes = (*(None for _ in same), 0)

    @jax.jit
    def both(same, many):
        rows = [jax.tree.map(lambda x, i=i: x[i], many) for i in range(2)]
        alone = jax.jit(fn)
        return jax.vmap(fn, axes)(*same, many), [alone(*same, row) for row in rows]

    mapped, rows = jax.device_get(both(same, many))
    for i, row in enumerate(rows):
        yield jax.tree.map(lambda x, i=i: x[i], mapped), row


@exam_of_maps
def test_vmap_over_inputs(case):
    """A leading axis on the input alone."""
    many = np.stack([case.x, case.x[::-1]])
    for got, wanted in _mapped_and_in_turn(lj.adapt(case.fn), case.bound(), many):
        case.close(got, wanted)


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
