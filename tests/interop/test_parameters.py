"""Bare parameters of experts: PEFT's `target_parameters`, and the same leaves here."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from drawn import drawn
from safetensors.numpy import load_file, save_file
from twins import modules_of, sites_of

import lorax_jax as lj
from lorax_jax._errors import CheckpointError, ConfigError
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


@pytest.fixture(params=MOES.values(), ids=MOES.keys())
def moe(request):
    return request.param


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


@pytest.mark.parametrize("planned", [False, True], ids=["without plan", "plan"])
def test_theirs_here(moe, planned, tmp_path, record_property):
    """Outputs, gradients of both factors, merged parameters, and the file again."""
    import torch

    theirs = moe.theirs()
    params = moe.params(theirs)
    base = run(theirs, moe.x)
    model = peft_model(theirs)
    model.save_pretrained(tmp_path / "a")
    plan = None
    if planned:
        config = lj.LoraConfig.from_peft(tmp_path / "a", moe.names)
        plan = lj.plan(config, params, moe.fn, (moe.x,))
        assert sites_of(plan, moe.names) == modules_of(model)
    adapter, receipt = lj.load_adapter(
        tmp_path / "a", params, names=moe.names, plan=plan
    )
    assert not receipt.problems and receipt.sites == receipt.expected == 4 * LAYERS
    assert plan is None or receipt.plan is plan

    out = model(torch.from_numpy(moe.x))
    torch.sin(out).sum().backward()
    worst = far(adapted_run(moe, params, adapter), out.detach().numpy())
    assert far(base, out.detach().numpy()) > 0.01  # it acts

    def loss(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return jnp.sin(lj.adapt(moe.fn)(bound, jnp.asarray(moe.x))).sum()

    grads = lj.Adapter(jax.grad(loss)(adapter.train), adapter.fixed)
    for name, one in (("b", adapter), ("g", grads)):
        lj.save_adapter(tmp_path / name, one, plan=receipt.plan, names=moe.names)
    found = load_file(tmp_path / "g" / TENSORS)
    expected = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in model.named_parameters()
        if "lora_" in name
    }
    assert found.keys() == expected.keys() and len(found) == 8 * LAYERS
    for key, gradient in expected.items():
        assert np.abs(gradient).max() > 0
        worst = max(worst, far(found[key], gradient))

    one, other = (load_file(tmp_path / name / TENSORS) for name in "ab")
    assert one.keys() == other.keys()
    assert all(np.array_equal(one[key], other[key]) for key in one)
    merged = moe.params(model.merge_and_unload())
    for ours, wanted in zip(
        *map(jax.tree.leaves, (lj.merge(params, adapter), merged)), strict=True
    ):
        worst = max(worst, far(ours, wanted))
    record_property("max_relative_difference", float(worst))
    assert worst <= TOLERANCE


def test_ours_there(moe, tmp_path, monkeypatch):
    """Our folder in PEFT: every key and every bit arrives, and comes back."""
    import peft

    theirs = moe.theirs()
    params = moe.params(theirs)
    rules = {
        r"layers/0/(up|router)": {"rank": 3, "alpha": 7},
        r"layers/\d/(up|down|router|out)": {},
    }
    config = lj.LoraConfig(rules, rank=2, alpha=3, init=False, rslora=True)
    plan = lj.plan(config, params, moe.fn, (moe.x,))
    adapter = drawn(plan, params)
    lj.save_adapter(tmp_path / "a", adapter, plan=plan, names=moe.names, params=params)
    results = []
    real = peft.PeftModel.load_adapter
    spy = lambda *args, **kw: results.append(real(*args, **kw)) or results[-1]  # noqa: E731
    monkeypatch.setattr(peft.PeftModel, "load_adapter", spy)
    model = peft.PeftModel.from_pretrained(theirs, tmp_path / "a")
    assert results[0].unexpected_keys == []
    assert [key for key in results[0].missing_keys if "lora_" in key] == []
    assert modules_of(model) == sites_of(plan, moe.names)
    assert far(adapted_run(moe, params, adapter), run(model, moe.x)) <= TOLERANCE

    model.save_pretrained(tmp_path / "b")
    written, back = (load_file(tmp_path / f / TENSORS) for f in "ab")
    assert written.keys() == back.keys()
    assert all(np.array_equal(written[key], back[key]) for key in written)
    loaded, _ = lj.load_adapter(tmp_path / "a", params)  # by its own metadata
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, adapter))
    loaded, _ = lj.load_adapter(tmp_path / "b", params, names=moe.names, plan=plan)
    assert jax.tree.all(jax.tree.map(np.array_equal, loaded, adapter))


def test_configurations(moe):
    """`to_peft` has PEFT adapt the same, at the same ranks and scales."""
    import peft

    config = lj.LoraConfig.from_peft({"peft_type": "LORA"} | FIELDS, moe.names)
    model = peft_model(moe.theirs())
    fields = config.to_peft(moe.names)
    assert fields["target_parameters"] == ["down", "router.weight", "up"]
    fields = {k: v for k, v in fields.items() if k not in ("peft_type", "peft_version")}
    again = peft.get_peft_model(moe.theirs(), peft.LoraConfig(**fields))
    assert modules_of(again) == modules_of(model)


def test_merged_without_the_model(moe, tmp_path, record_property):
    """`export_merged` gives the parameters that PEFT's merge gives."""
    theirs = moe.theirs()
    params = moe.params(theirs)
    base = tmp_path / "base"
    base.mkdir()
    state = {name: leaf.detach().numpy() for name, leaf in theirs.state_dict().items()}
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    (base / "config.json").write_text("{}")
    model = peft_model(theirs)
    model.save_pretrained(tmp_path / "a")
    adapter, receipt = lj.load_adapter(tmp_path / "a", params, names=moe.names)
    lj.save_adapter(tmp_path / "b", adapter, plan=receipt.plan, names=moe.names)
    wanted = model.merge_and_unload().state_dict()
    worst = 0.0
    for number, one in enumerate((adapter, tmp_path / "a", tmp_path / "b")):
        out = tmp_path / f"out{number}"
        done = lj.export_merged(base, one, out, names=moe.names)
        assert len(done.merged) == 4 * LAYERS == len(state)
        found = load_file(out / "model.safetensors")
        for name, leaf in wanted.items():
            worst = max(worst, far(found[name], leaf.numpy()))
    record_property("max_relative_difference", float(worst))
    assert worst <= TOLERANCE
    with pytest.raises(CheckpointError, match="has `target_parameters`, and a check"):
        lj.export_merged(base, tmp_path / "b", tmp_path / "out")


