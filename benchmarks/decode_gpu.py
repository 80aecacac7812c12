"""What decoding does on a GPU: equality, speed and memory, in ten minutes.

    python -m benchmarks decode_gpu [-o RESULTS.json]

equality   differing bytes over batches of 1 to 64, shuffles, two processes and the order of first
           use: `mini` and a DiT of its size, in float32 and bfloat16
peak       what bfloat16 matrix products reach here: the measure of the next two
speed      Stable Diffusion 1.5 at 512 px and DiT-XL/2 at 256 px with random weights: images a
           second exactly and fast, the share of the peak, memory against the number of images
compile    the same with the switch `compile`

Results are written after every part. `--device cpu --tiny` runs the same code on small things.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tiny_backbones
import torch
from full_backbones import full_dit, full_sd
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import decode
from benchmarks.results import RESULTS, command, load, save
from d3pack import Pack, write
from d3pack.backbones import open_backbone
from d3pack.decode import Decoder, choose_numerics

WHAT = (__doc__ or "").partition("\n")[0]

DTYPES = ("float32", "bfloat16")
PARTS = ("equality", "peak", "speed", "compile")


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    batches: tuple[int, ...] = tuple(range(1, 65))
    images: int = 8  # of each of the ten classes whose bytes are compared
    matrices: tuple[int, ...] = (4096, 8192, 16384)
    products: int = 20
    group: int = 16
    steps: int = 10
    rounds: int = 3
    groups: tuple[int, ...] = (1, 2, 8)  # groups decoded while memory is watched


TINY = Size((1, 3, 5), 1, (64, 128), 2, 4, 2, 1, (1, 2))


def seconds(device: torch.device, call: Callable[[], Any]) -> float:
    """Time until the device has done it."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        return time.perf_counter() - start
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    began.record()
    call()
    ended.record()
    torch.cuda.synchronize(device)
    return float(began.elapsed_time(ended)) / 1000


def peak(device: torch.device, size: Size) -> dict[str, Any]:
    """Floating point operations a second of large bfloat16 matrix products."""
    found = {}
    for n in size.matrices:
        a, b = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)

        def products(a: Any = a, b: Any = b, out: Any = out) -> None:
            for _ in range(size.products):
                torch.mm(a, b, out=out)

        took = min(seconds(device, products) for _ in range(3))
        found[str(n)] = 2 * n**3 * size.products / took
    return {"flops_per_second": max(found.values()), "by_matrix": found}


def digests(device: str, sources: str) -> None:
    """All images of each pack in this process, shuffled, in batches of 13: their sha256."""
    found = {}
    for name, (where, file) in json.loads(sources).items():
        pack, decoder = decode.opened(where, Path(file), device=device)
        count = len(decoder)
        images = torch.empty(count, 3, *pack.recipe.size, dtype=torch.uint8)
        for rows in torch.randperm(count).split(13):
            images[rows] = decoder.images(rows.tolist()).cpu()
        found[name] = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    print(json.dumps(found))


def equality(folder: Path, device: torch.device, size: Size, tiny: bool) -> dict[str, Any]:
    """Differing bytes of every way to ask for the same images; few steps, small groups."""
    homes = {
        "stable-diffusion": str(tiny_backbones.tiny_sd(folder / "sd")) if tiny else "mini",
        "dit": str((tiny_backbones.tiny_dit if tiny else decode.dit)(folder / "dit")),
    }
    sources = {}
    for (name, where), dtype in product(homes.items(), DTYPES):
        pack = tiny_backbones.tiny_pack(
            where, classes=10, images=size.images, steps=4, group=8, guidance=3.0, dtype=dtype
        )
        file = folder / f"{name}-{dtype}.d3m"
        write(pack, file)
        sources[f"{name} {dtype}"] = (where, str(file))
    words = [
        sys.executable,
        "-m",
        "benchmarks",
        "decode_gpu",
        "digests",
        str(device),
        json.dumps(sources),
    ]
    others = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    found = {
        name: compared(where, Path(file), device, size) for name, (where, file) in sources.items()
    }
    there = [json.loads(other.communicate()[0]) for other in others]
    for name, row in found.items():
        row["same_in_two_processes"] = [sha[name] == row["sha256"] for sha in there]
        differing = row["differing_bytes_batches"] + row["differing_bytes_first_use"]
        row["exact"] = differing == 0 and all(row["same_in_two_processes"])
        print(name, row, file=sys.stderr)
    return found


