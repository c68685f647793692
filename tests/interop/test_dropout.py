r"""Dropout on both sides as what it is, a random variable: its rate, mean and variance.

Of an input $x$ each entry is kept with probability $1 - p$ and then divided by it. With
$W_{ij} = s (A B)_{ij}$ the adapter gives $y_j = \sum_i x_i W_{ij} k_i / (1 - p)$, which
has the mean $\sum_i x_i W_{ij}$ and the variance $\frac{p}{1-p} \sum_i (x_i W_{ij})^2$.

Every draw is a row of one large input. The mean of $n$ draws deviates by
$\sigma / \sqrt n$, their variance by $\sqrt{(\mu_4 - \sigma^4) / n}$; bounds are five
of those, which fewer than one in a million comparisons exceed by chance.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lorax_jax as lj

D, M, RANK, ALPHA, DRAWS, RATE = 24, 5, 4, 6, 20_000, 0.25
SIGMAS = 5


class Sides:
    """One linear layer and one embedding, adapted by PEFT and here alike."""

    def __init__(self, folder, rank=RANK, d_out=M, base=0.0, fill=None):
        import peft
        import torch

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.table = torch.nn.Embedding(D, 7)
                self.lin = torch.nn.Linear(D, d_out, bias=False)

        torch.manual_seed(0)
        config = peft.LoraConfig(
            r=rank,
            lora_alpha=ALPHA,
            lora_dropout=RATE,
            target_modules=["table", "lin"],
            rank_pattern={"table": RANK},
        )
        model = Model()
        with torch.no_grad():
            model.lin.weight.mul_(base)
        self.theirs = peft.get_peft_model(model, config).train()
        with torch.no_grad():
            for name, leaf in self.theirs.named_parameters():
                if "lora_" in name:
                    leaf.copy_(torch.randn_like(leaf) / 2)
                    if fill is not None and "lin" in name:
                        leaf.copy_(fill(leaf))
        self.theirs.save_pretrained(folder)
        self.params = {
            "table": jnp.asarray(model.table.base_layer.weight.detach().numpy()),
            "lin": jnp.asarray(model.lin.base_layer.weight.detach().numpy().T),
        }
        names = [("table", "table.weight", "same"), ("lin", "lin.weight", "linear")]
        config = lj.LoraConfig.from_peft(folder, names)
        assert config.dropout == RATE
        fn = lambda p, x, i: (x @ p["lin"], p["table"][i])  # noqa: E731
        self.fn = fn
        args = (jnp.ones((1, D)), jnp.zeros(3, int))
        plan = lj.plan(config, self.params, fn, args)
        self.adapter, _ = lj.load_adapter(folder, self.params, names=names, plan=plan)

    def their_linear(self, x):
        return self._their(self.theirs.base_model.model.lin, np.asarray(x))

    def their_lookup(self, ids):
        return self._their(self.theirs.base_model.model.table, ids)

    def _their(self, module, x):
        import torch

        with torch.no_grad():
            return module(torch.from_numpy(x)).numpy()

    def ours(self, x, ids=(0,), key=1):
        key = None if key is None else jax.random.key(key)
        bound = lj.bind(self.params, self.adapter, key=key)
        args = jnp.asarray(x), jnp.asarray(ids)
        return [np.asarray(y) for y in lj.adapt(self.fn)(bound, *args)]

    def weight(self):
        """What the adapter adds to the kernel."""
        arrays = self.adapter.train["lin"]
        scale = float(self.adapter.fixed["lin"]["scale"])
        return scale * np.asarray(arrays["a"], float) @ np.asarray(arrays["b"], float)


@pytest.fixture(scope="module")
def sides(tmp_path_factory):
    return Sides(tmp_path_factory.mktemp("dropout"))


def test_mean_and_variance(sides):
    x = np.random.default_rng(0).normal(0, 1, D).astype(np.float32)
    rows = np.broadcast_to(x, (DRAWS, D)).copy()
    parts = x[:, None] * sides.weight()  # (D, M), of which each is kept or not
    mean = parts.sum(0)
    variance = RATE / (1 - RATE) * (parts**2).sum(0)
    # Of k / (1 - p) - 1, which is -1 with probability p and else p / (1 - p).
    fourth = RATE + (1 - RATE) * (RATE / (1 - RATE)) ** 4
    squares = (RATE / (1 - RATE) * parts**2) ** 2
    fourth = fourth * (parts**4).sum(0) + 3 * (variance**2 - squares.sum(0))
    for drawn in (sides.their_linear(rows), sides.ours(rows)[0]):
        drawn = drawn.astype(float)
        off = np.abs(drawn.mean(0) - mean) / np.sqrt(variance / DRAWS)
        assert off.max() < SIGMAS
        spread = np.sqrt((fourth - variance**2) / DRAWS)
        assert (np.abs(drawn.var(0) - variance) / spread).max() < SIGMAS


def test_the_rate_and_the_factor(tmp_path):
    """Through an A and B that do nothing, what is dropped can be seen."""
    import torch

    sides = Sides(tmp_path, rank=D, d_out=D, fill=lambda leaf: torch.eye(D))
    scale = ALPHA / D
    rows = np.ones((DRAWS // D, D), np.float32)
    for drawn in (sides.their_linear(rows), sides.ours(rows)[0]):
        dropped = (drawn == 0).mean()
        assert abs(dropped - RATE) < SIGMAS * np.sqrt(RATE * (1 - RATE) / drawn.size)
        kept = drawn[drawn != 0]
        np.testing.assert_allclose(kept, scale / (1 - RATE), rtol=1e-6)
        # Neither whole rows nor whole columns.
        for axis, count in ((0, len(rows)), (1, D)):
            share = (drawn == 0).mean(axis)
            most = SIGMAS * np.sqrt(RATE * (1 - RATE) / count)
            assert np.abs(share - RATE).max() < most and share.std() > 0


def test_it_acts_on_the_input_of_a_alone(tmp_path):
    """The base sees everything: with a B of zeros nothing is random."""
    import torch

    sides = Sides(tmp_path, base=1.0, fill=lambda leaf: torch.zeros(()))
    x = np.random.default_rng(1).normal(0, 1, (9, D)).astype(np.float32)
    plain = x @ np.asarray(sides.params["lin"])
    np.testing.assert_allclose(sides.their_linear(x), plain, atol=1e-5)
    np.testing.assert_allclose(sides.ours(x)[0], plain, atol=1e-5)


def test_off(sides):
    """Their `eval` is our lack of a key."""
    x = np.random.default_rng(1).normal(0, 1, (9, D)).astype(np.float32)
    sides.theirs.eval()
    still = sides.their_linear(x)
    sides.theirs.train()
    np.testing.assert_allclose(sides.ours(x, key=None)[0], still, atol=1e-5)
    assert np.abs(sides.their_linear(x) - still).max() > 0.1
    assert np.abs(sides.ours(x)[0] - still).max() > 0.1


def test_lookups_have_none(sides):
    ids = np.arange(D)
    x = np.ones((1, D), np.float32)
    theirs = sides.their_lookup(ids)
    assert np.array_equal(theirs, sides.their_lookup(ids))
    for key in (None, 0, 1):
        np.testing.assert_allclose(sides.ours(x, ids, key)[1], theirs, atol=1e-5)
