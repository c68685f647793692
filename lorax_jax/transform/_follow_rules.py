"""What each primitive does to the tokens that run along the axes of its operands.

One function for each kind of primitive, and the table. A primitive that is not in it
loses whatever enters it.
"""

from . import _follow_products as products
from . import _jaxpr
from ._follow_step import Rule, Step, without
from ._stretches import Axes, Axis, Lost, Shard, append, cut, grow, regroup, turn


def _elementwise(step: Step) -> list[Axes]:
    """Entry by entry; an operand may be a scalar, or have one entry for many."""
    shape = step.results[0]
    full: list[Axes] = [((),) * len(shape)]
    for axes, of in zip(step.operands, step.shapes, strict=True):
        if of and len(of) != len(shape):
            return step.lost("its operands have other shapes")
        if any(n not in (m, 1) for n, m in zip(of, shape, strict=False)):
            return step.lost("its operands have other shapes")
        if of:
            full.append(axes)
    return step.kept(step.join(*axes) for axes in zip(*full, strict=True))


def _one_to_one(step: Step) -> list[Axes]:
    return list(step.operands)


def _reduce(step: Step) -> list[Axes]:
    name = next(n for n in ("axes", "dimensions") if n in step.params)
    full = [axes for axes, of in zip(step.operands, step.shapes, strict=True) if of]
    if not full or any(len(axes) != len(full[0]) for axes in full):
        return step.lost()
    joined = [step.join(*axes) for axes in zip(*full, strict=True)]
    return step.kept(without(joined, step.params[name]))


def _squeeze(step: Step) -> list[Axes]:
    return step.kept(without(step.axes, step.params["dimensions"]))


def _transpose(step: Step) -> list[Axes]:
    return step.kept(step.axes[i] for i in step.params["permutation"])


def _reshape(step: Step) -> list[Axes]:
    order = step.params["dimensions"]
    order = range(len(step.shape)) if order is None else order
    axes = tuple(step.axes[i] for i in order)
    shape = tuple(step.shape[i] for i in order)
    return step.kept(regroup(axes, shape, step.results[0], step.lose))


def _broadcast(step: Step) -> list[Axes]:
    out: list[Axis] = [()] * len(step.results[0])
    for i, j in enumerate(step.params["broadcast_dimensions"]):
        out[int(j)] = step.axes[i]
    return step.kept(out)


def _cut(step: Step, starts, stops, strides=None) -> Axes:
    strides = strides or (1,) * len(starts)
    rows = zip(step.axes, step.shape, starts, stops, strides, strict=True)
    return tuple(
        cut(axis, n, int(start), int(stop), int(stride), step.lose)
        for axis, n, start, stop, stride in rows
    )


def _slice(step: Step) -> list[Axes]:
    p = step.params
    return [_cut(step, p["start_indices"], p["limit_indices"], p["strides"])]


def _split(step: Step) -> list[Axes]:
    axis, at, out = step.params["axis"], 0, []
    for size in step.params["sizes"]:
        starts = [at if i == axis else 0 for i in range(len(step.shape))]
        at += int(size)
        stops = [at if i == axis else n for i, n in enumerate(step.shape)]
        out.append(_cut(step, starts, stops))
    return out


def _dynamic_slice(step: Step) -> list[Axes]:
    out = []
    sizes = step.params["slice_sizes"]
    for axis, n, size, start in zip(
        step.axes, step.shape, sizes, step.eqn.invars[1:], strict=True
    ):
        if size == 1 or size == n:
            out.append(axis if size == n else ())
        elif _jaxpr.is_literal(start):
            begin = min(max(int(start.val), 0), n - size)
            out.append(cut(axis, n, begin, begin + size, 1, step.lose))
        else:
            out.append(step.drop(axis, "a part of them is taken, at a computed place"))
    return step.kept(out)


def _dynamic_update_slice(step: Step) -> list[Axes]:
    target, update = step.operands[:2]
    out = []
    for i, (n, m) in enumerate(zip(*step.shapes[:2], strict=True)):
        if n == m:
            out.append(step.join(target[i], update[i]))
        else:
            written = step.drop(update[i], "they are written at a computed place")
            out.append(step.join(target[i], written))
    return step.kept(out)


def _pad(step: Step) -> list[Axes]:
    out = []
    stretched = any(axis != () for axis in step.axes)
    for axis, n, (low, high, interior) in zip(
        step.axes, step.shape, step.params["padding_config"], strict=True
    ):
        if interior:
            out.append(step.drop(axis, "padding is put between them"))
        elif n == 1 and stretched and low + high > 0:
            out.append(step.lose("one entry is padded, and which one is not known"))
        else:
            out.append(grow(axis, n, low, high, step.lose))
    return step.kept(out)


def _rev(step: Step) -> list[Axes]:
    turned = step.params["dimensions"]
    return step.kept(turn(a) if i in turned else a for i, a in enumerate(step.axes))


