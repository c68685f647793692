r"""The starting factors that PEFT took out of a weight, found again.

What counts is their product: it must be what is missing in the residual that PEFT
trained on. Its own decompositions are torch's in float32. These are in float64, on the
host: an error in a singular vector grows with how near the next singular value is, and
here nothing but rounding is left of it.
"""

import numpy as np
import scipy.linalg

Factors = tuple[np.ndarray, np.ndarray]


def pissa(weight: np.ndarray, rank: int, scale: float) -> Factors:
    r"""The leading singular triplets, $s A_0 B_0 = U_r S_r V_r^\top$.

    Of the smaller Gram matrix, whose eigenvalues are the squares of the singular
    values: float64 has digits enough for that.

    Args:
        weight: the kernel, `(d_in, d_out)`.
        rank: at most the smaller of the two.
        scale: the adapter's multiplier, positive.

    Returns:
        `(a0, b0)`, `(d_in, rank)` and `(rank, d_out)`, float64.

    >>> a0, b0 = pissa(np.diag([3.0, 2.0, 1.0]), rank=1, scale=2.0)
    >>> (2.0 * a0 @ b0).round(6).tolist()
    [[3.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    w = weight.astype(np.float64)
    if w.shape[0] > w.shape[1]:
        b0, a0 = pissa(weight.T, rank, scale)
        return a0.T, b0.T
    n = w.shape[0]
    _, u = scipy.linalg.eigh(w @ w.T, subset_by_index=(n - rank, n - 1))
    u = u[:, ::-1]  # the largest first, as PEFT has them
    projected = u.T @ w  # (rank, d_out), rows of length S
    lengths = np.linalg.norm(projected, axis=1)
    root = np.sqrt(scale * np.where(lengths > 0, lengths, 1))
    return u * (lengths / root), projected / root[:, None]


def olora(weight: np.ndarray, rank: int, scale: float) -> Factors:
    r"""Of $W^\top = Q R$ the first columns of $Q$ and rows of $R$, whatever the scale.

    Args:
        weight: the kernel, `(d_in, d_out)`.
        rank: at most the smaller of the two.
        scale: unused: PEFT takes $s A_0 B_0$ out of the weight.

    Returns:
        `(a0, b0)`, `(d_in, rank)` and `(rank, d_out)`, float64.

    >>> a0, b0 = olora(np.array([[3.0, 4.0], [1.0, 1.0]]), rank=1, scale=2.0)
    >>> (a0 @ b0)[0].round(6).tolist()
    [3.0, 4.0]
    """
    del scale
    w = weight.astype(np.float64)
    q, _ = np.linalg.qr(w[:rank].T)  # (d_out, rank): the rest of R needs no more of Q
    return w @ q, q.T


METHODS = {"pissa": pissa, "olora": olora}
