"""What all models here share: a config, and the tree of parameters that it makes."""

import dataclasses
import functools
from typing import Any, Generic, Self, TypeVar, cast

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import PRNGKeyArray

from ._attention import Backend
from ._checks import check_tree
from ._stack import Remat

Params = dict[str, Any]
Config = TypeVar("Config")


@dataclasses.dataclass(frozen=True)
class Architecture(Generic[Config]):
    """A model without its parameters: what to compute, not with what.

    Frozen and hashable, so it may be a static argument of `jax.jit`. Its methods are
    pure functions of a nested dictionary of arrays. `Model` and `Encoder` are the two
    kinds; each says how its module is built and what it computes.

    Attributes:
        config: the family's numbers.
        dtype: of activations and of new parameters. Norms, softmax and rotary tables
            are computed in float32 and cast back, as Transformers does.
        scan_layers: layers are stacked, `layers/mlp/up_proj/kernel` has shape
            `(n_layers, d_in, d_out)`, and the forward pass is one `jax.lax.scan`:
            compiles faster, runs somewhat slower.
        remat: None, `"full"`, or a policy of `jax.checkpoint_policies`; per layer.
        attention: `"auto"`, `"xla"` or `"cudnn"`; see `apply`.
    """

    config: Config
    dtype: Any = dataclasses.field(default_factory=lambda: jnp.dtype("float32"))
    scan_layers: bool = False
    remat: Remat = None
    attention: Backend = "auto"

    def build(self, rngs: nnx.Rngs) -> nnx.Module:
        """The module, with parameters drawn from `rngs`."""
        raise NotImplementedError

    @property
    def num_layers(self) -> int:
        """How many layers the model has."""
        raise NotImplementedError

    def with_layers(self, n: int) -> Self:
        """The same model with another number of layers.

        Args:
            n: how many.

        Returns:
            A model for parameters that have so many.

        Example:
            >>> from lorax_jax.models import from_config
            >>> from_config({"model_type": "gpt2"}).with_layers(18).num_layers
            18
        """
        name = "n_layer" if hasattr(self.config, "n_layer") else "num_hidden_layers"
        config = dataclasses.replace(cast(Any, self.config), **{name: n})
        return dataclasses.replace(self, config=config)

    @property
    def names(self) -> Any:
        """`(ours, theirs, layout)` for every parameter; see `_names.py`."""
        raise NotImplementedError

    @property
    def layers_path(self) -> str:
        """Where the layers are in the tree of parameters: `"layers"` or `"h"`, say."""
        paths = (ours for ours, _, _ in self.names)
        return next(path for path in paths if "/{i}/" in path).partition("/{i}/")[0]

    def init(self, key: PRNGKeyArray) -> Params:
        """Random parameters, distributed as Transformers initializes them.

        Layers are drawn alike whether stacked or not.

        Args:
            key: a key from `jax.random.key`.

        Returns:
            A nested dictionary of arrays of dtype `self.dtype`.
        """
        return nnx.to_pure_dict(nnx.state(self.build(nnx.Rngs(key))))

    def abstract(self) -> Params:
        """The parameter tree as `jax.ShapeDtypeStruct`s; allocates nothing.

        Returns:
            A nested dictionary like that of `init`.

        Example:
            >>> from lorax_jax.models import from_config
            >>> shapes = from_config({"model_type": "gpt2"}).abstract()
            >>> sum(leaf.size for leaf in jax.tree.leaves(shapes))
            124439808
        """
        return jax.eval_shape(self.init, jax.random.key(0))

    def _module(self, params: Params) -> Any:
        """The module with these parameters in it."""
        graphdef, shapes = _skeleton(self)
        check_tree(params, shapes)
        return nnx.merge(graphdef, params)


@functools.lru_cache(maxsize=64)
def _skeleton(model: Architecture) -> tuple[Any, Params]:
    """The module without arrays, and the shapes that its parameters have."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: model.build(nnx.Rngs(0))))
    return graphdef, nnx.to_pure_dict(state)
