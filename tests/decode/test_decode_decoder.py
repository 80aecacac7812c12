"""Exact and fast, probes, and every way a decoder refuses."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from cli import invoke
from PIL import Image
from tiny_backbones import tiny_dit, tiny_pack, tiny_sd

import d3pack
from d3pack.backbones import open_backbone, to_grey
from d3pack.decode import Decoder, exact_numerics, make_probes, verify_probes
from d3pack.decode.probes import shrink
from d3pack.errors import BackboneChangedError, UsageError
from d3pack.format.codecs import encode_adapter, encode_prompts
from d3pack.system import resolve_device
from d3pack.testing import raises_code


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    return {
        "sd": tiny_sd(root / "sd"),
        "other": tiny_sd(root / "other", seed=1),
        "dit": tiny_dit(root / "dit"),
        "kl": tiny_sd(root / "kl", vae="kl"),
    }


@pytest.fixture(scope="module")
def pack(folders: dict[str, Path]) -> Any:
    return tiny_pack(folders["sd"])


def rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a.float() - b.float()).square().mean().sqrt())


def test_grey_is_the_luma_of_the_colours(pack: Any, folders: dict[str, Path]) -> None:
    grey = replace(pack, recipe=replace(pack.recipe, grey=True))
    coloured = Decoder(pack, path=folders["sd"]).images(range(6))
    made = Decoder(grey, path=folders["sd"]).images(range(6))
    assert (coloured[:, 0] != coloured[:, 1]).any()
    for image, colours in zip(made, coloured, strict=True):
        luma = np.asarray(Image.fromarray(colours.permute(1, 2, 0).numpy()).convert("L"))
        assert all(np.array_equal(channel.numpy(), luma) for channel in image)


def test_every_colour_has_the_luma_of_pillow() -> None:
    step = torch.arange(0, 256, 5, dtype=torch.uint8)
    colours = torch.cartesian_prod(step, step, step).T[None, :, :, None].contiguous()
    image = Image.fromarray(colours[0].permute(1, 2, 0).numpy())
    assert np.array_equal(to_grey(colours)[0, 0].numpy(), np.asarray(image.convert("L")))


def test_describe_of_exact_numerics(pack: Any, folders: dict[str, Path]) -> None:
    how = Decoder(pack, path=folders["sd"]).describe()
    assert how == {
        "numerics": "exact",
        "switches": [],
        "device": "cpu",
        "dtype": "float32",
        "group": 4,
        "backbone": pack.recipe.backbone.revision,
        "revision": pack.recipe.backbone.revision,
        "sampler": "dpmpp-2m",
        "steps": 3,
        "guidance": 2.0,
        "size": [64, 64],
        "adapter": 0,
    }


@pytest.mark.heavy
@pytest.mark.parametrize("family", ["sd", "dit"])
@pytest.mark.parametrize(
    ("switches", "most"), [(["channels_last"], 1.0), (["fused_attention"], 1.0), (["bf16"], 40.0)]
)
def test_images_of_each_switch_are_near_the_exact_ones(
    family: str, switches: list[str], most: float, folders: dict[str, Path]
) -> None:
    pack = tiny_pack(folders[family], steps=2)
    exact = Decoder(pack, path=folders[family]).images(range(8))
    fast = Decoder(pack, path=folders[family], numerics="fast", switches=switches)
    assert fast.describe()["numerics"] == "fast"
    assert fast.describe()["switches"] == switches
    assert rms(fast.images(range(8)), exact) < most


def test_tiny_vae_replaces_the_autoencoder(folders: dict[str, Path]) -> None:
    pack = tiny_pack(folders["kl"])
    exact = Decoder(pack, path=folders["kl"]).images(range(4))
    fast = Decoder(
        pack, path=folders["kl"], numerics="fast", switches=[], tiny_vae=folders["sd"] / "vae"
    )
    assert fast.describe()["switches"] == ["tiny_vae"]
    assert not torch.equal(fast.images(range(4)), exact)


@pytest.mark.heavy
@pytest.mark.filterwarnings("ignore:Dynamo detected a call:UserWarning")  # of diffusers
@pytest.mark.parametrize("family", ["sd", "kl", "dit"])
def test_denoiser_and_autoencoder_are_compiled_once(
    family: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a compiler that counts the graphs it is given, and changes nothing."""
    graphs: list[Any] = []

    def count(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    real = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: real(self, **how, backend=count)
    )
    torch._dynamo.reset()
    pack = tiny_pack(folders[family], steps=3)
    plain = Decoder(pack, path=folders[family], numerics="fast", switches=["bf16"]).images(range(8))
    fast = Decoder(pack, path=folders[family], numerics="fast", switches=["bf16", "compile"])
    assert rms(fast.images(range(8)), plain) < 1  # several steps and classes
    assert len(graphs) == 2
    fast.images(range(8, 16))
    assert len(graphs) == 2
    torch._dynamo.reset()


