"""Singular directions of gradients against dense gradients, in every layout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, made_shapes, numbers

import lorax_jax as lj
from lorax_jax.errors import CaptureError
from lorax_jax.statistics import GradientFactors

LAYERS, D, F, ROWS = 3, 8, 6, 11


def weight(seed, *shape):
    return numbers(jax.random.key(seed), shape) / np.sqrt(shape[-2])


def mean_gradient(loss, params, batches, weights=None):
    """The dense one, in float64 sums."""
    grads = [jax.grad(loss)(params, *batch) for batch in batches]

    def mean(*leaves):
        return np.average(np.asarray(leaves, np.float64), axis=0, weights=weights)

    return jax.tree.map(mean, *grads)


def rebuilt(factors):
    return np.einsum("...ik,...k,...kj->...ij", factors.u, factors.s, factors.v)


def capture(loss, params, batches, targets, rank=2, **options):
    config = lj.LoraConfig(targets, rank=rank)
    plan = lj.plan(config, params, loss, batches[0])
    return lj.capture_grad(loss, plan, **options).run(params, batches)


def rows(*shape, n=3):
    return [(numbers(jax.random.key(100 + i), shape),) for i in range(n)]


def stacked_model():
    params = {
        "table": weight(0, ROWS, D),
        "layers": {"w": weight(1, LAYERS, D, D)},
        "out": weight(2, D, F),
    }

    @jax.checkpoint
    def block(x, w):
        return x + jnp.tanh(x @ w), None

    def loss(params, ids):
        x = jnp.take(params["table"], ids, axis=0)
        x, _ = jax.lax.scan(block, x, params["layers"]["w"])
        return jnp.mean((x @ params["out"]) ** 2)

    ids = [np.arange(i, i + 10).reshape(2, 5) % ROWS for i in range(3)]
    return loss, params, [(jnp.asarray(i),) for i in ids]


def test_through_scan_remat_and_lookups():
    loss, params, batches = stacked_model()
    factors = capture(loss, params, batches, ["table", "layers/w", "out"])
    dense = mean_gradient(loss, params, batches)
    assert factors["layers/w"].u.shape == (LAYERS, D, D)  # 4 ranks of 2
    assert_close(rebuilt(factors["table"]), dense["table"], factor=4)
    assert_close(rebuilt(factors["layers/w"]), dense["layers"]["w"], factor=4)
    assert_close(rebuilt(factors["out"]), dense["out"], factor=4)


def test_layers_that_are_not_adapted_have_no_gradient():
    loss, params, batches = stacked_model()
    factors = capture(loss, params, batches, "layers/1/w")["layers/w"]
    dense = mean_gradient(loss, params, batches)["layers"]["w"]
    assert_close(rebuilt(factors)[1], dense[1], factor=4)
    assert not factors.s[np.array([0, 2])].any()


def test_experts_convolutions_and_groups():
    params = {
        "experts": weight(0, 3, D, F),
        "conv": weight(1, 3, 3, 4, F),
        "grouped": weight(2, 3, 2, 6),  # 3 taps, 2 inputs a group, 2 groups of 3
    }

    def loss(params, x, image, line):
        names = ("NHWC", "HWIO", "NHWC")
        total = jnp.sum(jnp.tanh(jnp.einsum("ebd,edf->ebf", x, params["experts"])) ** 2)
        y = jax.lax.conv_general_dilated(
            image, params["conv"], (1, 1), "SAME", dimension_numbers=names
        )
        z = jax.lax.conv_general_dilated(
            line,
            params["grouped"],
            (1,),
            "SAME",
            dimension_numbers=("NHC", "HIO", "NHC"),
            feature_group_count=2,
        )
        return total + jnp.sum(jnp.tanh(y) ** 2) + jnp.sum(jnp.tanh(z) ** 2)

    shapes = (3, 5, D), (2, 4, 4, 4), (2, 5, 4)
    batches = [
        tuple(numbers(jax.random.key(10 * i + j), s) for j, s in enumerate(shapes))
        for i in range(2)
    ]
    factors = capture(loss, params, batches, list(params), size=36)
    dense = mean_gradient(loss, params, batches)
    assert factors["experts"].s.shape == (3, F)
    assert_close(rebuilt(factors["experts"]), dense["experts"], factor=4)
    assert factors["conv"].u.shape == (36, F)
    assert_close(
        rebuilt(factors["conv"]).reshape(params["conv"].shape), dense["conv"], factor=4
    )
    found = rebuilt(factors["grouped"])  # (groups, taps * inputs, outputs)
    expected = dense["grouped"].reshape(6, 2, 3).swapaxes(0, 1)
    assert_close(found, expected, factor=4)


def linear():
    params = {"w": weight(0, 30, 20)}

    def loss(params, x):
        return jnp.mean((jnp.tanh(x @ params["w"]) - 1) ** 2)

    return loss, params, rows(16, 30)


def test_factors_are_in_order():
    loss, params, batches = linear()
    found = capture(loss, params, batches, "w", size=20)["w"]
    dense = mean_gradient(loss, params, batches)["w"]
    assert_close(found.s, np.linalg.svd(dense, compute_uv=False), factor=4)
    assert_close(found.u.T @ found.u, np.eye(20))
    assert_close(found.v @ found.v.T, np.eye(20))
    largest = np.abs(found.u).argmax(axis=0)
    assert (np.asarray(found.u)[largest, np.arange(20)] > 0).all()


@pytest.mark.parametrize("passes", [2, 3, 4, 5, 7])
def test_more_passes_lose_less(passes):
    r"""The error of the best rank-r part of what is found, as Halko bounds it."""
    loss, params, batches = linear()
    size, rank = 6, 3
    found = capture(loss, params, batches, "w", size=size, passes=passes)["w"]
    dense = mean_gradient(loss, params, batches)["w"]
    sigma = np.linalg.svd(dense, compute_uv=False)
    kept = GradientFactors(found.u[:, :rank], found.s[:rank], found.v[:rank])
    lost = np.linalg.norm(dense - rebuilt(kept), 2) / sigma[rank]
    # Theorem 10.6 of Halko, Martinsson and Tropp for `passes - 2` half iterations,
    # with the root that each takes of the factor for none.
    over = size - rank
    tail = np.sqrt((sigma[rank:] ** 2).sum()) / sigma[rank]
    none = 1 + np.sqrt(rank / (over - 1)) + np.e * np.sqrt(size) / over * tail
    assert lost <= 1 + none ** (1 / (passes - 1))
    assert (np.asarray(found.s) <= sigma[:size] * (1 + 1e-5)).all()


def test_batches_count_by_their_weight():
    loss, params, batches = linear()
    batches = [(x[: 4 * (i + 1)],) for i, (x,) in enumerate(batches)]
    config = lj.LoraConfig("w", rank=5)
    plan = lj.plan(config, params, loss, batches[0])
    count = lambda x: jnp.float32(x.shape[0])  # noqa: E731
    found = lj.capture_grad(loss, plan, weight=count).run(params, batches)["w"]
    dense = mean_gradient(loss, params, batches, [4.0, 8.0, 12.0])["w"]
    assert_close(rebuilt(found), dense, factor=4)


def test_small_losses_in_float16():
    """Gradients below what float16 has, unless the loss is scaled."""
    params = {"w": weight(0, 6, 5).astype(jnp.float16)}

    def loss(params, x):
        return jnp.mean((x @ params["w"]) ** 2) * jnp.float16(2.0**-20)

    batches = [(x.astype(jnp.float16),) for (x,) in rows(4, 6)]
    kernel = params["w"].astype(jnp.float32)
    full = [(x.astype(jnp.float32),) for (x,) in batches]
    wide = mean_gradient(lambda w, x: jnp.mean((x @ w) ** 2), kernel, full)
    found = capture(loss, params, batches, "w", size=5, loss_scale=2.0**14)["w"]
    assert_close(rebuilt(found) * 2**20, wide, dtype=jnp.float16, factor=4)
    lost = capture(loss, params, batches, "w", size=5)["w"]
    assert not np.allclose(rebuilt(lost) * 2**20, wide, rtol=0.2)


def test_divided_parameters_and_batches():
    loss, params, batches = linear()
    batches = [(jnp.concatenate([x, x]),) for (x,) in batches]
    expected = capture(loss, params, batches, "w", size=5)["w"]
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=auto)

    def put(x, *names):
        spec = jax.sharding.PartitionSpec(*names)
        return jax.device_put(x, jax.sharding.NamedSharding(mesh, spec))

    config = lj.LoraConfig("w", rank=2)
    plan = lj.plan(config, params, loss, batches[0])
    found = lj.capture_grad(loss, plan, size=5).run(
        {"w": put(params["w"], None, "model")},
        [(put(x, "data"),) for (x,) in batches],
    )["w"]
    # A power iteration multiplies rounding errors of the last kept direction.
    assert_close(rebuilt(found), rebuilt(expected), factor=16)


@pytest.mark.parametrize("names", [(None, "model"), ("model", None), (None, None)])
def test_explicit_sharding(names):
    loss, params, batches = linear()
    expected = capture(loss, params, batches, "w", size=20)["w"]
    explicit = (jax.sharding.AxisType.Explicit,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=explicit)
    spec = jax.sharding.PartitionSpec

    def placed(params, x):
        out = spec("data", None)
        y = jnp.einsum("bd,df->bf", x, params["w"], out_sharding=out)
        return jnp.mean((jnp.tanh(y) - 1) ** 2)

    plan = lj.plan(lj.LoraConfig("w", rank=2), params, loss, batches[0])
    with jax.set_mesh(mesh):
        divided = {"w": jax.device_put(params["w"], spec(*names))}
        xs = [jax.device_put(x, spec("data", None)) for (x,) in batches]
        found = lj.capture_grad(placed, plan, size=20).run(divided, xs)["w"]
    found = jax.device_get(found)
    assert_close(rebuilt(found), rebuilt(expected), factor=4)


def test_no_gradient_is_built():
    loss, params, batches = linear()
    plan = lj.plan(lj.LoraConfig("w", rank=2), params, loss, batches[0])
    capture = lj.capture_grad(loss, plan, size=3)
    state = capture.init()
    jaxpr = jax.make_jaxpr(capture.update)(state, params, *batches[0])
    made = made_shapes(jaxpr)
    assert made[30, 3] and made[3, 20] and not made[30, 20] and not made[20, 30]
    dense = jax.make_jaxpr(jax.grad(loss))(params, *batches[0])
    assert made_shapes(dense)[30, 20] or made_shapes(dense)[20, 30]


def test_compiled_once():
    loss, params, batches = linear()
    calls = []

    def counted(params, x):
        calls.append(x.shape)
        return loss(params, x)

    plan = lj.plan(lj.LoraConfig("w", rank=2), params, loss, batches[0])
    capture = lj.capture_grad(counted, plan)
    capture.run(params, batches)
    assert len(calls) == 1
    capture.run(params, batches)
    assert len(calls) == 1


def test_a_key_and_a_path_decide_the_draw():
    params = {"layers": {"w": weight(1, 2, D, D)}}
    loss = lambda p, x: jnp.sum(x @ p["layers"]["w"][0] @ p["layers"]["w"][1])  # noqa: E731
    flat = {"layers": {str(i): {"w": params["layers"]["w"][i]} for i in range(2)}}

    def unrolled(p, x):
        return jnp.sum(x @ p["layers"]["0"]["w"] @ p["layers"]["1"]["w"])

    (batch, *_) = rows(3, D)
    config = lj.LoraConfig(r"layers/.*/?w", rank=1)
    whole = lj.capture_grad(loss, lj.plan(config, params, loss, batch)).init()
    apart = lj.capture_grad(unrolled, lj.plan(config, flat, unrolled, batch))
    for i in range(2):
        found = apart.init().held[f"layers/{i}/w"]["a"]
        np.testing.assert_array_equal(found, whole.held["layers/w"]["a"][i])
    other = apart.init(jax.random.key(1)).held["layers/0/w"]["a"]
    assert (other != apart.init().held["layers/0/w"]["a"]).all()


def test_goes_on_from_a_state():
    """Saved in the middle of a pass as plain arrays, and restored in another object."""
    loss, params, batches = linear()
    plan = lj.plan(lj.LoraConfig("w", rank=2), params, loss, batches[0])
    expected = lj.capture_grad(loss, plan, size=3).run(params, batches)
    capture = lj.capture_grad(loss, plan, size=3)
    state = capture.init()
    for batch in batches:
        state = capture.update(state, params, *batch)
    state = capture.update(capture.next_pass(state), params, *batches[0])
    saved = [np.asarray(x) for x in jax.tree.leaves(state)]
    fresh = lj.capture_grad(loss, plan, size=3)
    restored = jax.tree.unflatten(jax.tree.structure(fresh.init()), saved)
    states = []
    found = fresh.run(params, batches, state=restored, after_pass=states.append)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert [int(state.done) for state in states] == [1, 2, 3]
    jax.tree.map(np.testing.assert_array_equal, fresh.finish(states[-1]), expected)


def test_batches_from_a_function_and_a_limit(capsys):
    loss, params, batches = linear()
    plan = lj.plan(lj.LoraConfig("w", rank=2), params, loss, batches[0])
    capture = lj.capture_grad(loss, plan, size=3)
    expected = capture.run(params, batches[:2])
    arrays = [x for (x,) in batches]  # a batch that is no tuple is the only argument
    found = capture.run(params, lambda: iter(arrays), limit=2, progress=True)
    jax.tree.map(np.testing.assert_array_equal, found, expected)
    assert "gradients: 8batch" in capsys.readouterr().err


def test_dora_sites_are_looked_at_like_others():
    loss, params, batches = linear()
    config = lj.LoraConfig("w", rank=5, dora=True)
    plan = lj.plan(config, params, loss, batches[0])
    found = lj.capture_grad(loss, plan).run(params, batches)["w"]
    assert_close(rebuilt(found), mean_gradient(loss, params, batches)["w"], factor=4)


# What is refused.


@pytest.fixture
def made():
    loss, params, batches = linear()
    plan = lj.plan(lj.LoraConfig("w", rank=2), params, loss, batches[0])
    return plan, params, batches, loss


def test_refuses_a_generator(made):
    plan, params, batches, loss = made
    match = "`batches` is a generator, .* 4 passes .* `lambda: iter"
    with pytest.raises(CaptureError, match=match):
        lj.capture_grad(loss, plan).run(params, (batch for batch in batches))


def test_refuses_what_holds_no_batches(made):
    plan, params, _, loss = made
    with pytest.raises(CaptureError, match="`batches` is a int; a list of batches"):
        lj.capture_grad(loss, plan).run(params, 3)
    with pytest.raises(CaptureError, match="`batches` is a dict; a list of batches"):
        lj.capture_grad(loss, plan).run(params, {"x": jnp.ones((4, 30))})


@pytest.mark.parametrize("batches", [[], lambda: iter([])])
def test_refuses_empty_data(made, batches):
    plan, params, _, loss = made
    with pytest.raises(CaptureError, match="no batch in this pass: `batches` is empty"):
        lj.capture_grad(loss, plan).run(params, batches)


def test_refuses_a_function_that_gives_the_same_iterator(made):
    plan, params, batches, loss = made
    used = iter(batches)
    with pytest.raises(CaptureError, match="was used up by the pass before"):
        lj.capture_grad(loss, plan).run(params, lambda: used)


def test_refuses_passes_over_other_batches(made):
    plan, params, batches, loss = made
    parts = [batches, batches[:2]]
    match = "had 2 batches .* first one 3 .* the same batches"
    with pytest.raises(CaptureError, match=match):
        lj.capture_grad(loss, plan).run(params, lambda: iter(parts.pop(0)))


def test_refuses_nan(made):
    plan, params, batches, loss = made
    (x,) = batches[1]
    batches = [batches[0], (x.at[0, 0].set(jnp.nan),), batches[2]]
    match = r"Batch 1 .* not finite\. Weights with such gradients: w\. Look for"
    with pytest.raises(CaptureError, match=match):
        lj.capture_grad(loss, plan).run(params, batches)


def test_names_the_layers_with_nan():
    loss, params, batches = stacked_model()

    def broken(params, ids):
        y = jnp.ones((1, D)) @ params["layers"]["w"][2]
        return loss(params, ids) + jnp.sqrt(jnp.sum(y * 0))  # of infinite slope

    config = lj.LoraConfig(["layers/w", "table"], rank=1)
    plan = lj.plan(config, params, loss, batches[0])
    match = "Weights with such gradients: layers/2/w. Look"
    with pytest.raises(CaptureError, match=match):
        lj.capture_grad(broken, plan).run(params, batches)


def test_refuses_weights_of_zero(made):
    plan, params, batches, loss = made
    capture = lj.capture_grad(loss, plan, weight=lambda x: 0 * x[0, 0])
    with pytest.raises(CaptureError, match="weights of the batches sum to 0"):
        capture.run(params, batches)


def test_refuses_to_finish_after_one_pass(made):
    plan, params, batches, loss = made
    capture = lj.capture_grad(loss, plan)
    state = capture.update(capture.init(), params, *batches[0])
    with pytest.raises(CaptureError, match="one side of the gradients alone. Call"):
        capture.finish(state)


def test_refuses_a_loss_that_is_no_number(made):
    plan, params, batches, _ = made
    capture = lj.capture_grad(lambda p, x: x @ p["w"], plan)
    match = r"one floating number for a batch, and gave float32\[16, 20\]"
    with pytest.raises(CaptureError, match=match):
        capture.run(params, batches)
    capture = lj.capture_grad(lambda p, x: (jnp.sum(x @ p["w"]), x), plan)
    with pytest.raises(CaptureError, match="of a function with several results"):
        capture.run(params, batches)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"size": 0}, "`size` = 0; an integer from 1 up"),
        ({"size": 2.5}, "`size` = 2.5; an integer from 1 up"),
        ({"passes": 1}, "`passes` = 1; an integer from 2 up"),
        ({"passes": True}, "`passes` = True; an integer from 2 up"),
        ({"loss_scale": 0}, "`loss_scale` = 0; a positive number"),
    ],
)
def test_refuses_numbers_that_make_no_sense(made, options, match):
    plan, *_, loss = made
    with pytest.raises(CaptureError, match=match):
        lj.capture_grad(loss, plan, **options)


def test_refuses_a_plan_without_ranks(made):
    _, params, batches, loss = made
    config = lj.LoraConfig("w", whole="w", rank=2)
    plan = lj.plan(lj.LoraConfig("w", rank=2), params, loss, batches[0])
    role = dataclasses.replace(plan.slots[0].role, kind="whole")
    slots = (dataclasses.replace(plan.slots[0], role=role),)
    del config
    with pytest.raises(CaptureError, match="No site of the plan has a rank"):
        lj.capture_grad(loss, dataclasses.replace(plan, slots=slots))
