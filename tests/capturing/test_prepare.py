"""`prepare` and `eva`: each initializer gets what it reads, on any model."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Counter, assert_close, numbers
from steps import drawn

import lorax_jax as lj
from lorax_jax.capturing import eva, prepare
from lorax_jax.errors import CaptureError, PlanError
from lorax_jax.initializers import Eva
from lorax_jax.statistics import Moments, Pca, SecondMoment, Sketch

D, LAYERS, ROWS = 6, 3, 11
KEY = jax.random.key(0)


def model():
    """A table, a stack that is scanned, and a head."""
    params = {
        "table": numbers(KEY, (ROWS, D)),
        "layers": {name: numbers(KEY, (LAYERS, D, D)) / 3 for name in ("q", "k")},
        "head": numbers(KEY, (D, ROWS)),
    }

    def fn(params, ids, *_):
        def block(x, layer):
            return x + jnp.tanh(x @ layer["q"]) * (x @ layer["k"]), None

        x, _ = jax.lax.scan(block, params["table"][ids], params["layers"])
        return x @ params["head"]

    def loss(params, ids, weights):
        logits = fn(params, ids)[:, :-1]
        nats = optax.softmax_cross_entropy_with_integer_labels(logits, ids[:, 1:])
        return (nats * weights[:, 1:]).sum() / weights[:, 1:].sum()

    return params, fn, loss


def some_batches(n=4):
    rng = np.random.default_rng(0)
    for _ in range(n):
        ids = rng.integers(0, ROWS, (5, 7))
        weights = (np.arange(7)[None] < rng.integers(4, 8, (5, 1))).astype(np.float32)
        yield jnp.asarray(ids), jnp.asarray(weights)


BATCHES = list(some_batches())
PARAMS, FN, LOSS = model()


def plan_of(targets, **options):
    config = lj.LoraConfig(targets, **{"rank": 2, **options})
    return lj.plan(config, PARAMS, FN, BATCHES[0])


def weights_of(ids, weights):
    return weights


def same(one, other):
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_each_reads_its_own():
    """Three statistics and two methods that read none, in one plan."""
    inits = {
        "layers/q": "eva",
        "layers/k": "corda_kpm",
        "head": "lora_ga",
        "table": "kaiming",
    }
    plan = plan_of({name: {"init": init} for name, init in inits.items()})
    found, stats = prepare(plan, PARAMS, FN, BATCHES, loss=LOSS, mask=weights_of)
    assert found is plan and set(stats) == {"layers/q", "layers/k", "head"}
    masked = [
        {"ids": ids, "weights": weights, "mask": weights} for ids, weights in BATCHES
    ]

    def named(params, ids, weights):
        return FN(params, ids)

    for name, stat in ("layers/q", Moments()), ("layers/k", SecondMoment()):
        gather = lj.capture(named, plan, stat=stat, only=[name], tokens="ids")
        same(stats[name], gather.run(PARAMS, masked)[name])
    gradients = lj.capture_grad(
        LOSS, plan, only=["head"], weight=lambda ids, weights: weights.sum()
    )
    same(stats["head"], gradients.run(PARAMS, BATCHES)["head"])
    adapter = lj.init(plan, PARAMS, key=KEY, stats=stats)
    bound = lj.bind(PARAMS, adapter)
    assert_close(lj.adapt(FN)(bound, BATCHES[0][0]), FN(PARAMS, BATCHES[0][0]))
    assert set(adapter.fixed["layers/k"]) >= {"a0", "b0"}


@pytest.mark.parametrize("init", ["kaiming", "pissa", "olora", "mica", "pissa_niter_2"])
def test_nothing_is_gathered_for_those_that_read_none(init):
    plan = plan_of("all-linear", init=init)
    found = prepare(plan, PARAMS, None, None)
    assert found == (plan, {})
    lj.init(found.plan, PARAMS, key=KEY, stats=found.stats)


def test_batches_of_every_form_and_once():
    plan = plan_of("layers/.", init="eva")
    ids = [one for one, _ in BATCHES]
    expected = prepare(plan, PARAMS, FN, ids).stats
    for given in ([{"ids": x} for x in ids], iter(ids), lambda: iter(ids)):
        same(prepare(plan, PARAMS, FN, given).stats, expected)


def test_another_statistic():
    plan = plan_of({"layers/q": {"init": Eva(whiten=True)}, "layers/k": {}})
    found = prepare(plan, PARAMS, FN, BATCHES, stat=Sketch(4)).stats
    assert type(found["layers/q"]).__name__ == "SketchState"
    both = {"layers/0/q": {"init": "eva"}, "layers/1/q": {"init": "corda"}}
    found = prepare(plan_of(both), PARAMS, FN, BATCHES, stat=Moments()).stats
    lj.init(plan_of(both), PARAMS, key=KEY, stats=found)


def test_ranks_are_distributed_by_explained_variance():
    """EVA's sites alone, experts and stacks among them, and what lost its rank goes."""
    targets = {"layers/.": {"init": "eva"}, "head": {"init": "corda"}}
    plan = plan_of(targets, alpha=3)
    found, stats = prepare(plan, PARAMS, FN, BATCHES, rho=2.0)
    sites = {site.name: site for site in found}
    assert sites["head"].rank == 2
    assert sum(site.rank for site in found) == sum(site.rank for site in plan)
    moments = lj.capture(FN, plan, stat=Moments()).run(PARAMS, BATCHES)
    shares = {}
    for name in ("q", "k"):
        covariance = jax.vmap(lambda x: x.covariance())(moments[f"layers/{name}"])
        values = np.linalg.eigvalsh(covariance)[:, ::-1]
        for i, one in enumerate(values):
            shares[f"layers/{i}/{name}"] = one[:4] / one.sum()
    cut = sorted(np.concatenate(list(shares.values())))[::-1][:12][-1]
    for name, share in shares.items():
        wanted = int((share >= cut * (1 - 1e-4)).sum())
        assert abs(sites[name].rank - wanted) <= 1  # q and k see the same: ties
        assert sites[name].alpha == pytest.approx(1.5 * sites[name].rank)
    adapter = lj.init(found, PARAMS, key=KEY, stats=stats)
    assert adapter.train["layers/q"]["a"].shape[-1] <= 4


