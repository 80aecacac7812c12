"""What strangers can hand to d3pack, beside packs, of which `spec/fuzz.py` takes care.

A target yields inputs and takes them; nothing but `D3MError` may come out. Seeds are made by code.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fuzz_mutate import dumped, mutate_bytes, mutate_json
from PIL import Image
from safetensors.torch import save

from d3pack.backbones.loading import Files, _read_weights, build
from d3pack.backbones.tokenizer import Words
from d3pack.encode.embeddings import _read_folder
from d3pack.format import EMBEDDED, Coded, decode_files, read, to_plain
from d3pack.hub import remote, remote_info
from d3pack.sources import open_source
from d3pack.sources.images import decode

Run = Callable[[random.Random], None]
COMMIT = "0123456789abcdef" * 2 + "01234567"


def images(folder: Path) -> Run:
    """Image files of every format."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (9, 7, 4), dtype=np.uint8)
    seeds = []
    for form, mode in (
        ("PNG", "RGBA"), ("PNG", "P"), ("PNG", "I;16"), ("JPEG", "RGB"), ("WEBP", "RGBA"),
        ("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGB"), ("TIFF", "F"), ("PPM", "RGB"), ("PPM", "L"),
    ):  # fmt: skip
        data = io.BytesIO()
        image = Image.fromarray(pixels)
        image = image.convert("I").convert("I;16") if mode == "I;16" else image.convert(mode)
        image.save(data, form)
        seeds.append(data.getvalue())

    def run(rng: random.Random) -> None:
        decode(mutate_bytes(rng.choice(seeds), seeds, rng))

    return run


def sources(folder: Path) -> Run:
    """Archives, shards, parquet files and tables of names."""
    from datasets import config

    data = io.BytesIO()
    Image.new("RGB", (5, 5)).save(data, "PNG")
    members = {f"{c}/{i}.png": data.getvalue() for c in ("cat", "dog") for i in range(2)}
    shard = {f"{i}.{end}": value for i in range(2) for end, value in
             (("png", data.getvalue()), ("cls", str(i).encode()))}  # fmt: skip
    seeds = {
        "a.tar": _tar(members), "b.tar": _tar(shard), "c.zip": _zip(members),
        "d.tar.gz": _tar(members, "w:gz"),
    }  # fmt: skip
    parquet = {"e.parquet": _parquet(data.getvalue())}
    whole = [*seeds.values(), *parquet.values()]
    table = dumped({"cat": "a cat", "dog": "a dog"})
    names = {"n.json": table, "n.csv": b"folder,name\ncat,a\ndog,b\n", "n.txt": b"n00000001 a\n"}

    def run(rng: random.Random) -> None:
        if rng.random() < 0.2:
            name = rng.choice(list(names))
            (folder / name).write_bytes(mutate_bytes(names[name], [table], rng))
            (folder / "a.tar").write_bytes(seeds["a.tar"])
            open_source(folder / "a.tar", class_names=folder / name)
            return
        # seldom parquet, which takes `datasets` as long as a dozen archives, and a copy
        some = parquet if rng.random() < 0.03 else seeds
        name = rng.choice(list(some))
        (folder / name).write_bytes(mutate_bytes(some[name], whole, rng))
        kept, config.HF_DATASETS_CACHE = config.HF_DATASETS_CACHE, folder / "cache"
        try:
            source = open_source(folder / name)
            for c in range(len(source.classes)):
                list(source.iter_class(c))
            source.fingerprint()
        finally:
            config.HF_DATASETS_CACHE = kept
            shutil.rmtree(folder / "cache", ignore_errors=True)

    return run


def embeddings(folder: Path) -> Run:
    """Files of learned tokens."""
    value = torch.zeros(2, 8)
    seeds = {"a.safetensors": save({"emb": value}, {"name": "cat"})}
    for name, content in (("b.pt", {"*": value}), ("c.bin", {"string_to_param": {"*": value}})):
        data = io.BytesIO()
        torch.save(content, data, _use_new_zipfile_serialization=name == "b.pt")
        seeds[name] = data.getvalue()
    seeds["d.pt"] = pickle.dumps({"*": [1.0]})
    whole = list(seeds.values())

    def run(rng: random.Random) -> None:
        name = rng.choice(list(seeds))
        place = folder / name
        place.write_bytes(mutate_bytes(seeds[name], whole, rng))
        try:
            _read_folder(folder)
        finally:
            place.unlink()

    return run


def weights(folder: Path) -> Run:
    """Headers and data of safetensors files of a backbone."""
    expected = {"a.weight": torch.zeros(3, 4), "a.bias": torch.zeros(4), "n": torch.zeros(())}
    seed = save(expected)
    length = 8 + int.from_bytes(seed[:8], "little")
    header, data = json.loads(seed[8:length]), seed[length:]
    path = folder / "w.safetensors"

    def run(rng: random.Random) -> None:
        if rng.random() < 0.5:
            text = dumped(mutate_json(header, rng))
            path.write_bytes(len(text).to_bytes(8, "little") + text + data)
        else:
            path.write_bytes(mutate_bytes(seed, [seed], rng))
        state = _read_weights((path,), "unet", expected, torch.float32)
        assert {name: value.shape for name, value in state.items()} == {
            name: value.shape for name, value in expected.items()
        }

    return run


