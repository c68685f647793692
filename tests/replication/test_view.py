"""Running on repeated layers: the answers of the copies, and none of the copies."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from helpers import assert_close
from jax import lax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lorax_jax as lj
from lorax_jax._errors import AdapterError, TransformError
from lorax_jax.transform._jaxpr import equations

# Sizes that nothing else has, so that shapes tell what an array is.
LAYERS, D, F, BATCH = 3, 10, 14, 5
RANGES = ((0, 2), (1, 3), (0, 3))
SOURCES = np.array([0, 1, 1, 2, 0, 1, 2])
N = len(SOURCES)


def block(x, layer):
    h = x * layer["norm"]["scale"][None]
    h = jnp.tanh(h @ layer["up"]["kernel"] + layer["up"]["bias"][None])
    return x + h @ layer["down"]["kernel"].astype(x.dtype)


def model(params, x, remat=None):
    step = block
    if remat == "full":
        step = jax.checkpoint(block)
    elif remat == "dots":
        policy = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
        step = jax.checkpoint(block, policy=policy)
    x, _ = lax.scan(lambda x, p: (step(x, p), None), x, params["layers"])
    return x @ params["head"]


@pytest.fixture
def params():
    keys = jax.random.split(jax.random.key(0), 5)
    draw = jax.random.normal
    return {
        "layers": {
            "norm": {"scale": 1 + 0.1 * draw(keys[0], (LAYERS, D))},
            "up": {
                "kernel": draw(keys[1], (LAYERS, D, F)) / 4,
                "bias": draw(keys[2], (LAYERS, F)) / 4,
            },
            "down": {"kernel": draw(keys[3], (LAYERS, F, D)) / 4},
        },
        "head": draw(keys[4], (D, 4)),
    }


@pytest.fixture
def deeper(params):
    return lj.replicate(params, RANGES)


@pytest.fixture
def copies(params):
    """The same model with its layers copied: what must come out."""
    return params | {"layers": jax.tree.map(lambda w: w[SOURCES], params["layers"])}


X = jax.random.normal(jax.random.key(9), (BATCH, D))

CONFIGS = {
    "lora": {"targets": r".*kernel"},
    "dora": {"targets": r"layers/.*kernel", "dora": True},
    "ranks": {
        "targets": {
            r"layers/[24]/up/kernel": {"rank": 3},
            r"layers/.*kernel": {"rank": 2},
        },
        "layers": [0, 2, 4, 5],
    },
    "bias of B": {"targets": r"layers/up/kernel", "lora_bias": True},
    "biases": {"targets": r"layers/up/kernel", "bias": "lora_only"},
    "some biases": {"targets": r"layers/(1|4)/up/kernel", "bias": "lora_only"},
    "whole": {"targets": r"layers/up/kernel", "whole": r".*scale"},
    "some whole": {
        "targets": r"layers/up/kernel",
        "whole": [r"layers/(2|3)/norm/scale", r"layers/6/down/kernel"],
    },
}


def planned(name, params, fn=model):
    return lj.plan(lj.LoraConfig(rank=2, **CONFIGS[name]), params, fn=fn, args=(X,))


def both(name, deeper, copies):
    """One adapter for each of the two trees, with the same values."""
    plans = [planned(name, tree) for tree in (deeper, copies)]
    assert [s.path for s in plans[0]] == [s.path for s in plans[1]]
    assert plans[0].trainable == plans[1].trainable
    return [drawn(p, t, size=0.3) for p, t in zip(plans, (deeper, copies), strict=True)]


def loss_of(params, adapter, **kwargs):
    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return jnp.sin(lj.adapt(model)(bound, X, **kwargs)).sum()

    return loss


@pytest.mark.parametrize("remat", [None, "full", "dots"])
@pytest.mark.parametrize("name", CONFIGS)
def test_answers_and_gradients(deeper, copies, name, remat):
    one, other = both(name, deeper, copies)
    found = jax.jit(jax.value_and_grad(loss_of(deeper, one, remat=remat)))(one.train)
    wanted = jax.value_and_grad(loss_of(copies, other, remat=remat))(other.train)
    assert_close(found, wanted, length=N * F, factor=8)
    eager = lj.adapt(model)(lj.bind(deeper, one), X, remat=remat)
    assert_close(eager, lj.adapt(model)(lj.bind(copies, other), X), length=N * F)


@pytest.mark.parametrize("name", CONFIGS)
def test_merged(deeper, copies, name):
    one, other = both(name, deeper, copies)
    found, wanted = lj.merge(deeper, one), lj.merge(copies, other)
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    assert_close(found, wanted, length=F)
    assert_close(
        model(found, X), lj.adapt(model)(lj.bind(deeper, one), X), length=N * F
    )


@pytest.mark.parametrize("name", ["lora", "dora", "whole"])
def test_starting_adapters_are_alike(deeper, copies, name):
    inits = [
        lj.init(planned(name, tree), tree, key=jax.random.key(3))
        for tree in (deeper, copies)
    ]
    assert_close(inits[0].train, inits[1].train, length=F)
    bound = lj.bind(deeper, inits[0])
    assert_close(lj.adapt(model)(bound, X), model(copies, X), length=N * F)


def test_without_an_adapter(deeper, copies):
    assert_close(lj.adapt(model)(deeper, X), model(copies, X), length=N * F)
    many = jnp.stack([X, 2 * X])
    mapped = jax.vmap(lj.adapt(model), in_axes=(None, 0))(deeper, many)
    assert_close(mapped[1], model(copies, 2 * X), length=N * F)


def test_many_adapters(deeper, copies):
    one, other = both("lora", deeper, copies)
    run = [lambda a, t=t: lj.adapt(model)(lj.bind(t, a), X) for t in (deeper, copies)]
    many = [jax.tree.map(lambda x: jnp.stack([x, 2 * x]), a) for a in (one, other)]
    found, wanted = (jax.vmap(r)(m) for r, m in zip(run, many, strict=True))
    assert_close(found, wanted, length=N * F, factor=8)


def test_dropout(deeper, copies):
    """Each copy has a mask of its own."""
    found = []
    for tree in (deeper, copies):
        config = lj.LoraConfig(r"layers/.*kernel", rank=2, dropout=0.5)
        adapter = drawn(lj.plan(config, tree, fn=model, args=(X,)), tree, size=0.3)
        bound = lj.bind(tree, adapter, key=jax.random.key(5))
        found.append(lj.adapt(model)(bound, X))
    assert_close(found[0], found[1], length=N * F)


# Nothing is copied -------------------------------------------------------------------


def largest(jaxpr):
    return max(v.aval.size for e in equations(jaxpr) for v in e.outvars)


@pytest.mark.parametrize("remat", [None, "full", "dots"])
@pytest.mark.parametrize("name", ["lora", "dora", "ranks", "biases"])
def test_no_pass_makes_the_replicated_stack(params, deeper, name, remat):
    """No array of the step, forward or backward, is as large as a stack of copies."""
    adapter = drawn(planned(name, deeper), deeper, size=0.3)

    def step(train, fixed, tree):
        return loss_of(tree, lj.Adapter(train, fixed), remat=remat)(train)

    jaxpr = jax.make_jaxpr(jax.value_and_grad(step))(*adapter, deeper)
    assert largest(jaxpr) < N * D * F
    # Copies made inside the step are seen by the same measure.
    copied = jax.make_jaxpr(
        lambda train, fixed, index: step(
            train,
            fixed,
            params | {"layers": jax.tree.map(lambda w: w[index], params["layers"])},
        )
    )(*adapter, SOURCES)
    assert largest(copied) == N * D * F


@pytest.mark.parametrize("name", ["lora", "dora"])
@pytest.mark.parametrize("remat", [None, "full"])
def test_compiled_memory(optimized, name, remat):
    """The base is one argument, and the step's own memory is not that of copies."""
    width, layers, times = 128, 2, 12
    kernels = {"up": (width, width), "down": (width, width)}
    shapes = {
        "layers": {
            n: {"kernel": jax.ShapeDtypeStruct((layers, *shape), jnp.float32)}
            for n, shape in kernels.items()
        }
    }
    x = jax.ShapeDtypeStruct((2, width), jnp.float32)

    def fn(params, x):
        def step(x, p):
            return jnp.tanh(x @ p["up"]["kernel"]) @ p["down"]["kernel"]

        step = jax.checkpoint(step) if remat else step
        return lax.scan(lambda x, p: (step(x, p), None), x, params["layers"])[0]

    tree = lj.replicate(shapes, ((0, layers),) * times)
    config = lj.LoraConfig(".*kernel", rank=1, dora=name == "dora")
    plan = lj.plan(config, tree, fn=fn, args=(x,))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tree)
    adapter = drawn(plan, zeros, size=0.1)

    def step(train, fixed, params, x):
        def loss(train):
            bound = lj.bind(params, lj.Adapter(train, fixed))
            return lj.adapt(fn)(bound, x).sum()

        return jax.value_and_grad(loss)(train)

    compiled = jax.jit(step).lower(*adapter, tree, x).compile()
    memory = compiled.memory_analysis()
    size = 4 * width * width
    beside = sum(leaf.nbytes for leaf in jax.tree.leaves(adapter)) + 4 * 2 * width
    index = 4 * layers * times
    # DoRA keeps norms, of which a step's gradient needs none.
    assert memory.argument_size_in_bytes <= 2 * layers * size + beside + 2 * index
    assert memory.argument_size_in_bytes >= 2 * layers * size
    # Not a third of what the copies of one of the two kernels would take.
    assert memory.temp_size_in_bytes < layers * times * size / 3


