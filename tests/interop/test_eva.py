"""EVA beside PEFT's: the same inputs of the same layers give the same adapter."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, tolerance
from inputs import inputs_of, mlp
from streams import D, rows, step

import lorax_jax as lj
from lorax_jax import initializers
from lorax_jax.capturing import label_mask
from lorax_jax.capturing._settle import settle
from lorax_jax.statistics import Pca

LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def batches(n=5, size=6, length=16, seed=0):
    """Token batches with padding and labels, as a loader gives them."""
    rng = np.random.default_rng(seed)
    for _ in range(n):
        ids = rng.integers(2, 97, (size, length))
        mask = np.arange(length)[None] < rng.integers(length - 4, length + 1, (size, 1))
        labels = np.where(rng.random((size, length)) < 0.2, -100, ids)
        yield {"input_ids": ids, "attention_mask": mask.astype(int), "labels": labels}


def torch_batches(given):
    import torch

    return [{k: torch.tensor(v).long() for k, v in one.items()} for one in given]


def theirs(model, loader, *, targets, eva, how=None, **options):
    """PEFT's model after its initialization: name -> (A, rank, alpha, scale)."""
    from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
    from peft.tuners.lora.config import EvaConfig

    config = LoraConfig(
        target_modules=targets,
        init_lora_weights="eva",
        eva_config=EvaConfig(**eva),
        **options,
    )
    model = get_peft_model(model, config)
    initialize_lora_eva_weights(model, loader, show_progress_bar=False, **how or {})
    return {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight.detach().numpy().T,
            module.r["default"],
            module.lora_alpha["default"],
            module.scaling["default"],
        )
        for name, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def stepper(plan, stat, seen, module):
    """A step that takes in rows caught in torch, by the number of the batch."""
    update = jax.jit(
        lambda state, rows: stat.update(
            state, stat.observe(rows, None, stat.context(state))
        )
    )

    def take(states, i):
        new = {}
        for slot in plan.slots:
            layers = []
            for at, site in enumerate(slot.sites):
                one = jax.tree.map(lambda x, at=at: x[at], unstacked(slot, states))
                rows = jnp.asarray(seen[module(site.path)][1][i])
                layers.append(update(one, rows))
            whole = jax.tree.map(lambda *x: jnp.stack(x), *layers)
            new[slot.name] = jax.tree.map(
                lambda x, slot=slot: x.reshape(*slot.layers, *x.shape[1:]), whole
            )
        return new

    return take


def unstacked(slot, states):
    return jax.tree.map(
        lambda x: x.reshape(len(slot.sites), *x.shape[len(slot.layers) :]),
        states[slot.name],
    )


def fresh(plan, stat):
    return {
        slot.name: jax.tree.map(
            lambda x, slot=slot: jnp.broadcast_to(x, (*slot.layers, *x.shape)),
            stat.init(slot.sides[0]),
        )
        for slot in plan.slots
    }


def start_of(site, slot, states, at):
    state = jax.tree.map(lambda x: x[at], unstacked(slot, states))
    weight = jax.ShapeDtypeStruct(slot.sides, jnp.float32)
    return initializers.get(site.init)(
        weight, rank=site.rank, scale=site.scale, key=jax.random.key(0), stats=state
    )


@pytest.fixture
def exact(monkeypatch):
    """PEFT with a full decomposition in place of its randomized one.

    That has twice as many columns as components, and misses directions of flat spectra
    by far more than rounding: its own seed changes them by 1e-3 on this model.
    """
    from peft.utils.incremental_pca import IncrementalPCA as Theirs

    monkeypatch.setattr(Theirs, "_svd_fn_lowrank", Theirs._svd_fn_full)


CASES = {
    "rho 2": dict(eva={"rho": 2.0}),
    "rho 1": dict(eva={"rho": 1.0}),
    "rslora": dict(eva={"rho": 2.0}, use_rslora=True),
    "alphas stay": dict(eva={"rho": 1.5, "adjust_scaling_factors": False}),
    "labels count": dict(eva={"rho": 2.0, "use_label_mask": False}),
    "tau": dict(eva={"rho": 3.0, "tau": 0.9}),
    "patterns": dict(
        eva={"rho": 2.0},
        rank_pattern={"q_proj": 6, "layers.1.mlp.down_proj": 2},
        alpha_pattern={"up_proj": 3},
    ),
}


@pytest.mark.parametrize(
    "case, scan",
    [*((case, False) for case in CASES), ("tau", True), ("patterns", True)],
)
def test_a_llama(case, scan, twin, exact):
    check(twin("llama"), scan, r=4, lora_alpha=7, **CASES[case])


def test_a_llama_in_peft_as_it_is(twin):
    """With ranks at which its randomized decomposition is exact: half of all inputs.

    Without keys and values, to which it may give ranks that exceed their outputs.
    """
    targets = [name for name in LINEAR if name not in ("k_proj", "v_proj")]
    options = {"r": 12, "lora_alpha": 12, "eva": {"rho": 2.0}}
    check(twin("llama"), targets=targets, bound=bounds, **options)


