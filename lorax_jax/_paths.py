"""Key paths of a parameter tree as strings such as `layers/0/attn/q_proj/kernel`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx
from flax.core import meta

_tree = jax.tree_util


def is_box(node: Any) -> bool:
    """Whether `node` is a Flax box: one array, and no component of a path."""
    return isinstance(node, nnx.Variable | meta.AxisMetadata)


def escape(component: str) -> str:
    """Writes one component so that a `/` in it cannot be read as a separator.

    The escapes are JSON Pointer's (RFC 6901): `~` becomes `~0` and `/` becomes `~1`.

    >>> escape("a/b~c")
    'a~1b~0c'
    """
    return component.replace("~", "~0").replace("/", "~1")


def path_string(keys: Sequence[Any]) -> str:
    """Joins the entries of a JAX key path.

    Dictionary keys give their text, list indices decimals, attributes their names.

    >>> path_string((_tree.DictKey("layers"), _tree.SequenceKey(0)))
    'layers/0'
    """
    return "/".join(escape(_component(key)) for key in keys)


def _component(key: Any) -> str:
    match key:
        case _tree.DictKey(key=inner) | _tree.FlattenedIndexKey(key=inner):
            return str(inner)
        case _tree.SequenceKey(idx=index):
            return str(index)
        case _tree.GetAttrKey(name=name):
            return name
    return str(key)


def flatten(
    tree: Any, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[tuple[str, Any]], Any]:
    """Flattens `tree` into `(path, leaf)` pairs and its treedef.

    Boxes (`nnx.Variable`, Linen's `Partitioned` and kin) are transparent: their leaf
    carries the path of the box. `is_leaf` stops the descent as in `jax.tree.flatten`.

    >>> pairs, treedef = flatten({"layers": [{"w": 1.0}], "b": 2.0})
    >>> pairs
    [('b', 2.0), ('layers/0/w', 1.0)]
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_leaf)

    def stop(node):
        return is_box(node) or (is_leaf is not None and is_leaf(node))

    paths: list[str] = []
    for keys, node in _tree.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        if not is_box(node):
            paths.append(path_string(keys))
            continue
        inside = _tree.tree_flatten_with_path(node, is_leaf=is_leaf)[0]
        for inner, _ in inside:
            # A box of one array adds nothing; of several, what tells them apart.
            more = inner[1:] if len(inside) > 1 else ()
            paths.append(path_string((*keys, *more)))
    return list(zip(paths, leaves, strict=True)), treedef


def insert_index(path: str, depth: int, index: int) -> str:
    """The virtual path of layer `index` of a stack that lives `depth` components down.

    >>> insert_index("layers/attn/kernel", 1, 3)
    'layers/3/attn/kernel'
    """
    parts = path.split("/")
    return "/".join([*parts[:depth], str(index), *parts[depth:]])


def common_depth(paths: Sequence[str]) -> int:
    """How many leading components the containers of all `paths` share.

    A stack's leaves are read together (by one scan, say), and what their containers
    have in common is where the stack lives.

    >>> common_depth(["layers/attn/q/kernel", "layers/mlp/up/kernel"])
    1
    >>> common_depth(["w"])
    0
    """
    parents = [path.split("/")[:-1] for path in paths]
    depth = 0
    for column in zip(*parents, strict=False):
        if len(set(column)) > 1:
            break
        depth += 1
    return depth


def sibling(path: str, name: str) -> str:
    """The path of another leaf in the same container.

    >>> sibling("attn/q/kernel", "bias")
    'attn/q/bias'
    """
    above, slash, _ = path.rpartition("/")
    return f"{above}{slash}{name}"


def of_types(tree: Any) -> list[str]:
    """Paths of the leaves that are known by their types alone.

    >>> of_types({"v": 1.0, "w": jax.ShapeDtypeStruct((2,), "float32")})
    ['w']
    """
    return [p for p, x in flatten(tree)[0] if isinstance(x, jax.ShapeDtypeStruct)]
