"""Make the conformance corpus: spec/vectors/valid, spec/vectors/invalid, spec/vectors/index.json.

    python spec/make_vectors.py [FOLDER]

Run again, it writes the same bytes. All values come from the format's own noise.
"""

from __future__ import annotations

import hashlib
import json
import struct
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))  # works without an installation

from broken import broken

from d3pack import BackboneRef, Coded, FileLock, Pack, Probes, Recipe, pack_bytes
from d3pack.decode import noise
from d3pack.format.codecs import (
    Codes,
    Coding,
    decode_files,
    encode_adapter,
    encode_codes,
    encode_files,
    encode_labels,
    encode_picks,
    encode_prompts,
    encode_sets,
    encode_unconditional,
    encode_weights,
)
from d3pack.format.pack import EMBEDDED

BACKBONE = BackboneRef(
    kind="stable-diffusion",
    repo="mini",
    revision="0123456789abcdef0123456789abcdef01234567",
    files={"unet/diffusion_pytorch_model.safetensors": FileLock(1000000, "5a" * 32)},
    licence="apache-2.0",
)
RECIPE = Recipe(BACKBONE, (64, 64), "ddim", (14.5, 4.25, 1.5, 0.0), guidance=2.0)


def normals(salt: int, *shape: int) -> Any:
    """Return values that are the same on every machine."""
    return noise.normal(salt, 0, 0, shape)[0]


def prompts(classes: int, modes: int = 1, vectors: int = 1, width: int = 32, salt: int = 1) -> Any:
    """Return vectors that are distributed like learned ones."""
    return normals(salt, classes, modes, vectors, width) * np.float32(0.0625)


def base(count: int = 4, images: int = 6, codec: str = "f16", **changes: Any) -> Pack:
    """Return a small pack without optional sections."""
    pack = Pack(
        classes=tuple(f"class {i}" for i in range(count)),
        images_per_class=images,
        recipe=RECIPE,
        prompts=encode_prompts(prompts(count), codec),
        seed=0x0123456789ABCDEF,
    )
    return replace(pack, **changes)


def beliefs(classes: int, images: int, salt: int = 7) -> Any:
    """Return probabilities in steps of 1/1024, so that every sum is exact."""
    weights = np.rint(np.exp2(normals(salt, classes, images, classes) * 2)).clip(0, 200)
    weights[..., 0] += 1
    total = weights.sum(axis=2, keepdims=True)
    probs = np.floor(weights * (1024 / total)) / 1024
    probs[..., 0] += 1 - probs.sum(axis=2)
    return probs


