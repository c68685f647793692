"""Bad input ends in one message and exit status 2, and changes nothing."""

import collections
import errno
import json
import os
import re
import shutil

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_folder import BERT, GPT2, write_model

from lorax_jax import checkpoint
from lorax_jax._errors import PlanError
from lorax_jax.cli import _training

GOOD = '{"text": "The cat sat on the mat and slept all day."}\n'


@pytest.fixture(scope="module")
def all_broken(tmp_path_factory, tiny_model):
    here = tmp_path_factory.mktemp("broken")
    (here / "empty.txt").write_text("")
    (here / "short.txt").write_text("The cat sat on the mat.\n\nThe dog too.")
    (here / "latin.txt").write_bytes("caf\xe9".encode("latin1"))
    (here / "table.csv").write_text("a,b")
    (here / "broken.jsonl").write_text(GOOD * 16 + '{"text": \n' + GOOD)
    (here / "odd.jsonl").write_text(GOOD + '{"text": "a", "label": 3}\n')
    (here / "prompts.jsonl").write_text(GOOD + '{"prompt": "a", "completion": ""}\n')
    (here / "one.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    (here / "folder").mkdir()
    (here / "folder" / "notes.md").write_text("hi")
    (here / "taken").write_text("a file")
    shutil.copytree(tiny_model, here / "mute")
    for path in (here / "mute").glob("tokenizer*"):
        path.unlink()
    shutil.copytree(tiny_model, here / "torn")
    (here / "torn" / "model.safetensors").write_bytes(b"torn")
    write_model(here / "small", vocab_size=100)
    write_model(here / "gpt2", GPT2)
    write_model(here / "bert", BERT)
    shutil.copytree(tiny_model, here / "nan")
    tensors = load_file(tiny_model / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"] * np.float32("nan")
    save_file(tensors, here / "nan" / "model.safetensors", {"format": "pt"})
    shutil.copytree(tiny_model, here / "heads")
    config = json.loads((tiny_model / "config.json").read_text())
    config["num_attention_heads"] = "six"
    (here / "heads" / "config.json").write_text(json.dumps(config))
    return here


@pytest.fixture
def broken(here, all_broken):
    """Files and folders that are not what their names say."""
    shutil.copytree(all_broken, here, dirs_exist_ok=True)
    return here


FINETUNE = [
    ({"data": "nowhere.txt"}, r"nowhere\.txt does not exist"),
    ({"data": "empty.txt"}, r"empty\.txt is empty"),
    ({"data": "folder"}, r"folder ends in ''; a data file is plain text"),
    ({"data": "table.csv"}, r"table\.csv ends in '\.csv'; a data file is plain text"),
    ({"data": "latin.txt"}, r"latin\.txt, line 1: byte 0xe9 is not UTF-8"),
    ({"data": "broken.jsonl"}, r"broken\.jsonl, line 17: no JSON: Expecting value"),
    ({"data": "odd.jsonl"}, r"odd\.jsonl, line 2: unknown fields \['label'\]"),
    ({"data": "prompts.jsonl"}, r"line 2: no completion tokens: 'completion' is em"),
    ({"data": "one.jsonl"}, r"one\.jsonl, line 1: too little to hold 2% out"),
    ({"data": "short.txt", "length": 64}, r"short\.txt is too short for one window"),
    ({"data": None}, r"--model is given without --data"),
    ({"model": "folder"}, r"folder is not a checkpoint: it has no config\.json"),
    ({"model": "taken"}, r"taken is a file; a checkpoint is a folder"),
    ({"model": "no where"}, r"'no where' is neither a folder nor a hub id"),
    ({"model": "nobody/nothing"}, r"downloading it from the hub failed"),
    (
        {"model": "mute"},
        r"mute holds no tokenizer that can be read: .*\w\. Put its tokenizer\.json",
    ),
    ({"model": "torn"}, r"torn/model\.safetensors is not a readable safetensors"),
    ({"model": "small"}, r"makes token \d+, and the model's table has 100 rows"),
    ({"model": "gpt2", "length": 64}, r"--length 64 exceeds the 32 positions"),
    (
        {"model": "nan"},
        r"held-out loss after 0 steps is nan\. The base holds NaN or in",
    ),
    ({"model": "heads"}, r"`num_attention_heads` = 'six'; a whole number from 1"),
    (
        {"rank": 1000},
        r"--rank 1000 exceeds \d+, the rank that '(.*)' of .* "
        r"Give --rank \d+, or leave it out with --exclude '\1'\.$",
    ),
    (
        {"targets": "embed_tokens/.*"},
        r"Choose what the adapter changes: --tie shared \(.*\), --tie lookup \(.*\), "
        r"--tie head \(the product alone\), or leave it out with --exclude\.$",
    ),
    ({"init": "psisa"}, r"--init 'psisa' is no initializer\. Known: "),
    ({"targets": "("}, r"--targets holds '\(', which is not a regex"),
    ({"exclude": "("}, r"--exclude holds '\(', which is not a regex"),
    ({"warmup": 9}, r"--warmup 9 steps do not fit into --steps 4"),
    ({"out": "taken"}, r"taken is a file; a folder is meant\. Nothing was changed"),
    ({"out": "folder"}, r"folder is not empty\. Choose another folder"),
    ({"rank": 0}, r"Invalid value for '--rank': 0 is not in the range"),
    ({"rank": "many"}, r"Invalid value for '--rank': 'many' is not a valid integer"),
    ({"dtype": "int8"}, r"Invalid value for '--dtype': 'int8' is not one of"),
    ({"dropout": 1}, r"Invalid value for '--dropout': 1\.0 is not in the range"),
    ({"lr": 0}, r"Invalid value for '--lr': 0\.0 is not in the range"),
    ({"heldout": -1}, r"Invalid value for '--heldout': -1\.0 is not in the range"),
    ({"lr": "nan"}, r"Invalid value for '--lr': nan is not a number that can be used"),
    ({"lr": "inf"}, r"Invalid value for '--lr': inf is not a number that can be used"),
    ({"weight-decay": "nan"}, r"Invalid value for '--weight-decay': nan is not a numb"),
    ({"dropout": "nan"}, r"Invalid value for '--dropout': nan is not a number"),
    ({"alpha": 0}, r"Invalid value for '--alpha': 0\.0 is not in the range x>0"),
    ({"alpha": "1e38"}, r"Invalid value for '--alpha': 1e38 is not a number"),
    ({"seed": 2**32}, r"Invalid value for '--seed': 4294967296 is not in the range"),
    (
        {"prompt": "caf\udce9"},
        r"Invalid value for '--prompt': it holds bytes that are n",
    ),
    ({"speed": "high"}, r"No such option.* '?--speed"),
]


@pytest.mark.parametrize(("options", "message"), FINETUNE)
def test_finetune(finetune, broken, options, message):
    before = {p: p.read_bytes() for p in broken.rglob("*") if p.is_file()}
    result = finetune(**options)
    assert_one_message(result, message)
    after = {p: p.read_bytes() for p in broken.rglob("*") if p.is_file()}
    assert after == before
    assert not list(broken.glob("lorax-out*"))


def assert_one_message(result, message, lines=1):
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith("lorax-jax")
    assert len(result.stderr.splitlines()) == lines
    assert "Traceback" not in result.output


def test_an_unknown_target_shows_the_closest(finetune, here):
    result = finetune(targets="self_attn/q_proj")
    message = (
        r"--targets matched no parameter\.\n"
        r"  pattern  self_attn/q_proj .*\n"
        r"  closest  layers/0/self_attn/q_proj/kernel\n"
    )
    assert_one_message(result, message, lines=len(result.stderr.splitlines()))
    assert not (here / "lorax-out").exists()


def test_no_space_is_noticed_before_training(finetune, here, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    message = r"Not enough disk space for lorax-out: it takes \d+ MiB, and 0 MiB"
    assert_one_message(finetune(), message)
    assert not (here / "lorax-out").exists()


def test_a_disk_that_fills_up(finetune, here, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_adapter", full)
    result = finetune()
    assert result.exit_code == 2
    message = "lorax-jax finetune: The disk is full. Saved: lorax-out/state.\n"
    assert result.stderr.endswith(message)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9"),
    ],
)
def test_memory_that_is_not_there(finetune, monkeypatch, error):
    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(_training.train, "finetune", fail)
    message = r"finetune: Out of memory\. Lower --batch .* or --length, .* Nothing was"
    assert_one_message(finetune(), message)


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.EFBIG, r"A file would be larger than it may be; see `ulimit -f`\. Not"),
        (errno.EDQUOT, r"Your share of the disk is full\. Nothing was saved"),
    ],
)
def test_limits_of_files(finetune, monkeypatch, number, message):
    def fail(*args, **kwargs):  # as a storage library says it
        raise ValueError(f"OUT_OF_RANGE: Error writing: {os.strerror(number)}")

    monkeypatch.setattr(_training.train, "finetune", fail)
    assert_one_message(finetune(), message)


