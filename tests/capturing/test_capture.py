"""`capture`: through whole models, with masks, over batches, and what it refuses."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Counter, numbers
from jax.sharding import NamedSharding, PartitionSpec

import lorax_jax as lj
from lorax_jax.capturing import Stats, capture
from lorax_jax.errors import CaptureError, PlanError, TransformError
from lorax_jax.statistics import Moments, Pca, SecondMoment, Sketch

EPS = np.finfo(np.float32).eps


@functools.cache
def tiny(scan: bool):
    model, params = lj.models.load(lj.embedded.MODEL_DIR, scan_layers=scan)
    ids = jax.random.randint(jax.random.key(1), (4, 4), 0, model.config.vocab_size)
    plan = lj.plan(lj.LoraConfig("all-linear", rank=2), params, model.apply, (ids,))
    return model, params, ids, plan


def close(one, other, factor=1.0):
    """States of the same rows, summed in another order."""
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        atol = factor * 200 * EPS * max(float(jnp.abs(y).max()), 1e-6)
        np.testing.assert_allclose(x, y, rtol=0, atol=atol)


def test_scanned_and_unrolled_models_gather_the_same():
    found = {}
    for scan in (False, True):
        model, params, ids, plan = tiny(scan)
        gather = capture(model.apply, plan, stat=Moments())
        found[scan] = jax.jit(gather)(gather.init(), params, ids)
    for name, state in found[False].items():
        head, number, rest = name.split("/", 2)
        stacked = found[True][f"{head}/{rest}"]
        close(state, jax.tree.map(lambda x, i=int(number): x[i], stacked))


def test_inputs_are_those_of_the_model():
    """Against what the embedding gives to the first layer, computed by hand."""
    model, params, ids, plan = tiny(False)
    gather = capture(model.apply, plan, stat=Moments())
    state = jax.jit(gather)(gather.init(), params, ids)[
        "layers/0/self_attn/q_proj/kernel"
    ]
    rows = np.asarray(params["embed_tokens"]["embedding"])[np.asarray(ids).ravel()]
    rows = rows.astype(np.float64)
    size = np.sqrt((rows**2).mean(-1, keepdims=True) + model.config.rms_norm_eps)
    rows = rows / size * np.asarray(params["layers"]["0"]["input_layernorm"]["scale"])
    assert state.count == ids.size
    np.testing.assert_allclose(state.mean, rows.mean(0), rtol=1e-4, atol=1e-5)
    expected = np.cov(rows.T, bias=True)
    np.testing.assert_allclose(
        state.covariance(), expected, atol=1e-4 * np.abs(expected).max()
    )


def test_masked_tokens_do_not_count():
    """Batch and sequence are equally long, so no shape tells them apart."""
    model, params, ids, plan = tiny(True)
    gather = capture(model.apply, plan, stat=Moments())
    mask = jnp.array([[1, 1, 0, 0], [1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    masked = jax.jit(gather)(gather.init(), params, ids, mask=mask)
    # A token sees those before it alone, so sequences may be cut instead.
    cut, step = gather.init(), jax.jit(gather)
    for i, count in enumerate(mask.sum(1).tolist()):
        cut = step(cut, params, ids[i : i + 1, :count])
    for name in masked:
        close(masked[name], cut[name])


def test_masks_are_weights():
    fn, params, x, plan = small()
    gather = capture(fn, plan, stat=Moments())
    twice = jnp.concatenate([x, x[:2]])
    weights = jnp.array([2.0, 2.0, *[1.0] * (len(x) - 2)])
    one = gather(gather.init(), params, x, mask=weights)
    other = gather(gather.init(), params, twice)
    close(one["w"], other["w"])


def small(shape=(5, 3)):
    params = {"w": numbers(jax.random.key(0), shape)}
    x = numbers(jax.random.key(1), (6, shape[0]))

    def fn(params, x):
        return jnp.tanh(x @ params["w"])

    return fn, params, x, lj.plan(lj.LoraConfig("w", rank=1), params, fn, (x,))


@pytest.mark.parametrize("stat", [Moments(), Sketch(4)], ids=lambda s: type(s).__name__)
def test_batches_are_added(stat):
    fn, params, x, plan = small()
    gather = capture(fn, plan, stat=stat)
    once = gather.run(params, [x])
    parts = gather.run(params, [(x[:1],), {"x": x[1:4]}])
    parts = gather.run(params, iter([x[4:]]), stats=parts)
    close(parts["w"].principal(2).variances, once["w"].principal(2).variances)
    assert int(parts.batches) == 3
    apart = gather.run(params, [x[:4]]).merge(gather.run(params, [x[4:]]))
    close(apart["w"].principal(2).variances, once["w"].principal(2).variances)


def test_statistics_without_a_context():
    fn, params, x, plan = small()
    gather = capture(fn, plan, stat=SecondMoment(normalize=False))
    state = gather.run(params, [x, x])["w"]
    expected = np.asarray(x, np.float64).T @ np.asarray(x, np.float64)
    np.testing.assert_allclose(state.second_moment(), expected, rtol=1e-5, atol=1e-5)


def test_one_program_for_all_batches():
    fn, params, x, plan = small()
    counted = Counter(fn)
    gather = capture(lambda p, x: counted(p, x), plan, stat=Moments())
    gather.run(params, [x, x, x])
    assert counted.calls == 1


def test_only_the_forward_pass_up_to_the_last_weight_runs():
    """The head is not adapted, and nothing of it is computed."""
    model, params, ids, plan = tiny(True)
    gather = capture(model.apply, plan, stat=Sketch(1))
    step = jax.jit(gather).lower(gather.init(), params, ids).compile()
    vocabulary = model.config.vocab_size
    assert not any(
        f"{vocabulary}]" in line.split("=")[0]
        for line in step.as_text().splitlines()
        if " dot(" in line
    )


def test_a_run_goes_on_where_it_was_stopped(tmp_path):
    fn, params, x, plan = small()
    gather = capture(fn, plan, stat=Moments())
    batches = [x[i : i + 1] for i in range(6)]
    path = tmp_path / "stats.safetensors"

    def stopping():
        yield from batches[:4]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        gather.run(params, stopping(), save=path, every=2)
    resumed = gather.run(params, batches, save=path)
    assert int(resumed.batches) == 6
    assert list(tmp_path.iterdir()) == [path]
    close(resumed["w"], gather.run(params, batches)["w"])
    again = gather.run(params, batches, save=path)  # all of it is there
    close(again["w"], resumed["w"], factor=0)


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_over_devices(kind):
    """A batch over eight devices, with the parameters sharded as well."""
    fn, params, x, plan = small((4, 8))
    x = jnp.concatenate([x, x[:2]])
    gather = capture(fn, plan, stat=Moments())
    alone = jax.jit(gather)(gather.init(), params, x)
    types = (getattr(jax.sharding.AxisType, kind),) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=types)
    place = lambda spec: NamedSharding(mesh, PartitionSpec(*spec))  # noqa: E731
    split = jax.device_put(params, {"w": place((None, "tensor"))})
    rows = jax.device_put(x, place(("data",)))
    with jax.set_mesh(mesh):
        many = gather.run(split, [rows])
    close(many["w"], alone["w"])


def test_devices_that_see_the_same_rows_count_them_once():
    """Inside the model's own `shard_map`, where `tensor` divides the outputs."""
    auto = (jax.sharding.AxisType.Auto,) * 2
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=auto)
    spec = PartitionSpec
    params = {"w": numbers(jax.random.key(0), (4, 6))}
    x = numbers(jax.random.key(1), (8, 4))

    def fn(params, x):
        return jax.shard_map(
            lambda w, x: x.astype(jnp.float32) @ w,
            mesh=mesh,
            in_specs=(spec(None, "tensor"), spec("data")),
            out_specs=spec("data", "tensor"),
        )(params["w"], x)

    plan = lj.plan(lj.LoraConfig("w", rank=1), params, fn, (x,))
    gather = capture(fn, plan, stat=Moments())
    state = jax.jit(gather)(gather.init(), params, x)["w"]
    assert state.count == 8
    expected = np.cov(np.asarray(x, np.float64).T, bias=True)
    np.testing.assert_allclose(state.covariance(), expected, rtol=1e-4, atol=1e-5)


