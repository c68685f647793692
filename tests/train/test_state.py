import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lorax_jax import train
from lorax_jax.train import State, TrainingError, restore_state, save_state, saved_steps

TX = optax.adamw(1e-3)


@pytest.fixture
def state(adapter):
    made = train.start(adapter, TX, jax.random.key(3))
    noise = iter(jax.random.split(jax.random.key(4), 99))
    moved = jax.tree.map(
        lambda x: x + jax.random.normal(next(noise), x.shape, x.dtype),
        (made.train, made.opt_state[0].mu),
    )
    adam = made.opt_state[0]._replace(mu=moved[1], count=jnp.int32(12))
    return State(moved[0], (adam, *made.opt_state[1:]), jnp.int32(12), made.key)


def same(one: State, other: State) -> bool:
    def plain(state):
        return state._replace(key=jax.random.key_data(state.key))

    return jax.tree.all(jax.tree.map(np.array_equal, plain(one), plain(other)))


def test_what_is_saved_comes_back_bit_for_bit(tmp_path, state, adapter):
    history = [{"step": 1, "loss": 0.1}]
    save_state(tmp_path / "state", state, adapter.fixed, history)
    like = train.start(adapter, TX, jax.random.key(0))
    found, fixed, lines = restore_state(tmp_path / "state", like, adapter.fixed)
    assert same(found, state) and not same(found, like)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert fixed["head"].role == adapter.fixed["head"].role
    assert jax.tree.all(jax.tree.map(np.array_equal, fixed, adapter.fixed))
    assert lines == history


def test_fixed_arrays_come_from_the_file(tmp_path, state, adapter):
    """A data-driven start is not computed twice."""
    save_state(tmp_path, state, adapter.fixed)
    other = jax.tree.map(jnp.zeros_like, adapter.fixed)
    like = train.start(adapter, TX, jax.random.key(0))
    _, fixed, _ = restore_state(tmp_path, like, other)
    assert float(fixed["head"]["scale"]) == 2.0


def test_the_latest_state_stays(tmp_path, state, adapter):
    for step in (5, 12, 20):
        save_state(tmp_path, state._replace(step=jnp.int32(step)), adapter.fixed)
        assert saved_steps(tmp_path) == [step]
    like = train.start(adapter, TX, jax.random.key(0))
    assert int(restore_state(tmp_path, like, adapter.fixed)[0].step) == 20


def test_a_step_may_be_saved_twice(tmp_path, state, adapter):
    save_state(tmp_path, state, adapter.fixed, [{"step": 1}])
    save_state(tmp_path, state, adapter.fixed, [{"step": 2}])
    like = train.start(adapter, TX, jax.random.key(0))
    assert restore_state(tmp_path, like, adapter.fixed)[2] == [{"step": 2}]


def test_it_goes_on_over_other_devices(tmp_path, state, adapter):
    save_state(tmp_path, state, adapter.fixed)
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    like = train.start(adapter, TX, jax.random.key(0))
    split = NamedSharding(mesh, PartitionSpec(None, "x"))
    a = jax.device_put(like.train["head"]["a"], split)
    like.train["head"]["a"] = a
    found, _, _ = restore_state(tmp_path, like, adapter.fixed)
    assert found.train["head"]["a"].sharding == split
    assert same(found, state)


def test_nothing_saved(tmp_path, state, adapter):
    with pytest.raises(TrainingError, match="holds no saved state, so there is nothin"):
        restore_state(tmp_path / "state", state, adapter.fixed)


def test_another_rank(tmp_path, state, adapter):
    save_state(tmp_path, state, adapter.fixed)
    other = adapter._replace(
        train={"head": {"a": jnp.zeros((8, 2)), "b": jnp.zeros((2, 16))}}
    )
    like = train.start(other, TX, jax.random.key(0))
    with pytest.raises(
        TrainingError, match=r"what is trained differs(.|\n)*head/a: saved \[\[8, 4\]"
    ):
        restore_state(tmp_path, like, other.fixed)


def test_other_targets(tmp_path, state, adapter):
    save_state(tmp_path, state, adapter.fixed)
    renamed = {"tail": adapter.train["head"]}
    other = adapter._replace(train=renamed, fixed={"tail": adapter.fixed["head"]})
    like = train.start(other, TX, jax.random.key(0))
    with pytest.raises(TrainingError, match=r"train/head/a: not in this run") as error:
        restore_state(tmp_path, like, other.fixed)
    assert "Resume with the targets, rank and optimizer" in str(error.value)


def test_another_optimizer(tmp_path, state, adapter):
    save_state(tmp_path, state, adapter.fixed)
    like = train.start(adapter, optax.sgd(0.1), jax.random.key(0))
    with pytest.raises(TrainingError, match=r"opt_state/0/count: not in this run"):
        restore_state(tmp_path, like, adapter.fixed)


def test_a_damaged_state(tmp_path, state, adapter):
    folder = save_state(tmp_path, state, adapter.fixed)
    (folder / "about" / "metadata").write_text("{")
    with pytest.raises(TrainingError, match="00000012 cannot be restored: "):
        restore_state(tmp_path, state, adapter.fixed)