def _concatenate(step: Step) -> list[Axes]:
    along = step.params["dimension"]
    sizes = [shape[along] for shape in step.shapes]
    out = []
    for i, pieces in enumerate(zip(*step.operands, strict=True)):
        if i == along:
            out.append(append(pieces, sizes, step.lose))
        else:
            out.append(step.join(*pieces))
    return step.kept(out)


def _stack(step: Step) -> list[Axes]:
    out = [step.join(*axes) for axes in zip(*step.operands, strict=True)]
    out.insert(step.params["axis"], ())
    return step.kept(out)


def _unstack(step: Step) -> list[Axes]:
    return step.kept(without(step.axes, [step.params["axis"]]))


def _reordering(name: str, reason: str) -> Rule:
    """Primitives that keep all axes but one, which the parameter tells."""

    def rule(step: Step) -> list[Axes]:
        along = step.params.get(name, -1) % len(step.shape)
        joined = [step.join(*axes) for axes in zip(*step.operands, strict=True)]
        joined[along] = step.drop(joined[along], reason)
        return step.kept(joined)

    return rule


def _fft(step: Step) -> list[Axes]:
    last = len(step.shape) - len(step.params["fft_lengths"])
    reason = "a Fourier transform runs along them"
    return step.kept(
        axis if i < last else step.drop(axis, reason)
        for i, axis in enumerate(step.axes)
    )


def _over_devices(step: Step) -> list[Axes]:
    """A sum over devices, entry by entry: tokens that they hold parts of are mixed."""
    names = {name for name in step.params["axes"] if isinstance(name, str)}
    if len(names) < len(step.params["axes"]):
        return step.lost()

    def mixed(axis: Axis) -> bool:
        labels = () if isinstance(axis, Lost) else [one.label for one in axis]
        return any(isinstance(of, Shard) and names & set(of.names) for of in labels)

    reason = "parts of them on several devices are summed"
    return [
        tuple(step.lose(reason) if mixed(axis) else axis for axis in axes)
        for axes in step.operands
    ]


def _read_memory(step: Step) -> list[Axes]:
    """What was written to it before is not followed."""
    lost = step.lose("what is read from memory is not followed")
    return [tuple(lost if n > 1 else () for n in shape) for shape in step.results]


_ELEMENTWISE = """
    abs acos acosh add add_any and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    bitcast_convert_type cbrt ceil clamp clz complex conj convert_element_type copy
    copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2 expm1 floor ge gt
    igamma igamma_grad_a igammac imag integer_pow is_finite le le_to lgamma log log1p
    log2 logistic lt lt_to max min mul mulhi name ne neg nextafter not
    one_minus_square or pcast polygamma population_count pow pvary real
    reduce_precision regularized_incomplete_beta rem reshard round rsqrt select_n
    sharding_constraint shift_left shift_right_arithmetic shift_right_logical sign sin
    sinh sqrt square stop_gradient sub tan tanh xor zeta cumsum cumprod cummax cummin
    cumlogsumexp
"""
_REDUCE = "argmax argmin reduce " + " ".join(
    f"reduce_{kind}" for kind in ("and", "max", "min", "or", "prod", "sum", "xor")
)
_WINDOW = " ".join(f"reduce_window_{kind}" for kind in ("max", "min", "sum"))
_SCATTER = "scatter " + " ".join(
    f"scatter{s}{kind}" for s in "-_" for kind in ("add", "max", "min", "mul", "sub")
)

_BY_RULE: list[tuple[str, Rule]] = [
    (_ELEMENTWISE, _elementwise),
    ("device_put optimization_barrier", _one_to_one),
    (_REDUCE, _reduce),
    ("squeeze", _squeeze),
    ("transpose", _transpose),
    ("reshape", _reshape),
    ("broadcast_in_dim", _broadcast),
    ("slice", _slice),
    ("split", _split),
    ("dynamic_slice", _dynamic_slice),
    ("dynamic_update_slice", _dynamic_update_slice),
    ("pad", _pad),
    ("rev", _rev),
    ("concatenate", _concatenate),
    ("stack", _stack),
    ("unstack", _unstack),
    ("sort", _reordering("dimension", "they are sorted")),
    ("top_k", _reordering("axis", "the largest of them are picked")),
    ("dot_general", products.dot_general),
    ("ragged_dot_general", products.ragged_dot),
    ("conv_general_dilated", products.convolution),
    (_WINDOW, products.window),
    ("gather", products.gather),
    (_SCATTER, products.scatter),
    ("fft", _fft),
    ("psum psum2 psum_invariant pmax pmin", _over_devices),
    ("dot_product_attention_fwd_wrapper", products.flash),
    ("get swap", _read_memory),
]
RULES: dict[str, Rule] = {
    name: rule for names, rule in _BY_RULE for name in names.split()
}
