"""Write the hexdump of the smallest pack, explained, into the end of spec/d3m-1.md.

python spec/make_hexdump.py
"""

from __future__ import annotations

import json
import struct
from pathlib import Path

HERE = Path(__file__).parent
MARK = "<!-- hexdump: made by spec/make_hexdump.py -->\n"


def dump(data: bytes, start: int, stop: int) -> list[str]:
    """Sixteen bytes a line."""
    lines = []
    for at in range(start, stop, 16):
        part = data[at : min(at + 16, stop)]
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{at:08x}  {part.hex(' '):<47}  {text}")
    return [line.rstrip() for line in lines]


def fields(data: bytes, size: int) -> list[tuple[int, str]]:
    """Where the parts of the header begin, and what each is."""
    text = data[8 : 8 + size].decode("ascii")
    at = text.index('{\\"')
    parts = [(0, f"the length of the header, {size}")]
    parts.append((8, "how every header begins: the one metadata entry, `d3m`, and in it"))
    header = json.loads(text)
    for name in json.loads(header["__metadata__"]["d3m"]):
        # A field may have an inner field of the same name; those that come later begin later.
        at = text.index(json.dumps(f'"{name}":')[1:-1], at)
        parts.append((8 + at, f"the manifest's `{name}`"))
        at += len(name)
    for name in list(header)[1:]:
        at = text.index(f'"{name}":', at)
        parts.append((8 + at, f"where `{name}` lies"))
    if text.endswith(" "):
        parts.append((8 + len(text.rstrip(" ")), "spaces up to a multiple of 8"))
    return parts


def explain(data: bytes) -> str:
    """The walk through the file."""
    size = struct.unpack_from("<Q", data)[0]
    header = json.loads(data[8 : 8 + size])
    begin = 8 + size
    manifest = json.loads(header["__metadata__"]["d3m"])
    hashes = {name: sha256[0] for name, _, _, *sha256 in manifest["sections"] if sha256}
    parts = fields(data, size)
    for at, meaning in (
        (
            0,
            "**classes.text**, U8 [1]: the only name, `a`; its SHA-256 begins with `{classes}`",
        ),
        (1, "**leaves.hash**, U8 [1, 16]: the leaf of class 0: half of the SHA-256 of its row"),
        (17, "**prompts.values**, F16 [1, 1, 1, 1]: the row of class 0; 0x3800 is 0.5 in binary16"),
    ):
        parts.append((begin + at, meaning.format(**hashes)))
    starts = [start for start, _ in parts]
    out = [
        f"The file has {len(data)} bytes, and the data begin at {begin} = 8 · {begin // 8}. "
        f"Its `root` is `{manifest['root']}`.",
        "",
        "| bytes | what they are |",
        "|---|---|",
        # A comma or a bracket between two parts goes with the one before.
        *(
            f"| {start:#06x} to {after - 1:#06x} | {what} |"
            for (start, what), after in zip(parts, [*starts[1:], len(data)], strict=True)
        ),
        "",
        "```",
        *dump(data, 0, len(data)),
        "```",
    ]
    return "\n".join(out) + "\n"


def main() -> None:
    """Put it at the end of the specification."""
    path = HERE / "d3m-1.md"
    text = path.read_text(encoding="utf-8")
    data = (HERE / "vectors" / "valid" / "smallest.d3m").read_bytes()
    path.write_text(text.partition(MARK)[0] + MARK + "\n" + explain(data), encoding="utf-8")


if __name__ == "__main__":
    main()
