"""The whole product in a few minutes: real digits to a pack, and what the pack is worth.

Everything here goes through the public verbs' own code; nothing is prepared in advance. Digits are
the hardest case: the backbone has only seen photographs, and one of these images weighs 70 bytes.
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

from d3pack.encode import EncodeOptions, encode
from d3pack.evaluate.evaluation import EvalOptions, Evaluation, evaluate
from d3pack.evaluate.presets import QUICK, Updates
from d3pack.evaluate.real import RealImages
from d3pack.evaluate.report import render
from d3pack.evaluate.workdir import Workdir
from d3pack.format.pack import Pack
from d3pack.preview import Row, contact_sheet
from d3pack.sources import Source, open_source
from d3pack.system import replace_file, require
from d3pack.system.events import Listener

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEST_SHARE = 5  # every fifth image is kept for the test
SIDE = 16  # pixels at which the students see the 8x8 originals and the 64x64 decoded images
OPTIONS = EncodeOptions(
    images_per_class=20,
    backbone="mini",
    vectors=4,
    codec="i4",
    candidates=4,
    guidance=4.0,  # what measuring gives for things that mini has never seen; spares half a minute
    probes=2,
    teacher_samples=30_000,
)
PRESET = replace(QUICK, length=Updates(150))


@dataclass(frozen=True, slots=True)
class Demo:
    """What the demo leaves behind, and what it found."""

    pack: Pack
    evaluation: Evaluation
    files: tuple[Path, ...]
    seconds: float

    def sentence(self) -> str:
        """What happened, in one sentence."""
        size = self.pack.ledger().total
        accuracy = {result.arm.key.split("-")[0]: result for result in self.evaluation.results}
        parts = [
            f"{len(self.pack)} images of 10 classes travel in {size:,} bytes; a student that never "
            f"saw a real image reads {accuracy['pack'].last.mean:.0%} of real digits"
        ]
        if "webp" in accuracy:
            parts.append(f"{accuracy['webp'].last.mean:.0%} after as many bytes of real images")
        if "names" in accuracy:
            parts.append(
                f"{accuracy['names'].last.mean:.0%} after images prompted by bare class names"
            )
        return (
            ", ".join(parts)
            + ". Digits are a hard case on purpose: the backbone knows photographs only."
        )

    def to_json(self) -> dict[str, Any]:
        """The figures."""
        return {
            "root": self.pack.root,
            "bytes": self.pack.ledger().total,
            "images": len(self.pack),
            "accuracy": {r.arm.key: r.last.mean for r in self.evaluation.results},
            "seconds": round(self.seconds, 1),
            "files": [path.name for path in self.files],
        }


def write_digits(folder: Path) -> None:
    """scikit-learn's digits as a tree of PNG files: train/ and test/, a folder a class."""
    digits = require("sklearn.datasets", "the demo").load_digits()
    for number, (pixels, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        split = "test" if number % TEST_SHARE == 0 else "train"
        path = folder / split / NAMES[label] / f"{number:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.round(pixels * (255 / 16)).astype(np.uint8)).save(path)


def run_demo(
    folder: Path,
    *,
    options: EncodeOptions = OPTIONS,
    updates: int = PRESET.units(0),
    view: Callable[[], AbstractContextManager[Listener]],
    say: Callable[[str], None],
) -> Demo:
    """Encode digits, rebuild them, train students, and leave pack, sheet and report in `folder`."""
    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    digits = folder / "digits"
    say("1/4  real images: scikit-learn's digits, 8x8 pixels")
    write_digits(digits)
    source = open_source(digits)
    path = folder / "digits.d3m"
    say("2/4  learning a prompt for each digit")
    with view() as listener:
        pack = encode(source, options, path, listeners=[listener], overwrite=True)
    say(f"     {path.name}: {pack.ledger().total:,} bytes for {len(pack)} images")
    say("3/4  training students on the pack and on real images of equal weight")
    result = evaluate(
        pack,
        RealImages(source, pack.classes, SIDE, "training"),
        RealImages(open_source(digits, split="test"), pack.classes, SIDE, "test"),
        EvalOptions(replace(PRESET, length=Updates(updates)), seeds=1, baselines=("webp", "names")),
        Workdir(folder / "students"),
        report=lambda text: say(f"     {text}"),
    )
    say("4/4  writing sheet and report")
    sheet, report = folder / "sheet.png", folder / "report.html"
    picture = io.BytesIO()
    drawn = contact_sheet(rows(source, result), captions=("real", "", "", "", "rebuilt"))
    drawn.save(picture, "PNG")
    replace_file(sheet, picture.getvalue())
    replace_file(report, render(result, name=path.name).encode())
    return Demo(pack, result, (path, sheet, report), time.monotonic() - began)


def rows(source: Source, result: Evaluation, each: int = 4) -> Sequence[Row]:
    """Real digits on the left, rebuilt ones on the right."""
    side = result.sheets.pack.shape[-1]
    found = []
    for c, name in enumerate(result.pack.classes):
        real = [
            source.load(c, i).resize((side, side), Image.Resampling.BICUBIC) for i in range(each)
        ]
        left = np.stack([np.asarray(image.convert("RGB")).transpose(2, 0, 1) for image in real])
        right = result.sheets.pack[c, :each].cpu().numpy()
        found.append(Row(name, np.concatenate([left, right])))
    return found
