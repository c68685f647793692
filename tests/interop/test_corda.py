"""CorDA beside PEFT's: the same inputs of the same layers give the same factors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from inputs import inputs_of, mlp

from lorax_jax import initializers
from lorax_jax.statistics import SecondMoment

KEY = jax.random.key(0)


def their_model(kind, twin):
    """A fresh model, its targets, and calls of it, one sequence each as PEFT asks."""
    import torch

    if kind == "mlp":
        batches = [torch.randn(40, 16, generator=generator) for generator in seeded(3)]
        return mlp(), ["0", "2"], [{"input": x} for x in batches]
    model = twin(kind).fresh()
    # Fewer tokens than values leave a second moment that no float32 inverts well.
    ids = torch.tensor(np.random.default_rng(1).integers(2, 97, (16, 12))).long()
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj", "down_proj"]
    return model, targets, [{"input_ids": row[None]} for row in ids]


def seeded(n):
    import torch

    return [torch.Generator().manual_seed(i) for i in range(n)]


def theirs(model, targets, calls, mode, **options):
    """The factors of each layer and its scale, from PEFT."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    config = LoraConfig(
        target_modules=targets,
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=mode),
        **options,
    )

    def run():
        with torch.no_grad():
            for call in calls:
                model(**call)

    preprocess_corda(model, config, run)
    adapted = get_peft_model(model, config)
    return {
        name.removeprefix("base_model.model."): (
            module.lora_A["default"].weight.detach().numpy().T,
            module.lora_B["default"].weight.detach().numpy().T,
            module.scaling["default"],
        )
        for name, module in adapted.named_modules()
        if hasattr(module, "lora_A")
    }


@pytest.mark.parametrize("mode", ["ipm", "kpm"])
@pytest.mark.parametrize("kind", ["mlp", "llama", "gpt2"])
@pytest.mark.parametrize("rslora", [False, True])
def test_factors(kind, mode, rslora, twin):
    model, targets, calls = their_model(kind, twin)
    seen = inputs_of(model, targets, calls)
    stat, found = SecondMoment(), {}
    for name, (module, batches) in seen.items():
        state = stat.init(batches[0].shape[-1])
        for x in batches:
            state = stat.update(state, stat.observe(jnp.asarray(x), None, ()))
        weight = module.weight.detach().numpy().copy()
        found[name] = state, weight if kind == "gpt2" else weight.T
    rank, options = 4, {"r": 4, "lora_alpha": 6, "use_rslora": rslora}
    expected = theirs(model, targets, calls, mode, **options)
    assert set(expected) == set(found)
    for name, (a, b, scale) in expected.items():
        state, weight = found[name]
        start = initializers.get(f"corda_{mode}")(
            jnp.asarray(weight), rank=rank, scale=scale, key=KEY, stats=state
        )
        ours, size = scale * start.a @ start.b, np.abs(scale * a @ b).max()
        assert np.abs(ours - scale * a @ b).max() <= 1e-4 * size, name
        signs = np.sign((np.asarray(start.b) * b).sum(1))
        assert np.abs(start.a * signs - a).max() <= 1e-4 * np.abs(a).max(), name
        assert np.abs(start.b * signs[:, None] - b).max() <= 1e-4 * np.abs(b).max()
