"""Convolutions on both sides: torch's with PEFT's adapter, and the same ones here."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from jax import lax
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax._errors import CheckpointError

# Values of order 1 in float32, summed over at most 36 products; relative.
TOLERANCE = 1e-5
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


@dataclasses.dataclass(frozen=True)
class Net:
    """Two convolutions with a tanh between, over `rank` axes."""

    rank: int
    stride: int = 1
    padding: int | str = 0
    first: bool = False  # kernels lie as torch has them, channels first

    def theirs(self):
        import torch

        torch.manual_seed(0)
        conv = getattr(torch.nn, f"Conv{self.rank}d")
        return torch.nn.Sequential(
            conv(4, 6, 3, stride=self.stride, padding=self.padding),
            torch.nn.Tanh(),
            conv(6, 5, (2, 3, 1)[: self.rank], padding=self.padding),
        )

    @property
    def names(self):
        layout = "same" if self.first else "conv"
        return [(f"{i}/kernel", f"{i}.weight", layout) for i in (0, 2)]

    def params(self, theirs):
        def ours(module):
            kernel = jnp.asarray(module.weight.detach().numpy())
            if not self.first:
                kernel = jnp.moveaxis(kernel, (0, 1), (-1, -2))
            return {"kernel": kernel, "bias": jnp.asarray(module.bias.detach().numpy())}

        return {str(i): ours(theirs[i]) for i in (0, 2)}

    def fn(self, params, x):
        for i, stride in ((0, self.stride), (2, 1)):
            x = self.conv(params[str(i)], x, stride)
            x = jnp.tanh(x) if i == 0 else x
        return x

    def conv(self, layer, x, stride):
        axes = "DHW"[-self.rank :]
        kernel = f"OI{axes}" if self.first else f"{axes}IO"
        p = self.padding
        y = lax.conv_general_dilated(
            x,
            layer["kernel"],
            (stride,) * self.rank,
            "SAME" if p == "same" else [(p, p)] * self.rank,
            dimension_numbers=(f"NC{axes}", kernel, f"NC{axes}"),
        )
        return y + layer["bias"].reshape(1, -1, *(1,) * self.rank)

    @property
    def x(self):
        shape = (2, 4, *(9, 8, 7)[: self.rank])
        return np.random.default_rng(0).normal(0, 1, shape).astype(np.float32)


NETS = {
    "1d": Net(1, padding=1),
    "1d strided": Net(1, stride=2),
    "2d": Net(2),
    "2d strided, padded": Net(2, stride=2, padding=2),
    "2d same": Net(2, padding="same"),
    "2d channels first": Net(2, stride=3, padding=1, first=True),
    "3d": Net(3, stride=2, padding=1),
}


@pytest.fixture(params=NETS.values(), ids=NETS.keys())
def net(request):
    return request.param


def their_adapter(theirs, **config):
    """PEFT's adapter with both factors drawn."""
    import peft

    config = {"r": 3, "lora_alpha": 5, "init_lora_weights": False} | config
    return peft.get_peft_model(theirs, peft.LoraConfig(**config))


def relative(x, y):
    y = np.asarray(y)
    return np.abs(np.asarray(x) - y).max() / np.abs(y).max()


