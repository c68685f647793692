"""What `lorax-jax finetune` promises without arguments. It takes a minute or two."""

import json
import os
import re
import subprocess
import sys
import time

import pytest


@pytest.mark.default_run
def test_the_default_run(tmp_path):
    env = os.environ | {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    env.pop("XLA_FLAGS", None)  # the suite's eight devices
    began = time.perf_counter()
    found = subprocess.run(
        [sys.executable, "-m", "lorax_jax.cli", "finetune"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=env,
    )
    took = time.perf_counter() - began
    print(found.stdout, f"{took:.1f} s in all")
    assert found.returncode == 0, found.stderr
    lines = (tmp_path / "lorax-out" / "history.jsonl").read_text().splitlines()
    measured = [
        x["heldout_loss"] for x in map(json.loads, lines) if "heldout_loss" in x
    ]
    assert measured[-1] < 0.75 * measured[0]
    share = re.search(r"trainable%: ([\d.]+)", found.stdout)
    assert float(share[1]) <= 5.0
    assert took < 120
