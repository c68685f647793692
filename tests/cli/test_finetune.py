import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
from safetensors.numpy import load_file
from tiny_folder import GPT2, write_model

from lorax_jax import models
from lorax_jax.cli import _training


def tree(folder):
    """Every file below a folder, with its content."""
    return {p: p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def losses(folder):
    lines = (folder / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_what_it_prints(trained):
    _, result = trained
    out = result.stdout
    assert "base      tiny: " in out
    assert "14 sites by  all-linear" in out
    assert "trainable params: " in out
    assert out.index("before    ") < out.index("after 0 steps") < out.index("after    ")
    assert "nats/token" in out and "bits/byte" in out and "tokens/s" in out
    assert "lorax-jax generate --adapter" in out
    assert "30/30" in result.stderr


def test_what_it_learns(trained):
    measured = [x["heldout_loss"] for x in losses(trained[0]) if "heldout_loss" in x]
    assert len(measured) == 6
    assert measured[-1] < 0.95 * measured[0]


def test_what_it_writes(trained, tiny_model):
    folder, _ = trained
    assert {p.name for p in folder.iterdir()} == {
        "adapter",
        "merged",
        "history.jsonl",
        "loss.png",
        "run.json",
        "state",
    }
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    assert (config["r"], config["lora_alpha"]) == (2, 16)
    assert (folder / "adapter" / "tokenizer.json").exists()
    merged = load_file(folder / "merged" / "model.safetensors")
    base = load_file(tiny_model / "model.safetensors")
    assert merged.keys() == base.keys()
    changed = [name for name in base if not np.array_equal(base[name], merged[name])]
    assert len(changed) == 14


def test_the_base_stays_as_it_is(finetune, tiny_model):
    before = tree(tiny_model)
    assert finetune("--export").exit_code == 0
    assert tree(tiny_model) == before


def test_each_run_gets_a_folder_of_its_own(finetune, here):
    for name in ("lorax-out", "lorax-out-2"):
        (here / name).mkdir()
        (here / name / "loss.png").write_text("of an earlier run")
    before = tree(here)
    assert finetune().exit_code == 0
    assert (here / "lorax-out-3" / "adapter").is_dir()
    after = tree(here)
    assert {path: after[path] for path in before} == before


def test_a_folder_with_something_in_it_is_refused(finetune, here):
    (here / "mine").mkdir()
    (here / "mine" / "thesis.tex").write_text("years of work")
    result = finetune(out="mine")
    assert result.exit_code == 2
    assert "mine is not empty. Choose another" in result.stderr
    assert finetune("--overwrite", out="mine").exit_code == 0
    assert (here / "mine" / "thesis.tex").read_text() == "years of work"
    assert (here / "mine" / "adapter").is_dir()


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
LINES = [
    {"text": "The cat sat on the mat."},
    {"prompt": "The owl sat on", "completion": " the roof."},
    {"messages": CHAT},
] * 6


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        (["--scan-layers", "--remat", "--rslora", "--pack"], {"dropout": 0.1}),
        (["--export"], {"dtype": "bfloat16", "accumulate": 2, "heldout": 0.2}),
        ([], {"dtype": "float16", "exclude": ".*/mlp/.*", "heldout": 0.2}),
        (["--export"], {"targets": "embed_tokens/.*", "tie": "head"}),
        ([], {"targets": r".*/(q|v)_proj/kernel", "sample_tokens": 4, "heldout": 0}),
    ],
)
@pytest.mark.usefixtures("relaxed")  # JAX's own attention, backwards in bfloat16
def test_options(finetune, here, flags, options):
    (here / "data.jsonl").write_text("\n".join(map(json.dumps, LINES)))
    result = finetune(*flags, data="data.jsonl", **options)
    assert result.exit_code == 0, result.output
    steps = [line["loss"] for line in losses(here / "lorax-out") if "loss" in line]
    assert len(steps) == 4 and all(map(np.isfinite, steps))


def test_a_model_that_has_learned_its_positions(finetune, run, here):
    write_model(here / "gpt2", GPT2)
    result = finetune(model="gpt2", length=32, sample_tokens=4)
    assert result.exit_code == 0, result.output
    args = ["--adapter", "lorax-out/adapter", "--prompt", "The cat"]
    assert run("generate", *args, "--max-new-tokens", 20).exit_code == 0
    result = run("generate", *args, "--max-new-tokens", 40)
    assert result.exit_code == 2
    assert "the model has learned 32 positions" in result.stderr


def interrupt(line):
    if line["step"] == 3:
        os.kill(os.getpid(), signal.SIGINT)


def test_ctrl_c_and_resume(finetune, run, here, monkeypatch):
    assert finetune(out="whole", steps=6, eval_every=3).exit_code == 0
    with monkeypatch.context() as patch:
        patch.setattr(_training, "_report", interrupt)
        result = finetune(out="parts", steps=6, eval_every=3)
    assert result.exit_code == 130
    assert "Interrupted after step" in result.stderr
    assert "Saved: parts/state" in result.stderr
    assert not (here / "parts" / "adapter").exists()
    result = run("finetune", "--resume", "parts")
    assert result.exit_code == 0, result.output
    files = [here / name / "adapter" for name in ("whole", "parts")]
    whole, parts = (load_file(f / "adapter_model.safetensors") for f in files)
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)
    assert losses(here / "parts") == losses(here / "whole")


