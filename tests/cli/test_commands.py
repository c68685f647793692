"""Generate, merge and inspect, on what finetune wrote."""

import json
import os
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from drawn import started
from safetensors.numpy import load_file, save_file

import lorax_jax as lj
from lorax_jax import checkpoint, models
from lorax_jax.cli import main

PROMPT = "The cat sat"


@pytest.mark.parametrize("command", [None, *main.commands])
def test_help_starts_with_examples(run, command):
    args = ["--help"] if command is None else [command, "--help"]
    result = run(*args)
    assert result.exit_code == 0
    assert result.stdout.index("Examples:") < result.stdout.index("Options:")
    assert "  lorax-jax " in result.stdout


def test_no_command_shows_the_help(run):
    result = run()
    assert result.exit_code == 2
    assert result.stderr.startswith("Usage: lorax-jax [OPTIONS] COMMAND")


def test_the_version(run):
    result = run("--version")
    assert result.exit_code == 0
    assert re.fullmatch(r"lorax-jax, version \d+\.\d+\.\S+\n", result.stdout)


def test_help_waits_for_nothing_large():
    code = "import sys, lorax_jax.cli; print(*sys.modules)"
    found = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    large = {"transformers", "orbax.checkpoint", "matplotlib", "huggingface_hub"}
    assert not large & set(found.stdout.split())


def generate(run, *args):
    result = run("generate", "--prompt", PROMPT, "--max-new-tokens", 8, *args)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(PROMPT)
    return result.stdout


def test_the_same_seed_gives_the_same_text(run, tiny_model):
    args = ["--model", tiny_model, "--temperature", 1]
    first = generate(run, *args)
    assert generate(run, *args) == first
    assert generate(run, *args, "--seed", 1) != first


def test_adapted_and_merged_say_the_same(run, trained, tiny_model, here):
    greedy = ["--temperature", 0]
    adapted = generate(run, "--adapter", trained[0] / "adapter", *greedy)
    assert generate(run, "--model", trained[0] / "merged", *greedy) == adapted
    assert generate(run, "--model", tiny_model, *greedy) != adapted
    result = run("merge", trained[0] / "adapter", "merged")
    assert result.exit_code == 0, result.output
    assert "wrote     merged" in result.stdout
    assert generate(run, "--model", "merged", *greedy) == adapted


def test_a_chat(run, trained):
    args = ["--prompt", "Hi", "--chat", "--max-new-tokens", 2]
    result = run("generate", "--adapter", trained[0] / "adapter", *args)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("User: Hi\nAssistant:")


def test_merge_is_merge(run, trained, tiny_model, here):
    result = run("merge", trained[0] / "adapter", "merged", "--base", tiny_model)
    assert result.exit_code == 0, result.output
    model, params = models.load(tiny_model)
    adapter, _ = checkpoint.load_adapter(
        trained[0] / "adapter", params, names=model.names
    )
    wanted = models.to_hf(model, lj.merge(params, adapter))
    found = load_file(here / "merged" / "model.safetensors")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_array_equal(found[name], np.asarray(value))
    assert (here / "merged" / "tokenizer.json").exists()


def test_merge_overwrites_when_told(run, trained, here):
    (here / "merged").mkdir()
    (here / "merged" / "old.txt").write_text("old")
    args = ["merge", trained[0] / "adapter", "merged"]
    assert run(*args).exit_code == 2
    assert (here / "merged" / "old.txt").exists()
    assert run(*args, "--overwrite").exit_code == 0
    assert (here / "merged" / "model.safetensors").exists()


def test_the_base_is_found_through_the_adapter(run, adapter, tiny_model, here):
    """Where the configuration says, unless an option says otherwise."""
    shutil.copytree(tiny_model, here / "moved")
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    config["base_model_name_or_path"] = "/no/such/place"
    path.write_text(json.dumps(config))
    assert run("inspect", adapter).exit_code == 2
    assert run("inspect", adapter, "--base", "moved").exit_code == 0
    assert run("merge", adapter, "merged", "--base", "moved").exit_code == 0
    generate(run, "--adapter", adapter, "--model", "moved")
    config["base_model_name_or_path"] = "../moved"  # seen from the adapter
    path.write_text(json.dumps(config))
    assert run("inspect", adapter).exit_code == 0


def test_an_adapter_of_repeated_layers(run, tiny_model, here):
    """Every command repeats the base's layers as the adapter says."""
    model, params = models.load(tiny_model, scan_layers=True)
    params = lj.replicate(params, ((0, 2), (1, 2)))
    config = lj.LoraConfig(r".*/q_proj/kernel", rank=2, init=False)
    fn, ids = model.with_layers(3).apply, jax.ShapeDtypeStruct((1, 4), "int32")
    plan = lj.plan(config, params, fn=fn, args=(ids,))
    lj.save_adapter(
        here / "adapter",
        lj.init(plan, params, key=jax.random.key(0)),
        plan=plan,
        names=model.names,
        base_model_name_or_path=tiny_model,
    )
    shown = run("inspect", "adapter")
    assert shown.exit_code == 0, shown.output
    assert "layers/{0..2}/self_attn/q_proj/kernel" in shown.stdout
    assert f"all params: {plan.total:,d}" in shown.stdout
    assert run("merge", "adapter", "merged").exit_code == 0
    greedy = ["--temperature", 0]
    adapted = generate(run, "--adapter", "adapter", *greedy)
    assert generate(run, "--model", "merged", *greedy) == adapted