def test_both_branches_and_layers_that_a_model_stacks():
    keys = jax.random.split(jax.random.key(0), 3)
    params = [{"w": numbers(key, (4, 4))} for key in keys]
    x = numbers(jax.random.key(5), (6, 4))

    def fn(params, x, which):
        stack = jnp.stack([layer["w"] for layer in params])

        def body(x, w):
            halved = lambda: jnp.tanh(x) @ w  # noqa: E731
            return jax.lax.cond(which, halved, lambda: x @ w), None

        return jax.lax.scan(body, x, stack)[0]

    which = jnp.array(False)
    plan = lj.plan(lj.LoraConfig(".*", rank=1), params, fn, (x, which))
    gather = capture(fn, plan, stat=Moments())
    stats = jax.jit(gather)(gather.init(), params, x, which)
    for i, layer in enumerate(params):
        assert stats[f"{i}/w"].count == len(x)
        np.testing.assert_allclose(
            stats[f"{i}/w"].mean, x.mean(0), rtol=1e-4, atol=1e-5
        )
        x = x @ layer["w"]


def test_functions_with_derivatives_of_their_own_are_gone_into():
    fn, params, x, plan = small()
    product = jax.custom_vjp(lambda w, x: x @ w)
    product.defvjp(lambda w, x: (x @ w, None), lambda _, g: (g, g))
    gather = capture(lambda p, x: product(p["w"], x), plan, stat=Moments())
    assert gather(gather.init(), params, x)["w"].count == len(x)


