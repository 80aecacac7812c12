"""Real digits become a pack, and an evaluation says what the pack is worth.

It calls `encode` and `evaluate` as any program does; nothing is prepared in advance. Digits are the
hardest case: the backbone has only seen photographs, and one of these images takes 70 bytes.
Prompts alone teach little here (62 % in 6.3 kB): the pack holds digits as codes of 24 bytes. How
many was chosen on digits held back from training, three students each: seven of each class, as
images of half of the backbone's size, reach 97.8 ± 0.7 % in 3.4 kB, where WebP files reach 90.8 ±
0.8 %; five of the whole size 95.0 ± 1.1 % in 2.9 kB (WebP 90.5 ± 0.7 %). Three students on the test
digits: the pack 96.3 ± 0.3 %, WebP files 91.9 ± 3.6 %, tiles of one AVIF picture 96.8 ± 0.9 %.
Digits are grey, and so are their images.
"""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d3pack.backbones import mini_directory
from d3pack.demo.page import render_demo
from d3pack.demo.photographs import rebuild_photographs
from d3pack.encode import EncodeSettings, encode
from d3pack.evaluate import PROTOCOLS, EvalSettings, Evaluation, Updates, evaluate, write_report
from d3pack.format import Pack
from d3pack.preview import Row
from d3pack.sources import open_source
from d3pack.system import Listener, replace_file, replace_folder, require

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_SHARE = 5  # every fifth image is kept for the test
UPDATES = 150  # of each student: half of what `quick` has
DIGITS = 7  # of each class
SETTINGS = EncodeSettings(
    images_per_class=DIGITS,
    codes=DIGITS,
    code_bits=12,
    code_tried=1,
    size=(32, 32),  # codes of smaller images come nearer; digits have 8x8 pixels
    backbone="mini",
    candidates=1,
    probes=1,
    teacher_samples=30_000,
)
EVALUATION = EvalSettings(
    seeds=1,
    size=16,  # the originals have 8x8 pixels, the decoded images 32x32
    baselines=("webp", "random"),
    allow_long=True,  # a busy machine takes longer, and says so
)


@dataclass(frozen=True, slots=True)
class Demo:
    """The files of the demo, and its figures."""

    pack: Pack
    evaluation: Evaluation
    files: tuple[Path, ...]
    seconds: float

    def sentence(self) -> str:
        """Return what happened, in one sentence."""
        return _sentence(self.pack, self.evaluation)

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


def _accuracies(evaluation: Evaluation) -> dict[str, float]:
    return {r.entry.key.split("-")[0]: r.last.mean for r in evaluation.results}


def _sentence(pack: Pack, evaluation: Evaluation) -> str:
    return (
        f"{len(pack)} handwritten digits became a file of {pack.ledger().total:,} bytes, and a"
        f" network that was trained only on what comes out of it reads"
        f" {_accuracies(evaluation)['pack']:.0%} of real digits."
    )


def _comparison(evaluation: Evaluation) -> str:
    accuracy = _accuracies(evaluation)
    return (
        f"As many bytes of WebP files make it {accuracy['webp']:.0%}, as many digits without loss"
        f" {accuracy['random']:.0%}. Digits are a hard case on purpose: the backbone has seen"
        " photographs only, and tiles of one AVIF picture teach as much or more."
    )


def write_digits(folder: Path) -> None:
    """Write scikit-learn's digits as PNG files: train/ and test/, a folder for each class.

    What else is in the folder stays.
    """
    digits = require("sklearn.datasets", "the demo").load_digits()
    files: dict[str, bytes] = {}
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if number % TEST_SHARE == 0 else "train"
        data = io.BytesIO()
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(data, "PNG")
        files[f"{split}/{NAMES[label]}/{number:04d}.png"] = data.getvalue()
    if folder.exists():
        for name, content in files.items():
            path = folder / name
            if not path.is_file() or path.read_bytes() != content:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_file(path, content)
        return
    with replace_folder(folder) as temporary:
        for name, content in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_bytes(content)


def run_demo(
    folder: Path,
    *,
    settings: EncodeSettings = SETTINGS,
    updates: int = UPDATES,
    view: Callable[[], AbstractContextManager[Listener]],
    say: Callable[[str], None],
) -> Demo:
    """Encode digits, evaluate the pack, rebuild photographs, and leave a page in `folder`.

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
    mini_directory()
    folder.mkdir(parents=True, exist_ok=True)
    digits = folder / "digits"
    say("1/4  real images: scikit-learn's digits, 8x8 pixels")
    write_digits(digits)
    source = open_source(digits)
    path, report, page = (folder / name for name in ("digits.d3m", "report.html", "index.html"))
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
    say("4/4  rebuilding photographs from a pack of CIFAR-10, and writing the page")
    write_report(evaluation, report)
    made = render_demo(
        _sentence(pack, evaluation),
        _comparison(evaluation),
        digit_sheets(evaluation),
        evaluation,
        rebuild_photographs(),
    )
    replace_file(page, made.encode())
    return Demo(pack, evaluation, (path, report, page), time.monotonic() - began)


def digit_sheets(evaluation: Evaluation) -> list[tuple[str, list[Row]]]:
    """Return a row for each digit, zero first: of real ones, and of what the pack rebuilds."""
    classes = evaluation.pack.classes
    order = sorted(range(len(classes)), key=lambda c: NAMES.index(classes[c]))
    return [
        (caption, [Row(classes[c], evaluation.images[title][c].cpu().numpy()) for c in order])
        for caption, title in (
            ("Real digits", "real images"),
            ("What the file gives back", "this pack"),
        )
    ]
