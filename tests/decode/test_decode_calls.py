"""What a decoder is asked for, and how it fails: numbers that are none, no room, closed twice."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import tiny_pack, tiny_sd

from d3pack.backbones import adapter, open_backbone
from d3pack.backbones.stable_diffusion import StableDiffusion
from d3pack.decode import Decoder
from d3pack.format.codecs import encode_adapter, encode_prompts
from d3pack.testing import raises_code


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {"sd": tiny_sd(tmp_path_factory.mktemp("asked") / "sd")}


@pytest.fixture(scope="module")
def pack(folders: dict[str, Path]) -> Any:
    return tiny_pack(folders["sd"])


def test_integers_of_numpy_and_torch_are_accepted(pack: Any, folders: dict[str, Path]) -> None:
    decoder = Decoder(pack, path=folders["sd"])
    pairs = [(0, 1), (2, 7)]
    for wanted in (
        pairs,
        [1, 23],
        np.array([1, 23]),
        torch.tensor([1, 23]),
        np.array(pairs),
        torch.tensor(pairs),
    ):
        assert decoder.pairs(wanted) == pairs
    assert decoder.images(torch.arange(3)).shape[0] == 3


def test_decoder_can_be_closed_twice(pack: Any, folders: dict[str, Path]) -> None:
    decoder = Decoder(pack, path=folders["sd"])
    decoder.images(range(8))
    decoder.close()
    decoder.close()


def test_decoder_keeps_its_threads(pack: Any, folders: dict[str, Path]) -> None:
    """Whatever number of groups is asked for: each thread has kernels compiled for it."""
    decoder = Decoder(pack, path=folders["sd"], workers=3)
    decoder.images(range(8))
    pool = decoder._pool
    for count in (24, 8, 12):
        decoder.images(range(count))
        assert decoder._pool is pool
    decoder.close()


def test_invalid_items_are_refused(pack: Any, folders: dict[str, Path]) -> None:
    prompts = np.full((3, 1, 1, 32), 6e4, np.float32)  # finite, but beyond the text encoder
    backbone = open_backbone(str(folders["sd"]), dtype=torch.float16)
    half = replace(
        pack, recipe=replace(pack.recipe, dtype="float16"), prompts=encode_prompts(prompts)
    )
    assert isinstance(backbone, StableDiffusion)
    with torch.no_grad():
        backbone.denoiser.conv_out.weight.mul_(1e5)
    with raises_code("E_BACKBONE_NOT_FINITE", match="not finite"):
        Decoder(half, backbone=backbone).images([0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_images_that_are_not_finite_are_an_error(
    value: float, pack: Any, folders: dict[str, Path]
) -> None:
    """An autoencoder may overflow where the latents did not."""
    backbone: Any = open_backbone(str(folders["sd"]))
    decoder = Decoder(pack, backbone=backbone)
    real = backbone.autoencoder.decode_float

    def overflow(latents: torch.Tensor) -> torch.Tensor:
        images: torch.Tensor = real(latents)
        images[-1, 0, 3, 4] = value
        return images

    backbone.autoencoder.decode_float = overflow
    with raises_code("E_BACKBONE_NOT_FINITE", match="pixels that are not finite"):
        decoder.images(range(4))


def test_out_of_memory_error_names_what_to_change(pack: Any, folders: dict[str, Path]) -> None:
    """A real allocation that no machine has: 2^46 bytes, inside the autoencoder."""
    backbone: Any = open_backbone(str(folders["sd"]))
    decoder = Decoder(pack, backbone=backbone)
    real = backbone.autoencoder.decode_float
    backbone.autoencoder.decode_float = lambda z: real(z) + torch.empty(2**44)[0]
    with raises_code("E_BACKBONE_MEMORY", match="group of 4 images of 64x64") as caught:
        decoder.images(range(4))
    assert "smaller group" in str(caught.value)
    assert decoder.group == 4
    backbone.autoencoder.decode_float = real
    assert decoder.images(range(4)).shape[0] == 4  # and goes on afterwards


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: out of memory",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
    ],
)
def test_every_out_of_memory_message_is_recognised(
    words: str, folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    backbone: Any = open_backbone(str(folders["sd"]))
    name = next(n for n in backbone.named_tensors() if n.endswith("to_q.weight"))
    pack = tiny_pack(folders["sd"], adapter=encode_adapter({f"{name}.scale": np.full(1, 2.0)}))
    decoder = Decoder(pack, backbone=backbone)
    kept: list[weakref.ref[torch.Tensor]] = []

    def full(*_: Any, **__: Any) -> None:
        made = torch.zeros(3)
        kept.append(weakref.ref(made))
        raise RuntimeError(words)

    for owner, attribute, use, why in (
        (torch.nn.Module, "to", lambda: Decoder(pack, path=folders["sd"]), "for the backbone"),
        (adapter, "_tuned", lambda: decoder.images([0]), "for a group of 4"),
        (backbone.autoencoder, "decode_float", lambda: decoder.images([0]), "for a group of 4"),
        (torch, "empty", lambda: decoder.images([0] * 5), "for 5 images of 64x64 at once"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, attribute, full)
            with raises_code("E_BACKBONE_MEMORY", match=why) as caught:
                use()
        assert caught.value.__context__ is None
        assert kept.pop()() is None, "what was made so far is free"
    assert decoder.images([0]).shape[0] == 1


def test_other_runtime_errors_pass_unchanged(pack: Any, folders: dict[str, Path]) -> None:
    backbone: Any = open_backbone(str(folders["sd"]))
    decoder = Decoder(pack, backbone=backbone)
    backbone.autoencoder.decode_float = lambda z: torch.zeros(2) @ torch.zeros(3)
    with pytest.raises(RuntimeError, match="inconsistent tensor size"):
        decoder.images([0])
