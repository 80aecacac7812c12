"""What is in a pack, to look at: a contact sheet (PNG) or one self-contained page (HTML)."""

from __future__ import annotations

from d3pack.preview.contact import Row, contact_sheet
from d3pack.preview.page import document, render_page
from d3pack.preview.sheet import Sample, render_sheet, sample

__all__ = ["Row", "Sample", "contact_sheet", "document", "render_page", "render_sheet", "sample"]
