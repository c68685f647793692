"""EVA's procedure: when sites settle, and what ends it."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from streams import D, rows

import lorax_jax as lj
from lorax_jax import capturing
from lorax_jax.capturing._settle import settle
from lorax_jax.errors import CaptureError, CaptureWarning, PlanError
from lorax_jax.statistics import Moments, Pca

STAT = Pca(4)


def take(states, batch):
    """A step: a batch holds the rows of each slot."""
    return {
        name: STAT.update(state, STAT.observe(batch[name], None, STAT.context(state)))
        for name, state in states.items()
    }


def plan_of(rank=2, names="uvw", **options):
    params = {name: jax.ShapeDtypeStruct((D, D), jnp.float32) for name in names}
    roles = {name: {"inputs": (0,), "outputs": (1,)} for name in names}
    config = lj.LoraConfig(f"[{names}]", rank=rank, init="eva", **options)
    return lj.plan(config, params, roles=roles)


def fresh(plan):
    return {slot.name: STAT.init(D) for slot in plan.slots}


def flat(n, seed):
    """Rows that vary alike along all directions: nothing settles soon."""
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.standard_normal((n, D)), jnp.float32)


def batch(seed, n=30):
    """`u` and `v` share their rows, which settle at once; those of `w` do not."""
    shared = rows(n, seed)
    return {"u": shared, "v": shared, "w": flat(n, seed)}


BATCHES = [batch(seed) for seed in range(3)]


class Steps:
    """`take`, remembering which slots moved at each step."""

    def __init__(self):
        self.moved = []

    def __call__(self, states, given):
        new = take(states, given)
        self.moved.append("".join(n for n in new if new[n].count != states[n].count))
        return new


def test_settled_sites_take_no_more_in():
    plan, steps = plan_of(), Steps()
    found = settle(plan, steps, fresh(plan), BATCHES, tau=0.95)
    assert not found.unsettled
    counts = {name: float(state.count) for name, state in found.states.items()}
    assert counts["u"] == counts["v"] < counts["w"] == 30 * found.steps
    assert found.shared == (("u", "v"),)
    assert found.steps > len(BATCHES)  # and so they were gone through again
    np.testing.assert_array_equal(found.spectra["u"], found.spectra["v"])
    for name, spectrum in found.spectra.items():
        state = found.states[name]
        expected = state.singular**2 / (state.count * state.variance.sum())
        np.testing.assert_allclose(spectrum, expected, rtol=1e-6)
    assert sum(site.rank for site in found.plan) == 6
    assert {s.name: s.alpha for s in found.plan} == {s.name: s.rank for s in found.plan}


def scaled(variances, seed, n=40):
    return flat(n, seed) * jnp.sqrt(jnp.asarray(variances, jnp.float32))[None]


def test_a_site_whose_rank_grows_moves_again():
    """`u` settles with one component; when `v` turns out to be flat, it gets another.

    At first `v` varies along one direction, which is another one in each batch, so that
    it does not settle; then along all. The second component of `u` is another one in
    the second batch, larger than the first's, and has not settled with the first.
    """
    u = [[90.0, 20.0, *[0.1] * (D - 2)], [90.0, 0.1, 40.0, *[0.1] * (D - 3)]]
    lines = [scaled(np.eye(D)[i] * 9.0**i, 50 + i) for i in range(5)]
    wide = [100.0 * flat(40, 60 + i) for i in range(3)]
    batches = [
        {"u": scaled(u[i % 2], i), "v": v} for i, v in enumerate([*lines, *wide] * 9)
    ]
    plan, steps = plan_of(rank=1, names="uv"), Steps()
    found = settle(plan, steps, fresh(plan), iter(batches), tau=0.95)
    assert {s.name: s.rank for s in found.plan} == {"u": 2}
    moved = ["u" in names for names in steps.moved]
    # The first entry is the look at which sites share an input.
    changes = [b for a, b in itertools.pairwise(moved[1:]) if a != b]
    assert changes[:2] == [False, True], steps.moved  # it stopped, and moved again


def test_layers_of_a_stack():
    """Layers of one slot settle one by one, and ranks differ within it."""
    params = {"layers": {"w": jax.ShapeDtypeStruct((3, D, D), jnp.float32)}}

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"]["w"])[0]

    config = lj.LoraConfig("layers/w", rank=2, init="eva")
    plan = lj.plan(config, params, fn, (jnp.ones((1, D)),))
    (slot,) = plan.slots
    assert slot.layers == (3,)
    states = {slot.name: jax.vmap(lambda _: STAT.init(D))(jnp.arange(3))}

    @jax.jit
    def step(states, given):
        def one(state, x):
            return STAT.update(state, STAT.observe(x, None, STAT.context(state)))

        return {slot.name: jax.vmap(one)(states[slot.name], given)}

    batches = [jnp.stack([rows(30, s), flat(30, s), rows(30, s + 9)]) for s in range(3)]
    found = settle(plan, step, states, batches, tau=0.95, budget=5)
    counts = found.states[slot.name].count
    assert counts[1] > counts[0] and float(counts[1]) == 30 * found.steps
    ranks = [0 if s is None else s.rank for s in found.plan.slots[0].sites]
    assert sum(ranks) == 5 and ranks[1] < ranks[0]
    # The same sites apart.
    alone = plan_of(names="uvw")
    apart = [dict(zip("uvw", given, strict=True)) for given in batches]
    other = settle(alone, take, fresh(alone), apart, tau=0.95, budget=5)
    by_name = {s.name: s.rank for s in other.plan}
    assert [by_name.get(name, 0) for name in "uvw"] == ranks


def test_small_batches_are_skipped():
    plan = plan_of(names="u")
    given = [{"u": rows(3)}, {"u": rows(30, 1)}, {"u": rows(30, 2)}]
    found = settle(plan, take, fresh(plan), given)
    assert float(found.states["u"].count) % 30 == 0


def test_no_batch_is_large_enough():
    plan = plan_of(names="uw")
    given = [{"u": rows(30, s), "w": rows(3, s)} for s in range(2)]
    match = r"No batch fed w as many rows as .*, up to 4. Give larger batches"
    with pytest.raises(CaptureError, match=match):
        settle(plan, take, fresh(plan), given)
    with pytest.raises(CaptureError, match=match):
        settle(plan, take, fresh(plan), iter(given), max_batches=1)


@pytest.mark.parametrize("once", [False, True])
def test_an_end_before_all_has_settled(once):
    plan = plan_of(names="uw")
    given = iter(BATCHES) if once else BATCHES
    steps, names = (3, ("u", "w")) if once else (5, ("w",))
    match = rf"After {steps} batches .* {len(names)} sites .*`tau` = 0.999 .*: u?.*w\."
    with pytest.warns(CaptureWarning, match=match):
        found = settle(plan, take, fresh(plan), given, tau=0.999, max_batches=5)
    assert found.unsettled == names and found.steps == steps


def test_order_says_who_of_a_group_comes_first():
    plan = plan_of(rank=1, names="uv")
    for order, expected in ((), {"u": 2, "v": 1}), (("v",), {"u": 1, "v": 2}):
        found = settle(plan, take, fresh(plan), BATCHES, budget=3, order=order)
        assert {s.name: s.rank for s in found.plan} == expected


def test_states_start_an_adapter():
    """Directions of each site, at its own rank."""
    from lorax_jax import initializers

    plan = plan_of()
    found = settle(plan, take, fresh(plan), BATCHES, tau=0.95)
    for site in found.plan:
        state = found.states[site.name]
        start = initializers.eva(
            jax.ShapeDtypeStruct((D, D), jnp.float32),
            rank=site.rank,
            scale=site.scale,
            key=jax.random.key(0),
            stats=state,
        )
        np.testing.assert_array_equal(start.a, state.components[: site.rank].T)
        assert np.linalg.matrix_rank(start.a) == site.rank


def test_on_a_model():
    """From a scanned model to an adapter, in one piece."""
    keys = jax.random.split(jax.random.key(0), 2)
    params = {
        n: jax.random.normal(k, (3, D, D)) / 4 for n, k in zip("ab", keys, strict=True)
    }

    def fn(params, x):
        def layer(x, w):
            return jnp.tanh(x @ w["a"]) + x @ w["b"], None

        return jax.lax.scan(layer, x, params)[0]

    plan = lj.plan(lj.LoraConfig("[ab]", rank=2, init="eva"), params, fn, (rows(30),))
    given = [rows(30, seed) for seed in range(4)]
    found = capturing.eva(plan, params, fn, given, tau=0.9)
    assert found.shared == tuple((f"{i}/a", f"{i}/b") for i in range(3))
    adapter = lj.init(found.plan, params, key=keys[0], stats=found.states)
    ranks = {site.name: site.rank for site in found.plan}
    for name, factors in adapter.train.items():
        components = np.asarray(found.states[name].components)  # (3, k, D)
        for i in range(3):
            rank = ranks.get(f"{i}/{name}", 0)
            expected = components[i, :rank].T
            np.testing.assert_array_equal(factors["a"][i, :, :rank], expected)
            assert not factors["a"][i, :, rank:].any()
        assert not factors["b"].any()


def test_a_bar(capsys):
    plan = plan_of(names="u")
    settle(plan, take, fresh(plan), BATCHES, progress=True)
    assert "1/1 sites settled" in capsys.readouterr().err
    settle(plan, take, fresh(plan), BATCHES)
    assert not capsys.readouterr().err


PLAN = plan_of(names="uw")
STATES = fresh(PLAN)
NAN = [{"u": rows(30), "w": rows(30).at[2, 2].set(jnp.nan)}]


@pytest.mark.parametrize(
    "states, batches, options, error, match",
    [
        (STATES, [], {}, CaptureError, r"`batches` is empty.* Give at least one"),
        (STATES, iter([]), {}, CaptureError, r"`batches` is empty"),
        (STATES, NAN, {}, CaptureError, r"NaN or infinity was fed to w\. .*masked"),
        (STATES, BATCHES, {"tau": 1.5}, CaptureError, r"`tau` = 1.5; a cosine"),
        (STATES, BATCHES, {"max_batches": 0}, CaptureError, r"`max_batches` = 0;"),
        (STATES, BATCHES, {"rho": 0.0}, PlanError, r"`rho` = 0.0; a number from 1"),
        (STATES, BATCHES, {"budget": 0}, PlanError, r"`budget` = 0; a number from 1"),
        (STATES, BATCHES, {"order": ["x"]}, PlanError, r"`order` names 'x', .*Closest"),
        (STATES, BATCHES, {"rho": 3}, CaptureError, r"'u' needs 6 comp.*`Pca\(6\)`"),
        ({}, BATCHES, {}, CaptureError, r"states are those of nothing, .* adapts u, w"),
        ({"x": STAT.init(D)}, BATCHES, {}, CaptureError, r"those of x, and the plan"),
        (
            {"u": Moments().init(D)},
            BATCHES,
            {},
            CaptureError,
            r"is a MomentsState; EVA",
        ),
        (
            {"u": jax.tree.map(lambda x: x[None], STAT.init(D))},
            BATCHES,
            {},
            CaptureError,
            r"state of 'u' has the leading axes \(1,\), and its weight \(\)",
        ),
    ],
)
def test_what_does_not_fit(states, batches, options, error, match):
    with pytest.raises(error, match=match):
        settle(PLAN, take, states, batches, **options)
