"""Compute the table of normal quantiles, and show that no machine can round it differently.

    python spec/normal_table.py [--write FILE]

Entry i of 65,536 is the standard normal quantile at (i + 1/2) / 65536, rounded to the nearest
float32. The lower half mirrors the upper one; `d3pack/decode/normal16.f32` holds the upper one. The
quantile is found with 50 decimal digits by Newton's method on the series of the error function,
so no C library has a say.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from decimal import Decimal, getcontext
from statistics import NormalDist

HALF = 32768


def quantiles() -> list[Decimal]:
    """Return the upper half: 32,768 quantiles above one half, ascending."""
    getcontext().prec = 50
    root = (2 * pi()).sqrt()
    out = []
    for i in range(HALF):
        # Phi(z) - 1/2 = (2i + 1) / 131072
        target = Decimal(2 * i + 1) / 131072
        z = Decimal(NormalDist().inv_cdf(0.5 + (2 * i + 1) / 131072))
        # The first guess is within 1e-12, so two steps reach all but the last few of 50 digits.
        for _ in range(2):
            square = z * z
            term = total = z
            n = 0
            while abs(term) > Decimal("1e-55"):  # z * sum z^2n / (1 * 3 * 5 * ... * (2n + 1))
                n += 1
                term = term * square / (2 * n + 1)
                total += term
            density = (-square / 2).exp() / root
            z -= total - target / density
        out.append(z)
    return out


def pi() -> Decimal:
    """Return pi by Machin's formula, 16 arctan(1/5) - 4 arctan(1/239)."""

    def arctan(inverse: int) -> Decimal:
        x = Decimal(1) / inverse
        power, total, n = x, x, 1
        while abs(power) > Decimal("1e-55"):
            power = -power / (inverse * inverse)
            n += 2
            total += power / n
        return total

    return 16 * arctan(5) - 4 * arctan(239)


def main() -> None:
    """Print the hash of the whole table and the smallest distance to a rounding boundary."""
    exact = quantiles()
    upper = struct.pack(f"<{HALF}f", *map(float, exact))
    closest = Decimal(1)
    for value, rounded in zip(exact, struct.unpack(f"<{HALF}f", upper), strict=True):
        bits = struct.unpack("<I", struct.pack("<f", rounded))[0]
        below, above = (struct.unpack("<f", struct.pack("<I", bits + d))[0] for d in (-1, 1))
        for neighbour in (below, above):
            middle = (Decimal(rounded) + Decimal(neighbour)) / 2
            closest = min(closest, abs(value - middle) / value)
    lower = struct.pack(f"<{HALF}f", *(-z for z in reversed(struct.unpack(f"<{HALF}f", upper))))
    print("sha256", hashlib.sha256(lower + upper).hexdigest())
    print(f"closest to a rounding boundary: {closest:.2e} of the value")
    if len(sys.argv) == 3 and sys.argv[1] == "--write":
        with open(sys.argv[2], "wb") as file:
            file.write(upper)


if __name__ == "__main__":
    main()
