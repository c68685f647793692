"""`models.load_adapted`: an adapter finds its base."""

import json

import numpy as np
import pytest

import lorax_jax as lj
from lorax_jax._errors import CheckpointError

IDS = np.arange(6, dtype=np.int32)[None]


@pytest.fixture
def adapter_folder(make, base_folder, tmp_path):
    made = make("tied")

    def write(name, **options):
        return made.save(tmp_path / "adapters" / name, params=made.params, **options)

    return made, base_folder(made), write


@pytest.mark.parametrize("scan", [False, True], ids=["unrolled", "scanned"])
def test_model_and_adapter(adapter_folder, scan):
    made, base, write = adapter_folder
    folder = write("a", base_model_name_or_path=base)
    model, params, adapter, receipt = lj.models.load_adapted(folder, scan_layers=scan)
    assert model.scan_layers == scan and not receipt.problems
    logits = lj.adapt(model.apply)(lj.bind(params, adapter), IDS)
    wanted = lj.adapt(made.model.apply)(lj.bind(made.params, made.adapter), IDS)
    np.testing.assert_allclose(logits, wanted, atol=1e-5)


def test_a_dtype(adapter_folder):
    _, base, write = adapter_folder
    folder = write("a", base_model_name_or_path=base)
    loaded = lj.models.load_adapted(folder, dtype="bfloat16")
    assert loaded.params["norm"]["scale"].dtype == "bfloat16"
    assert not loaded.receipt.problems


def test_relative_to_the_adapter_and_to_the_working_folder(
    adapter_folder, tmp_path, monkeypatch
):
    made, base, write = adapter_folder
    (tmp_path / "base").symlink_to(base)
    lj.models.load_adapted(write("a", base_model_name_or_path="../../base"))
    monkeypatch.chdir(tmp_path)
    lj.models.load_adapted(write("b", base_model_name_or_path="base"))


def test_the_base_may_be_given(adapter_folder):
    _, base, write = adapter_folder
    folder = write("a")
    with pytest.raises(
        CheckpointError, match="does not say which model the adapter is for"
    ):
        lj.models.load_adapted(folder)
    assert not lj.models.load_adapted(folder, base=base).receipt.problems


@pytest.mark.parametrize(
    "named", ["https://example.com/model", "/not/there", "a/b/c", "x\0y", "file:///etc"]
)
def test_a_base_that_is_nowhere(adapter_folder, named):
    _, _, write = adapter_folder
    folder = write("a")
    path = folder / "adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": named})
    )
    with pytest.raises(CheckpointError, match="which is no folder here and no hub id"):
        lj.models.load_adapted(folder)


def test_a_base_that_does_not_fit(adapter_folder, make, base_folder):
    _, _, write = adapter_folder
    other = base_folder(make("gpt2"))
    with pytest.raises(CheckpointError, match="does not fit the parameters"):
        lj.models.load_adapted(write("a"), base=other)
