"""What decoding costs, and that it is exact.

    python -m benchmarks decode all [-o RESULTS.json]

speed      images a second against the diffusers pipeline at its best batch size, alternating
equality   differing bytes over batch sizes, shuffles, thread counts, processes, order of first use
memory     peak memory against the number of images
linear     seconds against images and steps
cold       the first image of a fresh process, and where the time goes

Both families run: the embedded `mini` (or, with --backbone, any Stable Diffusion layout), and a DiT
of the same order of size with random weights, made on the spot. Wall time is what people wait for;
CPU seconds are given beside it, because they stay the same when a machine is shared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tiny_backbones
import torch

from benchmarks.results import RESULTS, command, load, save
from d3pack import Pack, read, write
from d3pack.decode import Decoder

WHAT = (__doc__ or "").partition("\n")[0]

STEPS, GUIDANCE, GROUP = 15, 3.0, 16
BATCHES = (8, 16, 32, 64)


def dit(path: Path) -> Path:
    """A DiT of 6 M parameters over 8x8x4 latents, in the layout of the published ones."""
    from diffusers import AutoencoderKL, DiTTransformer2DModel

    tiny_backbones.tiny_dit(path)  # its scheduler
    torch.manual_seed(0)
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=48,
        in_channels=4,
        out_channels=8,
        num_layers=8,
        attention_bias=True,
        sample_size=8,
        patch_size=1,
        num_embeds_ada_norm=1000,  # the pipeline takes 1000 for no class
    )
    for block in model.transformer_blocks[1:]:
        block.norm1.emb.load_state_dict(model.transformer_blocks[0].norm1.emb.state_dict())
    model.save_pretrained(path / "transformer")
    AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    ).save_pretrained(path / "vae")
    return path


def packs(
    folder: Path, backbone: str, group: int = GROUP, steps: int = STEPS
) -> dict[str, tuple[str, Path]]:
    """Backbone and pack file of each family."""
    made = {}
    for name, where in (("stable-diffusion", backbone), ("dit", str(dit(folder / "dit")))):
        pack = tiny_backbones.tiny_pack(
            where, classes=10, images=1000, steps=steps, guidance=GUIDANCE, group=group
        )
        file = folder / f"{name}.d3m"
        write(pack, file)
        made[name] = (where, file)
    return made


def opened(where: str, file: Path, **more: Any) -> tuple[Pack, Decoder]:
    pack = read(file)
    return pack, Decoder(pack, path=None if where == "mini" else where, **more)


def pipeline(name: str, where: str) -> Callable[[int], Any]:
    """The diffusers pipeline of a family, asked for tensors: the cheapest thing it can return."""
    from diffusers import (
        AutoencoderKL,
        AutoencoderTiny,
        DDIMScheduler,
        DiTPipeline,
        DiTTransformer2DModel,
        DPMSolverMultistepScheduler,
        StableDiffusionPipeline,
        UNet2DConditionModel,
    )

    from d3pack.backbones import mini_directory

    root = mini_directory() if where == "mini" else Path(where)
    kind = json.loads((root / "vae/config.json").read_text())["_class_name"]
    vae = {"AutoencoderKL": AutoencoderKL, "AutoencoderTiny": AutoencoderTiny}[kind]
    vae = vae.from_pretrained(root / "vae")
    betas = DDIMScheduler.from_pretrained(root / "scheduler").config
    scheduler = DPMSolverMultistepScheduler.from_config(betas, timestep_spacing="trailing")
    if name == "dit":
        made: Any = DiTPipeline(
            DiTTransformer2DModel.from_pretrained(root / "transformer"), vae, scheduler
        )
        made.set_progress_bar_config(disable=True)
        return lambda batch: made(
            [i % 10 for i in range(batch)],
            guidance_scale=GUIDANCE,
            num_inference_steps=STEPS,
            output_type="np",
        )
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(root / "text_encoder").float()
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
    tokenizer.model_max_length = encoder.config.max_position_embeddings
    made = StableDiffusionPipeline(
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        unet=UNet2DConditionModel.from_pretrained(root / "unet"),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    made.set_progress_bar_config(disable=True)
    return lambda batch: made(
        ["a photo of a goldfish"] * batch,
        guidance_scale=GUIDANCE,
        num_inference_steps=STEPS,
        output_type="pt",
    )


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), time.process_time()
    call()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(folder: Path, backbone: str, rounds: int) -> dict[str, Any]:
    """Least seconds per image of `rounds` alternating turns, ours and theirs at each batch size."""
    found = {}
    for name, (where, file) in packs(folder, backbone).items():
        turns: dict[str, Callable[[], Any]] = {}  # each decodes `images[turn]` images
        pipe = pipeline(name, where)
        for batch in BATCHES:
            turns[f"pipeline {batch}"] = partial(pipe, batch)
        _, exact = opened(where, file)
        count = 2 * GROUP
        turns["exact"] = partial(exact.images, range(count))
        _, fast = opened(where, file, numerics="fast", switches=["bf16"])
        turns["fast bf16"] = partial(fast.images, range(count))
        images = {t: int(t.split()[1]) if t.startswith("pipe") else count for t in turns}
        best = {turn: (float("inf"), float("inf")) for turn in turns}
        for _ in range(rounds):
            for turn, call in turns.items():
                took = timed(call)
                best[turn] = (min(best[turn][0], took[0]), min(best[turn][1], took[1]))
        rates = {
            turn: {
                "images_per_second": round(images[turn] / wall, 3),
                "images_per_cpu_second": round(images[turn] / cpu, 3),
            }
            for turn, (wall, cpu) in best.items()
        }
        theirs = [r for t, r in rates.items() if t.startswith("pipeline")]
        ratio = {
            unit: round(rates["exact"][unit] / max(r[unit] for r in theirs), 3)
            for unit in ("images_per_second", "images_per_cpu_second")
        }
        found[name] = {"rates": rates, "exact_over_best_pipeline": ratio, "rounds": rounds}
        print(name, json.dumps(found[name], indent=1), file=sys.stderr)
    return found


def equality(folder: Path, backbone: str) -> dict[str, Any]:
    """Differing bytes of packs of few steps and small groups."""
    found = {}
    for name, (where, file) in packs(folder, backbone, group=4, steps=4).items():
        found[name] = compared(where, file)
        exact = "exact" if found[name]["exact"] else "DIFFERS"
        print(name, exact, found[name]["differing_bytes"], file=sys.stderr)
    return found


def compared(where: str, file: Path) -> dict[str, Any]:
    """Differing bytes of every way to ask for the same 80 images of a pack."""
    _, decoder = opened(where, file)
    numbers = np.array([c * 1000 + i for c in range(10) for i in range(8)])
    wanted = decoder.images(numbers)
    generator = np.random.default_rng(0)
    table: list[dict[str, Any]] = []
    before = torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        for batch in (1, 2, 3, 4, 5, 7, 8, 9, 12, 16, 24, 31, 32, 48, 64):
            order = generator.permutation(len(numbers))[:batch]
            differ = int((decoder.images(numbers[order]) != wanted[order]).sum())
            table.append({"threads": threads, "batch": batch, "differing_bytes": differ})
    torch.set_num_threads(before)
    for first in (79, 40, 11):  # a decoder of its own for each order of first use
        _, fresh = opened(where, file)
        order = np.roll(np.arange(len(numbers)), -first)
        differ = int((fresh.images(numbers[order]) != wanted[order]).sum())
        table.append({"first_use": first, "differing_bytes": differ})
    here = hashlib.sha256(wanted.numpy().tobytes()).hexdigest()
    for threads in (1, 2):
        again = _digest_of_process(where, file, threads)
        table.append({"process_with_threads": threads, "same_sha256": again == here})
    total = sum(row.get("differing_bytes", 0) for row in table)
    exact = total == 0 and all(row.get("same_sha256", True) for row in table)
    return {"exact": exact, "differing_bytes": total, "sha256": here, "table": table}


def _digest_of_process(where: str, file: Path, threads: int) -> str:
    words = ["-m", "benchmarks", "decode", "digest", where, str(file), str(threads)]
    run = subprocess.run(
        [sys.executable, *words],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    return run.stdout.strip()


def digest(where: str, file: str, threads: str) -> None:
    """The same 80 images in another process, shuffled, in batches of 13."""
    torch.set_num_threads(int(threads))
    _, decoder = opened(where, Path(file))
    numbers = np.array([c * 1000 + i for c in range(10) for i in range(8)])
    images = torch.empty(80, 3, *read(file).recipe.size, dtype=torch.uint8)
    for rows in torch.randperm(80).split(13):
        images[rows] = decoder.images(numbers[rows.numpy()])
    print(hashlib.sha256(images.numpy().tobytes()).hexdigest())


PEAK = """
import resource, sys
from pathlib import Path
sys.path[:0] = {paths!r}
from benchmarks import decode
pack, decoder = decode.opened({where!r}, Path({file!r}))
total = 0
for _, images in decoder.stream(range({count})):
    total += len(images)
