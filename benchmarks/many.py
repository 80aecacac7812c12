"""What workers cost and gain: Ray against one process, and two workers against one.

    OMP_NUM_THREADS=1 python -m benchmarks many photos/ --work WORK --classes 10 --codes 50
    python -m benchmarks many --plan

Every process has one thread. All runs make the same pack, or the benchmark fails. Prompts are class
names, so that the time is that of what shards divide finely: candidates and codes. `--plan` prints
hours of a large encoding instead, from measured counts and FLOP.
"""

from __future__ import annotations

import argparse
import re
import shutil
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.results import RESULTS, command, load, save
from d3pack.encode import D3MSettings, EncodeSettings, encode
from d3pack.sources import Source, open_source
from d3pack.system import Workers

WHAT = "Encoding by workers: what Ray costs with one, and what a second one gains."
FIRST, LAST = "make and judge candidates", "code photographs"

# The plan: what is assumed, since nothing was measured on a GPU.
CLASSES, IMAGES, CANDIDATES = 1000, 50, 8
PEAK, SHARE = 989.0, 0.3  # TFLOP/s of an H100 in bfloat16, without sparsity; how much is reached
PASSES = 3  # of the denoiser: forward and backward through frozen weights, and validation
READ = 100.0  # photographs of ImageNet that a core decodes a second
PHOTO = 110_000  # bytes of one
TEACHER_READS, POOL = 43, 512  # photographs of a class, for the teacher and for collages
SLOTS = 10  # prompts that are fitted together


def timed(source: Source, work: Path, name: str, call: dict[str, Any], workers: Any) -> Any:
    """Return the seconds of a run, those of the divided stages, and the pack."""
    folder = work / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    marks: dict[str, float] = {}

    def listen(event: dict[str, Any]) -> None:
        if event.get("stage") == FIRST and event["event"] == "stage":
            marks.setdefault("begin", time.perf_counter())
        if event.get("stage") == LAST and event["event"] in {"step", "stage-done"}:
            marks["end"] = time.perf_counter()

    began = time.perf_counter()
    encode(source, folder / "x.d3m", listeners=[listen], workers=workers, **call)
    whole = time.perf_counter() - began
    return whole, marks["end"] - marks["begin"], (folder / "x.d3m").read_bytes()


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Run all three, one after another, several times."""
    torch.set_num_threads(1)
    source = open_source(arguments.source, first=arguments.classes)
    settings = EncodeSettings(
        backbone=arguments.backbone,
        device="cpu",
        images_per_class=arguments.ipc + arguments.codes,
        codes=arguments.codes,
        candidates=CANDIDATES,
        guidance=2.5,
        method_settings=D3MSettings(steps=0, cool=0),
    )
    call = {"settings": settings, "teachers": arguments.work / "teachers"}
    runs = {"plain": None, "one": Workers(devices="1"), "two": Workers(devices="2")}
    if not (arguments.work / "teachers").exists():
        timed(source, arguments.work, "first", call, None)  # trains the teacher that all use
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    packs = set()
    for _ in range(arguments.rounds):
        for name, workers in runs.items():
            whole, stages, pack = timed(source, arguments.work, name, call, workers)
            seconds[name].append((round(whole, 2), round(stages, 2)))
            packs.add(pack)
            print(f"{name}: {whole:.1f} s, {stages:.1f} s of candidates and codes", flush=True)
    if len(packs) > 1:
        raise SystemExit("the packs differ")
    whole = {name: median(run[0] for run in runs) for name, runs in seconds.items()}
    stages = {name: median(run[1] for run in runs) for name, runs in seconds.items()}
    return {
        "classes": len(source.classes),
        "seeded": arguments.ipc,
        "codes": arguments.codes,
        "candidates": CANDIDATES,
        "shards": {"one": min(4, len(source.classes)), "two": min(8, len(source.classes))},
        "seconds": {"whole": whole, "candidates and codes": stages},
        "rounds": seconds,
        "overhead": round(whole["one"] / whole["plain"] - 1, 4),
        "overhead_after_start": round(stages["one"] / stages["plain"] - 1, 4),
        "gain": round(stages["one"] / stages["two"], 3),
    }


def flops(backbone: str) -> tuple[float, float]:
    """Return TFLOP of a pass and of an image, as the guide to backbones counts them."""
    guide = Path(__file__).parent.parent / "docs" / "guides" / "backbone.md"
    for line in guide.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if cells[0] == backbone and (pair := re.fullmatch(r"([\d.]+), ([\d.]+)", cells[7])):
            return float(pair[1]), float(pair[2])
    raise SystemExit(f"no row {backbone!r} in {guide.name}")


def samples_each() -> float:
    """Return the samples from which the prompt of a class was learned, as it was measured."""
    figures = load("encode")
    if "sets" not in figures:  # the result of before
        return float(figures["ours_all_classes"]["samples"] / len(figures["classes"]))
    first = figures["sets"]["first"]
    return float(first["ours_all_classes"]["samples"] / first["source"]["classes"])


def rounds(units: int, workers: int) -> float:
    """Return the share of an even division that workers need for equal units: 1 or more."""
    return -(-units // workers) * workers / units


def hours(backbone: str, gpus: int) -> dict[str, float]:
    """Return hours of each stage on so many GPUs, each with a core that reads."""
    each, image = flops(backbone)
    rate = PEAK * SHARE * 3600
    reading = 3600 * READ
    groups = CLASSES // SLOTS
    return {
        "teacher, read by one shard": CLASSES * TEACHER_READS / reading,
        "collages, read": CLASSES * POOL / reading / gpus * rounds(groups, gpus),
        "prompts": CLASSES * samples_each() * PASSES * each / rate / gpus * rounds(groups, gpus),
        "candidates": CLASSES * IMAGES * CANDIDATES * image / rate / gpus,
        "decode of the pack": CLASSES * IMAGES * image / rate / gpus,
    }


def plan() -> str:
    """Return the hours as a table."""
    names, sizes = ("Stable Diffusion 1.5", "PRX 256"), (8, 64)
    columns = [(name, gpus, hours(name, gpus)) for name in names for gpus in sizes]
    lines = [
        "| stage | " + " | ".join(f"{name}, {gpus} GPUs" for name, gpus, _ in columns) + " |",
        "|---|" + "---:|" * len(columns),
    ]
    for stage in columns[0][2]:
        cells = " | ".join(f"{values[stage]:.2f} h" for _, _, values in columns)
        lines.append(f"| {stage} | {cells} |")
    totals = " | ".join(f"{sum(values.values()):.2f} h" for _, _, values in columns)
    return "\n".join([*lines, f"| all | {totals} |"])


def main(arguments: list[str]) -> None:
    """Measure, or print the plan."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks many", description=WHAT)
    parser.add_argument("source", nargs="?", help="real images")
    parser.add_argument("--work", type=Path, default=Path("many-work"), help="folder to work in")
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--classes", type=int, default=10)
    parser.add_argument("--ipc", type=int, default=10, help="seeded images of a class")
    parser.add_argument("--codes", type=int, default=50, help="coded images of a class")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plan", action="store_true", help="print hours of ImageNet-1k")
    chosen = parser.parse_args(arguments)
    if chosen.plan:
        print(plan())
        return
    if chosen.source is None:
        parser.error("name the real images, or --plan")
    save(RESULTS / "many.json", WHAT, command("many", arguments), measure(chosen))