def compared(where: str, file: Path, device: torch.device, size: Size) -> dict[str, Any]:
    """One pack in this process."""
    _, decoder = decode.opened(where, file, device=device)
    wanted = decoder.images(range(len(decoder)))
    generator = np.random.default_rng(0)
    batches = 0
    for batch in size.batches:
        order = generator.permutation(len(wanted))[:batch]
        batches += int((decoder.images(order) != wanted[order]).sum())
    first_use = 0
    for first in (len(wanted) - 1, len(wanted) // 2, 3):
        _, fresh = decode.opened(where, file, device=device)
        order = np.roll(np.arange(len(wanted)), -first)
        first_use += int((fresh.images(order) != wanted[order]).sum())
    return {
        "images": len(wanted),
        "distinct_images": len({image.cpu().numpy().tobytes() for image in wanted}),
        "batches": [min(size.batches), max(size.batches)],
        "differing_bytes_batches": batches,
        "differing_bytes_first_use": first_use,
        "sha256": hashlib.sha256(wanted.cpu().numpy().tobytes()).hexdigest(),
    }


def operations(call: Callable[[], Any]) -> int:
    """Floating point operations of a call, two for a multiplication with its addition."""
    eager = torch.compiler.set_stance("force_eager")  # a compiled kernel does not say what it does
    with eager, FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def memory(decoder: Decoder, groups: int) -> int:
    """The most bytes in use while so many groups are streamed; of the process on a CPU."""
    cuda = decoder.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(decoder.device)
    for _ in decoder.stream(range(groups * decoder.group)):
        pass
    if cuda:
        return int(torch.cuda.max_memory_allocated(decoder.device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rate(decoder: Decoder, size: Size, most: float) -> dict[str, Any]:
    """Images a second and the share of the peak: of a whole decode, and of its two models."""
    group, backbone = decoder.group, decoder.backbone

    def whole() -> torch.Tensor:
        return decoder.images(range(group))

    whole()  # conditions, kernels
    x = torch.randn(2 * group, *decoder.latent_shape, device=decoder.device)
    condition = backbone.unconditional().expand(2 * group)
    sigma = decoder.pack.recipe.sigmas[0]
    calls: dict[str, Callable[[], Any]] = {
        "whole": whole,
        "denoiser": lambda: backbone.denoise(x, sigma, condition),
        "autoencoder": lambda: backbone.decode(x[:group]),
    }
    found: dict[str, Any] = dict(decoder.describe())
    for name, call in calls.items():
        with torch.inference_mode():
            call()
            took = min(seconds(decoder.device, call) for _ in range(size.rounds))
            flops = operations(call)
        found[name] = {"seconds": took, "flops": flops, "share_of_peak": flops / took / most}
    found["images_per_second"] = group / found["whole"]["seconds"]
    return found


def family(
    root: Path, device: torch.device, size: Size, most: float, switches: list[str] | None
) -> dict[str, Any]:
    """One backbone: exact in both dtypes and fast; or, with switches, fast by them."""
    shared = open_backbone(str(root), device=device, dtype=torch.bfloat16)
    pack: Pack = tiny_backbones.tiny_pack(
        root,
        classes=4,
        images=1000,
        steps=size.steps,
        guidance=3.0,
        group=size.group,
        dtype="bfloat16",
        backbone=shared,
    )
    found: dict[str, Any] = {}
    if switches is None:
        single = replace(pack, recipe=replace(pack.recipe, dtype="float32"))
        for name, exact in (
            ("exact bfloat16", Decoder(pack, backbone=shared, device=device)),
            ("exact float32", Decoder(single, path=root, device=device)),
        ):
            numbers = list(range(exact.group))
            once, again = exact.images(numbers), exact.images(numbers[::-1]).flip(0)
            found[name] = {
                **rate(exact, size, most),
                "differing_bytes_reversed": int((once != again).sum()),
            }
            exact.close()
    del shared
    gc.collect()
    with Decoder(pack, path=root, device=device, numerics="fast", switches=switches) as fast:
        found["fast"] = rate(fast, size, most)
        found["fast"]["peak_bytes"] = {str(n * fast.group): memory(fast, n) for n in size.groups}
    return found


def sized(
    folder: Path, device: torch.device, size: Size, tiny: bool, most: float, compiled: bool
) -> dict[str, Any]:
    """Both families at full size, through the code that opens everything else."""
    makes = {
        "stable-diffusion": tiny_backbones.tiny_sd if tiny else full_sd,
        "dit": tiny_backbones.tiny_dit if tiny else full_dit,
    }
    switches = [*choose_numerics("fast", None, "float32").switches, "compile"] if compiled else None
    found: dict[str, Any] = {}
    for name, make in makes.items():
        root = folder / f"full-{name}"
        began = time.perf_counter()
        if not root.exists():
            make(root)
        try:
            found[name] = family(root, device, size, most, switches)
        except Exception as error:  # a compiler may be missing: the other numbers still count
            if not compiled:
                raise
            found[name] = {"error": f"{type(error).__name__}: {str(error)[:500]}"}
        found[name]["seconds_in_all"] = round(time.perf_counter() - began, 1)
        print(name, json.dumps(found[name], indent=1), file=sys.stderr)
    return found


def main(arguments: Sequence[str]) -> None:
    if arguments[:1] == ["digests"]:
        digests(*arguments[1:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "decode-gpu.json")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    given = parser.parse_args(arguments)
    device, size = torch.device(given.device), TINY if given.tiny else Size()
    result = load(given.output)
    result["device"] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "tiny": given.tiny,
    }
    with tempfile.TemporaryDirectory() as name:
        os.environ.setdefault("D3PACK_HOME", f"{name}/home")
        folder = Path(name)
        for part in given.parts:
            if part == "equality":
                result[part] = equality(folder, device, size, given.tiny)
            elif part == "peak" or "peak" not in result:
                result["peak"] = peak(device, size)
            if part in ("speed", "compile"):
                most = result["peak"]["flops_per_second"]
                compiled = part == "compile"
                result[part] = sized(folder, device, size, given.tiny, most, compiled)
            save(given.output, WHAT, command("decode_gpu", arguments), result)