def run(model, x):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def _key(name):
    """The key in a file of a parameter of their model."""
    key = name.replace(".default", "")
    return key.removesuffix(".weight") if "magnitude" in key else key


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_theirs_here(net, dora, tmp_path, record_property):
    """Values, gradients of what is trained, and merged weights are PEFT's."""
    import torch

    theirs = net.theirs()
    params = net.params(theirs)
    model = their_adapter(
        theirs,
        target_modules=["0", "2"],
        rank_pattern={"2": 2},
        use_rslora=True,
        use_dora=dora,
    )
    for name, parameter in model.named_parameters():
        if "magnitude" in name:  # starts where the gain is 1
            parameter.data *= 0.5 + torch.rand_like(parameter)
    model.save_pretrained(tmp_path)
    adapter, receipt = lj.load_adapter(tmp_path, params, names=net.names)
    assert [site.rank for site in receipt.plan] == [3, 2]

    def ours(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return lj.adapt(net.fn)(bound, jnp.asarray(net.x))

    out = model(torch.from_numpy(net.x))
    torch.sin(out).sum().backward()
    worst = relative(ours(adapter.train), out.detach().numpy())
    assert relative(net.fn(params, net.x), out.detach().numpy()) > 0.01  # it acts

    grads = jax.grad(lambda train: jnp.sin(ours(train)).sum())(adapter.train)
    back = tmp_path / "gradients"
    lj.save_adapter(
        back, lj.Adapter(grads, adapter.fixed), plan=receipt.plan, names=net.names
    )
    found = load_file(back / TENSORS)
    expected = {
        _key(name): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    assert set(found) == set(expected) and len(found) == (6 if dora else 4)
    for name, grad in expected.items():
        assert found[name].shape == grad.shape
        worst = max(worst, relative(found[name], grad))

    merged = net.params(model.merge_and_unload())
    ours_merged = lj.merge(params, adapter)
    for i in ("0", "2"):
        worst = max(worst, relative(ours_merged[i]["kernel"], merged[i]["kernel"]))
    record_property("max_relative_difference", float(worst))
    assert worst <= TOLERANCE


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
def test_ours_there(net, dora, tmp_path):
    """Our folder in PEFT: every bit arrives, and comes back."""
    import peft

    theirs = net.theirs()
    params = net.params(theirs)
    config = lj.LoraConfig("all-linear", rank=2, alpha=3, init=False, dora=dora)
    plan = lj.plan(config, params, net.fn, (net.x,))
    adapter = drawn(plan, params)
    lj.save_adapter(tmp_path / "a", adapter, plan=plan, names=net.names, params=params)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")
    out = lj.adapt(net.fn)(lj.bind(params, adapter), jnp.asarray(net.x))
    assert relative(out, run(model, net.x)) <= TOLERANCE

    model.save_pretrained(tmp_path / "b")
    written, back = (load_file(tmp_path / f / TENSORS) for f in "ab")
    assert set(written) == set(back)
    assert all(np.array_equal(written[key], back[key]) for key in written)
    for folder in "ab":  # with our metadata, and without
        for names in (net.names, None) if folder == "a" else (net.names,):
            loaded, _ = lj.load_adapter(tmp_path / folder, params, names=names)
            same = jax.tree.map(np.array_equal, loaded.train, adapter.train)
            assert jax.tree.all(same)


def test_where_it_starts():
    """A is drawn as PEFT draws it: within 1 / sqrt(d_in * window)."""
    import torch

    net = Net(2)
    theirs = torch.nn.Sequential(torch.nn.Conv2d(16, 8, 5))
    params = {"0": {"kernel": jnp.zeros((5, 5, 16, 8)), "bias": jnp.zeros(8)}}
    x = jnp.ones((1, 16, 5, 5))
    fn = lambda p, x: net.conv(p["0"], x, 1)  # noqa: E731
    for init in (True, "gaussian"):
        model = their_adapter(theirs, r=8, target_modules=["0"], init_lora_weights=init)
        expected = model.base_model.model[0].lora_A["default"].weight
        plan = lj.plan(lj.LoraConfig("0/kernel", rank=8, init=init), params, fn, (x,))
        adapter = lj.init(plan, params, key=jax.random.key(0))
        a, b = adapter.train["0/kernel"]["a"], adapter.train["0/kernel"]["b"]
        assert a.shape == (5, 5, 16, 8) and not b.any()
        # 3,200 draws: a standard deviation is known to about 1.3 percent.
        assert float(a.std()) == pytest.approx(expected.std().item(), rel=0.06)
        if init is True:
            assert float(jnp.abs(a).max()) == pytest.approx(1 / 20, rel=0.01)
        model.unload()


def test_grouped_adapters_of_theirs_are_refused(tmp_path):
    """Their A sees all channels: what they add is no change of the weight."""
    import torch

    theirs = torch.nn.Sequential(torch.nn.Conv2d(4, 6, 3, groups=2))
    model = their_adapter(theirs, r=4, target_modules=["0"])
    model.save_pretrained(tmp_path)
    params = {"0": {"kernel": jnp.ones((3, 3, 2, 6))}}
    names = [("0/kernel", "0.weight", "conv")]
    with pytest.raises(CheckpointError, match="'0' is a convolution in 2 groups: PEFT"):
        lj.load_adapter(tmp_path, params, names=names)


def test_their_all_linear_takes_no_convolutions(tmp_path):
    import torch

    theirs = torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3), torch.nn.Linear(7, 5))
    model = their_adapter(theirs, target_modules="all-linear")
    layers = [n for n, m in model.named_modules() if hasattr(m, "lora_A")]
    assert layers == ["base_model.model.1"]
    model.save_pretrained(tmp_path)
    names = [("0/kernel", "0.weight", "conv"), ("1/kernel", "1.weight", "linear")]
    params = {"0": {"kernel": jnp.ones((3, 4, 6))}, "1": {"kernel": jnp.ones((7, 5))}}
    fields = json.loads((tmp_path / CONFIG).read_text()) | {
        "target_modules": "all-linear"
    }
    config = lj.LoraConfig.from_peft(fields, names)

    def fn(p, x):
        y = lax.conv_general_dilated(
            x, p["0"]["kernel"], (1,), "VALID", dimension_numbers=("NCW", "WIO", "NCW")
        )
        return y @ p["1"]["kernel"]

    plan = lj.plan(config, params, fn, (jnp.ones((1, 4, 9)),))
    assert [site.path for site in plan] == ["1/kernel"]
