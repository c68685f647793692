"""Starting factors of the weight, beside PEFT's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from twins import IDS

import lorax_jax as lj

RANK, ALPHA = 4, 7
RULES = {
    r"(layers|h)/1/mlp/.*kernel": {"rank": 2, "alpha": 5},
    r"(layers|h)/0/.*/(o_proj|c_proj)/kernel": {"alpha": 1},
    "all-linear": {},
}
PATTERNS = {
    "rank_pattern": {r"(layers|h)\.1\.mlp\..*": 2},
    "alpha_pattern": {
        r"(layers|h)\.1\.mlp\..*": 5,
        r"(layers|h)\.0\..*\.(o_proj|c_proj)": 1,
    },
}
# Of a truncation whose smallest direction is well apart from the next.
TOLERANCE = 1e-4


def theirs(pair, init, rslora=False):
    """PEFT's model, freshly started."""
    import peft

    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules="all-linear",
        init_lora_weights=init,
        use_rslora=rslora,
        fan_in_fan_out=pair.family == "gpt2",
        **PATTERNS,
    )
    return peft.get_peft_model(pair.fresh(), config).eval()


def ours(pair, init, scan=False, seed=0, rslora=False):
    model, params = pair.ours(scan)
    config = lj.LoraConfig(RULES, rank=RANK, alpha=ALPHA, init=init, rslora=rslora)
    plan = lj.plan(config, params, fn=model.apply, args=(IDS,))
    return plan, lj.init(plan, params, key=jax.random.key(seed))


def module_of(model, site):
    """Their layer at one of our sites."""
    end = "." + site.path.removesuffix("/kernel").replace("/", ".")
    (found,) = [m for n, m in model.named_modules() if n.endswith(end)]
    return found


def factors(plan, adapter):
    """Site, and its A and B at its own rank, of a model that is not scanned."""
    for site in plan:
        held = {**adapter.fixed[site.name], **adapter.train[site.name]}
        yield site, np.asarray(held["a"]), np.asarray(held["b"])


def product(module):
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight
    return (b @ a).T.detach().numpy(), module.scaling["default"]


def assert_near(found, wanted):
    np.testing.assert_allclose(
        found, wanted, atol=TOLERANCE * max(np.abs(wanted).max(), 1e-3), rtol=0
    )


# Not GPT-2's with OLoRA: PEFT decomposes its kernels as they lie. See the next test.
@pytest.mark.parametrize("rslora", [False, True], ids=["plain", "rslora"])
@pytest.mark.parametrize(
    ("family", "init"), [("llama", "pissa"), ("llama", "olora"), ("gpt2", "pissa")]
)
def test_products_of_starting_factors(twin, family, init, rslora):
    pair = twin(family)
    model = theirs(pair, init, rslora)
    plan, adapter = ours(pair, init, rslora=rslora)
    for site, a, b in factors(plan, adapter):
        wanted, scale = product(module_of(model, site))
        assert a.shape[-1] == site.rank
        assert site.scale == pytest.approx(scale)
        assert_near(a @ b, wanted)


def test_olora_of_kernels_in_the_layout_of_conv1d(twin):
    """As of the same layer stored as torch's `Linear` stores it."""
    pair = twin("gpt2")
    plan, adapter = ours(pair, "olora")
    params = pair.ours()[1]
    for site, a, b in factors(plan, adapter):
        leaf = params
        for part in site.path.split("/"):
            leaf = leaf[part]
        q, r = np.linalg.qr(np.asarray(leaf, np.float64).T)
        assert_near(a @ b, (q[:, : site.rank] @ r[: site.rank]).T)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_minor_directions(twin, family):
    pair = twin(family)
    model = theirs(pair, "mica")
    plan, adapter = ours(pair, "mica")
    for site, a, b in factors(plan, adapter):
        module = module_of(model, site)
        wanted = module.lora_B["default"].weight.detach().numpy().T  # (rank, d_out)
        assert not a.any() and "b" not in adapter.train[site.name]
        # Each vector up to its sign.
        assert_near(np.abs((b * wanted).sum(1)), np.ones(site.rank))
    named = [p for n, p in model.named_parameters() if "lora_" in n]
    counted = lj.count(pair.ours()[1], adapter)
    trained = sum(p.numel() for p in named if p.requires_grad)
    assert counted.trainable == plan.trainable == trained
    # As in PEFT, what is frozen counts among all.
    plain = lj.count(pair.ours()[1], ours(pair, True)[1])
    assert counted.total == plain.total
    assert plain.trainable == sum(p.numel() for p in named)