def test_parameters_alone(tmp_path):
    """No targets beside them are an empty list: PEFT fills in its own for null."""
    moe = Moe()
    config = lj.LoraConfig(".*/up", rank=2)
    fields = config.to_peft(moe.names)
    assert (fields["target_modules"], fields["target_parameters"]) == ([], ["up"])
    theirs = moe.theirs()
    params = moe.params(theirs)
    plan = lj.plan(config, params, moe.fn, (moe.x,))
    lj.save_adapter(tmp_path, drawn(plan, params), plan=plan, names=moe.names)
    assert json.loads((tmp_path / CONFIG).read_text())["target_modules"] == []
    given = {"peft_type": "LORA", "target_parameters": ["up"]}
    with pytest.raises(ConfigError, match="no `target_modules`, and PEFT then adapts"):
        lj.LoraConfig.from_peft(given, moe.names)
    # What PEFT saved says what it took.
    model = peft_model(theirs, target_modules=None, target_parameters=["up"], **PLAIN)
    model.save_pretrained(tmp_path / "theirs")
    assert (
        json.loads((tmp_path / "theirs" / CONFIG).read_text())["target_modules"] is None
    )
    found = lj.LoraConfig.from_peft(tmp_path / "theirs", moe.names)
    assert [rule.pattern for rule in found.rules] == [r"layers/\d+/up"]


PLAIN = {"rank_pattern": {}, "alpha_pattern": {}}


def test_the_order_is_that_of_the_class():
    """PEFT nests in the order in which a module lists its parameters, no other."""
    for order, names in itertools.product(
        (("up", "down"), ("down", "up")),
        (["experts.up", "experts.down"], ["experts.down", "experts.up"]),
    ):
        model = peft_model(Moe(order=order).theirs(), target_parameters=names, **PLAIN)
        experts = model.base_model.model.layers[0].experts
        assert experts.parameter_name == order[-1]
        assert experts.base_layer.parameter_name == order[0]


def test_an_order_that_is_not_theirs_is_noticed(tmp_path):
    moe = Moe()
    theirs = moe.theirs()
    params = moe.params(theirs)
    peft_model(theirs).save_pretrained(tmp_path)
    wrong = dataclasses.replace(moe, order=("down", "up")).names
    with pytest.raises(
        CheckpointError, match=r"experts.lora_A.weight is \(3, 6\), not"
    ):
        lj.load_adapter(tmp_path, params, names=wrong)
    entries = [entry for entry in moe.names if not entry[0].endswith("up")]
    fewer = NameMap(entries, parameters=moe.names.parameters)
    with pytest.raises(CheckpointError, match="more parameters of that module than"):
        lj.load_adapter(tmp_path, params, names=fewer)


