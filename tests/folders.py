"""Folders of models and of adapters: what they hold, and how to change it."""

import json

from safetensors import safe_open
from safetensors.numpy import load_file, save_file

TENSORS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


def same_bytes(one, other):
    return one.keys() == other.keys() and all(
        one[k].dtype == other[k].dtype and one[k].tobytes() == other[k].tobytes()
        for k in one
    )


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def rewrite(folder, change, *, metadata=True):
    """Changes a file's tensors, and keeps its metadata or not."""
    path = folder / TENSORS
    with safe_open(path, framework="np") as file:
        kept = file.metadata() if metadata else {"format": "pt"}
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata=kept)


def reconfigure(folder, **fields):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    return folder
