import os
import signal
import sys

import jax
import numpy as np
import optax
import pytest

from lorax_jax import train
from lorax_jax.train import Heldout, TrainingError, Windows, finetune


def equal(one, other):
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


@pytest.fixture
def heldout(rows):
    return Heldout(Windows(rows.ids[8:11], rows.weights[8:11]), bytes=24)


@pytest.fixture
def options(heldout):
    return {
        "steps": 10,
        "batch": 4,
        "learning_rate": 0.1,
        "heldout": heldout,
        "eval_every": 4,
    }


def test_the_loss_falls(model, params, adapter, rows, options):
    run = finetune(model, params, adapter, rows, **options | {"steps": 60})
    losses = [line["loss"] for line in run.history if "loss" in line]
    assert len(losses) == 60 and losses[-1] < 0.5 * losses[0]
    measured = [line for line in run.history if "heldout_loss" in line]
    assert [line["step"] for line in measured] == [*range(0, 60, 4), 60]
    assert measured[-1]["heldout_loss"] < 0.5 * measured[0]["heldout_loss"]
    assert run.finished and run.tokens_per_second > 0 and run.compile_seconds > 0


def test_base_and_fixed_stay_as_they_are(model, params, adapter, rows, options):
    before = jax.tree.map(np.array, (params, adapter))
    run = finetune(model, params, adapter, rows, **options)
    assert equal(before, (params, adapter))
    assert equal(run.adapter.fixed, adapter.fixed)
    assert not equal(run.adapter.train, adapter.train)


def test_measurements_are_those_of_all_rows(model, params, adapter, rows, heldout):
    run = finetune(model, params, adapter, rows, steps=1, batch=2, heldout=heldout)
    ids, weights = heldout.windows
    loss = float(train.cross_entropy(model(params, ids[:, :-1]), ids[:, 1:], weights))
    before = run.history[0]
    np.testing.assert_allclose(before["heldout_loss"], loss, rtol=1e-5)
    bits = train.bits_per_byte(loss * 24, heldout.bytes)
    np.testing.assert_allclose(before["bits_per_byte"], bits, rtol=1e-5)


@pytest.mark.parametrize(("accumulate", "dropout"), [(1, 0.0), (2, 0.3)])
def test_to_resume_is_never_to_have_stopped(
    model, params, adapter_with, rows, options, tmp_path, dropout, accumulate
):
    adapter = adapter_with(params, dropout=dropout)
    options |= {"accumulate": accumulate}
    whole = finetune(model, params, adapter, rows, **options)

    class Stop(Exception):
        pass

    def crash(line):
        if line["step"] == 8:
            raise Stop("the power failed")

    saved = options | {"folder": tmp_path, "save_every": 5}
    with pytest.raises(Stop, match="the power failed"):
        finetune(model, params, adapter, rows, **saved, report=crash)
    assert train.saved_steps(tmp_path) == [5]
    run = finetune(model, params, adapter, rows, **saved, resume=True)
    assert equal(run.adapter, whole.adapter)
    assert run.history == whole.history
    assert train.saved_steps(tmp_path) == [10]


def test_nothing_compiles_after_the_first_step(model, params, adapter, rows, options):
    traced = []

    def counted(params, ids):
        traced.append(len(steps))
        return model(params, ids)

    steps = []
    finetune(
        counted, params, adapter, rows, **options, report=lambda _: steps.append(1)
    )
    assert set(traced) <= {0, 1}  # the measurement before, and the first step
    assert len(steps) == 4


def test_ctrl_c_stops_between_steps(model, params, adapter, rows, options, tmp_path):
    def interrupt(line):
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    saved = options | {"folder": tmp_path}
    run = finetune(model, params, adapter, rows, **saved, report=interrupt)
    assert signal.getsignal(signal.SIGINT) is before
    assert not run.finished
    (at,) = train.saved_steps(tmp_path)
    assert at in (4, 5)
    rest = finetune(model, params, adapter, rows, **saved, resume=True)
    assert rest.finished
    assert equal(
        rest.adapter, finetune(model, params, adapter, rows, **options).adapter
    )


def test_a_second_ctrl_c_stops_at_once(model, params, adapter, rows, options):
    def interrupt(line):
        if line["step"] == 4:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt, match="^$"):  # which says nothing
        finetune(model, params, adapter, rows, **options, report=interrupt)


