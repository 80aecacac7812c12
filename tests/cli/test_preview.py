"""Sheets and pages: right pixels, escaped names, nothing loaded from elsewhere."""

from __future__ import annotations

import base64
import io
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from cli import Result, invoke
from dataset_packs import tiny_pack
from PIL import Image
from tiny_backbones import tiny_sd

import d3pack
from d3pack.decode import Decoder, make_probes
from d3pack.errors import NotFoundError, UsageError
from d3pack.format import Pack
from d3pack.preview import Row, contact_sheet, render_page, sample
from d3pack.system import progress_bar


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Pack]:
    """A backbone, a pack file with labels and probes, and the pack."""
    room = tmp_path_factory.mktemp("preview")
    backbone = room / "sd"
    tiny_sd(backbone)
    pack = tiny_pack(backbone, labels=True)
    pack = replace(pack, classes=("<b>goldfish</b>", "penguin", "tabby & cat"))
    probes = make_probes(Decoder(pack, path=backbone), [(0, 0), (2, 1)], (16, 16))
    pack = replace(pack, probes=probes, provenance={"method": "test", "counts": {"images": 21}})
    path = room / "tiny.d3m"
    d3pack.write(pack, path)
    return backbone, path, pack


def preview(*args: str | Path) -> Result:
    return invoke("preview", *args)


class Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data


def test_page_shows_the_decoded_pixels(made: tuple[Path, Path, Pack], tmp_path: Path) -> None:
    backbone, path, pack = made
    out = tmp_path / "page.html"
    done = preview(path, "-o", out, "--backbone", backbone, "--ipc", "2", "--format", "json")
    assert done.exit_code == 0, done.exception
    assert json.loads(done.stdout)["root"] == pack.root
    text = out.read_text(encoding="utf-8")
    page = Reader()
    page.feed(text)
    pictures = [attrs for tag, attrs in page.tags if tag == "img"]
    expected = Decoder(pack, path=backbone).images([(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)])
    assert len(pictures) == len(expected)
    for attrs, image in zip(pictures, expected.numpy(), strict=True):
        raw = base64.b64decode(str(attrs["src"]).split(",")[1])
        assert (np.asarray(Image.open(io.BytesIO(raw))).transpose(2, 0, 1) == image).all()
        assert attrs["alt"]
        assert attrs["tabindex"] == "0"
    assert "probes: exact" in page.text
    assert "<b>goldfish</b>" in page.text  # escaped: it is text, not markup
    assert pack.root in page.text
    assert f"{pack.ledger().total:,} B" in page.text
    assert not re.search(r'(src|href)="(?!data:|#)', text)
    assert "$" not in text
    rows = re.findall(r'<tr><th scope="row">(.*?)</th>', text)
    sections = sorted(pack.ledger().sections.items(), key=lambda entry: -entry[1])
    first = rows.index(sections[0][0])
    assert rows[first : first + len(sections)] == [name for name, _ in sections]
    assert {"method", "counts.images"} <= set(rows)  # provenance, nested facts by their path
    widths = re.findall(r'class="meter" aria-hidden="true"><i style="width:([\d.]+)%', text)
    assert widths[-1] == "100.0"
    assert sum(map(float, widths[:-1])) == pytest.approx(100, abs=0.5)


def test_page_enlarges_tiny_images_as_squares(made: tuple[Path, Path, Pack]) -> None:
    backbone, _, pack = made
    decoder = Decoder(pack, path=backbone)
    shown = sample(pack, decoder, classes=1, images=1)
    tiny = replace(pack, recipe=replace(pack.recipe, size=(16, 16)))
    assert 'class="strip small"' in render_page(tiny, shown, name="x")
    assert 'class="strip small"' not in render_page(pack, shown, name="x")


@pytest.mark.parametrize(
    "text",
    ["<script>x</script>", 'a" onload="x', "$style", "abc\u202egpj.exe", "\x1b]52;c;ZXZpbA==\x07"],
)
def test_page_shows_hostile_text_as_text(made: tuple[Path, Path, Pack], text: str) -> None:
    backbone, _, pack = made
    shown = sample(pack, Decoder(pack, path=backbone), classes=1, images=1)
    pack = replace(pack, provenance={text: {"nested": {text: text}}})
    if "\x1b" not in text:  # which the format refuses here
        licence = replace(pack.recipe.backbone, licence=text)
        pack = replace(pack, recipe=replace(pack.recipe, template=text, backbone=licence))
    page, expected = Reader(), Reader()
    html = render_page(pack, shown, name=text)
    page.feed(html)
    expected.feed(render_page(replace(pack, provenance={"a": {"b": "c"}}), shown, name="x"))
    assert [tag for tag, _ in page.tags if tag not in ("tr", "th", "td", "code")] == [
        tag for tag, _ in expected.tags if tag not in ("tr", "th", "td", "code")
    ]
    assert [ch for ch in html if not ch.isprintable() and ch != "\n"] == []
    assert text.encode("unicode_escape").decode() in page.text


