"""Put the figures of the README where they belong, from the committed results alone.

python benchmarks/readme.py        # a test fails while README and results differ
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
BLOCK = re.compile(r"<!-- results -->.*<!-- /results -->", re.DOTALL)


def load(name: str) -> dict[str, Any]:
    data: dict[str, Any] = json.loads((HERE / "results" / f"{name}.json").read_text("utf-8"))
    return data


def worth() -> str:
    """The example pack beside its baselines."""
    data = load("example-cifar10")
    facts, ledger = data["facts"], data["ledger"]
    rows = []
    for arm in data["arms"]:
        nbytes = "-" if arm["bytes"] is None else f"{arm['bytes']:,.0f} B"
        mean, std = 100 * arm["last"]["mean"], 100 * arm["last"]["std"]
        images = arm["runs"][0]["images"]
        rows.append(f"| {arm['title']} | {images:,} | {nbytes} | {mean:.1f} ± {std:.1f} % |")
    head = "| a student trained on | images | bytes | reads real CIFAR-10 |\n|---|---:|---:|---:|"
    return (
        "[`examples/cifar10.d3m`](examples/cifar10.d3m) on `mini`, which was trained on other"
        f" photographs; students are {facts['student']}, {facts['updates']} updates, preset"
        f" `{data['preset']['name']}`, {facts['seeds']} seeds, {facts['test_images']:,} real test"
        f" images, chance 10 %:\n\n{head}\n" + "\n".join(rows) + "\n\n"
        f"Beside each pack stands the backbone, {ledger['backbone'] / 1e6:.1f} MB, shared by all"
        f" packs; decoding took {data['decode_seconds']:.0f} s here. `d3pack eval` makes this"
        " table for your pack, with a page to look at."
    )


def mini() -> str:
    """What the embedded backbone can do."""
    data = load("backbone")
    best = max(data["by_guidance"], key=lambda row: row["recognised_share"]["top1"])
    share = best["recognised_share"]
    return (
        "`mini` itself: of images made from bare class names a classifier recognises"
        f" {100 * share['top1']:.0f} % (top-1) and {100 * share['top5']:.0f} % (top-5) as often as"
        f" of real ones, among 202 classes; its autoencoder reaches"
        f" {data['autoencoder_psnr']:.1f} dB; one core decodes"
        f" {data['decode']['images_per_s']:.0f} images a second at 12 guided steps; all of it"
        f" weighs {data['weights_bytes'] / 1e6:.1f} MB."
    )


def sizes() -> str:
    """What a pack weighs."""
    data = load("format")["sizes"]
    f16, i4 = (data[f"1000_classes_{codec}"]["bytes"] for codec in ("f16", "i4"))
    return (
        "A pack of 1000 classes with one vector of 768 values each weighs"
        f" {f16:,} bytes in f16 and {i4:,} in i4, however many images it makes."
    )


def results() -> str:
    """The whole block."""
    body = "\n\n".join((worth(), mini(), sizes()))
    return f"<!-- results -->\n{body}\n<!-- /results -->"


if __name__ == "__main__":
    text = README.read_text("utf-8")
    README.write_text(BLOCK.sub(lambda _: results(), text), "utf-8")
