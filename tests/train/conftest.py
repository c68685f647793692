"""A tokenizer, and a model small enough to train in a blink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_folder import write_tokenizer

import lorax_jax as lj
from lorax_jax import models, train


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


@pytest.fixture
def tokenizer(tokenizer_folder):
    """Fresh each time: tests set a chat template."""
    return models.tokenizer(tokenizer_folder)


VOCAB = 16


def apply(params, ids):
    """A model of two weights: an embedding, and a product."""
    hidden = params["embed"][ids]  # (batch, length, width)
    return jnp.tanh(hidden) @ params["head"]


@pytest.fixture
def params():
    one, two = jax.random.split(jax.random.key(7))
    return {
        "embed": jax.random.normal(one, (VOCAB, 8)),
        "head": jax.random.normal(two, (8, VOCAB)) * 0.1,
    }


@pytest.fixture
def model():
    return apply


@pytest.fixture
def adapter(params):
    return make_adapter(params)


def make_adapter(params, **options):
    config = lj.LoraConfig("head", rank=4, alpha=8, **options)
    plan = lj.plan(config, params, apply, (jnp.zeros((1, 4), jnp.int32),))
    return lj.init(plan, params, key=jax.random.key(0))


@pytest.fixture
def adapter_with():
    """`adapter_with(params, dropout=0.5)`: an adapter by options of `LoraConfig`."""
    return make_adapter


@pytest.fixture
def rows():
    """Rows of counting: each token follows from the one before."""
    starts = np.arange(12)[:, None]
    ids = ((starts + np.arange(9)) % VOCAB).astype(np.int32)
    return train.Windows(ids, np.ones((12, 8), np.float32))