print(total, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory(folder: Path, backbone: str) -> dict[str, Any]:
    """Peak resident kilobytes of a process that streams so many images in groups of 4."""
    found: dict[str, Any] = {}
    for name, (where, file) in packs(folder, backbone, group=4, steps=1).items():
        found[name] = {}
        for count in (32, 128, 512):
            code = PEAK.format(paths=sys.path, where=where, file=str(file), count=count)
            run = subprocess.run(
                [sys.executable, "-c", code], capture_output=True, text=True, check=True
            )
            found[name][str(count)] = int(run.stdout.split()[1])
        print(name, found[name], file=sys.stderr)
    return found


def linear(folder: Path, backbone: str, rounds: int) -> dict[str, Any]:
    """CPU seconds for images x steps in groups of 4; least of `rounds`."""
    found: dict[str, Any] = {}
    for name, (where, _) in packs(folder, backbone).items():
        rows = []
        for steps in (4, 8, 16):
            pack = tiny_backbones.tiny_pack(
                where, classes=2, images=100, steps=steps, guidance=GUIDANCE, group=4
            )
            decoder = Decoder(pack, path=None if where == "mini" else where)
            decoder.images(range(4))
            for count in (4, 8, 16):
                took = min(timed(partial(decoder.images, range(count)))[1] for _ in range(rounds))
                rows.append({"steps": steps, "images": count, "cpu_seconds": round(took, 4)})
        x = np.array([[r["images"], r["images"] * r["steps"]] for r in rows], dtype=float)
        y = np.array([r["cpu_seconds"] for r in rows])
        fit, *_ = np.linalg.lstsq(x, y, rcond=None)
        off = np.abs(x @ fit - y) / y
        found[name] = {
            "rows": rows,
            "seconds_per_image": round(float(fit[0]), 5),
            "seconds_per_image_step": round(float(fit[1]), 5),
            "largest_relative_error": round(float(off.max()), 4),
        }
        print(name, found[name], file=sys.stderr)
    return found


COLD = """
import json, sys, time
marks = [("start", time.perf_counter(), time.process_time())]
def mark(name):
    marks.append((name, time.perf_counter(), time.process_time()))
import torch
mark("import torch")
from d3pack import read
from d3pack.decode import Decoder
mark("import d3pack")
pack = read({file!r})
decoder = Decoder(pack, path={path!r})
mark("verify and load")
decoder.images([0])
mark("first group")
decoder.images([1])
mark("second group")
print(json.dumps([[b[0], b[1] - a[1], b[2] - a[2]] for a, b in zip(marks, marks[1:])]))
"""


def cold(folder: Path, backbone: str, rounds: int) -> dict[str, Any]:
    """A fresh process up to its first image, groups of 8; the run with the least wall time."""
    where, file = packs(folder, backbone, group=8)["stable-diffusion"]
    code = COLD.format(file=str(file), path=None if where == "mini" else where)
    best: dict[str, Any] = {}
    for _ in range(rounds):
        started = time.perf_counter()
        run = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        whole = time.perf_counter() - started
        parts = json.loads(run.stdout)
        first = [p for p in parts if p[0] != "second group"]
        wall = sum(p[1] for p in first)
        if not best or wall < best["first_image_seconds"]:
            best = {
                "first_image_seconds": round(wall, 3),
                "first_image_cpu_seconds": round(sum(p[2] for p in first), 3),
                "process_seconds": round(whole, 3),
                "parts": {p[0]: {"wall": round(p[1], 3), "cpu": round(p[2], 3)} for p in parts},
            }
    print(json.dumps(best, indent=1), file=sys.stderr)
    return best


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["digest"]:
        digest(*arguments[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["speed", "equality", "memory", "linear", "cold", "all"])
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args(arguments)
    output = given.output or RESULTS / "decode.json"
    result = load(output)
    jobs: dict[str, Callable[[Path], dict[str, Any]]] = {
        "speed": lambda folder: speed(folder, given.backbone, given.rounds),
        "equality": lambda folder: equality(folder, given.backbone),
        "memory": lambda folder: memory(folder, given.backbone),
        "linear": lambda folder: linear(folder, given.backbone, given.rounds),
        "cold": lambda folder: cold(folder, given.backbone, given.rounds),
    }
    for name in jobs if given.what == "all" else [given.what]:
        with tempfile.TemporaryDirectory() as folder:
            result[name] = {
                "backbone": given.backbone if given.backbone == "mini" else "a directory",
                "result": jobs[name](Path(folder)),
            }
        save(output, WHAT, command("decode", arguments), result)
