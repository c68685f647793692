"""`load_adapter`: an adapter from PEFT's files, all of it or an error."""

import os
from typing import Any

from ..adapters import Adapter
from ..planning import Plan
from ._files import open_adapter
from ._loading import Loading
from ._receipt import Receipt


def load_adapter(
    dir: str | os.PathLike,
    params: Any,
    *,
    plan: Plan | None = None,
    names: Any = None,
    strict: bool = True,
    start: str | os.PathLike | None = None,
) -> tuple[Adapter, Receipt]:
    """Reads an adapter that `save_adapter` or PEFT wrote.

    Strict unless told otherwise: every tensor of the file must belong to a site, every
    site that the file or the plan promises must have its tensors, and shapes, ranks,
    dtypes and the base must be what they should. Otherwise the error names every key
    that is not. An adapter of which nothing fits always raises.

    Which axes the factors run along is said by the `plan`, else by the metadata of a
    file that this library wrote, else by `names`, whose kernels are `(in, out)`. Where
    a file speaks of one layer and the parameters hold all layers in one array, layers
    are its first axis.

    Starting factors and frozen ones come back as they were saved. PEFT's folders of
    PiSSA, OLoRA, CorDA and LoRA-GA adapters that were not converted hold factors of a
    residual base; they are read as adapters of the base itself. Their starting factors
    are computed anew from the weights for PiSSA and OLoRA, and taken from `start`, the
    folder of the untrained adapter, for the others.

    Values come in the dtype that they are stored in. Nothing in the folder is executed:
    the files are safetensors and JSON, checked against limits before anything is
    allocated.

    Args:
        dir: the folder, with `adapter_model.safetensors` in it.
        params: the parameters that the adapter is for, or their types.
        plan: what the adapter should be; it must agree in ranks and scales.
        names: the model's name table, a `NameMap` or its entries. PEFT's own files need
            it.
        strict: raise on any problem. Otherwise sites with a problem are left out, and
            the receipt lists them.
        start: of an adapter whose factors belong to a residual of the base, the folder
            of the adapter before it was trained: what PEFT calls
            `path_initial_model_for_weight_conversion`.

    Returns:
        `(adapter, receipt)`. `receipt.plan` is the plan of what was loaded.

    Raises:
        CheckpointError: see above; and always for a file that is damaged, hostile, or
            asks for what is not known here; if the vocabulary grew before the adapter
            was trained, and `params` did not; or if DoRA is to be loaded onto types
            alone, which have no norms.

    Example:
        >>> import tempfile, jax, jax.numpy as jnp, lorax_jax as lj
        >>> from lorax_jax.checkpoint import save_adapter
        >>> params = {"q": {"kernel": jnp.ones((3, 2))}}
        >>> plan = lj.plan(lj.LoraConfig("q/kernel", rank=1), params,
        ...                fn=lambda p, x: x @ p["q"]["kernel"], args=(jnp.ones(3),))
        >>> adapter = lj.init(plan, params, key=jax.random.key(0))
        >>> folder = tempfile.mkdtemp()
        >>> save_adapter(folder, adapter, plan=plan)
        >>> loaded, receipt = load_adapter(folder, params)
        >>> print(receipt)
        1 of 1 sites loaded from 2 tensors into 1 adapted weights
        >>> bool(jnp.array_equal(loaded.train["q/kernel"]["a"],
        ...                      adapter.train["q/kernel"]["a"]))
        True
    """
    begun = None
    if start is not None:
        with open_adapter(start) as files:
            begun, _ = Loading(files, params, None, names, is_start=True).run(True)
    with open_adapter(dir) as files:
        return Loading(files, params, plan, names, start=begun).run(strict)
