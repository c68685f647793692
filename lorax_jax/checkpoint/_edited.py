"""Whether the configuration beside a file of ours still names what the file adapts."""

import re
from collections.abc import Callable, Iterator, Sequence

from .. import _peft
from .._names import NameMap
from ._copies import adapted_modules
from ._file_site import FileSite
from ._files import CONFIG, AdapterFiles
from ._resolve import Tree

_NUMBER = re.compile(r"(?<![^./])(?:0|[1-9][0-9]*)(?![^./])")


def edited(files: AdapterFiles, names: NameMap | None, tree: Tree) -> Iterator[str]:
    """What `adapter_config.json` adapts otherwise than the tensors, one by one.

    The file that `save_adapter` wrote names exactly its modules. One that was edited
    adapts others when PEFT reads it, whatever the tensors' metadata says.

    Args:
        files: the open folder.
        names: the model's name table; without it, modules are known by those of the
            file and by the other layers of the parameters.
        tree: the parameters.
    """
    record = files.record
    if record is None or record.keys != "peft" or not files.config:
        return
    yield from _modules(files, record.sites, names, tree)
    yield from _parameters(files, record.sites, names, tree)


def _modules(
    files: AdapterFiles, sites: Sequence[FileSite], names: NameMap | None, tree: Tree
) -> Iterator[str]:
    chosen = _peft.Targets(files.config, files.what)
    takes = _taker(chosen, names, tree)
    held = adapted_modules(sites)
    known = dict.fromkeys([*sorted(held), *_known(sites, names, tree)])
    for module in known:
        taken, inside = takes(module), chosen.in_layers(module)
        if module in held and taken is False:
            yield f"{module} has factors, and {CONFIG} does not adapt it"
        elif module in held and not inside:
            # PEFT lets whole names escape the layers, and whoever wrote them did not.
            yield f"{module} has factors, and `layers_to_transform` leaves it out"
        elif module not in held and taken and inside:
            yield f"{module} has no factors, and {CONFIG} adapts it"
    if not isinstance(chosen.targets, str):
        parts = [module.split(".") for module in known]
        ends = {".".join(one[i:]) for one in parts for i in range(len(one))}
        for entry in sorted(set(chosen.targets or ()) - ends):
            yield f"{entry} is no module of the file, and {CONFIG} adapts it"


def _taker(
    chosen: _peft.Targets, names: NameMap | None, tree: Tree
) -> Callable[[str], bool | None]:
    """Whether the targets take a module; `None` where that cannot be told."""
    if not chosen.all_linear:
        return chosen.names
    if names is None:
        return lambda module: False if chosen.excludes(module) else None
    modules = names.expand(tree.layers())
    linear = {module.name for module in modules if _peft.is_linear(module, names)}
    return lambda module: module in linear and not chosen.excludes(module)


def _parameters(
    files: AdapterFiles, sites: Sequence[FileSite], names: NameMap | None, tree: Tree
) -> Iterator[str]:
    adapted = _peft.Parameters(files.config, files.what)
    held = {site.parameter for site in sites if site.parameter is not None}
    others = [] if names is None else names.tensors(tree.layers())
    known = {tensor.name for tensor in others if tree.knows(tensor.path)}
    for tensor in sorted(held | known):
        if tensor in held and not adapted(tensor):
            yield f"{tensor} has factors, and {CONFIG} does not adapt it"
        elif tensor not in held and adapted(tensor):
            yield f"{tensor} has no factors, and {CONFIG} adapts it"


def _known(
    sites: Sequence[FileSite], names: NameMap | None, tree: Tree
) -> Iterator[str]:
    """The modules of the parameters: of the table, else the sites' in all layers."""
    if names is not None:
        modules = names.expand(tree.layers())
        yield from (module.name for module in modules if tree.knows(module.path))
        return
    families = {}
    for site in sites:
        numbers = _NUMBER.findall(site.path)
        if site.low_rank and site.parameter is None and site.use is None:
            if len(numbers) == 1 and _NUMBER.findall(site.key) == numbers:
                family = _NUMBER.sub("#", site.path), _NUMBER.sub("#", site.key)
                families[family] = None
    for path, key in families:
        for layer in range(tree.layers()):
            if tree.knows(path.replace("#", str(layer))):
                yield key.replace("#", str(layer))
