"""Image (c, i) is a function of pack, class and index: 0 differing bytes, however it is asked."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import tiny_dit, tiny_pack, tiny_sd, tiny_sdxl
from tiny_flow import tiny_flow

import d3pack
from d3pack.backbones import open_backbone
from d3pack.decode import Decoder
from d3pack.format.codecs import encode_adapter, encode_picks

pytestmark = pytest.mark.heavy

ETA: dict[str, Any] = {"extra": {"eta": 1.0}}
OUTPUTS: dict[str, Any] = {"template": None, "size": (64, 64)}
FLOWS: dict[str, dict[str, Any]] = {
    "prx": {"sampler": "euler"},
    "z-image": {"sampler": "euler", "guidance": 1.0},
    "flux2": {"sampler": "euler", "guidance": 1.0, "modes": 2},
    "sana-sprint": {"sampler": "lcm", "steps": 2, "guidance": 1.0},
}
FAMILIES: dict[str, tuple[Callable[[Path], Path], dict[str, Any]]] = {
    "sd": (tiny_sd, {"vectors": 2, "modes": 2}),
    "sd-outputs": (tiny_sd, {"template": None, "vectors": 3, "modes": 2}),
    "sdxl": (tiny_sdxl, {"vectors": 2, "modes": 2}),
    "sdxl-outputs": (tiny_sdxl, {"template": None, "vectors": 3, "sampler": "ancestral", **ETA}),
    "dit": (tiny_dit, {"guided_channels": 3, "sampler": "ddim"}),
    **{
        kind: (partial(tiny_flow, kind), {**OUTPUTS, "vectors": 3, **more})
        for kind, more in FLOWS.items()
    },
}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
DTYPES = ("float32", "bfloat16")
# processors without bfloat16 products take minutes for these: two families stand for all
REST = [(family, "bfloat16") for family in FAMILIES if family not in ("sd", "dit")]
QUICK = [case for case in product(FAMILIES, DTYPES) if case not in REST]
CASES = [*QUICK, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)]
COUNT = 24  # 3 classes of 8
BATCHES: dict[str, dict[int, tuple[int, ...]]] = {  # by dtype and threads
    "float32": {
        1: (1, 2, 3, 4, 5, 7, 8, 13, 24, 64),
        **dict.fromkeys((2, 3), (1, 3, 4, 7, 13, 24)),
    },
    "bfloat16": {1: (1, 2, 5, 8, 24), 2: (3, 13), 3: (4, 7)},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("exact")
    return {name: make(root / name) for name, (make, _) in FAMILIES.items()}


@pytest.fixture(scope="module")
def packs(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: tiny_pack(folders[name], **more) for name, (_, more) in FAMILIES.items()}


def takes(family: str) -> dict[str, Any]:
    """What a pack of a family must say about its prompts and images."""
    return OUTPUTS if family in FLOWS else {}


def of_dtype(pack: Any, dtype: str) -> Any:
    return replace(pack, recipe=replace(pack.recipe, dtype=dtype))


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def digest(images: torch.Tensor) -> str:
    return hashlib.sha256(images.cpu().numpy().tobytes()).hexdigest()


@pytest.mark.heavy
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_images_do_not_depend_on_batch_order_or_threads(
    family: str,
    device: str,
    dtype: str,
    folders: dict[str, Path],
    packs: dict[str, Any],
    threads: Callable[[int], None],
) -> None:
    pack = of_dtype(packs[family], dtype)
    decoder = Decoder(pack, path=folders[family], device=device)
    wanted = decoder.images(range(COUNT))
    assert wanted.shape == (COUNT, 3, 64, 64)
    assert wanted.dtype == torch.uint8
    assert len({digest(image) for image in wanted}) == COUNT  # all different
    generator = np.random.default_rng(3)
    for count, batches in BATCHES["float32" if device == "cuda" else dtype].items():
        threads(count)
        for batch in batches:
            asked = generator.integers(COUNT, size=batch) if batch > 8 else None
            order = generator.permutation(COUNT)[:batch] if asked is None else asked
            found = decoder.images(order)
            assert int((found != wanted[order]).sum()) == 0, (batch, count)
    pairs = [(2, 7), (0, 0), (2, 7), (1, 3)]
    numbers = [c * 8 + i for c, i in pairs]
    assert torch.equal(decoder.images(pairs), wanted[numbers])
    assert decoder.images([]).shape == (0, 3, 64, 64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("family", "dtype"), CASES)
def test_images_do_not_depend_on_what_was_decoded_before(
    family: str, device: str, dtype: str, folders: dict[str, Path], packs: dict[str, Any]
) -> None:
    """A fresh decoder may meet any class first, with anything beside it."""
    pack, path = of_dtype(packs[family], dtype), folders[family]
    first = Decoder(pack, path=path, device=device).images(range(COUNT))
    for order in (range(COUNT - 1, -1, -1), [23, 0, 16, 8], [9]):
        found = Decoder(pack, path=path, device=device).images(order)
        assert torch.equal(found, first[list(order)])
    shared = open_backbone(
        pack.recipe.backbone, path=path, device=device, dtype=getattr(torch, dtype)
    )
    plain = tiny_pack(path, seed=77, guidance=1.0, dtype=dtype, **takes(family))
    other = Decoder(plain, backbone=shared, device=device)
    mine = Decoder(pack, backbone=shared, device=device)
    noise = other.images([3])
    assert torch.equal(mine.images(range(COUNT)), first)
    assert torch.equal(other.images([3]), noise)


SCRIPT = """
import hashlib, json, sys
import torch
import d3pack
from d3pack.decode import Decoder
torch.set_num_threads(int(sys.argv[1]))
found = {}
for name, folder, file in json.loads(sys.argv[2]):
    decoder = Decoder(d3pack.read(file), path=folder, device=sys.argv[3])
    images = torch.empty(24, 3, 64, 64, dtype=torch.uint8)
    for positions in torch.randperm(24).split(5):
        images[positions] = decoder.images(positions.tolist()).cpu()
    found[name] = hashlib.sha256(images.numpy().tobytes()).hexdigest()