def test_counts(params, deeper, copies):
    one, other = both("lora", deeper, copies)
    base = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert lj.count(deeper, one).total == base + lj.count(copies, other).trainable
    assert planned("lora", deeper).base == base
    held = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    # An index for all leaves, and nothing else.
    assert planned("lora", deeper).base_bytes - held <= 4 * 4 * N


def test_plans_of_types(deeper):
    types_ = jax.eval_shape(lambda: deeper)
    plan = planned("ranks", types_)
    assert [s.path for s in plan] == [s.path for s in planned("ranks", deeper)]


def test_the_audit_passes(deeper):
    adapter = drawn(planned("lora", deeper), deeper, size=0.3)
    lj.audit(lambda p, x: model(p, x).sum(), deeper, adapter, X).raise_if_failed()


def test_traced_once(deeper):
    adapter = drawn(planned("lora", deeper), deeper, size=0.3)
    calls = []

    @jax.jit
    def run(params, x):
        calls.append(None)
        return lj.adapt(model)(params, x)

    for factor in (1.0, 2.0):
        run(lj.bind(deeper, adapter, weights=[jnp.float32(factor)]), X)
    assert len(calls) == 1


# What a model may do with it ---------------------------------------------------------


def _fused(layers, x):
    def step(x, w):
        up, gate = jnp.split(w.astype(jnp.float32), 2, axis=1)
        return jnp.tanh((x @ up) * jax.nn.sigmoid(x @ gate)) @ up.T, None

    return lax.scan(step, x, layers["up"]["kernel"])[0]