@pytest.mark.parametrize("way", ["prepare", "eva"])
def test_a_site_that_loses_its_rank_has_no_statistic(way):
    """Two directions share the variance of one, six that of the other."""
    params = {"v": jnp.eye(D), "w": jnp.eye(D)}

    def fn(params, x):
        return x.at[:, 2:].multiply(1e-3) @ params["v"], x @ params["w"]

    xs = [jax.random.normal(jax.random.key(i), (60, D)) for i in range(2)]
    xs = [x.at[:, 0].multiply(1.2) for x in xs]
    config = lj.LoraConfig("[vw]", rank=1, init="eva")
    plan = lj.plan(config, params, fn, (xs[0],))
    if way == "prepare":
        found, stats = prepare(plan, params, fn, xs, rho=2.0)
    else:
        result = eva(plan, params, fn, xs, tau=0.0)
        found, stats = result.plan, result.states
        assert set(result.spectra) == {"v", "w"}
    assert {site.name: site.rank for site in found} == {"v": 2} and set(stats) == {"v"}
    lj.init(found, params, key=KEY, stats=stats)


def test_eva_on_a_model():
    """One program, and PEFT's procedure: components, ranks, groups."""
    plan = plan_of({"layers/.": {"init": "eva"}, "head": {}})
    counted = Counter(FN)
    given = [ids for ids, _ in BATCHES]
    options = {"rho": 1.5, "tau": 0.5}
    found = eva(plan, PARAMS, lambda p, x: counted(p, x), given, **options)
    assert counted.calls == 1
    assert set(found.states) == {"layers/q", "layers/k"}
    assert ("layers/0/q", "layers/0/k") in {
        tuple(sorted(g))[::-1] for g in found.shared
    }
    assert sum(s.rank for s in found.plan) == sum(s.rank for s in plan)
    assert not found.unsettled and found.steps >= 2
    # The first layer is fed rows of the table, whatever the model.
    state = lj.capture(FN, plan, stat=Pca(3), only=["layers/q"])
    state = state.run(PARAMS, given[: found.steps])["layers/q"]
    assert_close(found.states["layers/q"].components[0], state.components[0], factor=8)
    np.testing.assert_array_equal(found.states["layers/q"].keep, 3.0)
    adapter = lj.init(found.plan, PARAMS, key=KEY, stats=found.states)
    out = lj.adapt(FN)(lj.bind(PARAMS, adapter), given[0])
    assert_close(out, FN(PARAMS, given[0]))


def test_masks_and_bars(capsys):
    plan = plan_of("layers/q", init="eva")
    options = {"mask": weights_of, "tau": 0.0, "rho": 1, "progress": True}
    found = eva(plan, PARAMS, FN, BATCHES, **options)
    count = sum(float(weights.sum()) for _, weights in BATCHES[: found.steps])
    assert (found.states["layers/q"].count == count).all()
    prepare(plan_of("head", init="lora_ga"), PARAMS, FN, BATCHES, loss=LOSS)
    assert "gradients" not in capsys.readouterr().err
    prepare(plan, PARAMS, FN, BATCHES, progress=True)
    assert "4/4" in capsys.readouterr().err


FEW = [BATCHES[0][0][:1, :1]] * 2
EVA = {"layers/q": {"init": "eva"}}
MIXED = {"layers/0/q": {"init": "eva"}, "layers/1/q": {"init": "corda"}}
GRADIENTS = {"head": {"init": "lora_ga"}}


