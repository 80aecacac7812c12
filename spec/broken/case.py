"""What an invalid file of the corpus is made of."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from draft import Draft

Edit = Callable[[Draft], Any]  # changes the draft, or returns the bytes
Case = tuple[str, str, str, str, Edit]  # name, expected code, what it breaks, valid file, edit
Raw = tuple[str, str, str, bytes]  # name, expected code, what it breaks, bytes