def test_page_forbids_scripts_and_requests(made: tuple[Path, Path, Pack]) -> None:
    backbone, _, pack = made
    shown = sample(pack, Decoder(pack, path=backbone), classes=1, images=1)
    page = Reader()
    page.feed(render_page(pack, shown, name="x"))
    (policy,) = [a["content"] for tag, a in page.tags if tag == "meta" and "http-equiv" in a]
    assert str(policy).startswith("default-src 'none'; img-src data:;")
    assert "script" not in str(policy)


def test_sheet_has_a_row_for_each_class(made: tuple[Path, Path, Pack], tmp_path: Path) -> None:
    backbone, path, _ = made
    out = tmp_path / "sheet.png"
    done = preview(path, "-o", out, "--backbone", backbone, "--most-classes", "2", "--ipc", "3")
    assert done.exit_code == 0, done.exception
    with Image.open(out) as sheet:
        assert sheet.height == 16 + 28 + 2 * 76 + 16  # margins, title, one line a class


def test_unknown_suffix_is_refused_before_any_work(tmp_path: Path) -> None:
    done = preview("missing.d3m", "-o", tmp_path / "sheet.pdf")
    assert isinstance(done.exception, UsageError)
    assert not list(tmp_path.iterdir())


def test_thumbnails_keep_pixels_of_whole_multiples() -> None:
    image = np.random.default_rng(0).integers(0, 255, (1, 3, 24, 24), dtype=np.uint8)
    sheet = np.asarray(contact_sheet([Row("x", image)], cell=72))
    wanted = image[0].transpose(1, 2, 0).repeat(3, axis=0).repeat(3, axis=1)
    height, width = sheet.shape[:2]
    found = any(
        (sheet[y : y + 72, x : x + 72] == wanted).all()
        for y in range(height - 71)
        for x in range(width - 71)
        if (sheet[y, x] == wanted[0, 0]).all()
    )
    assert found


def test_sheet_draws_letters_of_other_languages(monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.zeros((1, 3, 24, 24), dtype=np.uint8)
    drawn = [contact_sheet([Row(name, image)]).tobytes() for name in ("éé", "èè", "жж")]
    assert len(set(drawn)) == 3  # a font that lacks a letter has the same box for all
    monkeypatch.setattr("matplotlib.get_data_path", lambda: "/nowhere")
    assert contact_sheet([Row("cat", image)]).size[1] > 72


def test_missing_folder_is_refused_before_any_work(tmp_path: Path) -> None:
    done = preview("missing.d3m", "-o", tmp_path / "no" / "sheet.png")
    assert isinstance(done.exception, NotFoundError)
    assert "is not a directory" in str(done.exception)


def test_page_says_how_much_it_shows(made: tuple[Path, Path, Pack]) -> None:
    backbone, _, pack = made
    with Decoder(pack, path=backbone) as decoder:
        some = sample(pack, decoder, classes=3, images=2)
        seen: list[tuple[int, int]] = []
        whole = sample(pack, decoder, classes=3, images=7, progress=lambda *at: seen.append(at))
    assert "3 of 3 classes, 2 of 7 images each" in render_page(pack, some, name="x")
    assert "images each" not in render_page(pack, whole, name="x")
    assert seen[-1] == (21, 21)


def test_progress_in_a_log_is_a_line_every_half_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter([0.0, 0.0, 10.0, 31.0, 40.0, 70.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    with progress_bar("decoding") as progress:
        for done in (0, 100, 310, 400, 700):
            progress(done, 1010)
    assert capsys.readouterr().err.splitlines() == [
        "decoding: 310 of 1,010, 10.0 images/s, 0:01:10 left",
        "decoding: 700 of 1,010, 10.0 images/s, 0:00:31 left",
    ]