def check(twin, scan=False, targets=LINEAR, bound=lambda *_: 1e-4, **options):
    """That ranks, alphas, scales and directions are PEFT's."""
    given = list(batches())
    loader = torch_batches(given)
    masked = options["eva"].get("use_label_mask", True)

    def mask(call):
        labels = jnp.asarray(call["labels"].numpy()) if masked else None
        return np.asarray(label_mask(call["attention_mask"].numpy(), labels)) > 0

    seen = inputs_of(twin.fresh(), targets, loader, mask)
    expected = theirs(twin.fresh(), loader, targets=targets, **options)

    model, params = twin.ours(scan)
    names = lj.checkpoint.NameMap.of(model.names)
    rules = {
        r".*/q_proj/kernel": {"rank": 6},
        r"layers/1/mlp/down_proj/kernel": {"rank": 2},
        r".*/up_proj/kernel": {"alpha": 3},
        rf".*/({'|'.join(targets)})/kernel": {},
    }
    config = lj.LoraConfig(
        rules if "rank_pattern" in options else list(rules)[-1],
        rank=options["r"],
        alpha=options["lora_alpha"],
        init="eva",
        rslora=options.get("use_rslora", False),
    )
    plan = lj.plan(config, params, fn=model.apply, args=(given[0]["input_ids"],))
    stat, rho = Pca(32), options["eva"].get("rho", 2.0)
    order = sorted((s.name for s in plan), key=lambda n: place(names.module(n)))
    found = settle(
        plan,
        stepper(plan, stat, seen, names.module),
        fresh(plan, stat),
        range(len(loader)),
        rho=rho,
        tau=options["eva"].get("tau", 0.99),
        adjust_scale=options["eva"].get("adjust_scaling_factors", True),
        order=order,
    )
    assert not found.unsettled
    numbers = {names.module(s.path): (s.rank, s.alpha, s.scale) for s in found.plan}
    assert numbers == {name: one[1:] for name, one in expected.items()}
    for slot in found.plan.slots:
        for at, site in enumerate(slot.sites):
            if site is not None:
                a = expected[names.module(site.path)][0]
                start = start_of(site, slot, found.states, at)
                assert not start.b.any()
                signs = np.sign((np.asarray(start.a) * a).sum(0))
                error = np.abs(start.a * signs - a).max(0)
                assert (error <= bound(found.spectra[site.name], a)).all(), site.name


def bounds(explained, a):
    """How well float32 knows each direction: to 1e-4, or less if the next is near.

    Products are rounded to a share of the largest variance, which turns a direction by
    as much over the gap to its neighbours.
    """
    between = -np.diff(explained, prepend=np.inf, append=0)
    gaps = np.minimum(between[:-1], between[1:])
    found = tolerance(jnp.float32, len(a)) * explained[0] / gaps
    return np.maximum(found, 1e-4)[: a.shape[1]]


def place(module):
    """The order of modules in a Llama."""
    parts = module.split(".")
    return int(parts[2]), LINEAR.index(parts[-1])


@pytest.mark.parametrize("whiten", [False, True])
def test_an_mlp(whiten, exact):
    """With a site that loses its rank, and, where no input is shared, whitened."""
    import torch

    def model():
        found = mlp()
        with (
            torch.no_grad()
        ):  # what reaches the second layer varies along two directions
            found[0].weight[:] = found[0].weight[:, :2] @ found[0].weight[:2]
        return found

    rng = np.random.default_rng(2)
    loader = [
        {"input": torch.tensor(rng.standard_normal((40, 16)), dtype=torch.float32)}
        for _ in range(4)
    ]
    seen = inputs_of(model(), ["0", "2"], loader)
    expected = theirs(
        model(),
        loader,
        targets=["0", "2"],
        eva={"rho": 2.0, "whiten": whiten},
        how={"prepare_model_inputs_fn": None, "prepare_layer_inputs_fn": None},
        r=1,
        lora_alpha=5,
    )
    assert set(expected) == {"2"}

    shapes = {"0": (16, 24), "2": (24, 12)}
    params = {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}
    roles = {name: {"inputs": (0,), "outputs": (1,)} for name in params}
    config = lj.LoraConfig("0|2", rank=1, alpha=5, init=initializers.Eva(whiten=whiten))
    plan, stat = lj.plan(config, params, roles=roles), Pca(2)
    found = settle(
        plan, stepper(plan, stat, seen, str), fresh(plan, stat), range(len(loader))
    )
    (slot,) = found.plan.slots
    (site,) = found.plan
    a, *numbers = expected["2"]
    assert [site.rank, site.alpha, site.scale] == numbers == [2, 10, 5]
    start = start_of(site, slot, found.states, 0)
    signs = np.sign((np.asarray(start.a) * a).sum(0))
    assert np.abs(start.a * signs - a).max() <= 1e-4 * np.abs(a).max()


def test_incremental_pca():
    """Components, singular values, explained variance, mean and variance."""
    import torch
    from peft.utils.incremental_pca import IncrementalPCA as Theirs

    k, stat = 3, Pca(3)
    one, state = Theirs(n_components=k), stat.init(D)
    for n in (30, 8, 5, 21):
        x = rows(n, seed=n)
        one.partial_fit(torch.tensor(np.asarray(x)))
        state = step(stat, state, x)
        found = state.principal(k)
        explained = found.variances / found.total
        assert np.abs(state.components - one.components_.numpy()).max() <= 1e-4
        assert_close(state.singular, one.singular_values_.numpy(), factor=16)
        assert_close(explained, one.explained_variance_ratio_.numpy(), factor=16)
        assert_close(state.mean, one.mean_.numpy())
        assert_close(state.variance, one.var_.numpy(), factor=16)
