"""What the library advises in Python, in the words of the command line."""

import re

_OPTIONS = "alpha|dropout|exclude|init|rank|steps|targets|tie|warmup"

# Patterns of the library's messages, and what a user of the command line can do.
_RULES = [
    (
        r"Lower `rank` for this site: targets=\{(.+?): \{'rank': (\d+)\}, \.\.\.\}",
        r"Give --rank \2, or leave it out with --exclude \1.",
    ),
    (
        r"Give it another rank: targets=\{.+?: \{'rank': (\d+)\}, \.\.\.\}",
        r"Give --rank \1.",
    ),
    (r"Give more batches, mask fewer tokens,", "Raise --init-rows,"),
    (r" for this site(, e\.g\. with a rule of its own)?\.", "."),
    (r"\nChoose what the adapter", " Choose what the adapter"),
    (
        r"\n  targets=\{[^\n]*\{'tie': '(\w+)'\}\} +([^\n]*)",
        r" --tie \1 (\2),",
    ),
    (r"(--tie head \([^)]*\)),$", r"\1, or leave it out with --exclude."),
    (r"say targets=\{.+?: \{'tie': 'shared'\}, \.\.\.\}", "give --tie shared."),
    (r"Leave it out of `targets`", "Leave it out with --exclude"),
    (
        r"`strict=False` loads what fits and lists the rest\.",
        "Is this the base that it was trained on?",
    ),
    (r"`out_dir` = ", ""),
    (r", or say `overwrite=True` to replace it", ", or move that away"),
    (r"measuring: hold out 0\.", "measuring: --heldout 0."),
    (rf"`({_OPTIONS})` = ", r"--\1 "),
    (rf"`({_OPTIONS})`", r"--\1"),
]


def in_options(message: str) -> str:
    """A message with options in place of arguments.

    >>> in_options("`warmup` = 9 steps do not fit into `steps` = 4.")
    '--warmup 9 steps do not fit into --steps 4.'
    """
    for pattern, text in _RULES:
        message = re.sub(pattern, text, message)
    return message
