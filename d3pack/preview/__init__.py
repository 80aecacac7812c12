"""What is in a pack, to look at: a contact sheet (PNG) or one self-contained page (HTML)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from d3pack.system import lazy_names

if TYPE_CHECKING:
    from d3pack.preview.page import document, html_text, render_page, table
    from d3pack.preview.sheet import Row, Sample, contact_sheet, render_sheet, sample

__all__ = [
    "Row",
    "Sample",
    "contact_sheet",
    "document",
    "html_text",
    "render_page",
    "render_sheet",
    "sample",
    "table",
]

__getattr__ = lazy_names(
    __name__,
    {
        "page": ["document", "html_text", "render_page", "table"],
        "sheet": ["Row", "Sample", "contact_sheet", "render_sheet", "sample"],
    },
)
