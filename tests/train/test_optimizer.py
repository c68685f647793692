import jax.numpy as jnp
import numpy as np
import pytest

from lorax_jax.train import TrainingError, optimizer

pytestmark = pytest.mark.usefixtures("relaxed")  # Optax's adam promotes types

TRAIN = {"w": {"a": jnp.ones((3, 1)), "b": jnp.zeros((1, 2))}}


def rates(steps, **options):
    """How far each step moves under a constant gradient: Adam's is the rate itself."""
    tx = optimizer(learning_rate=1.0, steps=steps, clip=1e9, **options)
    state, moved = tx.init(TRAIN), []
    grads = {"w": {"a": jnp.ones((3, 1)), "b": jnp.ones((1, 2))}}
    for _ in range(steps):
        updates, state = tx.update(grads, state, TRAIN)
        moved.append(-float(updates["w"]["b"][0, 0]))
    return np.array(moved)


def test_it_warms_up_and_falls_along_a_cosine():
    found = rates(40, warmup=4)
    assert 0 < found[0] < found[1] < found[2] < found[3] < found[4]
    np.testing.assert_allclose(found[4], 1.0, rtol=1e-5)
    assert (np.diff(found[4:]) < 0).all()
    assert found[-1] < 0.01


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_short_runs_move_too(steps):
    assert (rates(steps) > 0).all()


def test_weight_decay_is_off():
    nothing = {"w": {"a": jnp.zeros((3, 1)), "b": jnp.zeros((1, 2))}}
    tx = optimizer(learning_rate=1.0, steps=10)
    updates, _ = tx.update(nothing, tx.init(TRAIN), TRAIN)
    assert (updates["w"]["a"] == 0).all()


def test_a_long_gradient_is_clipped():
    tx = optimizer(learning_rate=1.0, steps=10)
    state = tx.init(TRAIN)
    huge = {"w": {"a": jnp.full((3, 1), 1e20), "b": jnp.full((1, 2), 1e20)}}
    updates, _ = tx.update(huge, state, TRAIN)
    assert jnp.isfinite(updates["w"]["a"]).all()


@pytest.mark.parametrize("warmup", [10, -1])
def test_a_warmup_that_does_not_fit(warmup):
    with pytest.raises(TrainingError, match=f"`warmup` = {warmup} steps do not fit"):
        optimizer(learning_rate=1.0, steps=10, warmup=warmup)
