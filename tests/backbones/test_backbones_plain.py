"""The models in plain PyTorch compute the same bits as the classes that they stand for."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from d3pack.backbones import mini_directory
from d3pack.backbones.models import autoencoder_tiny, clip, unet
from d3pack.system import fast_bfloat16

SMALL: dict[str, Any] = {
    "sample_size": 8,
    "block_out_channels": [16, 24],
    "layers_per_block": 1,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 12,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}
UNETS: dict[str, dict[str, Any]] = {
    "small": SMALL,
    "heads by block": SMALL | {"attention_head_dim": [2, 3], "num_attention_heads": None},
    "linear projections": SMALL | {"use_linear_projection": True, "layers_per_block": 2},
    "scales of the time": SMALL | {"resnet_time_scale_shift": "scale_shift"},
    "pooled text": SMALL | {"addition_embed_type": "text", "addition_embed_type_num_heads": 3},
    "sines first": SMALL | {"flip_sin_to_cos": False, "freq_shift": 1, "time_embedding_dim": 40},
    "four blocks of three widths": SMALL
    | {
        "sample_size": 16,
        "block_out_channels": [8, 16, 24, 24],
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "attention_head_dim": 8,
        "layers_per_block": 2,
    },
}
TEXTS: dict[str, dict[str, Any]] = {
    "clip": {},
    "gelu": {"hidden_act": "gelu", "layer_norm_eps": 1e-3},
}


def random_weights(model: nn.Module) -> nn.Module:
    """Give every tensor values, also those that begin at 0 or 1."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.2)
    return model.eval().requires_grad_(False)


def copy_of(model: nn.Module, other: nn.Module, prefix: str = "") -> Any:
    """Load the weights of another class, which must have the same names and shapes."""
    state = {key.removeprefix(prefix): value for key, value in other.state_dict().items()}
    model.load_state_dict(state)
    return model.eval().requires_grad_(False)


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*UNETS, "mini"])
def test_unet_gives_the_bits_of_diffusers(name: str, dtype: torch.dtype) -> None:
    from diffusers import UNet2DConditionModel

    config = UNETS.get(name) or json.loads((mini_directory() / "unet/config.json").read_text())
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    assert unet.can_build(config)
    theirs: Any = random_weights(UNet2DConditionModel(**config)).to(dtype)
    known = {k: v for k, v in config.items() if k not in (*unet._FIXED, *unet._UNREAD)}
    ours = copy_of(unet.UNet2DConditionModel(**known).to(dtype), theirs)
    side = config["sample_size"]
    if name == "mini" and dtype == torch.bfloat16 and not fast_bfloat16("cpu"):
        side //= 2  # the whole takes half a minute on such a processor
    for count in (2, 64):  # large batches are upsampled in another layout
        x = noise(count, config.get("in_channels", 4), side, side).to(dtype)
        x = x.contiguous(memory_format=torch.channels_last)
        hidden = noise(count, 5, config["cross_attention_dim"]).to(dtype)
        for t in (torch.tensor(500), torch.arange(count) * 7):
            wanted = theirs(x, t, encoder_hidden_states=hidden, return_dict=False)[0]
            assert torch.equal(ours(x, t, encoder_hidden_states=hidden)[0], wanted)
        assert wanted.std() > 0


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", UNETS)
def test_a_traced_unet_takes_batches_of_other_sizes(name: str) -> None:
    config = UNETS[name]
    model = random_weights(unet.UNet2DConditionModel(**config))
    side = config["sample_size"]

    def inputs(count: int) -> tuple[Tensor, Tensor, Tensor]:
        generator = torch.Generator().manual_seed(count)
        x = torch.randn(count, 4, side, side, generator=generator)
        return x, torch.tensor(7.0), torch.randn(count, 5, 12, generator=generator)

    traced = torch.jit.trace(model, inputs(2))
    for count in (1, 3):
        assert torch.allclose(traced(*inputs(count))[0], model(*inputs(count))[0], atol=1e-6)


def test_fused_attention_gives_what_diffusers_gives_with_it() -> None:
    from diffusers import UNet2DConditionModel

    from d3pack.backbones.kernels import _fuse_attention

    theirs: Any = random_weights(UNet2DConditionModel(**SMALL))
    ours = copy_of(unet.UNet2DConditionModel(**SMALL), theirs)
    x, hidden = noise(2, 4, 8, 8), noise(2, 5, 12)
    results = []
    for model in (theirs, ours):
        _fuse_attention(model)
        results.append(model(x, torch.tensor(3), encoder_hidden_states=hidden, return_dict=False))
    assert torch.equal(results[0][0], results[1][0])
    assert any(name.endswith("attn1.to_qkv.weight") for name in ours.state_dict())


