"""What tests of d3pack share with tests of plugins. Needs pytest."""

from __future__ import annotations

import pytest

from d3pack.errors import D3MError

__all__ = ["raises_code"]


def raises_code(*codes: str, match: str | None = None) -> pytest.RaisesExc[D3MError]:
    """Expect a `D3MError` with one of these codes.

    Args:
        codes: such as `E_HASH`.
        match: regular expression that the message has to contain.

    Example:
        >>> with raises_code("E_TRUNCATED"):
        ...     d3pack.read(b"")
    """
    return pytest.raises(D3MError, match=match, check=lambda error: error.code in codes)