def test_inspect_an_adapter(run, trained, tiny_model):
    result = run("inspect", trained[0] / "adapter")
    assert result.exit_code == 0, result.output
    assert f"base      {tiny_model}" in result.stdout
    assert "14 of 14 sites loaded from 28 tensors" in result.stdout
    assert "layers/{0..1}/mlp/down_proj/kernel" in result.stdout
    assert "Every B has moved away from zero." in result.stdout
    assert "trainable params: " in result.stdout


def test_inspect_measures(run, adapter, tiny_model):
    model, params = models.load(tiny_model)
    loaded, _ = checkpoint.load_adapter(adapter, params, names=model.names)
    name = "layers/1/mlp/up_proj/kernel"
    a, b = loaded.train[name]["a"], loaded.train[name]["b"]
    sizes = [np.linalg.norm(x) for x in (a, b, 8 * np.asarray(a) @ np.asarray(b))]
    line = next(
        line
        for line in run("inspect", adapter).stdout.splitlines()
        if line.startswith(name)
    )
    np.testing.assert_allclose([*map(float, line.split()[1:])], sizes, rtol=2e-3)


def test_inspect_lists_what_does_nothing(run, adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    name = "base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"
    tensors[name] = np.zeros_like(tensors[name])
    from safetensors import safe_open

    with safe_open(path, "np") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    result = run("inspect", adapter)
    assert result.exit_code == 0, result.output
    assert "B is still zero in 1 sites" in result.stdout
    assert "  layers/1/mlp/up_proj/kernel\n" in result.stdout


def test_inspect_what_started_from_the_weights(run, tiny_model, here):
    """Sizes of what is trained, and of what is added; what has not moved adds none."""
    model, params = models.load(tiny_model)
    config = lj.LoraConfig(".*/(q|v)_proj/kernel", rank=2)
    ids = np.zeros((1, 4), np.int32)
    plan = lj.plan(config, params, fn=model.apply, args=(ids,))
    adapter = started(plan)
    still = "layers/1/self_attn/q_proj/kernel"
    fixed = adapter.fixed[still]
    adapter.train[still] = {"a": fixed["a0"], "b": fixed["b0"]}
    save = {"plan": plan, "names": model.names, "base_model_name_or_path": tiny_model}
    lj.save_adapter("started", adapter, **save)
    result = run("inspect", "started")
    assert result.exit_code == 0, result.output
    assert f"trainable params: {plan.trainable:,d} " in result.stdout
    assert f"nothing:\n  {still}\n" in result.stdout
    name = "layers/0/self_attn/q_proj/kernel"
    train, fixed = adapter.train[name], adapter.fixed[name]
    change = train["a"] @ train["b"] - fixed["a0"] @ fixed["b0"]
    sizes = [np.linalg.norm(x) for x in (train["a"], train["b"], change)]
    lines = result.stdout.splitlines()
    line = next(x for x in lines if x.startswith(name) and "e" in x and "|" not in x)
    np.testing.assert_allclose([*map(float, line.split()[1:])], sizes, rtol=2e-3)
    assert run("merge", "started", "merged").exit_code == 0
    lj.save_adapter("frozen", started(plan, frozen=("b",)), **save)
    result = run("inspect", "frozen")
    assert result.exit_code == 0, result.output
    assert "Every B has moved away from zero." in result.stdout


def test_inspect_a_model(run, tiny_model, here):
    config = here / "config"
    config.mkdir()
    shutil.copy(tiny_model / "config.json", config)  # weights are not asked for
    result = run("inspect", config, "--targets", ".*/(q|v)_proj/kernel", "--rank", 4)
    assert result.exit_code == 0, result.output
    assert "4 sites by  .*/(q|v)_proj/kernel" in result.stdout


def real(*args, **kwargs):
    """The command as a user runs it: a process of its own."""
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    env.pop("XLA_FLAGS", None)
    return subprocess.run(
        [sys.executable, "-m", "lorax_jax.cli", *map(str, args)],
        capture_output=True,
        text=True,
        env=env,
        **kwargs,
    )


def test_a_first_run_as_a_user_makes_it(here):
    """The default run, cut short; `test_default.py` makes all of it."""
    found = real("finetune", "--steps", 3, "--heldout", 0.01, cwd=here)
    assert found.returncode == 0, found.stderr
    assert "base      the embedded model: 1,881,408 parameters" in found.stdout
    assert "data      devil.txt" in found.stdout
    assert (here / "lorax-out" / "adapter" / "adapter_model.safetensors").exists()
    found = real("inspect", "lorax-out/nothing", cwd=here)
    assert found.returncode == 2
    assert found.stderr == "lorax-jax inspect: lorax-out/nothing is no folder.\n"
