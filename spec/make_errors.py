"""Write the table of errors, section 11 of spec/d3m-1.md, from the codes in d3pack/errors.py.

python spec/make_errors.py
"""

from __future__ import annotations

from pathlib import Path

from d3pack.errors import CODES, InvalidPackError

BEGIN = "<!-- errors: made by spec/make_errors.py -->\n"
END = "<!-- end of errors -->\n"


def table() -> str:
    """Return the codes of a pack, in the order of a reader's checks, as a Markdown table."""
    rows = [
        f"| `{code}` | {meaning} |"
        for code, (name, meaning) in CODES.items()
        if name == "InvalidPackError" and code != InvalidPackError.code
    ]
    return "\n".join(["| code | broken rule |", "|---|---|", *rows]) + "\n"


def main() -> None:
    """Replace the table between the two marks."""
    path = Path(__file__).with_name("d3m-1.md")
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    path.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