def test_ctrl_c_does_not_tear_a_save(
    model, params, adapter, rows, options, tmp_path, monkeypatch
):
    real = train.save_state

    def save(*args):
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args)

    monkeypatch.setattr(sys.modules[finetune.__module__], "save_state", save)
    options = options | {"folder": tmp_path, "save_every": 5}
    run = finetune(model, params, adapter, rows, **options)
    assert not run.finished
    assert train.saved_steps(tmp_path) == [6]


def test_progress_goes_to_the_standard_error(
    model, params, adapter, rows, options, capsys
):
    finetune(model, params, adapter, rows, **options, progress=True)
    out, err = capsys.readouterr()
    assert not out
    assert "10/10" in err and "loss" in err and "tokens/s" in err


def test_a_loss_that_is_no_number(model, params, adapter, rows, options):
    broken = params | {"embed": params["embed"] * np.nan}
    message = r"is nan\. The base holds NaN or infinity in embed; load another"
    with pytest.raises(TrainingError, match="after 0 steps " + message):
        finetune(model, broken, adapter, rows, **options)
    options = options | {"heldout": None}
    with pytest.raises(TrainingError, match="loss of step 1 " + message):
        finetune(model, broken, adapter, rows, **options)


def test_a_base_that_overflows(model, params, adapter, rows, options):
    def overflow(params, ids):
        return model(params, ids) * np.float32(np.inf)

    message = r"after 0 steps is nan\. No update was made yet.* only finite numbers"
    with pytest.raises(TrainingError, match=message):
        finetune(overflow, params, adapter, rows, **options)


def test_a_run_that_diverges(model, params, adapter, rows, options):
    options = options | {"tx": optax.sgd(1e38)}
    message = (
        r"(loss|norm in|of) step \d+ is (nan|inf)\. Lower the learning rate or alpha"
    )
    with pytest.raises(TrainingError, match=message):
        finetune(model, params, adapter, rows, **options)


def test_a_gradient_that_is_no_number(model, params, adapter, rows, options):
    @jax.custom_jvp
    def wild(logits):
        return logits

    @wild.defjvp
    def _(primals, tangents):
        return primals[0], tangents[0] * np.float32(1e38)

    with pytest.raises(
        TrainingError, match=r"gradient's norm in step 1 is inf\. No upd"
    ):
        finetune(lambda p, ids: wild(model(p, ids)), params, adapter, rows, **options)


@pytest.mark.parametrize("name", ["steps", "batch", "accumulate"])
def test_no_step_to_make(model, params, adapter, rows, options, name):
    with pytest.raises(TrainingError, match=rf"`{name}` = 0.* must all be at least 1"):
        finetune(model, params, adapter, rows, **options | {name: 0})


def test_a_finished_run(model, params, adapter, rows, options, tmp_path):
    saved = options | {"folder": tmp_path}
    run = finetune(model, params, adapter, rows, **saved)
    again = finetune(model, params, adapter, rows, **saved, resume=True)
    assert again.finished and again.history == run.history
    for one, other in zip(
        *map(jax.tree.leaves, (run.adapter, again.adapter)), strict=True
    ):
        assert np.array_equal(one, other)
    with pytest.raises(TrainingError, match="has made 10 steps, more than `steps` = 9"):
        finetune(model, params, adapter, rows, **saved | {"steps": 9}, resume=True)


def test_resuming_from_nowhere(model, params, adapter, rows, options):
    with pytest.raises(TrainingError, match="`resume` needs a `folder`"):
        finetune(model, params, adapter, rows, **options, resume=True)


@pytest.mark.parametrize(
    "config",
    [{"dora": True}, {"token_rows": [3], "init": False}, {"whole": "embed"}],
    ids=["dora", "rows", "whole"],
)
def test_what_has_no_scale(model, params, adapter_with, rows, options, config):
    """The measurement before the first step is the base's."""
    adapter = adapter_with(params, **config)
    run = finetune(model, params, adapter, rows, **options)
    measured = [x["heldout_loss"] for x in run.history if "heldout_loss" in x]
    ids, weights = options["heldout"].windows
    loss = float(train.cross_entropy(model(params, ids[:, :-1]), ids[:, 1:], weights))
    np.testing.assert_allclose(measured[0], loss, rtol=1e-5)
    assert measured[-1] < measured[0]
