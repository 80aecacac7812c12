"""A LoRA rides in the pack: prompts and codes are made for the backbone that it tunes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from encode_world import changed, make_tree, quick
from safetensors.torch import save_file
from tiny_backbones import tiny_sd

from d3pack.backbones import open_backbone, read_lora
from d3pack.decode import Decoder, verify_probes
from d3pack.encode import encode, estimate_encode
from d3pack.errors import NotFoundError
from d3pack.format import decode_adapter, read

pytestmark = pytest.mark.heavy
LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_v"


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("lora")
    make_tree(root / "source", 8)
    tiny_sd(root / "sd")
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(*size, generator=generator) for size in ((2, 32), (32, 2)))
    named = {f"unet.{LAYER}.lora_A.weight": a, f"unet.{LAYER}.lora_B.weight": b * 3}
    save_file(named, root / "a.safetensors")
    return root


def test_lora_is_carried_and_learned_under(world: Path, tmp_path: Path) -> None:
    settings = quick(world / "sd", lora=world / "a.safetensors", probes=2, codes=1)
    pack = encode(world / "source", tmp_path / "a.d3m", settings, teachers=world / "teachers")
    found = read(tmp_path / "a.d3m")
    assert found.adapter is not None
    backbone: Any = open_backbone(str(world / "sd"))
    before = {name: tensor.clone() for name, tensor in backbone.named_tensors().items()}
    wanted = read_lora(world / "a.safetensors", backbone)
    stored = decode_adapter(found.adapter)
    assert set(stored) == set(wanted)
    for name, tensor in wanted.items():
        torch.testing.assert_close(torch.from_numpy(stored[name]), tensor, rtol=1e-3, atol=1e-3)
    decoder = Decoder(found, backbone=backbone)
    assert verify_probes(found, decoder).verdict == "exact"
    bare = Decoder(replace(found, adapter=None), backbone=backbone)
    items = range(len(pack))
    assert not torch.equal(decoder.images(items), bare.images(items))
    assert all(torch.equal(backbone.named_tensors()[name], before[name]) for name in before)
    expected = estimate_encode(world / "source", settings)["bytes"]
    assert abs(expected - (tmp_path / "a.d3m").stat().st_size) < 120


def test_codes_are_chosen_on_the_tuned_backbone(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[bool] = []
    from d3pack.encode import codes

    original, plain = codes.Coder._denoise, open_backbone(str(world / "sd")).named_tensors()

    def denoise(self: Any, *args: Any) -> Any:
        own = self.backbone.named_tensors()[f"{LAYER}.weight"]
        seen.append(not torch.equal(own, plain[f"{LAYER}.weight"]))
        return original(self, *args)

    monkeypatch.setattr(codes.Coder, "_denoise", denoise)
    settings = quick(world / "sd", lora=world / "a.safetensors", codes=1)
    encode(world / "source", tmp_path / "a.d3m", settings, teachers=world / "teachers")
    assert seen
    assert all(seen)


def test_another_lora_is_another_run(world: Path, tmp_path: Path) -> None:
    settings = quick(world / "sd", lora=world / "a.safetensors")
    one = encode(world / "source", tmp_path / "a.d3m", settings, teachers=world / "teachers")
    other = changed(settings, lora=None)
    two = encode(world / "source", tmp_path / "b.d3m", other, teachers=world / "teachers")
    assert two.adapter is None
    assert one.root != two.root
    with pytest.raises(NotFoundError, match="there is no file"):
        encode(
            world / "source",
            tmp_path / "c.d3m",
            changed(settings, lora=tmp_path / "nowhere"),
            teachers=world / "teachers",
        )
