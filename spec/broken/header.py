"""The outermost layer: lengths, the header, bytes around it."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from broken.case import Raw


def cases(plain: bytes) -> Iterator[Raw]:
    size = struct.unpack_from("<Q", plain)[0]
    header, data = plain[8 : 8 + size], plain[8 + size :]

    def head(text: bytes) -> bytes:
        text = text.ljust(-(-(8 + len(text)) // 8) * 8 - 8)
        return struct.pack("<Q", len(text)) + text + data

    yield "empty", "E_TRUNCATED", "no byte at all", b""
    yield "seven-bytes", "E_TRUNCATED", "less than the header length", plain[:7]
    yield "length-past-end", "E_TRUNCATED", "the header is longer than the file", plain[:100]
    yield "length-over-cap", "E_LIMIT", "a header of 2**63 bytes", b"\xff" * 7 + b"\x7f" + plain[8:]
    yield "length-zero", "E_HEADER", "a header of no bytes", bytes(8) + data
    yield "header-only", "E_TRUNCATED", "no tensor", plain[: 8 + size]
    yield "last-byte-missing", "E_TRUNCATED", "cut by one byte", plain[:-1]
    yield "trailing-byte", "E_TRAILING", "one byte too many", plain + b"\0"
    yield "trailing-block", "E_TRAILING", "64 bytes too many", plain + bytes(64)
    yield "header-leading-space", "E_HEADER", "white space before {", head(b" " + header)
    yield "header-bom", "E_HEADER", "a byte order mark", head(b"\xef\xbb\xbf" + header)
    yield (
        "header-not-ascii",
        "E_HEADER",
        "a byte above 127",
        head(header.replace(b"class", b"cl\xc3\xa9s", 1)),
    )
    yield "header-array", "E_HEADER", "not an object", head(b"[]")
    yield (
        "header-no-metadata",
        "E_HEADER",
        "a plain safetensors file",
        head(b'{"x":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}}'),
    )
    yield (
        "header-two-entries",
        "E_HEADER",
        "another metadata entry",
        head(header.replace(b'{"__metadata__":{', b'{"__metadata__":{"format":"pt",', 1)),
    )
    yield (
        "header-d3m-number",
        "E_HEADER",
        "the manifest is no string",
        head(b'{"__metadata__":{"d3m":1}}'),
    )
    yield "header-cut", "E_JSON", "JSON that ends early", head(header.rstrip()[:-1])
    yield "header-garbage", "E_JSON", "bytes after the JSON", head(header.rstrip() + b"}")
    yield "header-nested", "E_JSON", "100,000 brackets", head(b'{"a":' + b"[" * 100_000)
    yield "header-nan", "E_JSON", "NaN in the header", head(header.rstrip()[:-1] + b',"x":NaN}')
