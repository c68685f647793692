"""Mixtures of experts in torch and here, and adapters of their parameters."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

import lorax_jax as lj
from lorax_jax.checkpoint import NameMap

# Values of order 1 in float32, summed over at most 16 products; relative.
TOLERANCE = 1e-5
TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
LAYERS, EXPERTS, D, M = 2, 3, 8, 6


@dataclasses.dataclass(frozen=True)
class Moe:
    """Layers of a router, which is a 2-D parameter, and experts, which are 3-D ones.

    Attributes:
        transposed: what their module's `is_transposed` says.
        inputs_first: whether their experts are `(experts, d_in, d_out)`.
        same: whether ours lie as theirs; else the last two axes change places.
        scan: whether ours are stacks of all layers.
        order: in which order their class makes the parameters.
    """

    transposed: bool = False
    inputs_first: bool = False
    same: bool = False
    scan: bool = False
    order: tuple[str, ...] = ("up", "down")

    def theirs(self):
        import torch

        case = self

        class Experts(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.is_transposed = case.transposed
                for name in case.order:
                    d_in, d_out = (D, M) if name == "up" else (M, D)
                    shape = (d_in, d_out) if case.inputs_first else (d_out, d_in)
                    drawn = torch.randn(EXPERTS, *shape) / 3
                    setattr(self, name, torch.nn.Parameter(drawn))

            def forward(self, x):
                axes = "edm" if case.inputs_first else "emd"
                hidden = torch.einsum(f"etd,{axes}->etm", x, self.up).tanh()
                return torch.einsum(f"etd,{axes}->etm", hidden, self.down)

        class Router(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.weight = torch.nn.Parameter(torch.randn(EXPERTS, D) / 3)

            def forward(self, x):
                return (x @ self.weight.T).softmax(-1)

        class Layer(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.router, self.experts = Router(), Experts()
                self.out = torch.nn.Linear(D, D, bias=False)

            def forward(self, x):
                each = self.experts(x.expand(EXPERTS, *x.shape))
                mixed = torch.einsum("te,etd->td", self.router(x), each)
                return x + self.out(mixed)

        class Model(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.layers = torch.nn.ModuleList(Layer() for _ in range(LAYERS))

            def forward(self, x):
                for layer in self.layers:
                    x = layer(x)
                return x

        torch.manual_seed(0)
        return Model()

    @property
    def names(self):
        layout = "same" if self.same else "linear"
        table = [
            ("layers/{i}/router", "layers.{i}.router.weight", "linear"),
            ("layers/{i}/out", "layers.{i}.out.weight", "linear"),
        ]
        table += [
            (f"layers/{{i}}/{name}", f"layers.{{i}}.experts.{name}", layout)
            for name in self.order
        ]
        modules = ["layers.{i}.experts"] if self.transposed else []
        return NameMap(
            table, parameters=["layers.{i}.router.weight"], is_transposed=modules
        )

    @property
    def ours_inputs_first(self):
        return self.inputs_first == self.same

    def params(self, theirs):
        state = {k: v.detach().numpy() for k, v in theirs.state_dict().items()}
        layers = []
        for i in range(LAYERS):
            layer = {}
            for name, module in (
                ("router", "router.weight"),
                ("out", "out.weight"),
                ("up", "experts.up"),
                ("down", "experts.down"),
            ):
                tensor = state[f"layers.{i}.{module}"]
                turn = name in ("router", "out") or not self.same
                layer[name] = jnp.asarray(tensor.swapaxes(-1, -2) if turn else tensor)
            layers.append(layer)
        if self.scan:
            return {"layers": jax.tree.map(lambda *xs: jnp.stack(xs), *layers)}
        return {"layers": dict(zip(map(str, range(LAYERS)), layers, strict=True))}

    def layer(self, p, x):
        axes = "edm" if self.ours_inputs_first else "emd"
        each = jnp.broadcast_to(x, (EXPERTS, *x.shape))
        hidden = jnp.tanh(jnp.einsum(f"etd,{axes}->etm", each, p["up"]))
        each = jnp.einsum(f"etd,{axes}->etm", hidden, p["down"])
        mixed = jnp.einsum("te,etd->td", jax.nn.softmax(x @ p["router"]), each)
        return x + mixed @ p["out"]

    def fn(self, params, x):
        if self.scan:
            step = lambda x, p: (self.layer(p, x), None)  # noqa: E731
            return jax.lax.scan(step, x, params["layers"])[0]
        for i in range(LAYERS):
            x = self.layer(params["layers"][str(i)], x)
        return x

    @property
    def x(self):
        return np.random.default_rng(0).normal(0, 1, (5, D)).astype(np.float32)


MOES = {
    "default": Moe(),
    "default, scanned": Moe(scan=True),
    "default, as theirs": Moe(same=True),
    "default, down first": Moe(order=("down", "up"), scan=True),
    "transposed": Moe(transposed=True, inputs_first=True, same=True, scan=True),
    "transposed, turned": Moe(transposed=True, inputs_first=True),
    # As in Llama 4: inputs first, and nothing says so.
    "mirrored": Moe(inputs_first=True, same=True, scan=True),
}
PARAMETERS = ["router.weight", "experts.up", "experts.down"]
# Ranks, alphas and the layers of modules beside the parameters.
FIELDS = {
    "r": 2,
    "lora_alpha": 3,
    "target_parameters": PARAMETERS,
    "target_modules": ["out"],
    "rank_pattern": {r"layers\.1\.experts\.up": 3, "down": 1, "out": 4},
    "alpha_pattern": {"experts.down": 5},
}


def peft_model(theirs, **fields):
    """Their model with an adapter whose factors are all drawn."""
    import peft
    import torch

    model = peft.get_peft_model(theirs, peft.LoraConfig(**FIELDS | fields)).eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            if "lora_" in name:
                leaf.copy_(0.3 * torch.randn_like(leaf))
    return model


def run(model, x):
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(x)).numpy()


def adapted_run(moe, params, adapter):
    return np.asarray(lj.adapt(moe.fn)(lj.bind(params, adapter), jnp.asarray(moe.x)))


def far(x, y):
    """The largest difference, relative to the largest value."""
    return np.abs(np.asarray(x) - y).max() / np.abs(y).max()
