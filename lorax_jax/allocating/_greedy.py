"""`greedy`: ranks that capture the most under a budget."""

from collections.abc import Sequence

import numpy as np


def greedy(
    gains: Sequence[Sequence[float] | np.ndarray],
    costs: Sequence[int],
    budget: int,
    least: Sequence[int] | None = None,
) -> list[int]:
    r"""How many items of each list to take, the first ones first.

    Item $i$ of list $j$ gains $g_{ji}$ and costs $c_j$; gains descend within a list.
    After the `least` items of each list, the affordable item of the highest gain per
    cost is taken again and again, ties going to the earlier list.

    With equal costs that is the best there is. With any costs it is short of the best
    by less than the gain of one item: the first that was not affordable. For taking
    items down to that one solves the problem in which items may be cut, and no whole
    items do better than that. Never over the budget; and what is captured does not
    shrink when the budget grows.

    Args:
        gains: for each list, what its items gain, descending, from 0 up. Items that
            gain nothing are taken only where `least` says so.
        costs: what an item of each list costs, from 1 up.
        budget: what all may cost, at least that of the `least`.
        least: items of each list that are taken in any case.

    Returns:
        For each list how many of its items are taken.

    Example:
        >>> greedy([[9.0, 4.0, 1.0], [5.0, 5.0]], costs=[1, 2], budget=4)
        [2, 1]
    """
    counts = [0] * len(costs) if least is None else list(least)
    left = budget - sum(c * n for c, n in zip(costs, counts, strict=True))
    lists = [np.asarray(g, np.float64)[n:] for g, n in zip(gains, counts, strict=True)]
    if not lists:
        return counts
    gain = np.concatenate(lists)
    owner = np.repeat(np.arange(len(lists)), [len(g) for g in lists])
    # Stable: within a list equal gains keep their order, and so do lists among them.
    order = np.argsort(-gain / np.asarray(costs, np.float64)[owner], kind="stable")
    for item in order.tolist():
        j = int(owner[item])
        if costs[j] <= left and gain[item] > 0:
            counts[j] += 1
            left -= costs[j]
    return counts