@pytest.mark.heavy
def test_fast_numerics_keep_the_adapter(folders: dict[str, Path]) -> None:
    path = folders["sd"]
    backbone = open_backbone(str(path))
    named = backbone.named_tensors()
    tuned = {f"{n}.scale": np.full(1, 4.0) for n in named if n.endswith("attn1.to_q.weight")}
    pack = tiny_pack(path, adapter=encode_adapter(tuned))
    exact = Decoder(pack, path=path).images(range(4))
    fast = Decoder(pack, path=path, numerics="fast", switches=["fused_attention"])
    assert fast.describe()["adapter"] == len(tuned)
    bare = Decoder(tiny_pack(path), path=path).images(range(4))
    assert rms(fast.images(range(4)), exact) < 0.5 * rms(bare, exact)


@pytest.mark.heavy
def test_other_groups_need_fast_numerics(pack: Any, folders: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="group of 4"):
        Decoder(pack, path=folders["sd"], group=8)
    fast = Decoder(pack, path=folders["sd"], numerics="fast", switches=[], group=8)
    assert fast.describe()["group"] == 8
    assert rms(fast.images(range(8)), Decoder(pack, path=folders["sd"]).images(range(8))) < 1


def test_invalid_numerics_are_refused(pack: Any, folders: dict[str, Path]) -> None:
    path = folders["sd"]
    for more, why in (
        ({"device": "tpu9"}, "invalid device 'tpu9'"),
        ({"device": f"cuda:{torch.cuda.device_count()}"}, "on this machine"),
        ({"device": "meta"}, "there is no meta on this machine"),
        ({"device": "xpu:77"}, "there is no xpu:77 on this machine"),
        ({"device": "mps:77"}, "there is no mps:77 on this machine"),
        ({"workers": 0}, "invalid workers 0: expected at least 1"),
        ({"workers": -1}, "invalid workers -1: expected at least 1"),
        ({"numerics": "fast", "group": 0}, "invalid group 0: expected at least 1"),
        ({"numerics": "fast", "group": -4}, "invalid group -4: expected at least 1"),
        ({"numerics": "quick"}, "unknown numerics"),
        ({"switches": ["bf16"]}, "no switches"),
        ({"numerics": "fast", "switches": ["turbo"]}, "unknown switch"),
        ({"numerics": "fast", "switches": ["tiny_vae"]}, "needs an autoencoder"),
    ):
        with pytest.raises(UsageError, match=why):
            Decoder(pack, path=path, **more)
    shared = open_backbone(str(path))
    with pytest.raises(UsageError, match="shared"):
        Decoder(pack, backbone=shared, numerics="fast", switches=["channels_last"])
    assert Decoder(pack, backbone=shared, numerics="fast").describe()["switches"] == []
    half = replace(pack, recipe=replace(pack.recipe, dtype="bfloat16"))
    with pytest.raises(UsageError, match="float32"):
        Decoder(half, backbone=shared)


