"""What D3MDataset costs a training loop.

    python -m benchmarks loader all [-o RESULTS.json]

second     images a second from the second epoch on, beside JPEG files, MDS, WebDataset (each as
           JPEG and as raw pixels) and a tensor in memory: same images, same batch, same workers
first      the first epoch, decoding while it trains, against decoding everything and then training
memory     resident memory over 10 epochs, and against the number of images in the store on disk

The images are our own: decoded from random prompts by the embedded `mini` (or --backbone).
Wall time is what people wait for; CPU seconds are given beside it, because they stay the same when
a machine is shared. `mosaicml-streaming` is left out where it is not installed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from benchmarks import loader_peers as peers
from benchmarks.results import RESULTS, command, load, save
from d3pack import Pack, Recipe, read, write
from d3pack.backbones import open_backbone
from d3pack.dataset import D3MDataset
from d3pack.decode import Decoder, samplers
from d3pack.format.codecs import encode_prompts

WHAT = (__doc__ or "").partition("\n")[0]

BATCH = 128
STEPS, FAST_STEPS = 12, 1
NAMES = ("loader", "loader, background", "DataLoader")


def make_pack(path: Path, backbone: str, classes: int, images: int, steps: int) -> Path:
    """Random prompts on a backbone: the pixels do not matter here, their number does."""
    opened = open_backbone(backbone)
    prompts = np.random.default_rng(0).normal(size=(classes, 1, 1, opened.prompt_shape[1]))
    pack = Pack(
        classes=tuple(f"class {number}" for number in range(classes)),
        images_per_class=images,
        recipe=Recipe(
            backbone=opened.ref,
            size=opened.image_size,
            sampler="ddim",
            sigmas=samplers.schedule(opened.levels.alphas_cumprod, "ddim", steps),
            guidance=1.0 if steps == FAST_STEPS else 3.0,
        ),
        prompts=encode_prompts(prompts.astype(np.float32)),
        seed=1,
    )
    write(pack, path)
    return path


def opened(path: Path, folder: Path, backbone: str, **options: Any) -> D3MDataset:
    place = backbone if Path(backbone).is_dir() else None
    return D3MDataset(
        path, device="cpu", cache_dir=folder, backbone=place, **{"quiet": True, **options}
    )


# From the second epoch on


def spent() -> float:
    """CPU seconds of this process and its workers, those at work and those that ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    total = sum(each.ru_utime + each.ru_stime for each in used)
    for worker in multiprocessing.active_children():
        fields = Path(f"/proc/{worker.pid}/stat").read_text(encoding="ascii").rsplit(")")[1].split()
        total += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return total


def consume(batches: Iterable[tuple[Tensor, Tensor]]) -> int:
    """Touch every batch as a training step would, and no more."""
    seen = 0
    for images, labels in batches:
        if images.dtype != torch.uint8 or int(images[-1, -1, -1, -1]) < 0:
            raise ValueError("not the images that were asked for")
        seen += len(labels)
    return seen


def rates(
    loaders: dict[str, Callable[[], Any]], images: int, rounds: int, seconds: float
) -> dict[str, dict[str, float]]:
    """The best of some rounds in turn, so that all see the same machine."""
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in loaders}
    for number in range(rounds + 1):
        for name, make in loaders.items():
            seen, wall, cpu = 0, time.perf_counter(), spent()
            while spent() - cpu < seconds:
                seen += consume(make())
                if number == 0:
                    break  # the first epoch of each only warms up
            if seen % images:
                raise ValueError(f"{name} gave {seen} images in epochs of {images}")
            if number:
                found[name].append((seen / (time.perf_counter() - wall), seen / (spent() - cpu)))
    return {
        name: {
            "images_per_second": round(max(wall for wall, _ in pairs)),
            "images_per_cpu_second": round(max(cpu for _, cpu in pairs)),
        }
        for name, pairs in found.items()
    }