@pytest.mark.parametrize("end", ["A", "B"])
@pytest.mark.parametrize("key", ["experts", "experts.base_layer", "router"])
def test_keys_that_are_missing(tmp_path, end, key):
    moe = Moe()
    theirs = moe.theirs()
    params = moe.params(theirs)
    peft_model(theirs).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / TENSORS)
    lost = f"base_model.model.layers.1.{key}.lora_{end}.weight"
    del tensors[lost]
    save_file(tensors, tmp_path / TENSORS)
    with pytest.raises(CheckpointError, match=f"missing +{lost}"):
        lj.load_adapter(tmp_path, params, names=moe.names)
    _, receipt = lj.load_adapter(tmp_path, params, names=moe.names, strict=False)
    assert receipt.missing == (lost,) and receipt.sites == 4 * LAYERS - 1


def test_a_matrix_the_other_way_round(tmp_path):
    """A 2-D parameter is (d_out, d_in) to PEFT, whatever its module says or does."""
    import torch

    class Product(torch.nn.Module):
        is_transposed = True  # of 3-D parameters alone

        def __init__(self):
            super().__init__()
            self.w = torch.nn.Parameter(torch.randn(D, M) / 3)

        def forward(self, x):
            return x @ self.w

    torch.manual_seed(0)
    theirs = torch.nn.Sequential(Product())
    params = {"w": jnp.asarray(theirs[0].w.detach().numpy())}
    names = NameMap([("w", "0.w", "same")], is_transposed=["0"])
    fields = {"target_modules": [], "target_parameters": ["w"]} | PLAIN
    model = peft_model(theirs, **fields)
    model.save_pretrained(tmp_path / "a")
    written = load_file(tmp_path / "a" / TENSORS)
    assert written["base_model.model.0.lora_A.weight"].shape == (2, M)
    x = np.random.default_rng(0).normal(0, 1, (5, D)).astype(np.float32)
    fn = lambda p, x: x @ p["w"]  # noqa: E731
    plan = lj.plan(lj.LoraConfig("w", rank=2, alpha=3), params, fn, (x,))
    for one in (plan, None):
        adapter, receipt = lj.load_adapter(
            tmp_path / "a", params, names=names, plan=one
        )
        ours = lj.adapt(fn)(lj.bind(params, adapter), jnp.asarray(x))
        assert far(ours, run(model, x)) <= TOLERANCE
        lj.save_adapter(tmp_path / "b", adapter, plan=receipt.plan, names=names)
        back = load_file(tmp_path / "b" / TENSORS)
        assert all(np.array_equal(written[key], back[key]) for key in back)
    assert adapter.train["w"]["a"].shape == (M, 2)  # as PEFT has it


@pytest.mark.parametrize("init", [True, "gaussian"])
def test_where_they_start(init):
    """An expert's A is drawn as a matrix of its own: its fan-in is d, not E * d."""
    import torch

    experts, d, rank = 10, 16, 8
    moe = Moe()
    theirs = moe.theirs()
    owner = theirs.layers[0].experts
    owner.up = torch.nn.Parameter(torch.zeros(experts, d, d))
    fields = {"target_modules": [], "target_parameters": ["layers.0.experts.up"]}
    model = peft_model(theirs, r=rank, init_lora_weights=init, **fields | PLAIN)
    wrapper = model.base_model.model.layers[0].experts
    wrapper.reset_lora_parameters("default", init)
    expected = wrapper.lora_A["default"].weight
    fn = lambda p, x: jnp.einsum("etd,edm->etm", x, p["up"])  # noqa: E731
    params, x = {"up": jnp.zeros((experts, d, d))}, jnp.ones((experts, 2, d))
    plan = lj.plan(lj.LoraConfig("up", rank=rank, init=init), params, fn, (x,))
    train = lj.init(plan, params, key=jax.random.key(0)).train["up"]
    assert train["a"].size == expected.numel() and not train["b"].any()
    # 1,280 draws: a standard deviation is known to about 2 percent.
    assert float(train["a"].std()) == pytest.approx(expected.std().item(), rel=0.1)
    if init is True:
        for drawn_a in (np.asarray(train["a"]), expected.detach().numpy()):
            assert np.abs(drawn_a).max() == pytest.approx(1 / np.sqrt(d), rel=0.02)


# --- A real one -----------------------------------------------------------------------

MIXTRAL = {
    "model_type": "mixtral",
    "vocab_size": 61,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 32,
    "initializer_range": 0.15,  # outputs of order 1
}
MLP = "model.layers.{i}.mlp"
MIXTRAL_NAMES = NameMap(
    [
        ("layers/{i}/gate", f"{MLP}.gate.weight", "linear"),
        ("layers/{i}/gate_up", f"{MLP}.experts.gate_up_proj", "linear"),
        ("layers/{i}/down", f"{MLP}.experts.down_proj", "same"),
    ],
    parameters=[f"{MLP}.gate.weight"],
)


