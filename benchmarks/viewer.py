"""How fast the viewer is in Chromium, and how far its images are from the exact decoder's.

    python -m benchmarks viewer --rounds 3

Needs Chromium, Node.js and the viewer built with its networks: `viewer/README.md`. Every round
starts a browser, so nothing is left from the one before. `ready` counts from the page's opening,
`first image` from the verified pack, so it has the loading of the networks; the rate is that of
the images after the first, while the other workers load. All times are those that the page sees.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from viewer_pages import served

import d3pack
from benchmarks.results import RESULTS, command, save

WHAT = (__doc__ or "").partition("\n")[0]
ROOT = Path(__file__).resolve().parents[1]
VIEWER = ROOT / "viewer"
EXAMPLE = ROOT / "examples" / "cifar10.d3m"
SIX_KB = ROOT / "spec" / "vectors" / "valid" / "labels-topk-bits.d3m"  # 5,991 bytes


def visit(pack: Path, browser: str, *options: str) -> dict[str, Any]:
    """Open a pack in a new browser; return what was seen."""
    script = ["node", "tests/page.mjs", "--chromium", browser, *options]
    with served(pack) as address:
        done = subprocess.run([*script, address], cwd=VIEWER, stdout=subprocess.PIPE, check=True)
    seen: dict[str, Any] = json.loads(done.stdout)
    if seen["problems"]:
        raise SystemExit(f"the page reported {seen['problems']}")
    return seen


def one_round(browser: str, images: int) -> dict[str, float]:
    """Return the times of one visit, and the distance of its images in levels of 8 bits."""
    with tempfile.TemporaryDirectory() as folder:
        pixels = Path(folder) / "pixels.json"
        options = ("--images", str(images), "--pixels", str(pixels))
        times = visit(EXAMPLE, browser, *options)["timings"]
        made: dict[str, list[int]] = json.loads(pixels.read_text(encoding="utf-8"))
    with d3pack.Decoder(d3pack.read(EXAMPLE), device="cpu") as decoder:
        exact = decoder.images([(int(c), int(j)) for c, j in map(str.split, made)])
    gap = np.abs(exact.flatten(1).numpy().astype(int) - np.array(list(made.values())))
    seconds = (times["lastImage"] - times["firstImage"]) / 1000
    return {
        "ready_ms": round(times["ready"]),
        "verify_ms": round(visit(SIX_KB, browser)["timings"]["verify"], 1),
        "first_image_s": round(times["firstImage"] / 1000, 2),
        "images_per_second": round((len(made) - 1) / seconds, 2),
        "worst_pixel": int(gap.max()),
        "mean_pixel": round(float(gap.mean()), 5),
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--images", type=int, default=80, help="that the page makes by itself")
    parser.add_argument("--conditions", default="", help="what else ran, for the record")
    parser.add_argument("--output", type=Path, default=RESULTS / "viewer.json")
    args = parser.parse_args(arguments)
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        raise SystemExit("there is no Chromium")
    rounds = []
    for _ in range(args.rounds):
        load = round(os.getloadavg()[0], 2)
        rounds.append(one_round(browser, args.images) | {"load_before": load})
        print(rounds[-1], flush=True)
    version = subprocess.run([browser, "--version"], capture_output=True, text=True, check=True)
    figures = {
        "conditions": args.conditions,
        "browser": version.stdout.strip(),
        "images": args.images,
        "pack_bytes": EXAMPLE.stat().st_size,
        "verified_bytes": SIX_KB.stat().st_size,
        "rounds": rounds,
    }
    save(args.output, WHAT, command("viewer", arguments), figures)