def test_ctrl_c_before_anything_is_saved(finetune, here, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(_training.planning, "plan", interrupt)
    result = finetune()
    assert result.exit_code == 130
    assert "Interrupted. Nothing was saved." in result.stderr
    assert not (here / "lorax-out").exists()


def test_resume_keeps_the_settings(finetune, run, here):
    assert finetune().exit_code == 0
    result = run("finetune", "--resume", "lorax-out", "--rank", 4)
    assert result.exit_code == 2
    assert "--rank 4 contradicts the run in lorax-out, which has 2" in result.stderr
    result = run("finetune", "--resume", "lorax-out", "--out", "other")
    assert result.exit_code == 2
    assert "--out and --resume name two folders" in result.stderr
    assert run("finetune", "--resume", "lorax-out", "--rank", 2).exit_code == 0
    (here / "data.txt").write_text("Something else. " * 200)
    result = run("finetune", "--resume", "lorax-out")
    assert result.exit_code == 2
    assert "its content has changed" in result.stderr


def test_resume_from_what_is_no_run(run, here):
    (here / "empty").mkdir()
    for name in ("empty", "nowhere"):
        result = run("finetune", "--resume", name)
        assert result.exit_code == 2
        assert f"{name} is not the folder of a run" in result.stderr


def test_terminated(finetune, run, here, monkeypatch):
    def terminate(line):
        if line["step"] == 3:
            os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        patch.setattr(_training, "_report", terminate)
        result = finetune(steps=6, eval_every=3)
    assert result.exit_code == 143
    assert "Saved: lorax-out/state. Go on with: lorax-jax finetune" in result.stderr
    assert signal.getsignal(signal.SIGTERM) is before
    assert run("finetune", "--resume", "lorax-out").exit_code == 0


def test_terminated_before_anything_is_saved(finetune, here, monkeypatch):
    def terminate(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(_training.planning, "plan", terminate)
    for ignored in (False, True):  # as in the background of a script
        if ignored:
            before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        result = finetune()
        if ignored:
            signal.signal(signal.SIGINT, before)
        assert result.exit_code == 143
        assert "Interrupted. Nothing was saved." in result.stderr


LONG = [{"prompt": "The cat sat. " * 40, "completion": "Yes"}] * 2
SHORT = [{"prompt": "The cat sat.", "completion": "Yes"}]


def test_what_it_says_of_its_data(finetune, here):
    (here / "long.jsonl").write_text("\n".join(map(json.dumps, LONG + SHORT)))
    result = finetune(data="long.jsonl", heldout=0)
    assert result.exit_code == 0, result.output
    count = re.search(
        r"data      long\.jsonl: 3 documents \(2 longer than a row, and cut\), (\d+) "
        r"tokens to learn in (\d) rows of 16; 0 rows held out",
        result.stdout,
    )
    assert 3 <= int(count[1]) <= 3 * 4 and 3 <= int(count[2]) <= 4
    assert "warning   2 documents with a prompt longer than a row" in result.stderr
    (here / "short.jsonl").write_text("\n".join(map(json.dumps, SHORT * 2)))
    result = finetune(data="short.jsonl", heldout=0.5)
    assert "1 document, " in result.stdout
    assert " in 1 row of 16; 1 row held out" in result.stdout
    assert "warning" not in result.stderr


def test_more_positions_than_were_trained(finetune, run, tiny_model, here):
    shutil.copytree(tiny_model, here / "near")
    config = json.loads((tiny_model / "config.json").read_text())
    config["max_position_embeddings"] = 12
    (here / "near" / "config.json").write_text(json.dumps(config))
    result = finetune(model="near")
    assert result.exit_code == 0
    assert "--length 16 exceeds the 12 positions that the model" in result.stderr
    args = ["generate", "--prompt", "The cat", "--model", "near", "--max-new-tokens"]
    result = run(*args, 12)
    assert result.exit_code == 0
    assert "and 12 are to follow; the model was trained on 12 pos" in result.stderr
    assert "warning" not in run(*args, 1).stderr


def test_what_an_adapter_calls_its_base(finetune, run, tiny_model, here, monkeypatch):
    """Found again from anywhere; no path but one that was given as such."""
    shutil.copytree(tiny_model, here / "base")
    for model, named in [
        ("base", "../../../base"),
        (here / "base", str(here / "base")),
        (None, "lorax_jax/embedded/model"),
    ]:
        result = finetune("--overwrite", model=model, out="runs/one")
        assert result.exit_code == 0, result.output
        adapter = here / "runs" / "one" / "adapter"
        config = json.loads((adapter / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == named
        assert "base" not in (adapter / "README.md").read_text()
        with monkeypatch.context() as patch:
            patch.chdir(here / "runs")
            assert run("inspect", "one/adapter").exit_code == 0
        models.load_adapted(adapter)