def test_debug_shows_the_traceback(finetune):
    result = finetune("--debug", targets="nothing")
    assert isinstance(result.exception, PlanError)


def test_a_bug_keeps_its_traceback(finetune, monkeypatch):
    def bug(*args, **kwargs):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(checkpoint, "save_adapter", bug)
    assert isinstance(finetune().exception, ZeroDivisionError)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["generate"], r"Missing option '--prompt'"),
        (["generate", "--prompt", ""], r"--prompt is empty; give at least one word"),
        (
            ["generate", "--prompt", "a", "--temperature", "-1"],
            r"Invalid value for '--temperature': -1\.0 is not in the range",
        ),
        (
            ["generate", "--prompt", "a", "--top-p", "0"],
            r"Invalid value for '--top-p': 0\.0 is not in the range",
        ),
        (
            ["generate", "--prompt", "a", "--temperature", "nan"],
            r"Invalid value for '--temperature': nan is not a number",
        ),
        (
            ["generate", "--prompt", "a\udcff"],
            r"--prompt': it holds bytes that are not",
        ),
        (["generate", "--prompt", "a", "--adapter", "folder"], r"folder is no adapter"),
        (["generate", "--prompt", "a", "--model", "folder"], r"is not a checkpoint"),
        (
            ["generate", "--prompt", "a", "--model", "bert"],
            r"bert is an encoder \(bert\): it predicts no next token",
        ),
        (["merge", "folder", "merged"], r"folder is no adapter: it has no adapter_c"),
        (["merge", "adapter", "folder"], r"folder is not empty\. Choose another"),
        (["merge", "adapter", "taken"], r"taken is a file; a folder is meant"),
        (["merge", "adapter", "new", "--base", "folder"], r"config\.json"),
        (["merge", "adapter"], r"Missing argument 'OUT_DIR'"),
        (["inspect", "folder"], r"folder is neither an adapter nor a model"),
        (["inspect", "nowhere"], r"nowhere is no folder"),
        (
            ["inspect", "adapter", "--base", "nobody/no"],
            r"downloading its config\.json",
        ),
        (["frobnicate"], r"No such command 'frobnicate'"),
    ],
)
def test_other_commands(run, broken, adapter, args, message):
    assert_one_message(run(*args), message)
    assert not (broken / "merged").exists() and not (broken / "new").exists()


def test_an_adapter_of_another_base(run, broken, adapter):
    write_model(broken / "other", initializer_range=0.2)
    result = run("generate", "--adapter", adapter, "--model", "other", "--prompt", "a")
    assert result.exit_code == 2
    assert "is not the weight that the adapter was trained on" in result.stderr
    assert "Is this the base that it was trained on?" in result.stderr
    write_model(broken / "wide", hidden_size=64)
    result = run("merge", adapter, "new", "--base", "wide")
    assert result.exit_code == 2
    assert not (broken / "new").exists()


def test_a_base_that_is_gone(run, broken, adapter):
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text())
    for base, message in [
        ("/no/such/place", r"The base of adapter, /no/such/place, is not here"),
        (None, r"adapter does not say what its base is"),
    ]:
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        for args in (["merge", "adapter", "new"], ["inspect", "adapter"]):
            assert_one_message(run(*args), message)