@pytest.mark.parametrize(
    "targets, batches, options, error, match",
    [
        (GRADIENTS, BATCHES, {}, CaptureError, r"'head' reads gradients, and there is"),
        (GRADIENTS, iter(BATCHES), {"loss": LOSS}, CaptureError, r"4 passes over"),
        (
            EVA | GRADIENTS,
            iter(BATCHES),
            {"loss": LOSS},
            CaptureError,
            r"once; 5 passes over the same batches are needed. Give a list",
        ),
        (MIXED, BATCHES, {}, CaptureError, r"layers of 'layers/q' share one .*Moments"),
        (
            {"table": {"init": "eva"}},
            BATCHES,
            {},
            CaptureError,
            r"'table' reads what .* looked up by number.*\{'init': 'kaiming'\}",
        ),
        (EVA, FEW, {}, CaptureError, r"2 rows reached 'layers/0/q', .* the 2 dir"),
        (EVA, [], {}, CaptureError, r"`batches` is empty"),
        (EVA, 3, {}, CaptureError, r"`batches` is a int; a list of batches is meant"),
        (EVA, BATCHES, {"mask": jnp.ones(3)}, CaptureError, r"a function of a batch's"),
        (EVA, BATCHES, {"rho": 0.5}, PlanError, r"`rho` = 0.5; a number from 1 up"),
        (
            EVA,
            BATCHES,
            {"stat": Pca(2), "rho": 2},
            ValueError,
            r"Gather them with `Pca",
        ),
    ],
)
def test_what_does_not_fit(targets, batches, options, error, match):
    with pytest.raises(error, match=match):
        prepare(plan_of(targets), PARAMS, FN, batches, **options)


def test_an_initializer_that_names_no_statistic(monkeypatch):
    from lorax_jax.initializers import _base

    monkeypatch.setitem(_base._REGISTRY, "mine", _base.Method(print, reads="stats"))
    with pytest.raises(CaptureError, match=r"'mine' at 'head' .* does not say which"):
        prepare(plan_of("head", init="mine"), PARAMS, FN, BATCHES)


def test_eva_where_no_site_starts_with_it():
    with pytest.raises(CaptureError, match=r"No site .* `LoraConfig\(targets, init='e"):
        eva(plan_of("head"), PARAMS, FN, BATCHES)


def test_names_that_are_no_weights():
    plan = plan_of("layers/q")
    with pytest.raises(CaptureError, match=r"`only` holds 'layers/k', .*: layers/q"):
        lj.capture(FN, plan, stat=Moments(), only=["layers/k"])
    with pytest.raises(CaptureError, match=r"`only` holds 'k', .*: layers/q"):
        lj.capture_grad(LOSS, plan, only="k")


def trained(fn, params, plan, stats, x):
    """A step of Adam from where the statistics say, and how far the loss went."""
    train, fixed = lj.init(plan, params, key=KEY, stats=stats)

    @jax.jit
    def loss(train):
        return (lj.adapt(fn)(lj.bind(params, lj.Adapter(train, fixed)), x) ** 2).mean()

    assert_close(loss(train), (fn(params, x) ** 2).mean())
    tx = optax.adam(1e-2)
    updates, _ = tx.update(jax.grad(loss)(train), tx.init(train), train)
    return float(loss(optax.apply_updates(train, updates)) - loss(train))


@pytest.mark.usefixtures("relaxed")
def test_a_model_of_equinox():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(D, D, 9, 2, key=KEY)
    params, static = eqx.partition(net, eqx.is_inexact_array)

    def fn(params, x):
        return jax.vmap(eqx.combine(params, static))(x)

    xs = [jax.random.normal(jax.random.key(i), (20, D)) for i in range(3)]
    config = lj.LoraConfig("layers/./weight", rank=2, init="eva")
    plan = lj.plan(config, params, fn, (xs[0],))
    plan, stats = prepare(plan, params, fn, xs, rho=2.0)
    rows = np.concatenate(xs)
    assert_close(stats["layers/0/weight"].mean, rows.mean(0), factor=4)
    assert trained(fn, params, plan, stats, xs[0]) < 0


@pytest.mark.usefixtures("relaxed")
def test_a_model_of_nnx():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.up, self.down = (
                nnx.Linear(D, 9, rngs=rngs),
                nnx.Linear(9, D, rngs=rngs),
            )

        def __call__(self, x):
            return self.down(nnx.relu(self.up(x)))

    apply, params, state = lj.functional(Net(nnx.Rngs(0)))
    params = drawn(params)

    def fn(params, x):
        return apply(params, state, x)[0]

    def loss(params, x):
        return (fn(params, x) ** 2).mean()

    xs = [jax.random.normal(jax.random.key(i), (20, D)) for i in range(3)]
    targets = {"up/kernel": {"init": "eva"}, "down/kernel": {"init": "lora_ga"}}
    plan = lj.plan(lj.LoraConfig(targets, rank=2), params, fn, (xs[0],))
    plan, stats = prepare(plan, params, fn, xs, loss=loss)
    assert trained(fn, params, plan, stats, xs[0]) < 0