def carried(folder: Path) -> Run:
    """Parameters and bytes of a carried backbone, behind hashes that a maker sets right."""
    corpus = Path(__file__).parents[2] / "spec/vectors/valid"
    packs = [read(path) for path in sorted(corpus.glob("backbone-carried*.d3m"))]

    def run(rng: random.Random) -> None:
        pack = rng.choice(packs)
        coded = pack.extensions[EMBEDDED]
        params, shared = to_plain(coded.params), coded.tensors["shared"].tobytes()
        if rng.random() < 0.7:
            name = rng.choice(list(params))
            params[name] = mutate_json(params[name], rng)
        if rng.random() < 0.7:
            shared = mutate_bytes(shared, [shared], rng)
        bytes_of = {"shared": np.frombuffer(shared, np.uint8)}
        changed = Coded(coded.codec, bytes_of, params, coded.shared)
        nbytes = rng.choice((pack.recipe.backbone.nbytes, None))
        files = decode_files(changed, nbytes)
        assert sum(map(len, files.values())) <= 64 * len(shared)

    return run


def configs(folder: Path) -> Run:
    """`config.json` of the three models of a Stable Diffusion."""
    from tiny_backbones import tiny_sd

    root = tiny_sd(folder / "sd")
    parts = {
        "text_encoder": ("model", ("CLIPTextModel",)),
        "unet": ("diffusion_pytorch_model", ("UNet2DConditionModel",)),
        "vae": ("diffusion_pytorch_model", ("AutoencoderTiny", "AutoencoderKL")),
    }
    configs = {part: json.loads((root / part / "config.json").read_text()) for part in parts}
    paths = {str(p.relative_to(root)): p for p in root.rglob("*") if p.is_file()}

    def run(rng: random.Random) -> None:
        part = rng.choice(list(parts))
        stem, allowed = parts[part]
        changed = folder / "config.json"
        changed.write_bytes(dumped(mutate_json(configs[part], rng)))
        files = Files({**paths, f"{part}/config.json": changed})
        build(files, part, stem, allowed, device=torch.device("cpu"), dtype=torch.float32)

    return run


def tokenizers(folder: Path) -> Run:
    """`tokenizer.json`, which can describe a program."""
    from tiny_backbones import tiny_tokenizer

    tiny_tokenizer(folder / "tokenizer")
    seed = json.loads((folder / "tokenizer/tokenizer.json").read_text())
    path = folder / "tokenizer.json"

    def run(rng: random.Random) -> None:
        path.write_bytes(dumped(mutate_json(seed, rng)))
        files = Files({"tokenizer/tokenizer.json": path})
        Words(files).ids("a photo of a goldfish")

    return run


def hub(folder: Path) -> Run:
    """Answers to range requests: status, headers and body."""
    pack = (Path(__file__).parents[2] / "spec/vectors/valid/everything.d3m").read_bytes()
    facts = {
        "status": 206,
        "headers": {
            "Content-Range": f"bytes 0-{len(pack) - 1}/{len(pack)}",
            "X-Repo-Commit": COMMIT,
            "ETag": '"e"',
        },
    }

    http = _http_library()

    def run(rng: random.Random) -> None:
        changed = mutate_json(facts, rng)
        body = mutate_bytes(pack, [pack], rng) if rng.random() < 0.5 else pack
        status, answered = (changed[k] for k in facts) if _is_answer(changed) else (200, {})

        @contextmanager
        def stream(url: str, headers: dict[str, str], timeout: float) -> Iterator[Any]:
            yield http.Response(
                status, headers=answered, content=body, request=http.Request("GET", url)
            )

        kept, remote._stream = remote._stream, stream
        try:
            remote_info(f"hf://datasets/org/name@{COMMIT}/a.d3m")
        finally:
            remote._stream = kept

    return run


def _http_library() -> Any:
    """Return the library that huggingface_hub uses."""
    import huggingface_hub.utils

    utils: Any = huggingface_hub.utils  # exports lazily, which the type checker cannot see
    session = utils.get_session()
    return import_module(next(c.__module__ for c in type(session).__mro__).split(".")[0])


def _is_answer(value: Any) -> bool:
    """Return whether a server could send these headers: text without line breaks."""
    if not isinstance(value, dict) or value.keys() != {"status", "headers"}:
        return False
    status, headers = value["status"], value["headers"]
    return (
        type(status) is int and 100 <= status < 600 and isinstance(headers, dict)
        and all(isinstance(text, str) and text.isascii() and text.isprintable()
                for pair in headers.items() for text in pair)
    )  # fmt: skip


def _tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return data.getvalue()


def _zip(members: dict[str, bytes]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return data.getvalue()


def _parquet(image: bytes) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    data = io.BytesIO()
    rows = [{"image": {"bytes": image, "path": None}, "label": i % 2} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), data)
    return data.getvalue()


TARGETS: dict[str, Callable[[Path], Run]] = {
    target.__name__: target
    for target in (carried, configs, embeddings, hub, images, sources, tokenizers, weights)
}