@pytest.mark.parametrize("n", [0, 1, 4])
def test_randomized_captures_no_less(twin, n):
    pair = twin("llama")
    model = theirs(pair, f"pissa_niter_{n}")
    plan, adapter = ours(pair, f"pissa_niter_{n}")
    exact = dict(
        (site.name, np.square(site.scale * a @ b).sum())
        for site, a, b in factors(*ours(pair, "pissa"))
    )
    mine, others, best = 0.0, 0.0, sum(exact.values())
    for site, a, b in factors(plan, adapter):
        wanted, scale = product(module_of(model, site))
        mine += np.square(site.scale * a @ b).sum()
        others += np.square(scale * wanted).sum()
    assert others <= mine <= best * (1 + 1e-5)


def test_orthogonal_factors_have_the_same_law(twin):
    """No draw is the same: the product is zero, and entries are of one size."""
    pair = twin("llama")
    model = theirs(pair, "orthogonal")
    plan, adapter = ours(pair, "orthogonal")
    sizes, drawn = [], np.zeros(2)
    for site, a, b in factors(plan, adapter):
        module = module_of(model, site)
        wanted, _ = product(module)
        for one in (a @ b, wanted):
            assert np.abs(one).max() < 1e-6
        for x in (a, b):
            assert np.linalg.matrix_rank(x) == site.rank // 2
        both = [
            p["default"].weight.detach().numpy() for p in (module.lora_A, module.lora_B)
        ]
        sizes.append([np.square(x).mean() for x in (a, b, *both)])
        drawn += len(a) * site.rank // 2, b.shape[1] * site.rank // 2
    # A normal matrix of half the columns, turned and divided by 10: within 5 deviations
    # of a mean of so many squares.
    found = np.mean(sizes, axis=0).reshape(2, 2) / (0.01 / 2)
    assert (np.abs(found - 1) < 5 * np.sqrt(2 / drawn)).all(), found


def moved(adapter, seed):
    """The adapter after steps that change every factor."""
    rng = np.random.default_rng(seed)

    def move(x):
        size = 0.3 * np.asarray(jnp.abs(x)).mean() + 0.02
        return x + jnp.asarray(rng.normal(0, size, x.shape), x.dtype)

    return adapter._replace(train=jax.tree.map(move, adapter.train))


def given(model, plan, adapter):
    """Their model with our factors in it."""
    import torch

    with torch.no_grad():
        for site, a, b in factors(plan, adapter):
            module = module_of(model, site)
            module.lora_A["default"].weight.copy_(torch.from_numpy(a.T.copy()))
            module.lora_B["default"].weight.copy_(torch.from_numpy(b.T.copy()))
    return model


def logits(model):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(IDS).long()).logits.numpy()


def test_four_adapters_on_one_base(twin):
    """Two of PiSSA, one of OLoRA and a plain one: alone, and all together."""
    pair = twin("llama")
    model, params = pair.ours()
    before = jax.tree.leaves(params)
    run = lj.adapt(model.apply)
    base = np.asarray(model.apply(params, IDS))
    adapters, changes = [], {}
    for seed, init in enumerate(("pissa", "pissa", "olora", True)):
        plan, start = ours(pair, init, seed=seed)
        np.testing.assert_array_equal(run(lj.bind(params, start), IDS), base)
        adapter = moved(start, seed)
        peft = given(theirs(pair, init), plan, adapter)
        wanted = logits(peft)
        found = np.asarray(run(lj.bind(params, adapter), IDS))
        assert np.abs(wanted - base).max() > 0.05 * np.abs(base).max()
        assert_near(found, wanted)
        adapters.append(adapter)
        merged = dict(peft.merge_and_unload().named_parameters())
        for name, value in merged.items():
            changes.setdefault(name, []).append(value.detach().numpy())
    together = pair.fresh().eval()
    import torch

    with torch.no_grad():
        for name, value in together.named_parameters():
            own = value.numpy().copy()
            total = own + sum(one - own for one in changes[name])
            value.copy_(torch.from_numpy(total))
    found = np.asarray(run(lj.bind(params, *adapters), IDS))
    assert_near(found, logits(together))
    after = jax.tree.leaves(params)
    assert all(x is y for x, y in zip(before, after, strict=True))
