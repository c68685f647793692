"""The forms that a layer and a stack of them may take."""

import pytest
from audited import FORMS, LAYERS, new_layer
from jax import lax


@pytest.fixture(params=FORMS)
def each(request):
    """The layer, in one of the forms that it may take."""
    return FORMS[request.param](new_layer())


@pytest.fixture(params=["unrolled", "scanned"])
def stack(request):
    """A function that runs a layer over stacked weights, and gives the result."""

    def unrolled(apply, w, x):
        for i in range(LAYERS):
            x = apply(w[i], x)
        return x

    def scanned(apply, w, x):
        return lax.scan(lambda x, w: (apply(w, x), None), x, w)[0]

    return {"unrolled": unrolled, "scanned": scanned}[request.param]