def test_decoder_names_its_device_with_its_index(
    pack: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "cuda" names no device for good: each thread may have chosen another."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert resolve_device("cuda") == torch.device("cuda:1")
    assert resolve_device("cuda:0") == torch.device("cuda:0")
    assert resolve_device("cpu:0") == torch.device("cpu")
    with pytest.raises(UsageError, match="there is no cuda:2"):
        resolve_device("cuda:2")
    backbone: Any = open_backbone(str(folders["sd"]))
    elsewhere = SimpleNamespace(device=torch.device("cuda:0"))
    backbone.named_tensors = lambda: {"weight": elsewhere}
    with pytest.raises(UsageError, match=r"on cuda:0; this pack and numerics need .* on cuda:1"):
        Decoder(pack, backbone=backbone, device="cuda")


def test_default_device_is_that_of_the_backbone_or_of_the_machine(
    pack: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a given backbone; else the one that every verb takes."""
    shared = open_backbone(str(folders["sd"]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert Decoder(pack, backbone=shared).device == torch.device("cpu")
    with pytest.raises(UsageError, match="cuda:0"):
        Decoder(pack, backbone=shared, device="cuda")

    def refuse(*_: Any, device: torch.device, **__: Any) -> None:
        raise LookupError(device)

    monkeypatch.setattr("d3pack.decode.decoder.open_backbone", refuse)
    with pytest.raises(LookupError, match="cuda:0"):
        Decoder(pack, path=folders["sd"])


def test_number_of_threads_is_restored(pack: Any, folders: dict[str, Path]) -> None:
    before = torch.get_num_threads()
    decoder = Decoder(pack, path=folders["sd"])
    try:
        torch.set_num_threads(3)
        with exact_numerics(decoder.device, decoder.numerics):
            assert torch.get_num_threads() == 1
        stream = decoder.stream(range(24))
        next(stream)
        assert torch.get_num_threads() == 3  # also while a stream is waiting
        with pytest.raises(ZeroDivisionError), exact_numerics(decoder.device, decoder.numerics):
            raise ZeroDivisionError
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
        decoder.close()


@pytest.mark.parametrize(
    ("wanted", "why"),
    [
        ([(3, 0)], "class 3 is out of range; there are 3"),
        ([(-1, 0)], "class -1"),
        ([(0, 8)], "index 8 is out of range; there are 8"),
        ([(0, -1)], "index -1"),
        ([24], "image 24 is out of range; there are 24"),
        ([-1], "image -1"),
        ([1.0], "invalid image 1.0: expected a number or a pair"),
        ([(0,)], "invalid image"),
        ([(0, 1, 2)], "invalid image"),
        ([(0.5, 1)], "invalid image"),
        ([None], "invalid image None"),
        (["12"], "invalid image '12'"),
        (torch.zeros(3, 3), "invalid image"),
    ],
)
def test_items_out_of_range_are_refused(
    wanted: list[Any], why: str, pack: Any, folders: dict[str, Path]
) -> None:
    decoder = Decoder(pack, path=folders["sd"])
    with pytest.raises(UsageError, match=why):
        decoder.images(wanted)


def test_prompts_of_wrong_width_are_refused(
    pack: Any, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("d3pack.decode.decoder.decode_prompts", None)  # refused before that
    for shape in ((3, 1, 1, 31), (3, 1, 40, 32)):
        wrong = replace(pack, prompts=encode_prompts(np.ones(shape, np.float32)))
        with raises_code("E_BACKBONE_PROMPT", match="takes up to 14 of 32"):
            Decoder(wrong, path=folders["sd"])


def test_open_backbone_of_another_lock_is_refused(pack: Any, folders: dict[str, Path]) -> None:
    with pytest.raises(BackboneChangedError, match="text_encoder"):
        Decoder(pack, path=folders["other"])
    with pytest.raises(BackboneChangedError, match="not the one"):
        Decoder(pack, backbone=open_backbone(str(folders["other"])))


def test_adapter_of_another_backbone_is_refused(folders: dict[str, Path]) -> None:
    wrong = tiny_pack(folders["sd"], adapter=encode_adapter({"blocks.0.bias.delta": np.ones(3)}))
    with raises_code("E_ADAPTER", match="does not have"):
        Decoder(wrong, path=folders["sd"])


def test_shrinking_is_an_exact_mean() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 12), dtype=torch.uint8)
    found = shrink(images, (4, 4))
    tiles = images.double().unfold(2, 2, 2).unfold(3, 3, 3).mean((-1, -2))
    assert torch.equal(found, (tiles + 0.5).floor().to(torch.uint8))
    assert torch.equal(shrink(images, (8, 12)), images)
    with pytest.raises(UsageError, match="tile"):
        shrink(images, (3, 4))


@pytest.fixture(scope="module")
def probed(pack: Any, folders: dict[str, Path]) -> Any:
    with Decoder(pack, path=folders["sd"]) as decoder:
        return replace(pack, probes=make_probes(decoder, [(0, 0), (1, 3), (2, 7)], (16, 16)))


def test_probes_are_verified(probed: Any, folders: dict[str, Path]) -> None:
    decoder = Decoder(probed, path=folders["sd"])
    report = verify_probes(probed, decoder)
    assert report.to_json() == {
        "verdict": "exact",
        "rms": 0.0,
        "peak": 0,
        "probes": 3,
        "different": 0,
    }
    with pytest.raises(UsageError, match="exact numerics"):
        make_probes(
            Decoder(probed, path=folders["sd"], numerics="fast", switches=[]), [(0, 0)], (8, 8)
        )
    with pytest.raises(UsageError, match="no probes"):
        verify_probes(replace(probed, probes=None), decoder)


def test_probes_of_other_arithmetic_are_within_tolerance(
    probed: Any, folders: dict[str, Path]
) -> None:
    images = np.array(probed.probes.images)
    images[0, 0, :4, :4] ^= 1
    moved = replace(probed, probes=replace(probed.probes, images=images))
    report = verify_probes(moved, Decoder(moved, path=folders["sd"]))
    assert report.verdict == "within tolerance"
    assert (report.peak, report.different) == (1, 16)
    assert report.rms == pytest.approx((16 / images.size) ** 0.5, abs=1e-4)


def test_probes_of_another_model_are_wrong(probed: Any, folders: dict[str, Path]) -> None:
    """Weights that pass for the locked ones, but are not: what the lock cannot see, probes do."""
    swapped: Any = open_backbone(str(folders["other"]))
    swapped.ref = probed.recipe.backbone
    report = verify_probes(probed, Decoder(probed, backbone=swapped))
    assert report.verdict == "wrong backbone"
    assert report.rms > 2


def test_verify_command_compares_probes(
    probed: Any, folders: dict[str, Path], tmp_path: Path
) -> None:
    d3pack.write(probed, tmp_path / "good.d3m")
    words = ["verify", str(tmp_path / "good.d3m"), "--decode", "--backbone", str(folders["sd"])]
    good = invoke(*words, "--format", "json")
    assert good.exit_code == 0, good.output
    assert json.loads(good.stdout)[0]["decode"]["verdict"] == "exact"
    assert "exact: 3 probes" in invoke(*words).stdout
    images = 255 - np.array(probed.probes.images)
    wrong = replace(probed, probes=replace(probed.probes, images=images))
    d3pack.write(wrong, tmp_path / "good.d3m")
    bad = invoke(*words)
    assert bad.exit_code == 4
    assert "wrong backbone" in bad.stdout
    moved = Path(shutil.copytree(folders["sd"], tmp_path / "moved"))
    (moved / "vae/config.json").unlink()
    gone = invoke(*words[:-1], str(moved))
    assert gone.exit_code == 4
    assert "E_BACKBONE_MISSING" in gone.stderr
