"""Turn two public-domain Debian packages into the texts of this folder.

    apt-get install bible-kjv dict-devil
    bible -l100000 Gen1:1-Rev22:21 > bible.txt
    python -m lorax_jax.embedded.texts --bible bible.txt \
        --devil /usr/share/dictd/devil.dict.dz --out lorax_jax/embedded

writes `kjv_heldout.txt` (the chapters that the base never saw) and `devil.txt` (what
`lorax-jax finetune` adapts it to).
"""

import argparse
import gzip
import re
from pathlib import Path

HOLD_OUT_EVERY = 20  # one chapter in twenty, spread over all the books

# Entries that are nothing but their age's contempt for a people.
OMITTED = ("AFRICAN", "HEBREW", "MINSTREL", "MULATTO", "NEGRO")


def chapters(bible: str) -> list[str]:
    """Cuts the output of Debian's `bible` program into chapters.

    Each starts with its name on a line of its own ("Genesis 1"), then one verse a line,
    without numbers, and ends with a line feed.

    Raises:
        ValueError: if a line is neither a chapter's name nor a numbered verse.
    """
    found: list[str] = []
    for line in filter(None, map(str.strip, bible.splitlines())):
        if re.fullmatch(r"(\d )?[A-Z][A-Za-z ]+ \d+", line):
            found.append(line + "\n")
        elif found and (verse := re.fullmatch(r"\d+ (.+)", line)):
            found[-1] += verse[1] + "\n"
        else:
            raise ValueError(
                f"Expected a chapter's name or a numbered verse, found {line[:60]!r}. "
                "Make the file with: bible -l100000 Gen1:1-Rev22:21 > bible.txt"
            )
    return found


def split(
    documents: list[str], every: int = HOLD_OUT_EVERY
) -> tuple[list[str], list[str]]:
    """The documents to train on and those held out, the middle one of every `every`."""
    middle = every // 2
    train = [d for i, d in enumerate(documents) if i % every != middle]
    return train, documents[middle::every]


def as_text(documents: list[str]) -> str:
    """One plain text, a blank line between documents."""
    return "\n".join(documents)


def dictionary(raw: str) -> str:
    """The entries of the Devil's Dictionary, unwrapped: one paragraph or verse a line.

    The dictd file is hard-wrapped. A line that starts in column 0 continues its
    paragraph; four spaces open a new one; in a block where every line is indented, each
    line is one of verse (or the name of its "author") and stays a line, indented by
    four spaces as in the file.
    """
    first = re.search(r"^ABASEMENT, n\.", raw, re.MULTILINE)
    if first is None:
        raise SystemExit("The file has no entry ABASEMENT: is it devil.dict.dz?")
    raw = raw[first.start() :]
    kept: list[str] = []
    skipping = False
    for block in re.split(r"\n\s*\n", raw):
        lines = block.strip("\n").split("\n")
        if re.match(r"[A-Z][A-Z'-]", lines[0]):  # a headword opens an entry
            skipping = lines[0].startswith(OMITTED)
        if skipping or lines == [" abcdefghijklmnopqrstuvwxyz"]:
            continue
        verse = all(line.startswith(" ") for line in lines)
        if not verse:
            lines = re.sub(r"\n(?!    )", " ", "\n".join(lines)).split("\n")
        marks = r"[{}_]"  # of cross-references and italics
        lines = [" ".join(re.sub(marks, "", line).split()) for line in lines]
        kept.append("\n".join("    " * verse + line for line in lines))
    return "\n\n".join(kept) + "\n"


def main(argv: list[str] | None = None) -> None:
    """Writes the texts; the command line of this module."""
    parser = argparse.ArgumentParser(
        prog="python -m lorax_jax.embedded.texts",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--bible", type=Path, required=True)
    parser.add_argument("--devil", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    _, heldout = split(chapters(args.bible.read_text("utf-8")))
    devil = dictionary(gzip.decompress(args.devil.read_bytes()).decode("utf-8"))
    for name, text in {"kjv_heldout.txt": as_text(heldout), "devil.txt": devil}.items():
        (args.out / name).write_text(text, "utf-8", newline="\n")
        print(f"{args.out / name}: {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
