"""Whether the configuration beside a file of ours still names what the file adapts."""

import re
from collections.abc import Iterator, Sequence

from .. import _peft
from .._names import NameMap
from ._copies import adapted_modules
from ._files import CONFIG, AdapterFiles
from ._record import FileSite
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
    chosen = _peft.Targets(files.config, files.what)
    bare = _peft.Parameters(files.config, files.what)
    held = adapted_modules(record.sites)
    known = dict.fromkeys(sorted(held)) | dict.fromkeys(_known(record.sites, tree))
    if names is not None:
        known |= dict.fromkeys(
            module.name
            for module in names.expand(tree.layers())
            if tree.knows(module.path)
        )
    linear = None
    if chosen.all_linear:  # which of the modules those are is told by a table alone
        modules = [] if names is None else list(names.expand(tree.layers()))
        linear = {m.name for m in modules if names and _peft.is_linear(m, names)}
    for module in known:
        if linear is None:
            taken = chosen.names(module)
        else:
            taken = not chosen.excludes(module) and (not linear or module in linear)
        inside = chosen.in_layers(module)
        if module in held and not taken:
            yield f"{module} has factors, and {CONFIG} does not adapt it"
        elif module in held and not inside:
            # PEFT lets whole names escape the layers, and whoever wrote them did not.
            yield f"{module} has factors, and `layers_to_transform` leaves it out"
        elif module not in held and taken and inside and (names or linear is None):
            yield f"{module} has no factors, and {CONFIG} adapts it"
    tensors = {site.parameter for site in record.sites if site.parameter is not None}
    others = [] if names is None else names.tensors(tree.layers())
    for tensor in sorted(tensors | {t.name for t in others if tree.knows(t.path)}):
        if (tensor in tensors) != bare(tensor):
            holds = "has" if tensor in tensors else "has no"
            adapts = "does not adapt" if tensor in tensors else "adapts"
            yield f"{tensor} {holds} factors, and {CONFIG} {adapts} it"
    if not isinstance(chosen.targets, str):
        parts = [module.split(".") for module in known]
        ends = {".".join(one[i:]) for one in parts for i in range(len(one))}
        for entry in sorted(set(chosen.targets or ()) - ends):
            yield f"{entry} is no module of the file, and {CONFIG} adapts it"


def _known(sites: Sequence[FileSite], tree: Tree) -> Iterator[str]:
    """The modules of the sites in all the layers that the parameters have."""
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