def picks(classes: int, images: int, pool: int, lanes: int = 1) -> Coded:
    """Return picks without repetition: `pool` candidates in each lane."""
    order = np.argsort(normals(9, classes, pool), axis=1, kind="stable")
    place = np.arange(images)
    return encode_picks(place % lanes + order[:, place // lanes] * lanes, lanes)


def weights(classes: int, images: int) -> Coded | None:
    """Return weights from a sixteenth to sixteen, of which the first class has the extremes."""
    octaves = np.clip(normals(22, classes, images) * 2, -4, 4)
    octaves[0, :2] = -9, 9  # cut to the least and the most
    return encode_weights(np.exp2(octaves))


def probes(count: int = 2, side: int = 4) -> Probes:
    """Return reference images of noise."""
    pixels = np.clip(normals(11, count, 3, side, side) * 40 + 128, 0, 255).astype(np.uint8)
    return Probes(pixels, np.arange(count), np.arange(count)[::-1].copy())


def codes(classes: int, count: int, images: int, coding: Coding) -> Coded:
    """Return codes, of which those of the first class have the atoms of highest rank."""
    levels, signs = [], normals(20, classes, count, sum(coding.atoms)) < 0
    for level, atoms in enumerate(coding.atoms):
        order = np.argsort(normals(21 + level, classes, count, coding.entries), axis=2)
        order[0] = np.arange(coding.entries)[::-1]
        levels.append(np.sort(order[..., :atoms], axis=2))
    chosen = np.concatenate(levels, axis=2)
    return encode_codes(Codes(coding, images, chosen, np.where(signs, -1, 1).astype(np.int8)))


def adapter(codec: str) -> Coded:
    """Return deltas of two tensors."""
    deltas = {"unet.conv_in.bias.delta": normals(13, 5), "unet.mid.weight.delta": normals(14, 4, 3)}
    return encode_adapter(deltas, codec)


def weights_file(values: Sequence[tuple[str, str, Any]]) -> bytes:
    """Return named arrays as a safetensors file, in this order."""
    header, at = {}, 0
    for name, kind, array in values:
        header[name] = {
            "dtype": kind,
            "shape": list(array.shape),
            "data_offsets": [at, at + array.nbytes],
        }
        at += array.nbytes
    text = json.dumps(header, separators=(",", ":")).encode("ascii")
    return struct.pack("<Q", len(text)) + text + b"".join(a.tobytes() for _, _, a in values)


def carried(*values: tuple[str, str, Any], in_four: Collection[str] = ()) -> Pack:
    """Return a pack that carries a backbone: these arrays, some in four bits, and a plain file."""
    files = {
        "transformer/config.json": b'{"_class_name": "DiTTransformer2DModel"}',
        "transformer/diffusion_pytorch_model.safetensors": weights_file(values),
    }
    coded = encode_files(files, lambda path, name: name in in_four)
    locks = {
        path: FileLock(len(data), hashlib.sha256(data).hexdigest())
        for path, data in decode_files(coded).items()
    }
    home = BackboneRef("dit", "", files=locks, licence="apache-2.0")
    return base(
        recipe=replace(RECIPE, backbone=home),
        optional={EMBEDDED: {}},
        extensions={EMBEDDED: coded},
    )


def quantised() -> Coded:
    """Return product-quantised prompts without k-means, which may differ between machines."""
    codes = (np.arange(4 * 8, dtype=np.uint8) * 5 % 16).reshape(4, 1, 1, 8)
    tensors = {
        "codebook": normals(15, 16, 4).astype(np.float16),
        "codes": codes,
        "scales": np.full((4, 1, 1), 0.0625, dtype=np.float16),
    }
    params = {"shape": [1, 1, 32], "dim": 4, "entries": 16}
    return Coded("pq", tensors, params, frozenset({"codebook"}))


def newer() -> Pack:
    """Return a pack of minor version 7 with an optional feature and its section."""
    tensors = {
        "rows": np.arange(4 * 3, dtype=np.uint8).reshape(4, 3),
        "shared": np.arange(5, dtype="<u4").view(np.uint8),
    }
    captions = Coded("utf8", tensors, {"language": "en"}, frozenset({"shared"}))
    features = {"captions": {"since": 7, "weights": [0.5, 1e-07]}, "mood": {}}
    return base(optional=features, extensions={"captions": captions}, minor=7)


def valid() -> Iterator[tuple[str, str, Pack]]:
    """Yield name, what it shows, and the pack."""
    tiny = Recipe(BACKBONE, (8, 8), "euler", (1.0, 0.0), template="{}")
    yield (
        "smallest",
        "one class, one image, one value: the one in the specification",
        Pack(("a",), 1, tiny, encode_prompts(np.full((1, 1, 1, 1), 0.5, np.float32)), 0),
    )
    yield (
        "prompts-f16",
        "ten classes, half precision",
        base(10, prompts=encode_prompts(prompts(10))),
    )
    yield "prompts-i8", "a byte a value, a scale a vector", base(codec="i8")
    yield "prompts-i4", "half a byte a value, a scale for 32", base(codec="i4")
    odd = encode_prompts(prompts(4, width=33), "i4")
    yield "prompts-i4-odd", "an odd width: the last nibble is zero", base(prompts=odd)
    yield "prompts-pq", "a codebook that all classes share", base(prompts=quantised())
    many = encode_prompts(prompts(4, modes=3, vectors=2, width=16), "i8")
    yield "prompts-modes", "three modes of two vectors", base(prompts=many)
    zeros = encode_prompts(np.zeros((2, 1, 1, 32), np.float32), "i8")
    yield "prompts-zero", "all values zero", base(2, prompts=zeros)
    yield "seed-largest", "all 64 bits of the seed set", base(seed=2**64 - 1)
    yield "picks", "curated seeds out of 256, a byte each", base(picks=picks(4, 6, 256))
    yield "picks-wide", "out of 1000, ten bits each", base(picks=picks(4, 6, 1000))
    own = encode_picks(np.arange(6) + 6 * (np.arange(24).reshape(4, 6) % 5), 6)
    yield "picks-own", "each image out of five of its own, three bits each", base(picks=own)
    yield "picks-modes", "out of four a mode", base(prompts=many, picks=picks(4, 6, 4, lanes=3))
    eight = encode_sets(np.array([4, 0, 7, 2]), 6, 6)
    yield "picks-sets", "one of eight sets a class, three bits each", base(picks=eight)
    far = encode_sets(np.array([999_999, 3, 65_536, 0]), 6, 8)
    yield "picks-sets-wide", "one of a million, eight candidates apart", base(picks=far)
    five = Coding((8.0, 4.0, 2.0, 1.0, 0.5, 0.0), (1,) * 5, bits=8)
    yield "codes", "five levels of one atom out of 256, 45 bits", base(codes=codes(4, 6, 6, five))
    sets = Coding((8.0, 2.0, 0.5, 0.0), (2, 0, 3), bits=4, eta=0.75, prompts=False)
    mixed = base(codes=codes(4, 2, 3, sets), picks=picks(4, 3, 256))
    yield "codes-mixed", "two codes for three images, fresh noise in a level, then picks", mixed
    start = Coding((8.0, 2.0, 0.0), (3, 0), bits=4, eta=0.0, guidance=2.0)
    alone = base(codes=codes(4, 6, 6, start))
    yield "codes-start", "atoms of the first noise alone, guided", alone
    unprompted = codes(4, 6, 6, replace(five, prompts=False))
    yield "codes-bare", "codes of all images, and no prompt", base(prompts=None, codes=unprompted)
    shape = Coded(
        "x", {"shared": np.arange(5, dtype=np.uint8)}, {"shape": 5}, frozenset({"shared"})
    )
    feature: dict[str, Any] = {
        "optional": {"shape": {}},
        "extensions": {"shape": shape},
        "minor": 7,
    }
    yield (
        "codes-bare-newer",
        "the same with an optional feature that has a shape of its own",
        base(prompts=None, codes=unprompted, **feature),
    )
    yield "labels-topk", "the best two of four", base(labels=encode_labels(beliefs(4, 6), k=2))
    yield (
        "labels-topk-all",
        "k is the number of classes: no tail",
        base(labels=encode_labels(beliefs(4, 6), k=4, bits=5)),
    )
    yield "labels-top1", "k is one", base(labels=encode_labels(beliefs(4, 6), k=1, bits=12))
    wide = encode_labels(beliefs(37, 3), k=10, bits=7)
    yield "labels-topk-bits", "fields across byte borders", base(37, 3, labels=wide)
    yield "labels-dense", "all probabilities", base(labels=encode_labels(beliefs(4, 6), "dense"))
    yield (
        "labels-one-class",
        "one class, all the mass",
        base(1, labels=encode_labels(np.ones((1, 6, 1)))),
    )
    yield "weights", "a weight for each image", base(weights=weights(4, 6))
    yield "adapter-f16", "two tuned tensors", base(adapter=adapter("f16"))
    yield "adapter-i8", "the same in a byte a value", base(adapter=adapter("i8"))
    gains = {"transformer.blocks.0.norm.weight.gain": normals(18, 7) * np.float32(0.125)}
    yield "adapter-gain", "factors near one", base(adapter=encode_adapter(gains, "i8"))
    eight_bits = normals(16, 6, 8).astype(np.float16)
    bias = ("bias", "F32", normals(17, 5))
    whole = carried(("matrix", "F16", eight_bits), bias)
    yield "backbone-carried", "a backbone inside the pack, in eight bits", whole
    uneven = ("odd", "F16", normals(23, 5, 27).astype(np.float16))
    twice = (uneven, bias, ("fine", "F16", eight_bits), ("twin", "F16", uneven[2]))
    four = carried(*twice, in_four=["odd"])
    yield "backbone-carried-i4", "an odd number of values in four bits, and a copy of them", four
    yield "probes", "two reference images", base(probes=probes())
    names = ("été", "猫", "Ωmega", "شجرة", "🐈\u200d⬛", "../x", "CON", " a\\\"b'", "x" * 1024)
    yield (
        "names-unicode",
        "names of many scripts, and hostile to a file system",
        base(9, classes=names),
    )
    facts: dict[str, Any] = {
        "teacher": {"name": "resnet18", "bytes": 44_700_000, "accuracy": 0.93125},
        "numbers": [0.1, 1e-07, 1e16, 123456789.125, -0.0, 5e-324, 2**53 - 1, -1, True, None],
        "text": 'a/b quote " backslash \\ line\nend \u00e9 \U0001f408 \u007f',
        "deep": [[[[[[[[[[]]]]]]]]]],
    }
    yield "provenance", "every kind of JSON value", base(provenance=facts)
    extra = {"table": [[0.5, [0.5]], [0.25, [1, -0.25]], [0, [1.0]]], "name": "am-ed"}
    table = replace(RECIPE, sampler="table", extra=extra, dtype="bfloat16", guided_channels=3)
    yield "recipe-table", "a sampler given as a table", base(recipe=table)
    yield "recipe-grey", "images without colours", base(recipe=replace(RECIPE, grey=True))
    ancestral = replace(RECIPE, sampler="ancestral", extra={"eta": 1.0})
    yield "recipe-ancestral", "a sampler that adds noise", base(recipe=ancestral)
    bare = replace(RECIPE, template=None)
    two = encode_prompts(prompts(4, vectors=2, width=33), "i4")
    yield "outputs", "outputs of the text encoder: no template", base(recipe=bare, prompts=two)
    values = prompts(1, vectors=2, width=33, salt=19)[0, 0]
    none = base(recipe=bare, prompts=two, unconditional=encode_unconditional(values))
    yield "outputs-unconditional", "the same, and the outputs of no class", none
    odd_none = encode_unconditional(values, "i4")
    yield "unconditional", "tokens of no class", base(prompts=two, unconditional=odd_none)
    files = {f"part-{i:02d}/weights.safetensors": FileLock(i, f"{i:064x}") for i in range(12)}
    home = replace(RECIPE, backbone=BackboneRef("dit", "", files=files, licence="apache-2.0"))
    yield "recipe-directory", "a backbone without a public home", base(recipe=home)
    yield "newer-minor", "version 1.7 with an optional feature and its section", newer()
    full = base(
        prompts=quantised(),
        codes=codes(4, 2, 3, sets),
        picks=picks(4, 3, 256),
        labels=encode_labels(beliefs(4, 6), k=2),
        weights=weights(4, 6),
        adapter=adapter("i8"),
        probes=probes(),
        provenance=facts,
    )
    yield "everything", "all sections at once", full
    yield "selected", "two classes of it, which keep their noise", full.select([3, 1])
    yield "first", "the first two images a class of it", full.first(2)
    yield (
        "classes-300",
        "three hundred classes",
        base(300, 2, prompts=encode_prompts(prompts(300, width=4), "i8")),
    )


def main() -> None:
    """Write the corpus."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "vectors"
    index: dict[str, Any] = {"valid": {}, "invalid": {}}
    files: dict[str, bytes] = {}
    for name, shows, pack in valid():
        files[name] = pack_bytes(pack)
        index["valid"][name] = {"root": pack.root, "bytes": len(files[name]), "shows": shows}
    for name, code, breaks, data in broken(files):
        assert name not in index["invalid"], name
        index["invalid"][name] = {"code": code, "breaks": breaks}
        write(folder / "invalid" / f"{name}.d3m", data)
    for name, data in files.items():
        write(folder / "valid" / f"{name}.d3m", data)
    text = json.dumps(index, indent=1, sort_keys=True) + "\n"
    write(folder / "index.json", text.encode("ascii"))
    print(f"{len(index['valid'])} valid, {len(index['invalid'])} invalid")


def write(path: Path, data: bytes) -> None:
    """Write one file of the corpus."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


if __name__ == "__main__":
    main()
