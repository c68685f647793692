"""A plan as text."""

from typing import TYPE_CHECKING

from ._sites import Site
from ._spectra import Spectra

if TYPE_CHECKING:
    from ._plan import Plan

HEAD = ("weight", "sites", "shape", "in -> out", "rank", "alpha", "scale", "trainable")


def table(plan: "Plan") -> str:
    """A line for each group of like sites, the rules with their counts, and totals.

    Sites that differ in nothing but numbers in their paths share a line.
    """
    groups: dict[tuple, list[Site]] = {}
    for site in plan:
        key = (_pattern(site.path), site.role.suffix, site.shape, site.rank)
        key = (*key, site.alpha, site.scale, _axes(site))
        groups.setdefault(key, []).append(site)
    spectra = plan.spectra
    rows: list[tuple[str, ...]] = [HEAD if spectra is None else (*HEAD, "explained")]
    for sites in groups.values():
        site = sites[0]
        use = f" ({site.use})" if site.use else ""
        use += f"@{site.role.part.name}" if site.role.part is not None else ""
        use += " DoRA" if site.role.kind == "dora" else ""
        rows.append(
            (
                _path(sites) + use,
                str(len(sites)),
                " x ".join(map(str, site.shape)),
                _axes(site),
                *_numbers(site),
                f"{sum(s.trainable for s in sites):,}",
                *(() if spectra is None else (_explained(spectra, sites),)),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (0, 2, 3)
    lines = [
        "  ".join(
            cell.ljust(n) if i in left else cell.rjust(n)
            for i, (cell, n) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    lines.insert(1, "-" * max(map(len, lines)))
    for pattern, count in plan.matches:
        lines.append(f"{count:>4} sites by  {pattern}")
    share = 100 * plan.trainable / plan.total
    lines.append(
        f"{len(plan)} sites, {plan.trainable:,} trainable of {plan.total:,} values "
        f"({share:.4f} %); {plan.memory()} before activations"
    )
    return "\n".join(lines)


def _numbers(site: Site) -> tuple[str, str, str]:
    if not site.rank:
        return ("-", "-", "-")
    return str(site.rank), f"{site.alpha:g}", f"{site.scale:.4g}"


def _explained(spectra: Spectra, sites: list[Site]) -> str:
    """The shares of their energy that ranks explain: one, or the least and the most."""
    shares = [spectra.explained(s.name, s.rank) for s in sites if s.name in spectra]
    if not shares:
        return "-"
    least, most = (f"{100 * share:.1f}" for share in (min(shares), max(shares)))
    return f"{least} %" if least == most else f"{least} to {most} %"


def _axes(site: Site) -> str:
    role = site.role
    if role.kind == "whole":
        return "whole"
    if role.kind == "rows":
        return "rows"
    kept = [i for i in range(len(site.shape) + role.stack) if i not in role.stacked]
    where = {axis: i for i, axis in enumerate(kept)}

    def names(axes):
        return ",".join(str(where[axis]) for axis in axes)

    batch = role.batch[role.stack :]
    prefix = f"[{names(batch)}] " if batch else ""
    lookup = "rows " if role.lookup else ""
    groups = f" in {role.groups} groups" if role.groups > 1 else ""
    return f"{prefix}{lookup}{names(role.inputs)} -> {names(role.outputs)}{groups}"


def _pattern(path: str) -> tuple[str, ...]:
    return tuple("#" if part.isdigit() else part for part in path.split("/"))


def _path(sites: list[Site]) -> str:
    """The path of several sites: `layers/{0..31}/q` where only a number differs."""
    columns = zip(*(site.path.split("/") for site in sites), strict=True)
    return "/".join(_component(column) for column in columns)


def _component(column: tuple[str, ...]) -> str:
    values = sorted({int(part) for part in column}) if column[0].isdigit() else []
    if len(values) < 2:
        return column[0]
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"
