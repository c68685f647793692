"""`lorax-jax finetune --init`: one method of each sort, from the run to its files."""

import json
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

import lorax_jax as lj
from lorax_jax import capturing, planning
from lorax_jax.cli import _training

IDS = np.arange(12).reshape(2, 6)


@pytest.mark.parametrize(
    ("init", "reads", "rank"),
    [
        ("pissa", None, 4),
        ("pissa_niter_2", None, 4),
        ("eva", "statistics", 2),
        ("corda_kpm", "statistics", 4),
        ("lora_ga", "gradients", 4),
        ("mica", None, 2),
    ],
)
@pytest.mark.usefixtures("relaxed")
def test_from_the_run_to_its_files(finetune, run, here, tiny_model, init, reads, rank):
    result = finetune("--export", init=init, init_rows=5)
    assert result.exit_code == 0, result.output
    for bar in ("statistics", "gradients"):
        assert (f"{bar}: 100%" in result.stderr) == (bar == reads)
    assert (f"init      {init}: reads 6 rows" in result.stdout) == (reads is not None)
    folder = here / "lorax-out"
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    ranks = {x.shape[0] for name, x in tensors.items() if "lora_A" in name}
    assert ranks == {rank}  # twice the run's where it started from the weight

    result = run("inspect", folder / "adapter")
    assert result.exit_code == 0, result.output
    assert "14 of 14 sites loaded" in result.stdout
    assert "Every B has moved" in result.stdout or init == "mica"
    args = ["--adapter", folder / "adapter", "--prompt", "The cat"]
    assert run("generate", *args, "--max-new-tokens", 4).exit_code == 0
    assert run("merge", folder / "adapter", "merged").exit_code == 0

    found = lj.models.load_adapted(folder / "adapter", base=str(tiny_model))
    bound = lj.bind(found.params, found.adapter)
    ours = lj.adapt(found.model.apply)(bound, jnp.asarray(IDS))
    for where in (folder / "merged", here / "merged"):
        model, params = lj.models.load(where)
        np.testing.assert_allclose(model.apply(params, IDS), ours, atol=1e-4)
    base = found.model.apply(found.params, jnp.asarray(IDS))
    assert float(jnp.abs(ours - base).max()) > 1e-3
    np.testing.assert_allclose(theirs(tiny_model, folder / "adapter"), ours, atol=1e-4)


def theirs(base, adapter):
    """Logits of PEFT's model: the original base with the folder."""
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # theirs
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        model = peft.PeftModel.from_pretrained(model, adapter)
        return model(torch.tensor(IDS)).logits.numpy()


def test_it_starts_where_the_base_is(finetune, here):
    """The first loss of each is the base's."""
    inits = ("kaiming", "pissa", "eva", "lora_ga")
    for init in inits:
        assert finetune(init=init, out=init, steps=1).exit_code == 0
    lines = [(here / init / "history.jsonl").read_text().splitlines() for init in inits]
    assert len({first for first, *_ in lines}) == 1
    steps = [json.loads(line[1])["loss"] for line in lines]
    np.testing.assert_allclose(steps, steps[0], rtol=1e-5)


@pytest.mark.usefixtures("relaxed")
def test_eva_moves_ranks(finetune, run, here, tiny_model):
    result = finetune(init="eva", rho=2)
    assert result.exit_code == 0, result.output
    folder = here / "lorax-out" / "adapter"
    tensors = load_file(folder / "adapter_model.safetensors")
    ranks = [x.shape[0] for name, x in tensors.items() if "lora_A" in name]
    assert sum(ranks) == 2 * 14 and 2 < max(ranks) <= 4
    fewest = min(ranks) if len(ranks) == 14 else 0
    said = f"ranks     {fewest} to {max(ranks)} for 14 sites, by explained variance"
    assert said in result.stdout.splitlines()

    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    assert f"{len(ranks)} of {len(ranks)} sites loaded" in result.stdout
    found = lj.models.load_adapted(folder, base=str(tiny_model))
    bound = lj.bind(found.params, found.adapter)
    ours = lj.adapt(found.model.apply)(bound, jnp.asarray(IDS))
    np.testing.assert_allclose(theirs(tiny_model, folder), ours, atol=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        {"init": "eva"},
        {"init": "eva", "rho": 1.5},
        {"init": "lora_ga"},
        {"init": "pissa"},
        {"init": "mica"},
    ],
)
def test_a_run_that_goes_on_gathers_nothing(finetune, run, here, monkeypatch, options):
    assert finetune(out="whole", steps=6, **options).exit_code == 0

    def interrupt(line):
        if line["step"] == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(_training, "_report", interrupt)
        result = finetune(out="parts", steps=6, eval_every=3, save_every=1, **options)
    assert result.exit_code == 130, result.output

    def refuse(*args, **kwargs):
        raise AssertionError("a run that goes on starts anew")

    monkeypatch.setattr(capturing, "prepare", refuse)
    started = planning.init
    monkeypatch.setattr(planning, "init", lambda *a, **k: traced(started(*a, **k)))
    result = run("finetune", "--resume", "parts", "--rho", 9)
    assert result.exit_code == 2 and "--rho 9.0 contradicts the run" in result.stderr
    result = run("finetune", "--resume", "parts")
    assert result.exit_code == 0, result.output
    files = [here / name / "adapter" for name in ("whole", "parts")]
    whole, parts = (load_file(f / "adapter_model.safetensors") for f in files)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


def traced(adapter):
    """The adapter, which must be one of types alone."""
    assert all(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(adapter.train))
    return adapter


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "eva", "init-rows": 1, "batch": 1, "rank": 16}, r"Raise --init-rows"),
        (
            {"init": "lora_ga", "rank": 12},
            "Give --rank 8, or leave it out",
        ),
        ({"init": "orthogonal", "rank": 3}, r"and '.*' has the rank 3\. Give --rank 4"),
        ({"init": "pissa", "rank": 40}, r"--rank 40 exceeds|Give --rank"),
        ({"init": "pissa", "rho": 2}, r"--rho 2 .* --init is pissa\. Give --init eva"),
        ({"init": "eva", "rho": 0.5}, r"Invalid value for '--rho': 0.5 is not in the"),
        ({"init": "eva", "init-rows": 0}, r"Invalid value for '--init-rows': 0 is not"),
        (
            {"init": "pissa_niter_x"},
            r"--init 'pissa_niter_x' is no init.*'pissa_niter_N",
        ),
    ],
)
def test_what_does_not_fit(finetune, here, options, message):
    result = finetune(**options)
    assert result.exit_code == 2
    (line,) = result.stderr.splitlines()[-1:]
    assert re.search(message, line), result.stderr
    assert not (here / "lorax-out").exists()
