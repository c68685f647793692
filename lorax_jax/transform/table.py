"""The table of rules in this folder's README: `python -m lorax_jax.transform.table`."""

from pathlib import Path

from ._registry import RULES

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- rules -->", "<!-- end of rules -->"
POLICIES = {
    "native": "computes in factored form",
    "passes": "leaves the weight symbolic",
    "enters": "goes inside with the weight",
    "refuses": "refuses, unless in `materialize`",
}


def table() -> str:
    """A Markdown table: primitive, policy, what happens, file."""
    lines = ["| primitive | policy | what happens | file |", "|---|---|---|---|"]
    for name, rule in sorted(RULES.items(), key=lambda item: (item[1].policy, item[0])):
        file = rule.module.rsplit(".", 1)[-1]
        lines.append(
            f"| `{name}` | {POLICIES[rule.policy]} | {rule.note} | `rules/{file}.py` |"
        )
    return "\n".join(lines)


def renewed(text: str) -> str:
    """`text` with the table between its marks written anew."""
    before, rest = text.split(BEGIN)
    return f"{before}{BEGIN}\n{table()}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    README.write_text(renewed(README.read_text()))
