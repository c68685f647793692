"""Merged checkpoints of adapters that are more than plain LoRA."""

import jax.numpy as jnp
import numpy as np
import pytest
from kind_files import CASES, RULES
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax._errors import AdapterError
from lorax_jax.adapters import Fixed


@pytest.mark.parametrize("case", CASES)
def test_exported_as_merged(made_of, peft_made, base_folder, tmp_path, case):
    """The bytes of `merge`, from an adapter and from either kind of folder."""
    from lorax_jax import models

    made = made_of(case)
    base = base_folder(made)
    own = made.save(tmp_path / "own", params=made.params)
    theirs = peft_made(own, tmp_path / "theirs")
    wanted = None
    if case != "dora head":  # which no one matrix holds
        merged = lj.merge(made.params, made.adapter)
        wanted = models.to_hf(made.model, merged)
    for i, (adapter, names) in enumerate(
        [(made.adapter, made.names), (own, None), (theirs, None), (own, made.names)]
    ):
        out = tmp_path / f"out{i}"
        done = lj.export_merged(base, adapter, out, names=names)
        found = load_file(out / "model.safetensors")
        if wanted is None:
            wanted = found
            assert done.untied and "lm_head.weight" in found
            continue
        assert found.keys() == wanted.keys()
        assert [k for k in found if not np.array_equal(found[k], wanted[k])] == []
        assert not done.untied or case == "dora head"


def test_a_bias_of_b_without_a_bias(make, base_folder, tmp_path):
    made = make("llama", rules=RULES, lora_bias=True)
    with pytest.raises(AdapterError, match=r"no model.layers.*bias to merge it into"):
        lj.export_merged(
            base_folder(made), made.adapter, tmp_path / "out", names=made.names
        )


def test_a_copy_has_no_multiple(made_of, base_folder, tmp_path):
    made = made_of("head and norm")
    base, out = base_folder(made), tmp_path / "out"
    with pytest.raises(AdapterError, match=r"`weights` multiplies .*trained whole"):
        lj.export_merged(base, made.adapter, out, names=made.names, weights=0.5)
    with pytest.raises(AdapterError, match="trained whole, and adapted by another"):
        lj.export_merged(base, [made.adapter] * 2, out, names=made.names)


def test_dora_of_a_table_whose_head_gets_its_own(make, base_folder, tmp_path):
    shared = make("tied", rules={"embed.*": {"tie": "shared"}} | RULES, dora=True)
    head = make("tied", rules={"embed.*": {"tie": "head"}} | RULES)
    with pytest.raises(AdapterError, match="DoRA for the lookup and the head, and by"):
        lj.export_merged(
            base_folder(shared),
            [shared.adapter, head.adapter],
            tmp_path / "out",
            names=shared.names,
        )
    done = lj.export_merged(
        base_folder(shared), shared.adapter, tmp_path / "out", names=shared.names
    )
    assert not done.untied


def test_whole_kernels_of_more_axes_are_not_exported(make, base_folder, tmp_path):
    from lorax_jax.adapters import Role

    made = make("llama")
    path = "layers/0/self_attn/q_proj/kernel"
    role = Role(path, (), (0, 1, 2), kind="whole")
    adapter = lj.Adapter(
        {path: {"whole": jnp.ones((16, 4, 4))}}, {path: Fixed(role, {})}
    )
    with pytest.raises(AdapterError, match="how its axes make a matrix is not known"):
        lj.export_merged(base_folder(made), adapter, tmp_path / "out", names=made.names)


@pytest.mark.parametrize(
    "case", ["dora", "dora gpt2", "both biases of B", "everything"]
)
def test_exported_in_sixteen_bits(make, base_folder, tmp_path, case):
    """One rounding, that of `merge`; blocks and gains included."""
    from lorax_jax import models

    extra = {"both biases of B": ("gpt2", RULES, {"bias": "all", "lora_bias": True})}
    family, rules, config = (CASES | extra)[case]
    made = make(family, rules=rules, dtype="bfloat16", **config)
    merged = lj.merge(made.params, made.adapter)
    wanted = models.to_hf(made.model, merged)
    lj.export_merged(
        base_folder(made), made.adapter, tmp_path / "out", names=made.names
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert [k for k in wanted if not np.array_equal(found[k], wanted[k])] == []


@pytest.mark.parametrize("case", ["dora", "dora table", "rows", "rows of a head"])
def test_exported_in_blocks(made_of, base_folder, tmp_path, monkeypatch, case):
    """Blocks share the gains of whole columns, and each has its own rows."""
    from lorax_jax import models
    from lorax_jax.checkpoint import _stream

    monkeypatch.setattr(_stream, "_WHOLE", 1)
    monkeypatch.setattr(_stream, "_FEWEST_ROWS", 6)
    made = made_of(case)
    lj.export_merged(
        base_folder(made), made.adapter, tmp_path / "out", names=made.names
    )
    found = load_file(tmp_path / "out" / "model.safetensors")
    wanted = models.to_hf(made.model, lj.merge(made.params, made.adapter))
    for key in wanted:  # so small blocks may differ in their last bits
        np.testing.assert_allclose(found[key], wanted[key], rtol=1e-6, atol=1e-7)
