"""Mutate packs of the corpus: only D3MError may be raised, and both readers must agree.

    python spec/fuzz.py COUNT [--seed N] [--both] [--sealed SHARE] [--section NAME] [--damage]
                              [--seconds S]

Raw mutants have bytes changed anywhere; sealed ones have the manifest or a tensor changed and every
hash made right again, so that the rules behind the hashes are reached. `--both` asks spec/reader.py
as well and compares the codes; `--section codes` takes packs that have that section; `--damage`
flips every bit before, and cuts at every byte. Prints one JSON document; a mutant that breaks a
promise is kept.
"""

from __future__ import annotations

import argparse
import json
import random
import struct
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import reader as second
from draft import Draft

import d3pack
from d3pack.errors import InvalidPackError

CORPUS = Path(__file__).parent / "vectors" / "valid"
LARGEST = 4096  # small packs: more mutants a second, and more of them hit the header
NUMBERS = [
    0,
    1,
    -1,
    2,
    7,
    63,
    64,
    65,
    255,
    2**16,
    2**31 - 1,
    2**31,
    2**53 - 1,
    2**53,
    2**64,
    10**30,
]
CODECS = sorted({codec for codecs in second.CODECS.values() for codec in codecs.split()})
VALUES: list[Any] = [
    None,
    True,
    False,
    "",
    "a",
    "\ud800",
    "\x1b",
    [],
    {},
    [[]],
    0.0,
    -0.0,
    0.5,
    1.0,
    1e308,
    8,
    [1] * 5,
]
# of fields that are left out where they have their default, or that are no field
NAMES = (
    *("x", "row", "", "shared", "requires", "seed", "licence"),
    *("atoms", "bits", "eta", "guidance", "images", "prompts"),
)


