"""Charts and the results' scripts: valid SVG, colours of the page, figures that are the table's."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from d3pack.evaluate import charts
from d3pack.evaluate.charts import Series, accuracy_per_byte, confusion
from d3pack.system import size

SERIES = [
    Series("packs", [3000, 10_000, 1000], [0.3, 0.35, 0.2], [0.01, 0.01, 0.0]),
    Series("real <images>", [1000], [0.1], [0.0]),
]


def both() -> tuple[str, str]:
    counts = np.array([[90, 10], [40, 60]])
    return (
        accuracy_per_byte(SERIES, levels={"all": 0.6}, chance=0.1, title="a & b"),
        confusion(counts, ["cat", "dog"], title="who is who"),
    )


def test_charts_are_svg_that_takes_the_colour_of_the_page() -> None:
    for svg in both():
        root = ElementTree.fromstring(svg)
        assert root.tag.endswith("svg")
        assert root.attrib["role"] == "img"
        assert root.attrib["aria-label"]
        assert "currentColor" in svg
        assert "#010203" not in svg
        for text in re.findall(r"<text[^>]*>", svg):
            assert "currentColor" in text or "#1f2024" in text or "#ffffff" in text


def test_two_charts_share_no_identifier() -> None:
    one, other = (set(re.findall(r'\bid="([^"]+)"', svg)) for svg in both())
    assert one
    assert other
    assert not one & other
    for svg in both():
        wanted = set(re.findall(r'(?:url\(#|href="#)([^")]+)', svg))
        assert wanted <= set(re.findall(r'\bid="([^"]+)"', svg))


def test_sizes_that_are_nearly_equal_lie_close_together() -> None:
    near = [Series("a", [8_270], [0.9], [0.0]), Series("b", [8_330], [0.8], [0.0])]
    chart = accuracy_per_byte(near, title="sizes")
    for tick in (5_000, 10_000):
        assert f">{size(tick)}<" in chart
    assert ">8.3 kB<" not in chart


def test_points_in_one_place_are_all_seen() -> None:
    def outlines(*points: tuple[float, float]) -> list[str]:
        series = [Series(str(i), [x], [y], [0.01]) for i, (x, y) in enumerate(points)]
        svg = accuracy_per_byte([*series, Series("far", [90_000], [0.2], [0.0])], title="t")
        root = ElementTree.fromstring(svg)
        groups = [node for node in root.iter() if "hidden-" in node.get("id", "")]
        return [ElementTree.tostring(group, encoding="unicode") for group in groups]

    apart = (1_000, 0.5), (1_500, 0.5), (1_000, 0.6)
    assert outlines(*apart) == []
    one, two = outlines((1_000, 0.5), (1_000, 0.5), (1_002, 0.501), (3_000, 0.5))
    for ring, colour in ((one, charts.COLOURS[0]), (two, charts.COLOURS[1])):
        assert f"stroke: {colour}" in ring
        assert f"fill: {colour}" not in ring

    def width(ring: str) -> float:
        path = re.search(r'<[^>]*path[^>]* d="([^"]+)"', ring)
        assert path
        numbers = [float(value) for value in re.findall(r"-?[\d.]+", path[1])]
        return max(numbers[::2]) - min(numbers[::2])

    assert width(one) > width(two) > charts._MARKER


def test_charts_are_reproducible() -> None:
    assert both() == both()


def test_letters_are_letters_and_nothing_is_cut() -> None:
    curve, matrix = both()
    for word in ("packs", "real &lt;images&gt;", "chance", "bytes sent", "10 kB"):
        assert word in curve
    for word in ("cat", "dog", "90", "40", "truth", "answer"):
        assert f">{word}<" in matrix


def test_names_are_plain_text_whatever_they_hold(recwarn: pytest.WarningsRecorder) -> None:
    names = ["$5 to $9", r"$\bad$", "飞机", "naïve_x^2"]
    svg = confusion(np.eye(4, dtype=np.int64), names, title="t")
    curve = accuracy_per_byte(
        [Series(names[0], [10], [0.5], [0.0])], levels={names[1]: 0.3}, title="t"
    )
    texts = ["".join(node.itertext()) for node in ElementTree.fromstring(svg).iter()]
    assert set(names) <= set(texts)
    assert names[0] in curve
    assert names[1] in curve
    assert not [str(w.message) for w in recwarn if "Glyph" in str(w.message)]


def test_a_font_that_has_the_letters_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib import font_manager

    usual = charts._families(["cat", "naïve"])
    assert charts._families(["cat \U0001d4d0"])[:-1] == usual  # a script A: STIX has it
    assert charts._families(["cat \U0010fffd"]) == usual  # a letter of no font
    gone = font_manager.FontEntry(fname="/nowhere.ttf", name="gone")
    monkeypatch.setattr(font_manager.fontManager, "ttflist", [gone])
    assert charts._families(["飞机"]) == usual


def result(
    arm: str, budget: int | None, nbytes: float | None, *accuracies: float
) -> dict[str, Any]:
    mean = sum(accuracies) / len(accuracies)
    return {
        "arm": arm,
        "budget": budget,
        "bytes": nbytes,
        "last": {"mean": mean, "std": 0.01 if len(accuracies) > 1 else 0.0},
        "runs": [{"images": 500, "last": a} for a in accuracies],
    }


def test_markdown_and_figure_say_what_the_results_say() -> None:
    from benchmarks import figure

    rows = {
        "pack 3,000 B": result("pack", 3000, 2990, 0.30, 0.32),
        "webp 3,000 B": result("webp", 3000, 2950, 0.18, 0.18),
        "jpeg 3,000 B": result("jpeg", 3000, 2800, 0.20),
        "sheet 3,000 B": result("sheet", 3000, 2999, 0.24, 0.26),
        "webp 1,000 B": result("webp", 1000, 990, 0.15),
        "random": result("random", None, None, 0.4, 0.42),
        "names": result("names", None, 2500, 0.25),
    }
    table = {"rows": rows, "classes": ["c"] * 10, "per_class": 50, "target": "cifar10"}
    text = figure.markdown(table)
    assert "| packs | – | 31.0 ± 1.0 |" in text
    assert "| real images, WebP files | 15.0 (1 seed) | 18.0 ± 1.0 |" in text
    assert "| pack to best real files, above chance | – | 2.1 x |" in text  # 21 points against 10
    assert "| pack to best real sheet, above chance | – | 1.4 x |" in text
    assert "500 images: 41.0 ± 1.0 %" in text
    svg = figure.figure(table)
    ElementTree.fromstring(svg)
    assert "prefers-color-scheme: dark" in svg


def test_better_of_two_payloads_of_a_kind_stands_in_the_table() -> None:
    from benchmarks import figure, readme
    from benchmarks.table import Cell

    by_hand = str(Cell("avif", 3000, lambda: None, "AVIF sheet q10 28 px"))
    assert by_hand == "avif 3,000 B, AVIF sheet q10 28 px"
    rows = {
        "pack 3,000 B": result("pack", 3000, 2990, 0.30, 0.32),
        "avif 3,000 B": result("avif", 3000, 2950, 0.18, 0.18),
        by_hand: result("avif", 3000, 2950, 0.22, 0.22),
    }
    for ordered in (rows, dict(reversed(rows.items()))):
        table = {"rows": ordered, "classes": ["c"] * 10, "per_class": 50, "target": "cifar10"}
        assert "tiles of one AVIF picture | 22.0 ± 1.0 |" in figure.markdown(table)
        assert readme.best(ordered, 3000, "avif") is rows[by_hand]


def test_the_table_names_every_cell_and_counts_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks import table

    monkeypatch.setattr(table, "RESULTS", tmp_path)
    table.show("cifar10", 3)
    text = capsys.readouterr().out
    assert "135 students missing" in text  # 7 kinds at 6 sizes and 3 without a size, 3 seeds
    assert text.count("missing") == 46