def second(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = make_pack(folder / "many.d3m", args.backbone, 50, args.images // 50, FAST_STEPS)
    dataset = opened(path, folder, args.backbone)
    order = np.arange(len(dataset))
    images = torch.cat([batch for batch, _ in dataset.loader(500, shuffle=False)])
    labels = dataset.targets
    has_streaming = peers.streaming() is not None
    peers.write_files(folder / "files", images, labels)
    for kind in ("jpg", "npy"):
        peers.write_shards(folder / f"web-{kind}", images, labels, kind)
        if has_streaming:
            peers.write_mds(folder / f"mds-{kind}", images, labels, kind)
    result: dict[str, Any] = {"images": len(order), "shape": list(images.shape[1:]), "batch": BATCH}
    memory = opened(path, folder, args.backbone, cache="cpu")
    consume(memory.loader(BATCH, shuffle=True))
    own = {
        "d3m loader, disk": dataset.loader(BATCH, shuffle=True),
        "d3m loader, memory": memory.loader(BATCH, shuffle=True),
        "d3m DataLoader": DataLoader(dataset, BATCH, shuffle=True),
    }
    alone: dict[str, Callable[[], Any]] = {
        "tensor[index]": peers.tensor(images, labels, BATCH, "index"),
        "tensor.index_select": peers.tensor(images, labels, BATCH, "select"),
        **{name: loader.__iter__ for name, loader in own.items()},
    }
    for workers in (0, 2):
        loaders = dict(alone) if workers == 0 else {}
        if workers:
            busy = DataLoader(
                dataset, BATCH, shuffle=True, num_workers=workers, persistent_workers=True
            )
            loaders["d3m DataLoader"] = busy.__iter__
        loaders["tensor, DataLoader"] = peers.rows(images, labels, BATCH, workers)
        loaders["JPEG files"] = peers.files(folder / "files", BATCH, workers)
        for kind, word in (("jpg", "JPEG"), ("npy", "raw")):
            loaders[f"WebDataset, {word}"] = peers.webdataset(
                folder / f"web-{kind}", BATCH, workers, kind
            )
            if has_streaming:
                loaders[f"MDS, {word}"] = peers.mds(folder / f"mds-{kind}", BATCH, workers, kind)
        result[f"workers_{workers}"] = rates(loaders, len(order), args.rounds, args.seconds)
    result["ratios"] = ratios(result)
    return result


def ratios(result: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The loader of ours against each, and the plain DataLoader with as many workers."""
    found: dict[str, dict[str, float]] = {}
    for unit in ("images_per_second", "images_per_cpu_second"):
        for workers in ("workers_0", "workers_2"):
            rows = result[workers]
            own = result["workers_0"]["d3m loader, disk"][unit]
            plain = rows["d3m DataLoader"][unit]
            for name, row in rows.items():
                if not name.startswith("d3m"):
                    entry = found.setdefault(f"{name}, {workers}", {})
                    entry[f"loader_{unit}"] = round(own / row[unit], 2)
                    entry[f"DataLoader_{unit}"] = round(plain / row[unit], 2)
    return found


# The first epoch


def student(classes: int) -> nn.Module:
    """A ConvNet-3, the student of this field."""
    layers: list[nn.Module] = []
    for channels in (3, 128, 128):
        layers += [nn.Conv2d(channels, 128, 3, padding=1), nn.GroupNorm(128, 128), nn.ReLU()]
        layers += [nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(classes))


def train(batches: Iterable[tuple[Tensor, Tensor]], model: nn.Module, steps_each: int) -> int:
    """One epoch; `steps_each` updates a batch stand for augmented views of it."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    seen = 0
    for images, labels in batches:
        pixels = images.float() / 255
        for _ in range(steps_each):
            loss = F.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seen += len(labels)
    return seen


def timed(work: Callable[[], Any]) -> tuple[float, float]:
    wall, cpu = time.perf_counter(), spent()
    work()
    return time.perf_counter() - wall, spent() - cpu


def first(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    path = make_pack(folder / "few.d3m", args.backbone, 10, args.first_images // 10, STEPS)
    pack = read(path)
    place = args.backbone if Path(args.backbone).is_dir() else None
    decoder = Decoder(pack, path=place)
    decoder.images(range(pack.recipe.group))  # opened and warm
    every: list[Tensor] = []
    rows: dict[str, list[tuple[float, float]]] = {}
    for number in range(args.rounds):
        rows.setdefault("decode everything", []).append(
            timed(lambda: every.append(decoder.images(range(len(pack)))))
        )
        images = every.pop()
        targets = [index // pack.images_per_class for index in range(len(pack))]
        plain = peers.tensor(images, targets, BATCH // 4, "select")
        model = student(len(pack.classes))
        train(plain(), model, 1)
        rows.setdefault("then train", []).append(
            timed(lambda: train(plain(), model, args.updates))  # noqa: B023, called at once
        )
        for name in NAMES:
            dataset = opened(path, folder / f"first-{name}-{number}", args.backbone)
            dataset.images._decoder = decoder  # opening the backbone is not what is measured
            batches: Any = DataLoader(dataset, BATCH // 4, shuffle=True)
            if name != "DataLoader":
                batches = dataset.loader(
                    BATCH // 4, shuffle=True, background=name == "loader, background"
                )
            rows.setdefault(f"first epoch, {name}", []).append(
                timed(partial(train, batches, model, args.updates))
            )
            rows.setdefault(f"second epoch, {name}", []).append(
                timed(partial(train, batches, model, args.updates))
            )
    median = {
        name: {
            "seconds": round(statistics.median(wall for wall, _ in pairs), 3),
            "cpu_seconds": round(statistics.median(cpu for _, cpu in pairs), 3),
        }
        for name, pairs in rows.items()
    }
    result: dict[str, Any] = {"images": len(pack), "steps": STEPS, "times": median, "ratio": {}}
    for name in NAMES:
        result["ratio"][name] = {
            unit: round(
                median[f"first epoch, {name}"][unit]
                / (median["decode everything"][unit] + median["then train"][unit]),
                3,
            )
            for unit in ("seconds", "cpu_seconds")
        }
    return result


# Memory


def resident() -> float:
    """Megabytes of this process."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise OSError("no VmRSS")


def memory(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each row in a process of its own."""
    make_pack(folder / "few.d3m", args.backbone, 10, args.first_images // 10, FAST_STEPS)
    make_pack(folder / "some.d3m", args.backbone, 50, args.images // 500, FAST_STEPS)
    make_pack(folder / "many.d3m", args.backbone, 50, args.images // 50, FAST_STEPS)
    result: dict[str, Any] = {"epochs_mb": {}, "store_on_disk_mb": {}}
    for cache in ("disk", "cpu", "none", "fresh"):
        result["epochs_mb"][cache] = child(args, folder, "few.d3m", cache, 10)
    for name in ("some.d3m", "many.d3m"):
        child(args, folder, name, "disk", 1)  # decoded by another process
        epochs = child(args, folder, name, "disk", 3)
        result["store_on_disk_mb"][f"{len(read(folder / name))} images"] = max(epochs)
    return result


def child(
    args: argparse.Namespace, folder: Path, name: str, cache: str, epochs: int
) -> list[float]:
    words = [sys.executable, "-m", "benchmarks", "loader", "resident", "--backbone", args.backbone]
    words += ["--folder", str(folder), "--pack", name, "--cache", cache, "--epochs", str(epochs)]
    done = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
    found: list[float] = json.loads(done.stdout)
    return found


def residents(args: argparse.Namespace) -> list[float]:
    """Resident megabytes at the end of each epoch."""
    options: dict[str, Any] = {"fresh": True} if args.cache == "fresh" else {"cache": args.cache}
    if args.cache == "none":
        options = {"cache": None}
    dataset = opened(args.folder / args.pack, args.folder, args.backbone, **options)
    loader = dataset.loader(BATCH, shuffle=True)
    found = []
    for _ in range(args.epochs):
        consume(loader)
        found.append(round(resident(), 1))
    return found


def about() -> dict[str, Any]:
    names = ("torch", "numpy", "pillow", "webdataset", "mosaicml-streaming")
    packages = {}
    for name in names:
        try:
            packages[name] = version(name)
        except ImportError:
            packages[name] = "not installed"
    return {
        "python": platform.python_version(),
        "packages": packages,
        "cores": len(os.sched_getaffinity(0)),
        "torch_threads": torch.get_num_threads(),
        "load_before": [round(load, 1) for load in os.getloadavg()],
    }


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=WHAT)
    parser.add_argument("what", choices=("second", "first", "memory", "all", "resident"))
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "loader.json")
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--first-images", type=int, default=320)
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--pack")
    parser.add_argument("--cache")
    parser.add_argument("--epochs", type=int)
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    peers.streaming()  # before anything else imports the torchvision that it brings
    if args.what == "resident":
        json.dump(residents(args), sys.stdout)
        return
    parts = {"second": second, "first": first, "memory": memory}
    result = load(args.output)
    for name, part in parts.items():
        if args.what in (name, "all"):
            with tempfile.TemporaryDirectory() as folder:
                place = "a directory" if Path(args.backbone).is_dir() else args.backbone
                head = {"about": about(), "backbone": place}
                result[name] = {**head, **part(args, Path(folder))}
            print(name, json.dumps(result[name], indent=2), file=sys.stderr)
            save(args.output, WHAT, command("loader", arguments), result)
