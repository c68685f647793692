"""What layers of torch models are fed, caught with hooks."""

import numpy as np


def mlp():
    """Two layers and a nonlinearity, the same every time."""
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 24), torch.nn.Tanh(), torch.nn.Linear(24, 12)
    )


def inputs_of(model, targets, calls, mask=None):
    """Name of a layer -> the layer, and its input in each call, as rows.

    Args:
        model: in torch.
        targets: last components of names.
        calls: keyword arguments.
        mask: of a call -> which tokens count, shape (batch, length).
    """
    import torch

    found, handles, now = {}, [], {}

    def hook(name, module):
        def see(module, args, output):
            rows = args[0].detach().float().numpy()
            keep = (
                np.ones(rows.shape[:-1], bool) if now["mask"] is None else now["mask"]
            )
            found[name][1].append(rows[keep])

        found[name] = module, []
        return module.register_forward_hook(see)

    for name, module in model.named_modules():
        if name.split(".")[-1] in targets:
            handles.append(hook(name, module))
    with torch.no_grad():
        for call in calls:
            now["mask"] = None if mask is None else mask(call)
            model(**call)
    for handle in handles:
        handle.remove()
    return found
