"""Charts as SVG: lines and letters take the text colour of the page, dark or light."""

from __future__ import annotations

import contextlib
import io
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

import numpy as np
import numpy.typing as npt

from d3pack.system import size

_INK = "#010203"  # replaced by currentColor
_FAINT = "#040506"
_WIDE, _HIGH = 8.4, 4.2  # inches
_SPAN = 2  # between the smallest and the largest size of a chart, at least
# Okabe and Ito's colours, which colour-blind people can tell apart, and Tol's wine as the eighth;
# the shapes differ as well.
COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#999999", "#882255",
)  # fmt: skip
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "p")
_MARKER = 6  # points, as are those below
_HIDDEN = 4  # markers whose middles are closer than this hide one another
_RING = 5  # by how much an outline is wider than what lies in it


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind: bytes, accuracies and their deviations, as shares of 1."""

    name: str
    nbytes: Sequence[float]
    mean: Sequence[float]
    std: Sequence[float]
    line: bool = True


def _svg(figure: Any, title: str, salt: str) -> str:
    """The figure as an `svg` element; screen readers say its title."""
    import matplotlib

    buffer = io.StringIO()
    with (
        matplotlib.rc_context({"svg.hashsalt": salt, "svg.fonttype": "none"}),
        warnings.catch_warnings(),
    ):
        # Letters stay letters in the file: readers may have a font for those that this machine
        # has none to measure with.
        warnings.filterwarnings("ignore", "Glyph .* missing", UserWarning)
        figure.savefig(
            buffer, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
    text = buffer.getvalue()
    text = text[text.index("<svg") :].replace(_INK, "currentColor").replace(_FAINT, "currentColor")
    # Identifiers are global to a page: two charts must not share them.
    text = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{salt}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(title)}"', 1)


def _families(names: Sequence[str]) -> list[str]:
    """The usual font, then installed ones that have the letters it lacks."""
    from matplotlib import font_manager, rcParams

    families = list(rcParams["font.family"])
    usual = font_manager.get_font(font_manager.findfont(font_manager.FontProperties()))
    lacking = {ord(letter) for name in names for letter in name} - set(usual.get_charmap())
    for entry in font_manager.fontManager.ttflist:
        if not lacking:
            break
        if entry.name.startswith("Last Resort"):  # draws a box for every letter
            continue
        with contextlib.suppress(OSError, RuntimeError):  # the file is gone or damaged
            has = lacking & set(font_manager.get_font(entry.fname).get_charmap())
            families += [entry.name] if has else []
            lacking -= has
    return families


def _axes(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    for spine in ("top", "right"):
        axes.spines[spine].set_visible(False)
    for spine in ("bottom", "left"):
        axes.spines[spine].set_color(_INK)
    axes.tick_params(colors=_INK, which="both", labelsize=9)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    return figure, axes


def accuracy_per_byte(
    series: Sequence[Series],
    *,
    levels: Mapping[str, float] = {},
    chance: float | None = None,
    title: str,
    salt: str = "curve",
    front: Sequence[tuple[float, float]] = (),
) -> str:
    """Draw accuracy against bytes (log scale).

    A point that another one hides is outlined in its own colour and shape around that one.

    Args:
        series: points, one colour and shape each.
        levels: accuracies that have no bytes, by name: horizontal lines.
        chance: accuracy of guessing.
        title: what screen readers say.
        salt: makes identifiers unlike those of other charts of a page.
        front: (bytes, accuracy) of the points that nothing smaller equals.
    """
    figure, axes = _axes(_WIDE, _HIGH)
    _draw_series(axes, series)
    if front:
        nbytes, height = np.array(sorted(front)).T
        axes.step(nbytes, 100 * height, where="post", color=_FAINT, linestyle=":", label="front")
    _draw_levels(axes, levels, chance)
    sizes = [value for points in series for value in points.nbytes if value > 0]
    if sizes:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_xscale("log")
        if max(sizes) < _SPAN * min(sizes):  # sizes of a few bytes apart are one size
            axes.set_xlim(min(sizes) / 2, max(sizes) * 2)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(lambda value, _: size(value))
        axes.xaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("bytes sent")
    axes.set_ylabel("accuracy on real test images, %")
    axes.grid(axis="y", color=_FAINT, alpha=0.15)
    rows = -(-(len(series) + bool(front)) // 2)
    figure.set_size_inches(_WIDE, _HIGH + 0.22 * rows)
    _outline_hidden(figure, axes, series)
    legend = figure.legend(
        frameon=False, fontsize=9, labelcolor=_INK, ncols=2, loc="outside lower center"
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    return _svg(figure, title, salt)


def _draw_series(axes: Any, series: Sequence[Series]) -> None:
    for number, points in enumerate(series):
        kind = number % len(COLOURS)
        order = np.argsort(points.nbytes)
        axes.errorbar(
            np.asarray(points.nbytes)[order],
            100 * np.asarray(points.mean)[order],
            100 * np.asarray(points.std)[order],
            color=COLOURS[kind],
            marker=MARKERS[kind],
            markersize=_MARKER,
            linestyle="-" if points.line and len(order) > 1 else "none",
            linewidth=1.6,
            capsize=2.5,
            label=points.name,
        )


def _outline_hidden(figure: Any, axes: Any, series: Sequence[Series]) -> None:
    """Outline the points that later ones are drawn over, each wider than those above it."""
    figure.draw_without_rendering()  # the layout decides which points meet
    values = [
        (number, nbytes, 100 * mean)
        for number, points in enumerate(series)
        for nbytes, mean in zip(points.nbytes, points.mean, strict=True)
    ]
    places = axes.transData.transform([place for _, *place in values] or np.empty((0, 2)))
    places = places * 72 / figure.dpi
    for i, (number, nbytes, height) in enumerate(values):
        above = np.hypot(*(places[i + 1 :] - places[i]).T) < _HIDDEN
        if above.any():
            axes.plot(
                [nbytes],
                [height],
                color=COLOURS[number % len(COLOURS)],
                marker=MARKERS[number % len(MARKERS)],
                markersize=_MARKER + _RING * int(above.sum()),
                markerfacecolor="none",
                markeredgewidth=1.6,
                linestyle="none",
                gid=f"hidden-{i}",
            )


def _draw_levels(axes: Any, levels: Mapping[str, float], chance: float | None) -> None:
    label: dict[str, Any] = {"fontsize": 8, "color": _FAINT, "parse_math": False}
    for name, value in levels.items():
        axes.axhline(100 * value, color=_FAINT, linewidth=1, linestyle="--", alpha=0.7)
        axes.annotate(
            f"{name}, {100 * value:.1f} %",
            (0.005, 100 * value),  # few bytes, low accuracies: the left is where room is
            xycoords=("axes fraction", "data"),
            ha="left",
            va="bottom",
            **label,
        )
    if chance is not None:
        axes.axhline(100 * chance, color=_FAINT, linewidth=0.8, linestyle=":")
        axes.annotate(
            "chance",
            (0, 100 * chance),
            xycoords=("axes fraction", "data"),
            xytext=(3, 1),
            textcoords="offset points",
            **label,
        )


def confusion(
    counts: npt.NDArray[np.int64], classes: Sequence[str], *, title: str, salt: str = "confusion"
) -> str:
    """Draw a confusion matrix: rows are the truth, columns the answers, as shares of a row."""
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(3.6, min(8.0, 0.42 * len(classes) + 1.6))
    figure, axes = _axes(side, side)
    axes.pcolormesh(share, cmap="Blues", vmin=0, vmax=1, rasterized=len(classes) > 50)
    axes.invert_yaxis()
    axes.set_aspect("equal")
    if len(classes) <= 20:
        middles, names = np.arange(len(classes)) + 0.5, [name[:16] for name in classes]
        plain: dict[str, Any] = {"parse_math": False, "family": _families(names)}
        axes.set_xticks(middles, names, rotation=45, ha="right", rotation_mode="anchor", **plain)
        axes.set_yticks(middles, names, **plain)
        for row in range(len(classes)):
            for column in range(len(classes)):
                if share[row, column] >= 0.005:
                    axes.text(
                        column + 0.5,
                        row + 0.5,
                        f"{100 * share[row, column]:.0f}",
                        ha="center",
                        va="center",
                        fontsize=7.5,
                        color="#ffffff" if share[row, column] > 0.6 else "#1f2024",
                    )
    else:
        axes.set_xticks([])
        axes.set_yticks([])
    axes.set_xlabel("answer")
    axes.set_ylabel("truth")
    return _svg(figure, title, salt)
