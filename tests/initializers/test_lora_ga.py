"""LoRA-GA against PEFT's own, and what it refuses."""

import itertools
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_close, numbers

import lorax_jax as lj
from lorax_jax.adapters import Adapter, Fixed
from lorax_jax.errors import ConfigError, PlanError
from lorax_jax.initializers import LoraGa, lora_ga
from lorax_jax.statistics import GradientFactors

# The smaller sides are 4 ranks, so that PEFT's randomized decomposition is exact.
D, H, OUT, RANK, ALPHA = 12, 8, 9, 2, 6
SCALE = ALPHA / RANK
DIRECTIONS = ("ArB2r", "A2rBr", "ArBr", "random")
SCALES = {
    "stable": "stable",
    "weight_svd": "weight_svd",
    "gd": "gd_scale",
    "unit": "unit",
}
NAMES = ("up", "down")
BATCHES = 3


def draw(*shape):
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


XS = [draw(5, D) + i for i in range(BATCHES)]
YS = [draw(5, OUT) - i for i in range(BATCHES)]
# (d_in, d_out), with a first singular value that PEFT's estimate of it finds.
WEIGHTS = {"up": draw(D, H) / 4 + 0.3, "down": draw(H, OUT) / 3 + 0.5}


def apply(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def loss(params, x, y):
    return jnp.mean((apply(params, x) - y) ** 2)


@pytest.fixture(scope="module")
def factors():
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    config = lj.LoraConfig(list(NAMES), rank=RANK, alpha=ALPHA)
    plan = lj.plan(config, params, apply, (XS[0],))
    batches = list(zip(XS, YS, strict=True))
    return lj.capture_grad(loss, plan, size=H).run(params, batches)


def theirs(direction, scale, conv1d=False):
    """PEFT's model after `preprocess_loraga`, and the gradients that it took."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from peft.tuners.lora.config import LoraGAConfig
    from peft.tuners.lora.loraga import preprocess_loraga
    from transformers.pytorch_utils import Conv1D

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.up = torch.nn.Linear(D, H, bias=False)
            self.down = torch.nn.Linear(H, OUT, bias=False)
            if conv1d:
                self.down = Conv1D(OUT, H)
                torch.nn.init.zeros_(self.down.bias)

        def forward(self, x):
            return self.down(torch.tanh(self.up(x)))

    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        model.up.weight.copy_(torch.tensor(WEIGHTS["up"].T))
        weight = WEIGHTS["down"] if conv1d else WEIGHTS["down"].T
        model.down.weight.copy_(torch.tensor(weight))
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        target_modules=list(NAMES),
        init_lora_weights="lora_ga",
        lora_ga_config=LoraGAConfig(direction=direction, scale=scale),
    )

    def train_step():
        for x, y in zip(XS, YS, strict=True):
            ((model(torch.tensor(x)) - torch.tensor(y)) ** 2).mean().backward()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        preprocess_loraga(model, config, train_step)
        gradients = {
            name: getattr(model, name)._peft_loraga_grad.numpy() for name in NAMES
        }
        model = peft.get_peft_model(model, config)
    return model, gradients


def factors_of(model, name):
    """PEFT's A and B as ours lie: `(d_in, rank)` and `(rank, d_out)`."""
    module = getattr(model.base_model.model, name)
    a, b = (m["default"].weight for m in (module.lora_A, module.lora_B))
    return a.detach().numpy().T, b.detach().numpy().T


def ours(factors, name, options, seed=0):
    return lora_ga(
        jnp.asarray(WEIGHTS[name]),
        rank=RANK,
        scale=SCALE,
        key=jax.random.key(seed),
        stats=factors[name],
        options=options,
    )


def close(found, expected):
    found, expected = np.asarray(found), np.asarray(expected)
    np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


def test_gradients_are_theirs(factors):
    _, gradients = theirs("ArB2r", "unit")
    for name in NAMES:
        u, s, v = (np.asarray(x) for x in jax.tree.leaves(factors[name]))
        close((u * s) @ v, gradients[name].T)


def test_gradients_of_conv1d_are_theirs(factors):
    _, gradients = theirs("ArB2r", "unit", conv1d=True)
    u, s, v = (np.asarray(x) for x in jax.tree.leaves(factors["down"]))
    close((u * s) @ v, gradients["down"])


def matched(factors, name, options, a):
    """Our start, with the same subset where it is drawn: of A's columns up to signs."""
    for seed in range(200):
        start = ours(factors, name, options, seed)
        cosines = (np.asarray(start.a) * a).sum(axis=0)
        norms = np.linalg.norm(a, axis=0) * np.linalg.norm(start.a, axis=0)
        if np.allclose(np.abs(cosines), norms, rtol=1e-4):
            return start, np.sign(cosines)
    raise AssertionError(f"no draw of {options} takes PEFT's directions of {name}")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_starts_where_theirs_does(factors, direction, scale):
    model, _ = theirs(direction, SCALES[scale])
    for name in NAMES:
        a, b = factors_of(model, name)
        start, sign_a = matched(factors, name, LoraGa(direction, scale), a)
        # A triplet's sign is free in A and in B; where both take the same triplets,
        # the two signs are one.
        sign_b = np.sign((np.asarray(start.b) * b).sum(axis=1))
        close(start.a * sign_a[None], a)
        close(start.b * sign_b[:, None], b)
        if direction == "random":
            close(start.a @ start.b, a @ b)
        assert start.a is start.a0 and start.b is start.b0
        # Orthogonal directions, as long as the table says.
        long = 1 / SCALE if scale == "gd" else 1.0
        assert_close(start.a.T @ start.a, long**2 * np.eye(RANK), length=D)
        gram = np.asarray(start.b @ start.b.T)
        assert_close(gram, np.diag(np.diag(gram)), length=64)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_moves_as_theirs_does(factors, direction):
    """Their residual base with moved factors is our base with the same ones."""
    torch = pytest.importorskip("torch")
    model, _ = theirs(direction, "stable")
    train, fixed = {}, {}
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    plan = lj.plan(lj.LoraConfig(list(NAMES), rank=RANK), params, apply, (XS[0],))
    roles = {slot.name: slot.role for slot in plan.slots}
    with torch.no_grad():
        close(apply(params, XS[0]), model(torch.tensor(XS[0])))
    for name in NAMES:
        a, b = factors_of(model, name)
        start, sign_a = matched(factors, name, LoraGa(direction), a)
        sign_b = np.sign((np.asarray(start.b) * b).sum(axis=1))
        a0, b0 = start.a * sign_a[None], start.b * sign_b[:, None]
        moved_a, moved_b = draw(*a.shape) / 20, draw(*b.shape) / 20
        train[name] = {"a": a0 + moved_a, "b": b0 + moved_b}
        kept = {"scale": jnp.float32(SCALE), "rank": jnp.int32(RANK)}
        fixed[name] = Fixed(roles[name], kept | {"a0": a0, "b0": b0})
        module = getattr(model.base_model.model, name)
        with torch.no_grad():
            module.lora_A["default"].weight += torch.tensor(moved_a.T)
            module.lora_B["default"].weight += torch.tensor(moved_b.T)
    bound, x = lj.bind(params, Adapter(train, fixed)), jnp.asarray(XS[0])
    with torch.no_grad():
        expected = model(torch.tensor(XS[0])).numpy()
    close(lj.adapt(apply)(bound, x), expected)
    assert np.abs(expected - np.asarray(apply(params, x))).max() > 1e-2
    started = {n: {"a": fixed[n]["a0"], "b": fixed[n]["b0"]} for n in NAMES}
    bound = lj.bind(params, Adapter(started, fixed))
    np.testing.assert_array_equal(lj.adapt(apply)(bound, x), apply(params, x))


def test_conv1d_takes_its_inputs_for_outputs(factors):
    """What PEFT does there and we do not: the factor is that of the wrong side."""
    model, _ = theirs("ArB2r", "stable", conv1d=True)
    _, b = factors_of(model, "down")
    start = ours(factors, "down", LoraGa())
    ratio = np.linalg.norm(b, axis=1) / np.linalg.norm(start.b, axis=1)
    np.testing.assert_allclose(ratio, (H / OUT) ** 0.25, rtol=1e-4)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_from_gradients_to_a_step(direction, dtype, key):
    """Stacked layers: nothing changes at the start, and a step goes downhill."""
    weights = numbers(jax.random.key(1), (3, D, D)) / np.sqrt(D)
    params = {"layers": {"w": weights.astype(dtype)}}

    def forward(params, x):
        layer = lambda x, w: (x + jnp.tanh(x @ w), None)  # noqa: E731
        return jax.lax.scan(layer, x.astype(dtype), params["layers"]["w"])[0]

    def loss(params, x):
        return jnp.mean((forward(params, x).astype(jnp.float32) - 1) ** 2)

    batches = [numbers(jax.random.key(i), (6, D)) for i in range(2)]
    init = LoraGa(direction)
    config = lj.LoraConfig({r"layers/(0|2)/w": {"init": init}, "layers/w": {}}, rank=2)
    plan = lj.plan(config, params, loss, (batches[0],))
    stats = lj.capture_grad(loss, plan).run(params, batches)
    adapter = lj.init(plan, params, key=key, stats=stats)
    bound = lj.bind(params, adapter)
    base = forward(params, batches[0])
    np.testing.assert_array_equal(lj.adapt(forward)(bound, batches[0]), base)
    assert adapter.fixed["layers/w"]["a0"][np.array([0, 2])].any()
    assert not adapter.fixed["layers/w"]["a0"][1].any()

    def total(train):
        bound = lj.bind(params, Adapter(train, adapter.fixed))
        return sum(lj.adapt(loss)(bound, x) for x in batches)

    value, grads = jax.value_and_grad(total)(adapter.train)
    moved = jax.tree.map(lambda x, g: x - 0.1 * g, adapter.train, grads)
    assert total(moved) < value


def test_init_asks_for_gradients(key):
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    config = lj.LoraConfig(list(NAMES), rank=RANK, init="lora_ga")
    plan = lj.plan(config, params, apply, (XS[0],))
    with pytest.raises(PlanError, match="`loss=` where it starts"):
        lj.init(plan, params, key=key)


def test_plan_names_the_site_that_has_too_few_directions():
    params = jax.tree.map(jnp.asarray, WEIGHTS)
    ranks = {"up": {"rank": H // 2}, "down": {"rank": H // 2 + 1}}
    config = lj.LoraConfig(ranks, init="lora_ga")
    match = (
        "`init` = 'lora_ga' takes 2 directions for each rank, and 'down' has the rank "
        r"5 and 8 directions\. Lower `rank` for this site: .*'rank': 4"
    )
    with pytest.raises(PlanError, match=match):
        lj.plan(config, params, apply, (XS[0],))
    config = lj.LoraConfig("w", rank=1, init=LoraGa("ArBr"))
    one, roles = {"w": jnp.ones((3, 1))}, {"w": {"inputs": (0,), "outputs": (1,)}}
    with pytest.raises(PlanError, match="has the rank 1 and 1 .* Give it another"):
        lj.plan(config, one, roles=roles)


def exact(d_in=6, d_out=5, size=None):
    u, s, v = jnp.linalg.svd(jnp.asarray(draw(d_in, d_out)), full_matrices=False)
    return GradientFactors(u[:, :size], s[:size], v[:size])


def call(stats, options=None, rank=2, d_in=6, d_out=5, key=0):
    options = {} if options is None else {"options": options}
    weight = jnp.asarray(draw(d_in, d_out))
    key = jax.random.key(key)
    return lora_ga(weight, rank=rank, scale=2.0, key=key, stats=stats, **options)


def test_random_takes_both_sides_of_the_same_triplets():
    stats = exact()
    drawn = set()
    for seed in range(12):
        start = call(stats, LoraGa("random", "unit"), key=seed)
        at = np.argmax(np.abs(np.asarray(stats.u.T @ start.a)), axis=0)
        drawn.add(tuple(at.tolist()))
        assert_close(start.b, stats.s[at][:, None] * stats.v[at], length=1)
    assert len(drawn) > 4 and all(len(set(at)) == 2 for at in drawn)
    assert set(itertools.chain(*drawn)) == {0, 1, 2, 3}


def test_a_gradient_of_zero_leaves_b_at_zero():
    stats = exact()
    stats = GradientFactors(stats.u, 0 * stats.s, stats.v)
    for scale in ("stable", "weight_svd", "gd", "unit"):
        start = call(stats, LoraGa(scale=scale))
        assert start.a.any() and not start.b.any()


def test_maps_over_layers():
    layers = [exact(), jax.tree.map(lambda x: x[..., ::-1], exact())]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *layers)
    starts = jax.jit(jax.vmap(call))(stacked)
    for i, layer in enumerate(layers):
        assert_close(jax.tree.map(lambda x, i=i: x[i], starts), call(layer), length=8)


def test_options_stand_for_the_name():
    config = lj.LoraConfig("w", init=LoraGa(scale="unit"))
    assert config == lj.LoraConfig("w", init=LoraGa(scale="unit"))
    assert hash(config) == hash(lj.LoraConfig("w", init=LoraGa(scale="unit")))
    found = lj.initializers.method(config.init)
    assert found.reads == "stats"
    start = found.start(
        jnp.asarray(draw(6, 5)),
        rank=2,
        scale=2.0,
        key=jax.random.key(0),
        stats=exact(),
    )
    assert_close(start, call(exact(), LoraGa(scale="unit")))


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_options_go_to_peft_and_back(direction, scale):
    options = LoraGa(direction, scale, 8)
    fields = options.to_peft()
    assert fields["scale"] == SCALES[scale] and LoraGa.from_peft(fields) == options
    config = pytest.importorskip("peft.tuners.lora.config").LoraGAConfig(**fields)
    assert vars(config) == fields
    assert LoraGa.from_peft({}) == LoraGa()


@pytest.mark.parametrize(
    "options, match",
    [
        ({"direction": "ArBx"}, r"`LoraGa\(direction='ArBx'\)`: one of 'ArB2r', "),
        (
            {"scale": "gd_scale"},
            r"`LoraGa\(scale='gd_scale'\)`: one of 'stable', ",
        ),
        ({"gamma": 0}, r"`LoraGa\(gamma=0\)`: a positive number is meant"),
        ({"gamma": math.nan}, r"`LoraGa\(gamma=nan\)`: a positive number is meant"),
    ],
)
def test_unknown_options(options, match):
    with pytest.raises(ConfigError, match=match):
        LoraGa(**options)


def test_refuses_without_gradients():
    with pytest.raises(PlanError, match="starts from gradients, and got None"):
        call(None)


def test_refuses_gradients_of_another_kernel():
    with pytest.raises(PlanError, match=r"shape \(7, 5\) were given for .* \(6, 5\)"):
        call(exact(d_in=7))


def test_refuses_too_few_directions():
    match = r"needs 4 directions .* got 3\. Gather more: .*size=8\)"
    with pytest.raises(PlanError, match=match):
        call(exact(size=3))


def test_refuses_ranks_that_the_kernel_has_no_directions_for():
    with pytest.raises(PlanError, match=r"has 5 at most: lower `rank` to 2 for this"):
        call(exact(), rank=3)