print(json.dumps(found))
"""


@pytest.mark.parametrize("cases", [QUICK, pytest.param(REST, marks=pytest.mark.slow)])
@pytest.mark.parametrize("device", DEVICES)
def test_images_are_the_same_in_another_process(
    device: str,
    cases: list[tuple[str, str]],
    folders: dict[str, Path],
    packs: dict[str, Any],
    tmp_path: Path,
) -> None:
    jobs, here = [], {}
    for family, dtype in cases:
        name, file = f"{family} {dtype}", tmp_path / f"{family}-{dtype}.d3m"
        pack = of_dtype(packs[family], dtype)
        d3pack.write(pack, file)
        jobs.append([name, str(folders[family]), str(file)])
        decoder = Decoder(pack, path=folders[family], device=device)
        here[name] = digest(decoder.images(range(COUNT)))
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, "2", json.dumps(jobs), device],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        check=True,
    )
    assert json.loads(run.stdout) == here


@pytest.mark.parametrize("family", FAMILIES)
def test_select_and_first_give_the_same_images(
    family: str, folders: dict[str, Path], packs: dict[str, Any]
) -> None:
    pack, path = packs[family], folders[family]
    whole = Decoder(pack, path=path).images(range(COUNT)).reshape(3, 8, 3, 64, 64)
    some = pack.select([pack.classes[2], pack.classes[0]])
    kept = [pack.classes.index(name) for name in some.classes]
    found = Decoder(some, path=path).images(range(16)).reshape(2, 8, 3, 64, 64)
    assert torch.equal(found, whole[kept])
    few = Decoder(pack.first(3), path=path).images(range(9)).reshape(3, 3, 3, 64, 64)
    assert torch.equal(few, whole[:, :3])


@pytest.mark.parametrize("family", FAMILIES)
def test_autocast_of_the_caller_changes_nothing(
    family: str, folders: dict[str, Path], packs: dict[str, Any]
) -> None:
    wanted = Decoder(packs[family], path=folders[family]).images(range(4))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = Decoder(packs[family], path=folders[family]).images(range(4))
    assert digest(found) == digest(wanted)


def test_picked_images_are_those_candidates(folders: dict[str, Path]) -> None:
    path = folders["sd"]
    plain = Decoder(tiny_pack(path), path=path)
    picks = np.array([[5, 0], [7, 2], [1, 6]])
    curated = Decoder(tiny_pack(path, images=2, picks=encode_picks(picks)), path=path)
    wanted = plain.images([(c, int(i)) for c in range(3) for i in picks[c]])
    assert torch.equal(curated.images(range(6)), wanted)


def test_images_use_the_modes_in_turn(folders: dict[str, Path]) -> None:
    path = folders["dit"]
    two = tiny_pack(path, modes=2, classes=1, images=4)
    images = Decoder(two, path=path).images(range(4))
    from d3pack.format.codecs import decode_prompts, encode_prompts

    prompts = decode_prompts(two.prompts)

    for mode in range(2):
        one = replace(two, prompts=encode_prompts(prompts[:, mode : mode + 1]))
        found = Decoder(one, path=path).images(range(4))
        assert torch.equal(found[mode::2], images[mode::2])
        assert not torch.equal(found[1 - mode :: 2], images[1 - mode :: 2])


def test_epochs_have_other_images_that_repeat(
    folders: dict[str, Path], packs: dict[str, Any]
) -> None:
    decoder = Decoder(packs["sd"], path=folders["sd"])
    base, one = decoder.images(range(6)), decoder.images(range(6), epoch=1)
    assert not (base == one).flatten(1).all(1).any()
    assert torch.equal(decoder.images(range(6), epoch=1), one)
    assert torch.equal(decoder.images(range(6), epoch=0), base)


@pytest.mark.parametrize("sampler", ["ddim", "euler", "lcm", "table"])
def test_images_of_every_sampler_are_exact(sampler: str, folders: dict[str, Path]) -> None:
    path = folders["sd"]
    rows = [[0.2, [0.8]], [0.1, [1.0, -0.1]], [0.0, [1.0]]]
    extra = {"table": rows} if sampler == "table" else {}
    decoder = Decoder(tiny_pack(path, sampler=sampler, extra=extra), path=path)
    wanted = decoder.images(range(8))
    assert torch.equal(decoder.images([7, 2])[1], wanted[2])
    assert torch.equal(decoder.images([5])[0], wanted[5])


def test_guidance_mixes_conditional_and_unconditional(folders: dict[str, Path]) -> None:
    """1 leaves the empty prompt out; other values push along the same line."""
    path = folders["dit"]
    pairs = [(0, 0), (1, 1), (2, 2), (0, 3)]

    def latents(guidance: float, channels: int = 0) -> torch.Tensor:
        pack = tiny_pack(path, guidance=guidance, steps=1, guided_channels=channels)
        decoder = Decoder(pack, path=path)
        with torch.inference_mode():
            return decoder._latents(pairs, decoder._model(pairs), 0)

    made = {g: latents(g) for g in (0.0, 1.0, 3.0)}
    torch.testing.assert_close(
        made[3.0], made[0.0] + 3 * (made[1.0] - made[0.0]), rtol=1e-3, atol=1e-2
    )
    some = latents(3.0, channels=3)
    torch.testing.assert_close(some[:, :3], made[3.0][:, :3])
    torch.testing.assert_close(some[:, 3:], made[1.0][:, 3:], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_packs_with_adapters_share_a_backbone(family: str, folders: dict[str, Path]) -> None:
    path = folders[family]
    backbone = open_backbone(str(path))
    queries = ("to_q.weight", "img_qkv_proj.weight")
    names = [n for n in backbone.named_tensors() if n.endswith(queries)][:2]
    tuned = {
        f"{n}.delta": np.random.default_rng(1).normal(size=tuple(backbone.named_tensors()[n].shape))
        for n in names
    }
    pack = tiny_pack(path, **takes(family))
    plain = Decoder(pack, backbone=backbone)
    adapter = encode_adapter({n: t * 3 for n, t in tuned.items()})
    adapted = Decoder(tiny_pack(path, adapter=adapter, **takes(family)), backbone=backbone)
    bare, wanted = plain.images(range(6)), adapted.images(range(6))
    assert not torch.equal(bare, wanted)
    assert torch.equal(plain.images(range(6)), bare)
    streams = zip(plain.stream(range(6)), adapted.stream(range(6)), strict=True)
    for (where, one), (_, two) in streams:  # taken in turns
        assert torch.equal(one, bare[where.start : where.stop])
        assert torch.equal(two, wanted[where.start : where.stop])


@pytest.mark.heavy
def test_decoders_share_a_backbone_in_threads(folders: dict[str, Path]) -> None:
    path = folders["sd"]
    backbone = open_backbone(str(path))
    named = backbone.named_tensors()
    name = next(n for n in named if n.endswith("to_q.weight"))
    packs = [tiny_pack(path)]
    for seed in (1, 2):
        delta = np.random.default_rng(seed).normal(size=tuple(named[name].shape)) * 3
        packs.append(tiny_pack(path, adapter=encode_adapter({f"{name}.delta": delta})))
    decoders = [Decoder(pack, backbone=backbone) for pack in packs]
    wanted = [decoder.images(range(12)) for decoder in decoders]
    before = named[name].clone()
    wrong = [0] * len(decoders)

    def decode(number: int) -> None:
        for _ in range(5):
            images = decoders[number].images(range(12))
            wrong[number] += int((images != wanted[number]).sum())

    threads = [threading.Thread(target=decode, args=(n,)) for n in range(len(decoders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [0, 0, 0]
    assert torch.equal(named[name], before)


def test_dropped_conditions_change_nothing(
    folders: dict[str, Path], packs: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = Decoder(packs["sd"], path=folders["sd"]).images(range(COUNT))
    monkeypatch.setattr("d3pack.decode.decoder._MAX_CONDITIONS", 1)
    small = Decoder(packs["sd"], path=folders["sd"])
    assert torch.equal(small.images(range(COUNT)), wanted)
    assert len(small._conditions) == 1