def mixtral_blocks(params, x):
    """Mixtral's mixtures of experts, one on top of the other."""

    def block(x, p):
        scores, chosen = jax.lax.top_k(jax.nn.softmax(x @ p["gate"]), 2)  # (t, 2)
        scores = scores / scores.sum(-1, keepdims=True)
        share = (jax.nn.one_hot(chosen, 4) * scores[..., None]).sum(1)  # (t, experts)
        each = jnp.broadcast_to(x, (4, *x.shape))
        gate, up = jnp.split(jnp.einsum("etd,edm->etm", each, p["gate_up"]), 2, -1)
        each = jnp.einsum("etm,edm->etd", jax.nn.silu(gate) * up, p["down"])
        return x + jnp.einsum("te,etd->td", share, each), None

    return jax.lax.scan(block, x, params["layers"])[0]


@pytest.fixture(scope="module")
def mixtral():
    """Transformers' model and our parameters, stacked."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(**MIXTRAL)
    theirs = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    layers = [layer.mlp for layer in theirs.model.layers]
    stack = lambda leaves: jnp.stack([jnp.asarray(x.detach()) for x in leaves])  # noqa: E731
    params = {
        "gate": stack(layer.gate.weight.T for layer in layers),
        "gate_up": stack(layer.experts.gate_up_proj.mT for layer in layers),
        "down": stack(layer.experts.down_proj for layer in layers),
    }
    return theirs, {"layers": params}


@pytest.mark.parametrize("targets", [["gate_up_proj", "down_proj"], ["down_proj"]])
def test_mixtral(mixtral, targets, tmp_path, record_property):
    """The experts of a real architecture, which Transformers keeps in one parameter."""
    import copy

    import torch

    theirs, params = mixtral
    model = peft_model(
        copy.deepcopy(theirs),
        target_modules=[],
        target_parameters=[*targets, "gate.weight"],
        rank_pattern={"down_proj": 3},
        alpha_pattern={"gate": 4, "gate.weight": 5},
    )
    model.save_pretrained(tmp_path / "a")
    x = np.random.default_rng(0).normal(0, 1, (7, 16)).astype(np.float32)
    fields = json.loads((tmp_path / "a" / CONFIG).read_text())
    del fields["alpha_pattern"]["gate"]  # takes nothing, and PEFT does not mind
    config = lj.LoraConfig.from_peft(fields, MIXTRAL_NAMES)
    plan = lj.plan(config, params, mixtral_blocks, (x,))
    assert sites_of(plan, MIXTRAL_NAMES) == modules_of(model)
    adapter, receipt = lj.load_adapter(
        tmp_path / "a", params, names=MIXTRAL_NAMES, plan=plan
    )
    assert not receipt.problems

    def run(train):
        bound = lj.bind(params, lj.Adapter(train, adapter.fixed))
        return lj.adapt(mixtral_blocks)(bound, jnp.asarray(x))

    out = torch.from_numpy(x)[None]
    for layer in model.base_model.model.model.layers:
        out = out + layer.mlp(out)
    torch.sin(out).sum().backward()
    worst = far(run(adapter.train), out[0].detach().numpy())
    assert far(mixtral_blocks(params, x), out[0].detach().numpy()) > 0.01  # it acts
    grads = jax.grad(lambda train: jnp.sin(run(train)).sum())(adapter.train)
    for name, train in (("b", adapter.train), ("g", grads)):
        one = lj.Adapter(train, adapter.fixed)
        lj.save_adapter(tmp_path / name, one, plan=plan, names=MIXTRAL_NAMES)
    theirs, ours, found = (load_file(tmp_path / name / TENSORS) for name in "abg")
    assert theirs.keys() == ours.keys() == found.keys()
    assert all(np.array_equal(theirs[key], ours[key]) for key in ours)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            gradient = parameter.grad.numpy()
            worst = max(worst, far(found[name.replace(".default", "")], gradient))
    record_property("max_relative_difference", float(worst))
    assert worst <= TOLERANCE


def test_ours_in_mixtral(mixtral, tmp_path):
    """Transformers 5 takes our folder as it is: nothing is converted or lost."""
    import copy

    import peft

    theirs, params = mixtral
    config = lj.LoraConfig("layers/.*", rank=2, init=False)
    x = np.ones((7, 16), np.float32)
    plan = lj.plan(config, params, mixtral_blocks, (x,))
    adapter = drawn(plan, params)
    lj.save_adapter(tmp_path, adapter, plan=plan, names=MIXTRAL_NAMES)
    model = peft.PeftModel.from_pretrained(copy.deepcopy(theirs), tmp_path)
    assert modules_of(model) == sites_of(plan, MIXTRAL_NAMES)
    state = peft.get_peft_model_state_dict(model)
    written = load_file(tmp_path / TENSORS)
    assert state.keys() == written.keys()
    assert all(np.array_equal(state[key].numpy(), written[key]) for key in written)