def raw(data: bytes, rng: random.Random) -> bytes:
    """Change some bytes, mostly in the header."""
    out = bytearray(data)
    size = struct.unpack_from("<Q", data)[0]
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        at = rng.randrange(len(out) if rng.random() < 0.4 else min(len(out), 8 + size) or 1)
        kind = rng.randrange(9)
        if kind == 0:
            out[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            out[at] = rng.randrange(256)
        elif kind == 2:
            del out[at : at + rng.randrange(1, 9)]
        elif kind == 3:
            out[at:at] = rng.randbytes(rng.randrange(1, 9))
        elif kind == 4:
            del out[at:]
        elif kind == 5:
            out[at : at + 1] = rng.choice(b'{}[]",:\\0123456789eE+-. ntfu').to_bytes(1, "little")
        elif kind == 6:
            other = rng.randrange(len(out))
            out[at:at] = out[other : other + rng.randrange(1, 65)]
        elif kind == 7:
            out[:8] = struct.pack("<Q", rng.choice((0, 1, 2, size - 1, size + 8, len(out), 2**63)))
        else:
            text = json.dumps(rng.choice(NUMBERS)).encode()
            out[at : at + len(text)] = text
        if not out:
            break
    return bytes(out)


def sealed(draft: Draft, rng: random.Random) -> bytes:
    """Change the manifest or a tensor, and set the hashes as far as possible."""
    draft = draft.copy()
    for _ in range(rng.choice((1, 1, 2))):
        kind = rng.randrange(5)
        if kind == 4 and draft.blobs:
            with suppress(AttributeError, LookupError, StopIteration, TypeError, ValueError):
                poke_section(draft, rng)  # a tensor that another mutation has removed stays removed
        elif kind == 0 and draft.blobs:
            name = rng.choice(list(draft.blobs))
            blob = draft.blobs[name]
            if blob:
                value = rng.choice((0, 1, 0x7C, 0x7E, 0x80, 0xFC, 0xFF, rng.randrange(256)))
                draft.poke(name, rng.randrange(len(blob)), bytes([value]))
        elif kind == 1 and draft.blobs:
            name = rng.choice(list(draft.blobs))
            draft.blobs[name] = draft.blobs[name][: rng.randrange(len(draft.blobs[name]) + 1)]
        else:
            poke_json(draft.manifest, rng)
    seals = [draft.rehash, draft.reroot]
    if has_few_classes(draft):  # not a leaf for each of 2**31 classes
        seals.insert(0, draft.releaf)
    for seal in seals:
        try:
            seal()
        except (AttributeError, KeyError, IndexError, TypeError, ValueError, StopIteration,
                ZeroDivisionError):  # fmt: skip
            continue  # the mutation removed what would be hashed
    try:
        return draft.bytes()
    except (AttributeError, KeyError, IndexError, TypeError, ValueError):
        return raw(b"\x02\0\0\0\0\0\0\0{}", rng)


def has_few_classes(draft: Draft) -> bool:
    """Return whether rows of all classes, as many as the manifest says by now, fit in memory."""
    count = draft.manifest.get("classes")
    return type(count) is int and count <= 4096


def poke_section(draft: Draft, rng: random.Random) -> None:
    """Remove a tensor, or change parameters and bytes of a section together."""
    name = rng.choice(list(draft.blobs))
    section = name.split(".")[0]
    kind = rng.randrange(4)
    if kind == 0:
        del draft.blobs[name]
    elif kind == 1:
        draft.section(section)[1] = rng.choice(CODECS)
    elif kind == 2:
        params = draft.params(section)
        key = rng.choice(list(params))
        params[key] += rng.choice((-1, 1))
        count = draft.manifest["classes"] if name in draft.rows[section] else 1
        if count == 1 or has_few_classes(draft):
            draft.blobs[name] += bytes(count * rng.choice((1, 2, 3)))
    else:
        draft.section(section)[3:] = [] if len(draft.section(section)) == 4 else ["ab" * 16]


def poke_json(value: Any, rng: random.Random) -> None:
    """Change one place of a JSON value."""
    while True:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        if not keys:
            return
        key = rng.choice(keys)
        if isinstance(value[key], (dict, list)) and value[key] and rng.random() < 0.8:
            value = value[key]
            continue
        old = value[key]
        kind = rng.randrange(6)
        if kind == 0:
            del value[key]
        elif kind == 1 and isinstance(value, dict):
            value[rng.choice(NAMES)] = old if rng.random() < 0.5 else rng.choice(VALUES)
        elif kind == 1:
            value.insert(key, old)
        elif kind == 2 and isinstance(old, (int, float)) and not isinstance(old, bool):
            value[key] = old + rng.choice((-1, 1)) * rng.choice((1, 1, 2, 0.5))
        elif kind == 3:
            value[key] = rng.choice(NUMBERS)
        elif kind == 4 and isinstance(old, str) and old:
            at = rng.randrange(len(old))
            value[key] = old[:at] + rng.choice(("", "x", "0", "\u00e9", "/", ".")) + old[at + 1 :]
        else:
            value[key] = rng.choice(VALUES)
        return


def verdict(data: bytes) -> str:
    """Return the code of d3pack's reader; exceptions other than InvalidPackError pass."""
    try:
        d3pack.read(data)
    except InvalidPackError as error:
        return error.code
    return "valid"


def second_verdict(data: bytes) -> str:
    """Return the code of the second reader."""
    try:
        second.read(data)
    except second.Refused as error:
        return str(error.code)
    return "valid"


def small_packs(section: str | None) -> list[bytes]:
    """Return small packs of the corpus: all, or those that have a section."""
    every = (path.read_bytes() for path in sorted(CORPUS.glob("*.d3m")))
    small = [data for data in every if len(data) <= LARGEST]
    return [data for data in small if section is None or section in Draft(data).rows]


def run(
    count: int,
    seed: int,
    share: float,
    both: bool,
    section: str | None = None,
    seconds: float = 1e9,
) -> dict[str, Any]:
    """Try mutants until the count or the time is reached."""
    rng = random.Random(seed)
    packs = small_packs(section)
    drafts = [Draft(data) for data in packs]
    codes: Counter[str] = Counter()
    broken: list[str] = []
    start = time.monotonic()
    done = 0
    while done < count and time.monotonic() - start < seconds:
        which = rng.randrange(len(packs))
        is_sealed = rng.random() < share
        data = sealed(drafts[which], rng) if is_sealed else raw(packs[which], rng)
        done += 1
        try:
            code = verdict(data)
            other = second_verdict(data) if both else code
            problem = "" if code == other else f"{code} but {other}"
        except Exception as error:
            code, problem = "exception", repr(error)
        codes[code] += 1
        if problem:
            name = f"fuzz-{seed}-{done}.d3m"
            Path(name).write_bytes(data)
            broken.append(f"{name}: {problem}")
            print(broken[-1], file=sys.stderr)
    return {
        "mutants": done,
        "packs": len(packs),
        "section": section,
        "sealed_share": share,
        "both_readers": both,
        "seed": seed,
        "seconds": round(time.monotonic() - start, 1),
        "codes": dict(sorted(codes.items())),
        "broken_promises": broken,
    }


def damage(packs: list[bytes], both: bool) -> dict[str, int]:
    """Flip every bit of the packs, and cut them at every byte: nobody may read the result."""
    count = {"bits": 0, "cuts": 0, "accepted": 0}

    def ask(data: bytes, kind: str) -> None:
        count[kind] += 1
        verdicts = [verdict(data), second_verdict(data)] if both else [verdict(data)]
        count["accepted"] += "valid" in verdicts

    for data in packs:
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            ask(bytes(flipped), "bits")
        for size in range(len(data)):
            ask(data[:size], "cuts")
    return count


def main() -> int:
    """Run and report."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--both", action="store_true")
    parser.add_argument("--sealed", type=float, default=0.25)
    parser.add_argument("--section", help="only packs that have it: codes, labels, ...")
    parser.add_argument("--damage", action="store_true", help="every flip and cut before")
    parser.add_argument("--seconds", type=float, default=1e9)
    got = parser.parse_args()
    if not small_packs(got.section):
        parser.error(f"no small pack of the corpus has a section {got.section!r}")
    damaged = damage(small_packs(got.section), got.both) if got.damage else {"accepted": 0}
    result = run(got.count, got.seed, got.sealed, got.both, got.section, got.seconds)
    if got.damage:
        result["damage"] = damaged
    print(json.dumps(result, indent=1))
    return 1 if result["broken_promises"] or damaged["accepted"] else 0


if __name__ == "__main__":
    sys.exit(main())