def test_the_base_is_untouched():
    model, params, ids, plan = tiny(True)
    before = jax.tree.leaves(params)
    capture(model.apply, plan, stat=Sketch(2)).run(params, [ids])
    assert all(
        x is y and not x.is_deleted()
        for x, y in zip(before, jax.tree.leaves(params), strict=True)
    )


def test_stats_are_a_tree_and_a_mapping():
    fn, params, x, plan = small()
    gather = capture(fn, plan, stat=Moments())
    stats = gather(gather.init(), params, x)
    assert isinstance(stats, Stats) and list(stats) == ["w"] and len(stats) == 1
    assert jax.tree.structure(
        jax.tree.map(jnp.zeros_like, stats)
    ) == jax.tree.structure(gather.init())


def test_the_head_of_a_tied_table():
    """Its inputs are those of the head; the lookup goes by."""
    params = {"e": numbers(jax.random.key(0), (9, 4))}
    ids = jnp.arange(6).reshape(2, 3)

    def fn(params, ids):
        return jnp.tanh(params["e"][ids]) @ params["e"].T

    config = lj.LoraConfig({"e": {"tie": "head"}}, rank=2, init="eva")
    plan = lj.plan(config, params, fn, (ids,))
    stats = capture(fn, plan, stat=Moments()).run(params, [ids])
    rows = np.tanh(np.asarray(params["e"]))[np.asarray(ids).ravel()]
    np.testing.assert_allclose(stats["e@head"].mean, rows.mean(0), atol=1e-6)
    adapter = lj.init(plan, params, key=jax.random.key(0), stats=stats)
    out = lj.adapt(fn)(lj.bind(params, adapter), ids)
    np.testing.assert_array_equal(out, fn(params, ids))


