"""Measure the file format: sizes, overhead, speed, damage, determinism.

    python -m benchmarks format

Times are the least of many, in wall-clock and in processor time: on a shared machine the first says
what was seen, the second what an idle core would take. D3PACK_PYTHONS may name further interpreters
(separated by ":") that have NumPy, for the comparison of bytes.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import os
import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

import d3pack
from benchmarks.results import RESULTS, command, save
from d3pack import BackboneRef, FileLock, Pack, Recipe
from d3pack.decode import noise
from d3pack.errors import InvalidPackError
from d3pack.format import class_ranges, read_class_ranges, read_header
from d3pack.format.codecs import encode_labels, encode_prompts

WHAT = (__doc__ or "").partition("\n")[0]

ROOT = Path(__file__).resolve().parents[1]
VALID = sorted((ROOT / "spec" / "vectors" / "valid").glob("*.d3m"))
# The files of Stable Diffusion 1.5 that a decoder reads, with their true sizes.
FILES = {
    "model_index.json": 541,
    "scheduler/scheduler_config.json": 308,
    "text_encoder/config.json": 617,
    "text_encoder/model.safetensors": 492265879,
    "tokenizer/merges.txt": 524619,
    "tokenizer/special_tokens_map.json": 472,
    "tokenizer/tokenizer_config.json": 806,
    "tokenizer/vocab.json": 1059962,
    "unet/config.json": 743,
    "unet/diffusion_pytorch_model.safetensors": 3438167540,
    "vae/config.json": 547,
    "vae/diffusion_pytorch_model.safetensors": 334643276,
}


def pack_of(classes: int, codec: str = "f16", images: int = 50) -> Pack:
    """Vectors of 768 values, derived seeds, no labels, names as long as WordNet's ids."""
    rng = np.random.default_rng(classes)
    values = rng.normal(0, 0.03, (classes, 1, 1, 768)).astype(np.float32)
    locks = {path: FileLock(size, f"{size:064x}") for path, size in FILES.items()}
    backbone = BackboneRef(
        "stable-diffusion",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "0" * 40,
        locks,
        "openrail",
    )
    sigmas = (*np.geomspace(14.6, 0.03, 20).tolist(), 0.0)
    recipe = Recipe(backbone, (512, 512), "dpmpp-2m", sigmas, guidance=7.5)
    names = tuple(f"n{10000000 + 17 * i}" for i in range(classes))
    return Pack(names, images, recipe, encode_prompts(values, codec), 1)


def least(run: Callable[[], Any], times: int) -> dict[str, float]:
    """Least wall-clock and processor milliseconds of a call."""
    wall = cpu = 1e9
    gc.disable()
    for _ in range(times):
        a, b = time.perf_counter(), time.process_time()
        run()
        cpu = min(cpu, time.process_time() - b)
        wall = min(wall, time.perf_counter() - a)
    gc.enable()
    return {"wall_ms": round(wall * 1e3, 3), "cpu_ms": round(cpu * 1e3, 3)}


def sizes() -> dict[str, Any]:
    """1000 classes x 768 by codec, and the container's overhead at 10 classes."""
    out: dict[str, Any] = {}
    for codec in ("f16", "i8", "i4", "pq"):
        pack = pack_of(1000, codec)
        assert pack.prompts is not None
        out[f"1000_classes_{codec}"] = {
            "bytes": len(d3pack.pack_bytes(pack)),
            "ledger": dict(pack.ledger().sections),
            "error": dict(pack.prompts.figures["error"]),
        }
    pack = pack_of(10)
    ledger = pack.ledger()
    out["10_classes_f16"] = {
        "bytes": ledger.total,
        "ledger": dict(ledger.sections),
        "container_overhead": ledger.sections["container"],
        "container_and_names": ledger.sections["container"] + ledger.sections["classes"],
        "all_but_prompts": ledger.total - ledger.sections["prompts"],
    }
    return out


