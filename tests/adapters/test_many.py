"""Many adapters on one base: what they cost, and that the base stays one."""

import jax
import jax.numpy as jnp
import pytest

import lorax_jax as lj
from lorax_jax import models

CONFIG = {
    "model_type": "llama",
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
}
IDS = jnp.arange(8)[None]


@pytest.fixture(scope="module", params=[False, True], ids=["unrolled", "scanned"])
def model_and_plan(request):
    model = models.from_config(CONFIG, scan_layers=request.param)
    params = model.init(jax.random.key(0))
    config = lj.LoraConfig("all-linear", rank=4, init=False)
    plan = lj.plan(config, params, model.apply, (IDS,))
    return model, params, plan


def size(tree):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def ids_of(tree):
    return [id(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.parametrize("k", [0, 1, 3])
def test_k_adapters_add_k_times_their_bytes(model_and_plan, k):
    model, params, plan = model_and_plan
    adapters = [lj.init(plan, params, key=jax.random.key(i)) for i in range(k)]
    before = ids_of(params)
    bound = lj.bind(params, *adapters)
    # The base: the same objects, in the tree that was given and in the bound one.
    assert ids_of(params) == before
    assert set(before) <= set(ids_of(bound))
    factors = 4 * plan.trainable
    scales = 4 * len(plan)  # one for every layer of a stack
    assert [size(adapter.train) for adapter in adapters] == [factors] * k
    assert size(bound) == size(params) + k * (factors + scales)

    def apply(params, adapters, ids):
        return lj.adapt(model.apply)(lj.bind(params, *adapters), ids)

    def arguments(adapters):
        program = jax.jit(apply).lower(params, adapters, IDS).compile()
        return program.memory_analysis().argument_size_in_bytes

    # What the compiled program takes: nothing more. It may leave out the true ranks.
    added = arguments(adapters) - arguments([])
    assert k * factors <= added <= k * (factors + 2 * scales) + 64 * k


def test_one_base_serves_all_of_them(model_and_plan):
    """In one program, each adapter alone and none at all: the base enters once."""
    model, params, plan = model_and_plan
    adapters = [lj.init(plan, params, key=jax.random.key(i)) for i in range(2)]

    def apply(params, adapters, ids):
        forward = lj.adapt(model.apply)
        alone = [forward(lj.bind(params, adapter), ids) for adapter in adapters]
        return [*alone, forward(lj.bind(params, *adapters), ids), forward(params, ids)]

    program = jax.jit(apply).lower(params, adapters, IDS).compile()
    taken = program.memory_analysis().argument_size_in_bytes
    assert taken <= size(params) + size(adapters) + IDS.nbytes + 1024