@pytest.mark.parametrize(
    "change",
    [
        {"transformer_layers_per_block": [1, 2]},
        {"addition_embed_type": "text_time", "addition_time_embed_dim": 8},
        {"class_embed_type": "timestep"},
        {"time_cond_proj_dim": 256},
        {"down_block_types": ["KDownBlock2D", "KCrossAttnDownBlock2D"]},
        {"mid_block_type": None},
        {"layers_per_block": [1, 2]},
        {"cross_attention_dim": [12, 12]},
        {"upcast_attention": True},
        {"block_out_channels": [15, 24]},
        {"a_setting_of_tomorrow": 1},
        {"down_block_types": None},
        {"up_block_types": [[], {}]},
        {"addition_embed_type": []},
        {"block_out_channels": 16},
    ],
    ids=lambda change: next(iter(change)),
)
def test_other_unets_are_left_to_diffusers(change: dict[str, Any]) -> None:
    assert not unet.can_build(SMALL | change)


def test_lists_that_differ_in_length_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length"):
        unet.UNet2DConditionModel(**(SMALL | {"attention_head_dim": [2, 2, 2]}))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*TEXTS, "projection"])
def test_text_model_gives_the_bits_of_transformers(name: str, dtype: torch.dtype) -> None:
    import transformers

    sizes = {
        "vocab_size": 50,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "max_position_embeddings": 9,
        **TEXTS.get(name, {}),
    }
    config = transformers.CLIPTextConfig(**sizes, projection_dim=16, eos_token_id=49)
    ids = torch.tensor([[48, 3, 7, 49, 49, 49, 49, 49, 49], [48, 1, 2, 3, 4, 5, 6, 7, 49]])
    if name == "projection":
        theirs: Any = random_weights(transformers.CLIPTextModelWithProjection(config)).to(dtype)
        ours: Any = clip.CLIPTextModelWithProjection(**sizes, projection_dim=16).to(dtype)
        assert torch.equal(
            copy_of(ours, theirs, "text_model.").text_projection.weight,
            theirs.text_projection.weight,
        )
    else:
        theirs = random_weights(transformers.CLIPTextModel(config)).to(dtype)
        ours = copy_of(clip.CLIPTextModel(**sizes).to(dtype), theirs, "text_model.")
    wanted = theirs(ids).last_hidden_state
    low = torch.finfo(dtype).min
    mask = torch.full((9, 9), low, dtype=dtype).triu(1).expand(2, 1, 9, 9)
    x = ours.embeddings(ours.embeddings.token_embedding(ids))
    for layer in ours.encoder.layers:
        x = layer(x, mask)
    assert torch.equal(ours.final_layer_norm(x), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"hidden_act": "tanh"}, "hidden_act 'tanh'"), ({"num_attention_heads": 5}, "5 heads")],
)
def test_text_models_of_other_kinds_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        clip.CLIPTextModel(**{"vocab_size": 9, "hidden_size": 24, "num_hidden_layers": 1} | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mini", "taesd"])
def test_autoencoder_gives_the_bits_of_diffusers(name: str, dtype: torch.dtype) -> None:
    from diffusers import AutoencoderTiny

    config = {}
    if name == "mini":
        config = json.loads((mini_directory() / "vae/config.json").read_text())
        config = {k: v for k, v in config.items() if not k.startswith("_")}
        config.pop("block_out_channels")  # diffusers writes it and does not read it
    theirs: Any = random_weights(AutoencoderTiny(**config)).to(dtype)
    unread = ("latent_magnitude", "latent_shift", "force_upcast")
    known = {k: v for k, v in config.items() if k not in unread}
    ours: Any = copy_of(autoencoder_tiny.AutoencoderTiny(**known).to(dtype), theirs)
    latents = noise(2, config.get("latent_channels", 4), 4, 4).to(dtype)
    assert torch.equal(ours.decode(latents).sample, theirs.decode(latents).sample)
    images = noise(2, 3, 32, 32).to(dtype)
    assert torch.equal(ours.encode(images).latents, theirs.encode(images).latents)


def test_autoencoders_of_other_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match="act_fn 'silu' is not relu"):
        autoencoder_tiny.AutoencoderTiny(act_fn="silu")
    with pytest.raises(ValueError, match="zip"):
        autoencoder_tiny.AutoencoderTiny(num_decoder_blocks=(1, 1))


def test_images_of_mini_are_decoded_without_the_libraries() -> None:
    """Nor is torch's compiler imported, which takes a second."""
    pack = Path(__file__).parents[2] / "examples/cifar10.d3m"
    check = (
        "import sys; from d3pack import D3MDataset; D3MDataset(sys.argv[1], cache='cpu')[0];"
        "print(*sorted({'diffusers', 'transformers', 'torch._dynamo'} & sys.modules.keys()))"
    )
    command = [sys.executable, "-c", check, str(pack)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert done.stdout.split() == []


@pytest.mark.parametrize("method", ["d3m", "modes", "minimax", "codes"])
def test_methods_are_imported_without_the_libraries(method: str) -> None:
    check = (
        f"import sys, d3pack.encode.driver, d3pack.encode.methods.{method}.method;"
        "sys.exit(bool({'diffusers', 'transformers', 'torch._dynamo'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", check], check=True)