def _heads(layers, x):
    def step(x, w):
        heads = w.T.reshape(2, F // 2, D)
        return jnp.einsum("bd,nhd->bnh", x, heads).reshape(BATCH, F) @ w.T, None

    return lax.scan(step, x, layers["up"]["kernel"])[0]


def _prepared(layers, x):
    w = (layers["up"]["kernel"] * 0.5).reshape(N, D, 2, F // 2).astype(jnp.bfloat16)

    def step(x, w):
        h = jnp.einsum("bd,dnh->bnh", x, w.astype(x.dtype)).reshape(BATCH, F)
        return x + h @ w.reshape(D, F).T.astype(x.dtype), None

    return lax.scan(step, x, w)[0]


def _indexed(layers, x):
    w = layers["up"]["kernel"]
    for i in (0, 3, -1):
        x = jnp.tanh(x @ w[i]) @ jnp.take(w, jnp.int32(i % N), axis=0).T
    return x


def _some(layers, x):
    w = layers["up"]["kernel"][1::2]
    x, _ = lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, w)
    return lax.scan(
        lambda x, w: (x @ w @ w.T / 9, None), x, layers["up"]["kernel"], reverse=True
    )[0]


def _at_once(layers, x):
    h = jnp.einsum("bd,ldf->blf", x, layers["up"]["kernel"])
    return jnp.einsum("blf,ldf->lbd", jnp.tanh(h), layers["up"]["kernel"])


def _custom(layers, x):
    @jax.custom_vjp
    def normed(x, scale):
        return x * scale[None]

    normed.defvjp(
        lambda x, scale: (x * scale[None], scale),
        lambda scale, g: (2 * g * scale[None], jnp.zeros_like(scale)),
    )

    def step(x, layer):
        x = normed(x, layer["norm"]["scale"])
        return jnp.tanh(x @ layer["up"]["kernel"]) @ layer["down"]["kernel"], None

    return lax.scan(step, x, layers)[0]


def _choice(layers, x):
    def step(x, w):
        even = lax.cond(x.sum() > 0, lambda w: x @ w, lambda w: -x @ w, w)
        return lax.fori_loop(0, 2, lambda i, y: jnp.tanh(y @ w.T @ w), even) @ w.T, None

    return lax.scan(step, x, layers["up"]["kernel"])[0]


def _each(layers, x):
    rows = jnp.stack([x] * N, 1)
    return jnp.einsum("bld,ldf->lbf", rows, layers["up"]["kernel"])


USES = [_fused, _heads, _prepared, _indexed, _some, _at_once, _each, _custom, _choice]


@pytest.mark.parametrize("use", USES, ids=lambda use: use.__name__)
@pytest.mark.parametrize("adapted", [True, False])
def test_uses(deeper, copies, use, adapted):
    def fn(params, x):
        return use(params["layers"], x)

    if not adapted:
        assert_close(lj.adapt(fn)(deeper, X), fn(copies, X), length=N * F, factor=8)
        return
    found = []
    for tree in (deeper, copies):
        config = lj.LoraConfig("layers/up/kernel", rank=2, tie="shared")
        adapter = drawn(lj.plan(config, tree, fn=fn, args=(X,)), tree, size=0.3)

        def loss(train, tree=tree, fixed=adapter.fixed):
            return jnp.sin(
                lj.adapt(fn)(lj.bind(tree, lj.Adapter(train, fixed)), X)
            ).sum()

        if use is _choice:  # JAX does not go backwards through its loop
            found.append(loss(adapter.train))
        else:
            found.append(jax.value_and_grad(loss)(adapter.train))
    # A product in bfloat16 is rounded alike on both sides.
    assert_close(found[0], found[1], length=N * F, factor=64)


def test_a_plain_function_is_told(params, deeper):
    w = deeper["layers"]["up"]["kernel"]
    with pytest.raises(TransformError, match=r"plain function.*lj\.adapt\(fn\)"):
        X @ w
    turned = lj.replicate(params, ((1, 3), (0, 1)))  # as many layers as before
    with pytest.raises(TransformError, match="plain function"):
        model(turned, X)


def test_what_needs_all_of_them_is_refused(deeper, copies):
    def fn(params, x):
        return x @ jnp.cos(params["layers"]["up"]["kernel"]).sum(0)

    match = r"(?s)`cos` cannot use a packed weight.*layers/up/kernel, shape \(7, 10, 14"
    with pytest.raises(TransformError, match=match):
        lj.adapt(fn)(deeper, X)
    built = lj.adapt(fn, materialize=("cos",))(deeper, X)
    assert_close(built, fn(copies, X), length=N * D)

    def summed(params, x):
        many = jnp.stack([x] * N, 1)
        return jnp.einsum("bld,ldf->bf", many, params["layers"]["up"]["kernel"])

    match = r"(?s)`dot_general` cannot.*all 7 of a stack's replicated layers at once"
    with pytest.raises(TransformError, match=match):
        lj.adapt(summed)(deeper, X)
    built = lj.adapt(summed, materialize="allow")(deeper, X)
    assert_close(built, summed(copies, X), length=N * D, factor=8)


@pytest.mark.parametrize(
    "change, says",
    [
        (lambda w: w * jnp.arange(1.0, N + 1)[:, None, None], "scaled by its own"),
        (lambda w: jnp.pad(w, ((1, 0), (0, 0), (0, 0))), "padded with others"),
        (lambda w: jnp.broadcast_to(w, (2, *w.shape))[0], "get a new axis"),
        (lambda w: w.reshape(N * D, F).reshape(N, D, F), "merges axes"),
    ],
)
def test_what_changes_the_copies_is_refused(deeper, change, says):
    def fn(params, x):
        w = change(params["layers"]["up"]["kernel"])
        return lax.scan(lambda x, w: (jnp.tanh(x @ w) @ w.T, None), x, w)[0]

    with pytest.raises(TransformError, match=says):
        lj.adapt(fn)(deeper, X)


def test_layers_trained_whole_beside_a_packed_base(deeper):
    """Only what can be written into takes some of its layers from an adapter."""
    from bases import ToyInt8

    base = ToyInt8.quantize(jnp.ones((N, D)))
    adapter = drawn(planned("some whole", deeper), deeper, size=0.3)
    deeper["layers"]["norm"]["scale"] = base
    with pytest.raises(
        AdapterError, match="Some layers of .*ToyInt8 cannot be written"
    ):
        lj.bind(deeper, adapter)


def test_on_a_mesh(params, copies):
    """The stack is sharded as it was; the index is one number a layer."""
    mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))

    def place(path, leaf):
        spec = P(None, None, "d") if leaf.ndim == 3 else P()
        return jax.device_put(leaf, NamedSharding(mesh, spec))

    placed = jax.tree_util.tree_map_with_path(place, params)
    deeper = lj.replicate(placed, RANGES)
    one, other = both("lora", deeper, copies)
    found = jax.jit(lambda t, a, x: lj.adapt(model)(lj.bind(t, a), x))(deeper, one, X)
    wanted = lj.adapt(model)(lj.bind(copies, other), X)
    assert_close(found, wanted, length=N * F)
