"""Condition numbers against PEFT's."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import numbers

import lorax_jax as lj
from lorax_jax.errors import PlanError

LAYERS, D, F, EXPERTS = 3, 8, 6, 4


def model():
    """Linear layers, and experts in one leaf, as mixtures of them have."""
    params = {
        f"linear_{i}": numbers(jax.random.key(i), (D, D)) + i * jnp.eye(D)
        for i in range(7)
    }
    for i in range(LAYERS):
        params[f"{i}"] = {"up_proj": numbers(jax.random.key(20 + i), (EXPERTS, D, D))}

    def fn(params, x):
        for i in range(7):
            x = jnp.tanh(x @ params[f"linear_{i}"])
        for i in range(LAYERS):
            w = params[f"{i}"]["up_proj"]
            x = jnp.tanh(jnp.einsum("bd,edf->bf", x, w))
        return x

    config = lj.LoraConfig(r"linear_\d|\d/up_proj", rank=2)
    return config, params, fn


def make_plan():
    config, params, fn = model()
    roles = {
        f"{i}/up_proj": {"batch": (0,), "inputs": (1,), "outputs": (2,)}
        for i in range(LAYERS)
    }
    roles |= {f"linear_{i}": {"inputs": (0,), "outputs": (1,)} for i in range(7)}
    return lj.plan(config, params, roles=roles), params


def theirs(params, share):
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")

    class Experts(torch.nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.up_proj = torch.nn.Parameter(torch.tensor(np.asarray(weight)))

    net = torch.nn.Module()
    for name, weight in params.items():
        if isinstance(weight, dict):
            net.add_module(name, Experts(weight["up_proj"]))
        else:
            linear = torch.nn.Linear(D, D, bias=False)
            linear.weight.data = torch.tensor(np.asarray(weight).T.copy())
            net.add_module(name, linear)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.find_kappa_target_modules(
            net, top_p=share, show_progress=False
        ), net


@pytest.mark.parametrize("share", [0.01, 0.2, 0.5, 0.7, 1.0])
def test_chooses_what_peft_does(share):
    plan, params = make_plan()
    found = lj.kappa(plan, params, share=share)
    expected, _ = theirs(params, share)
    linear = [name for name in found.chosen if name.startswith("linear")]
    experts = [name for name in found.chosen if name.endswith("up_proj")]
    assert linear == expected["target_modules"]
    assert [name.replace("/", ".") for name in experts] == expected["target_parameters"]
    assert {site.name for site in found.plan} == set(found.chosen)


def test_numbers_are_theirs():
    pytest.importorskip("peft")
    from peft.helpers import KappaTuneSelector

    plan, params = make_plan()
    found = lj.kappa(plan, params)
    selector = KappaTuneSelector(theirs(params, 0.2)[1], show_progress=False)
    selector._compute_kappas()
    expected = dict(selector._condition_numbers or {})
    expected |= dict(selector._parameter_condition_numbers or {})
    expected = {name.replace(".", "/"): value for name, value in expected.items()}
    assert set(found.values) == set(expected)
    for name, value in found.values.items():
        # A condition number multiplies the relative error of the least value.
        bound = 8 * np.finfo(np.float32).eps * max(value, D) * np.sqrt(D)
        assert value == pytest.approx(expected[name], rel=bound)
    assert list(found.values.values()) == sorted(found.values.values())


def test_stacked_layers_are_ranked_one_by_one():
    params = {
        "layers": {
            "w": jnp.stack([jnp.diag(jnp.array([k, 1.0])) for k in (3.0, 1.0, 2.0)])
        }
    }
    fn = lambda p, x: jax.lax.scan(lambda x, w: (x @ w, None), x, p["layers"]["w"])[0]  # noqa: E731
    plan = lj.plan(lj.LoraConfig("layers/w", rank=1), params, fn, (jnp.ones((1, 2)),))
    found = lj.kappa(plan, params, share=0.7)
    assert found.chosen == ("layers/1/w", "layers/2/w")
    assert found.targets == (r"layers/1/w", r"layers/2/w")
    np.testing.assert_allclose(list(found.values.values()), [1, 2, 3], rtol=1e-6)
    again = lj.plan(
        lj.LoraConfig(found.targets, rank=1), params, fn, (jnp.ones((1, 2)),)
    )
    assert {site.name for site in again} == {site.name for site in found.plan}
    assert str(found).splitlines()[0].endswith("chosen")
    assert str(found).splitlines()[2] == "layers/0/w             3"


def test_large_weights_are_skipped_and_said():
    params = {"small": jnp.eye(3), "large": jnp.ones((3, 9))}
    fn = lambda p, x: x @ p["small"] @ p["large"]  # noqa: E731
    plan = lj.plan(lj.LoraConfig("small|large", rank=1), params, fn, (jnp.ones(3),))
    found = lj.kappa(plan, params, share=1.0, most=8)
    assert found.chosen == ("small",) and found.skipped == ("large",)
    assert str(found).endswith("skipped as too large: large")
    with pytest.raises(PlanError, match="has a rank and sides up to `most` = 2"):
        lj.kappa(plan, params, most=2)


def test_refuses():
    plan, params = make_plan()
    for share in (0, 1.5, float("nan")):
        with pytest.raises(PlanError, match="a share of the sites in"):
            lj.kappa(plan, params, share=share)
    with pytest.raises(PlanError, match="'0/up_proj' is known by its type alone, and"):
        lj.kappa(plan, jax.eval_shape(lambda: params))
    broken = params | {"linear_3": params["linear_3"].at[0, 0].set(jnp.nan)}
    with pytest.raises(PlanError, match="weight of 'linear_3' is not finite"):
        lj.kappa(plan, broken)


def test_parts_have_no_regex():
    params = {"fused": jnp.eye(4)}
    rules = {"fused": {"parts": {"q": {1: (0, 2)}, "v": {1: (2, 4)}}, "rank": 1}}
    fn = lambda p, x: x @ p["fused"]  # noqa: E731
    plan = lj.plan(lj.LoraConfig(rules), params, fn, (jnp.ones(4),))
    found = lj.kappa(plan, params, share=0.5)
    assert found.chosen == ("fused@q",) and len(found.plan) == 1
    with pytest.raises(PlanError, match=r"'fused@q' is not all .* Use `\.plan`"):
        found.targets  # noqa: B018