class TestRefusals:
    @pytest.mark.parametrize(
        "stat", [Moments(), Pca(3)], ids=lambda s: type(s).__name__
    )
    def test_too_few_rows_to_start_from(self, stat):
        fn, params, x, _ = small()
        plan = lj.plan(lj.LoraConfig("w", rank=3, init="eva"), params, fn, (x,))
        stats = capture(fn, plan, stat=stat).run(params, [x[:2]])
        with pytest.raises(PlanError, match="[02] rows reached 'w'"):
            lj.init(plan, params, key=jax.random.key(0), stats=stats)

    def test_batches_too_small_for_their_components(self):
        fn, params, x, _ = small()
        plan = lj.plan(lj.LoraConfig("w", rank=3, init="eva"), params, fn, (x,))
        stats = capture(fn, plan, stat=Pca(3)).run(params, [x[:2], x[2:4], x[4:]])
        with pytest.raises(PlanError, match="rows reached|fewer directions"):
            lj.init(plan, params, key=jax.random.key(0), stats=stats)

    @pytest.mark.parametrize("init", ["corda", "pissa", "olora"])
    def test_factors_that_are_no_numbers(self, init):
        fn, params, x, _ = small()
        plan = lj.plan(lj.LoraConfig("w", rank=2, init=init), params, fn, (x,))
        gather = capture(fn, plan, stat=SecondMoment())
        stats = gather.run(params, [0 * x]) if init == "corda" else None
        if stats is None:
            params = {"w": params["w"].at[0, 0].set(jnp.nan)}
        with pytest.raises(PlanError, match="hold NaN"):
            lj.init(plan, params, key=jax.random.key(0), stats=stats)

    @pytest.mark.parametrize(
        "mask, match",
        [
            (-np.ones(6), "negative entries"),
            (np.full(6, np.nan), "negative entries or NaN"),
            (np.ones(6, complex), "an entry for each token"),
            (1.0, "an entry for each token"),
            ("all", "an entry for each token"),
        ],
    )
    def test_masks_that_are_none(self, mask, match):
        fn, params, x, plan = small()
        gather = capture(fn, plan, stat=Moments())
        with pytest.raises(CaptureError, match=match):
            gather(gather.init(), params, x, mask=mask)

    def test_intervals_that_are_none(self, tmp_path):
        fn, params, x, plan = small()
        with pytest.raises(CaptureError, match="`every` = 0"):
            capture(fn, plan, stat=Moments()).run(
                params, [x], save=tmp_path / "s", every=0
            )

    def test_no_batches(self):
        fn, params, _, plan = small()
        with pytest.raises(CaptureError, match="`batches` is empty"):
            capture(fn, plan, stat=Moments()).run(params, [])

    def test_no_numbers(self):
        fn, params, x, plan = small()
        with pytest.raises(CaptureError, match="reaches 'w' holds NaN"):
            capture(fn, plan, stat=Moments()).run(params, [x.at[0, 0].set(jnp.nan)])

    def test_another_model_on_the_way(self):
        fn, params, x, plan = small()
        gather = capture(fn, plan, stat=Moments())
        stats = gather.run(params, [x])
        with pytest.raises(CaptureError, match="saw another model"):
            gather.run({"w": params["w"] + 1}, [x], stats=stats)
        other = gather.run({"w": params["w"] + 1}, [x])
        assert bool(stats.merge(other).mixed)

    def test_init_on_another_model(self):
        fn, params, x, _ = small()
        config = lj.LoraConfig("w", rank=1, init="eva")
        plan = lj.plan(config, params, fn, (x,))
        stats = capture(fn, plan, stat=Moments()).run(params, [x])
        lj.init(plan, params, key=jax.random.key(0), stats=stats)
        with pytest.raises(PlanError, match="gathered on another model"):
            other = {"w": params["w"] + 1}
            lj.init(plan, other, key=jax.random.key(0), stats=stats)

    def test_other_parameters(self):
        fn, params, x, plan = small()
        gather = capture(fn, plan, stat=Moments())
        with pytest.raises(CaptureError, match="'w' with shape"):
            gather(gather.init(), {"w": params["w"][:, :2]}, x)

    def test_a_weight_that_nothing_reaches(self):
        _, params, x, plan = small()
        gather = capture(lambda params, x: x.sum(), plan, stat=Moments())
        with pytest.raises(CaptureError, match="Nothing was multiplied by w"):
            gather(gather.init(), params, x)

    def test_plans_of_tables_alone(self):
        params = {"table": jnp.ones((9, 4))}
        ids = jnp.zeros(3, int)
        plan = lj.plan(
            lj.LoraConfig("table", rank=1), params, lambda p, i: p["table"][i], (ids,)
        )
        with pytest.raises(CaptureError, match="looked up by number"):
            capture(lambda p, i: p["table"][i], plan, stat=Moments())

    def test_masks_that_fit_no_argument(self):
        fn, params, x, plan = small()
        gather = capture(fn, plan, stat=Moments())
        with pytest.raises(CaptureError, match=r"`mask` has the shape \(9,\)"):
            gather(gather.init(), params, x, mask=jnp.ones(9))

    def test_masks_that_are_lost(self):
        _, params, x, plan = small()

        def fn(params, x):
            return jnp.sort(x, axis=0) @ params["w"]

        gather = capture(fn, plan, stat=Moments())
        with pytest.raises(CaptureError, match="`mask` cannot be followed to what"):
            gather(gather.init(), params, x, mask=jnp.ones(len(x)))

    def test_files_of_other_statistics(self, tmp_path):
        fn, params, x, plan = small()
        path = tmp_path / "stats"
        capture(fn, plan, stat=Moments()).run(params, [x], save=path)
        with pytest.raises(CaptureError, match="of another kind"):
            capture(fn, plan, stat=Sketch(2)).run(params, [x], save=path)
        path.write_bytes(b"no such file")
        with pytest.raises(CaptureError, match="holds no statistics"):
            capture(fn, plan, stat=Moments()).run(params, [x], save=path)

    def test_statistics_of_other_leaves_do_not_merge(self):
        fn, params, x, plan = small()
        one = capture(fn, plan, stat=Moments()).run(params, [x])
        with pytest.raises(CaptureError, match="what one statistic gathered"):
            one.merge(capture(fn, plan, stat=Sketch(2)).run(params, [x]))
        fn, params, x, plan = small((4, 3))
        with pytest.raises(CaptureError, match="differ about"):
            one.merge(capture(fn, plan, stat=Moments()).run(params, [x]))

    def test_dense_weights(self):
        fn, params, x, plan = small()

        def sorting(params, x):
            return x @ jnp.sort(params["w"], axis=0)

        gather = capture(sorting, plan, stat=Moments(), materialize="allow")
        with pytest.raises(TransformError, match="A dense weight would be built"):
            gather(gather.init(), params, x)
