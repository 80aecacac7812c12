"""The demo: real digits become a pack, and an evaluation says what the pack is worth.

It calls `encode` and `evaluate` as any program does; nothing is prepared in advance. Digits are the
hardest case: the backbone has only seen photographs, and one of these images takes 70 bytes.
Prompts alone teach little here (62 % in 6.3 kB): the pack holds digits as codes of 17 bytes.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d3pack.encode import EncodeSettings, encode
from d3pack.evaluate import PROTOCOLS, EvalSettings, Evaluation, Updates, evaluate, write_report
from d3pack.format import Pack
from d3pack.preview import Row, contact_sheet
from d3pack.sources import Source, open_source
from d3pack.system import Listener, replace_file, require

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_SHARE = 5  # every fifth image is kept for the test
UPDATES = 150  # of each student: half of what `quick` has
DIGITS = 26  # of each class: as codes of 24 bytes, they teach more than 32 of 17
SETTINGS = EncodeSettings(
    images_per_class=DIGITS,
    codes=DIGITS,
    code_bits=12,
    backbone="mini",
    candidates=1,
    probes=1,
    teacher_samples=30_000,
)
EVALUATION = EvalSettings(
    seeds=1,
    size=16,  # the originals have 8x8 pixels, the decoded images 64x64
    baselines=("webp", "random"),
)


@dataclass(frozen=True, slots=True)
class Demo:
    """The files of the demo, and its figures."""

    pack: Pack
    evaluation: Evaluation
    files: tuple[Path, ...]
    seconds: float

    def sentence(self) -> str:
        """Return what happened, in one or two sentences."""
        size = self.pack.ledger().total
        accuracy = {r.entry.key.split("-")[0]: r.last.mean for r in self.evaluation.results}
        parts = [
            f"{len(self.pack)} images of 10 classes travel in {size:,} bytes, as codes; a student "
            f"of what they rebuild reads {accuracy['pack']:.0%} of real digits"
        ]
        if "webp" in accuracy:
            parts.append(f"{accuracy['webp']:.0%} after as many bytes of real images")
        if "random" in accuracy:
            parts.append(f"{accuracy['random']:.0%} after as many real images without loss")
        return (
            ", ".join(parts)
            + ". Digits are a hard case on purpose: the backbone knows photographs only."
        )

    def to_json(self) -> dict[str, Any]:
        """Return the figures, ready for JSON."""
        return {
            "root": self.pack.root,
            "bytes": self.pack.ledger().total,
            "images": len(self.pack),
            "accuracy": {r.entry.key: r.last.mean for r in self.evaluation.results},
            "seconds": round(self.seconds, 1),
            "files": [path.name for path in self.files],
        }


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as PNG files: train/ and test/, a folder for each class."""
    digits = require("sklearn.datasets", "the demo").load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if number % TEST_SHARE == 0 else "train"
        path = folder / split / NAMES[label] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)


def run_demo(
    folder: Path,
    *,
    settings: EncodeSettings = SETTINGS,
    updates: int = UPDATES,
    view: Callable[[], AbstractContextManager[Listener]],
    say: Callable[[str], None],
) -> Demo:
    """Encode digits, evaluate the pack, and leave pack, contact sheet and report in `folder`.

    Args:
        folder: where files are written; it is created where it is missing.
        settings: how the pack is made.
        updates: steps of each student.
        view: shows the events of `encode` while it runs.
        say: receives one line for each step of the demo.
    """
    began = time.monotonic()
    for module in ("sklearn", "threadpoolctl", "matplotlib"):  # before minutes of work
        require(module, "the demo")
    folder.mkdir(parents=True, exist_ok=True)
    digits = folder / "digits"
    say("1/4  real images: scikit-learn's digits, 8x8 pixels")
    write_digits(digits)
    source = open_source(digits)
    path, sheet, report = folder / "digits.d3m", folder / "sheet.png", folder / "report.html"
    say("2/4  coding digits as choices among noise")
    with view() as listener:
        pack = encode(source, path, settings, listeners=[listener], overwrite=True)
    say(f"     {path.name}: {pack.ledger().total:,} bytes for {len(pack)} images")
    say("3/4  training students on the pack and on real images of equal bytes")

    def note(event: dict[str, Any]) -> None:
        if event["event"] == "note":
            say(f"     {event['text']}")

    evaluation = evaluate(
        path,
        source,
        EVALUATION,
        test=open_source(digits, split="test"),
        work=folder / "students",
        protocol=replace(PROTOCOLS["quick"], length=Updates(updates)),
        listeners=[note],
    )
    say("4/4  writing sheet and report")
    picture = io.BytesIO()
    rows = sheet_rows(source, evaluation)
    contact_sheet(rows, captions=("real", "", "", "", "rebuilt")).save(picture, "PNG")
    replace_file(sheet, picture.getvalue())
    write_report(evaluation, report)
    return Demo(pack, evaluation, (path, sheet, report), time.monotonic() - began)


def sheet_rows(source: Source, evaluation: Evaluation, each: int = 4) -> Sequence[Row]:
    """Return a row for each class: real digits on the left, rebuilt ones on the right."""
    decoded = evaluation.images["this pack"]
    side = decoded.shape[-1]
    rows = []
    for c, name in enumerate(evaluation.pack.classes):
        real = [
            source.load(c, i).resize((side, side), Image.Resampling.BICUBIC) for i in range(each)
        ]
        left = np.stack([np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in real])
        rows.append(Row(name, np.concatenate([left, decoded[c, :each].cpu().numpy()])))
    return rows