def digest(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def opening() -> dict[str, Any]:
    """Read and verify 1000 classes, against hashing the same bytes once."""
    out: dict[str, Any] = {}
    for codec in ("f16", "i8"):
        data = d3pack.pack_bytes(pack_of(1000, codec))
        got = least(partial(d3pack.read, data), 300)
        once = least(partial(digest, data), 300)
        ratio = round(got["cpu_ms"] / once["cpu_ms"], 2)
        out[codec] = {"read": got, "hash_once": once, "ratio": ratio}
    return out


def imagenet_21k() -> dict[str, Any]:
    """21,841 classes: write, read, verify one class, memory."""
    pack = pack_of(21841)
    data = d3pack.pack_bytes(pack)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.d3m"
        writing = least(lambda: d3pack.write(pack, path), 3)
        reading = least(lambda: d3pack.read(path), 15)
        hashing = least(lambda: hashlib.sha256(data).digest(), 15)
        gc.collect()
        tracemalloc.start()
        kept = d3pack.read(path)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(kept.classes) == 21841
    prefix = data[: 8 + int.from_bytes(data[:8], "little")]
    head = read_header(prefix)
    reads = class_ranges(head, [12345])
    blobs = [data[r.start : r.stop] for r in reads]
    one = read_class_ranges(head, [12345], blobs)
    assert one == kept.select([12345])
    return {
        "bytes": len(data),
        "write": writing,
        "read": reading,
        "hash_once": hashing,
        "read_peak_memory_over_file": round(peak / len(data), 3),
        "verify_one_class": least(lambda: read_class_ranges(head, [12345], blobs), 5),
        "bytes_read_for_one_class": len(prefix) + sum(r.stop - r.start for r in reads),
    }


def labels() -> dict[str, Any]:
    """50,000 images x 1000 classes, top 10: as a good teacher's logits are spread."""
    rng = np.random.default_rng(0)
    probs = np.empty((1000, 50, 1000), dtype=np.float32)
    for c in range(1000):
        logits = rng.normal(0, 1.5, (50, 1000)).astype(np.float32)
        logits[:, c] += rng.normal(9, 2.5, 50)
        probs[c] = np.exp(logits - logits.max(axis=1, keepdims=True))
        probs[c] /= probs[c].sum(axis=1, keepdims=True)
    out: dict[str, Any] = {}
    for bits in (7, 8):
        start = time.process_time()
        coded = encode_labels(probs, k=10, bits=bits)
        out[f"top10_{bits}_bits"] = {
            "bytes": coded.nbytes,
            "bytes_an_image": round(coded.nbytes / 50000, 2),
            "kept": dict(coded.figures["kept"]),
            "error": dict(coded.figures["error"]),
            "encode_cpu_s": round(time.process_time() - start, 1),
        }
    return out


def damage() -> dict[str, Any]:
    """Every bit flip and every truncation of three packs of the corpus."""
    out: dict[str, Any] = {}
    for name in ("smallest", "prompts-i8", "labels-topk"):
        data = (ROOT / "spec" / "vectors" / "valid" / f"{name}.d3m").read_bytes()
        passed = 0
        for bit in range(8 * len(data)):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            passed += accepted(bytes(flipped))
        cut = sum(accepted(data[:size]) for size in range(len(data)))
        out[name] = {"bits": 8 * len(data), "cuts": len(data), "accepted": passed + cut}
    return out


def accepted(data: bytes) -> bool:
    """Whether the reader takes it."""
    try:
        d3pack.read(data)
    except InvalidPackError:
        return False
    return True


def stock() -> dict[str, int]:
    """Valid packs that safetensors itself opens, every tensor read."""
    opened = 0
    for path in VALID:
        with safe_open(path, "numpy") as file:
            opened += all(file.get_tensor(name) is not None for name in file.keys())  # noqa: SIM118
    return {"opened": opened, "of": len(VALID)}


PROGRAM = """
import hashlib, platform, sys
sys.path[:0] = [{root!r}, {spec!r}]
import numpy, make_vectors, d3pack
whole = hashlib.sha256()
for name, _, pack in make_vectors.valid():
    whole.update(d3pack.pack_bytes(pack))
print(platform.python_version(), numpy.__version__, whole.hexdigest())
"""


def same_bytes() -> dict[str, Any]:
    """The corpus made by several interpreters and hash seeds."""
    program = PROGRAM.format(root=str(ROOT), spec=str(ROOT / "spec"))
    pythons = [sys.executable, *filter(None, os.environ.get("D3PACK_PYTHONS", "").split(":"))]
    made: dict[str, list[str]] = {}
    for python in pythons:
        for seed in ("1", "2"):
            env = {**os.environ, "PYTHONHASHSEED": seed}
            got = subprocess.run(
                [python, "-c", program], capture_output=True, text=True, check=True, env=env
            )
            version, numpy, digest = got.stdout.split()
            made.setdefault(digest, []).append(f"python {version}, numpy {numpy}, seed {seed}")
    return {"identical": len(made) == 1, "made_by": made}


def info_process() -> dict[str, Any]:
    """`d3pack info` as a whole process."""
    command = [sys.executable, "-m", "d3pack", "info", str(VALID[0])]
    wall = cpu = 1e9
    for _ in range(20):
        before, start = os.times(), time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = min(wall, time.perf_counter() - start)
        after = os.times()
        spent = after.children_user + after.children_system
        cpu = min(cpu, spent - before.children_user - before.children_system)
    code = "import sys; from d3pack.cli import main; sys.argv[1:] = ['info', %r]\n"
    code += "try: main()\nexcept SystemExit: pass\nprint('torch' in sys.modules, file=sys.stderr)"
    got = subprocess.run(
        [sys.executable, "-c", code % str(VALID[0])], capture_output=True, text=True, check=True
    )
    return {
        "wall_ms": round(wall * 1e3),
        "cpu_ms": round(cpu * 1e3),
        "torch_imported": got.stderr.strip() != "False",
    }


def noise_speed() -> dict[str, Any]:
    """Milliseconds for one latent of 4 x 64 x 64, NumPy and torch."""
    import torch

    torch.set_num_threads(1)
    shape, images = (4, 64, 64), np.arange(16)
    got = {
        "numpy": least(lambda: noise.normal(1, images, images, shape), 20),
        "torch_cpu": least(lambda: noise.normal_torch(1, images, images, shape), 20),
    }
    return {name: round(value["cpu_ms"] / 16, 3) for name, value in got.items()}


def main(arguments: Sequence[str]) -> None:
    """Measure everything."""
    parts = (
        sizes,
        opening,
        imagenet_21k,
        labels,
        damage,
        stock,
        same_bytes,
        info_process,
        noise_speed,
    )
    parser = argparse.ArgumentParser(description=WHAT)
    parser.add_argument("-o", "--output", type=Path, default=RESULTS / "format.json")
    output = parser.parse_args(arguments).output
    figures: dict[str, Any] = {"load_average": os.getloadavg()[0]}
    for part in parts:
        print(part.__name__, file=sys.stderr)
        figures[part.__name__] = part()
    save(output, WHAT, command("format", arguments), figures)
