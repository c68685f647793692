"""Live torch, Transformers and PEFT; skipped where they are absent."""

import warnings

import pytest
import twins

import lorax_jax as lj


@pytest.fixture(scope="session", autouse=True)
def live():
    """The originals; everything here is skipped without them."""
    torch = pytest.importorskip("torch", reason="the originals need torch")
    pytest.importorskip("peft", reason="the originals need PEFT")
    pytest.importorskip("transformers", reason="the originals need Transformers")
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def their_warnings(relaxed):
    """What torch, Transformers and PEFT warn about is theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def twin(tmp_path_factory):
    """`twin(family)`: one model on both sides."""
    made = {}

    def make(family):
        if family not in made:
            made[family] = twins.make_twin(family, tmp_path_factory.mktemp(family))
        return made[family]

    return make


@pytest.fixture(scope="session")
def adapted():
    """`adapted(twin, scan, rules, **config)`: a plan and an adapter that acts."""
    made = {}

    def make(twin, scan=False, rules=None, **config):
        key = twin.family, scan, repr(rules), repr(config)
        if key not in made:
            model, params = twin.ours(scan)
            config = {"rank": 4, "alpha": 7, "init": False} | config
            whole = lj.LoraConfig(twins.RULES if rules is None else rules, **config)
            plan = lj.plan(whole, params, fn=model.apply, args=(twins.IDS,))
            made[key] = plan, twins.draw(plan, params)
        return made[key]

    return make
