"""Both families against the libraries' own forwards, and what training needs from them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import tiny_dit, tiny_sd

from d3pack.backbones import (
    Backbone,
    Condition,
    DiT,
    apply_adapter,
    check_adapter,
    open_backbone,
)
from d3pack.errors import UsageError
from d3pack.testing import raises_code

VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sd": (tiny_sd, {}),
    "sd-kl-vocab-eps": (tiny_sd, {"vae": "kl", "tokenizer": "vocab", "prediction": "epsilon"}),
    "sd-77-sample": (tiny_sd, {"positions": 77, "prediction": "sample"}),
    "dit": (tiny_dit, {}),
    "dit-untied": (tiny_dit, {"tied": False, "learned_sigma": False, "vae": "tiny"}),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("backbones")
    return {name: make(root / name, **more) for name, (make, more) in VARIANTS.items()}


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: open_backbone(str(path)) for name, path in folders.items()}


def latents(backbone: Backbone, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *backbone.latent_shape, generator=generator)


def prompts(backbone: Backbone, count: int, k: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(count, k, backbone.prompt_shape[1], generator=generator) * 0.3


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["sd", "sd-kl-vocab-eps", "sd-77-sample"])
@torch.no_grad()
def test_spliced_token_embeddings_encode_as_transformers_does(
    name: str, folders: dict[str, Path], opened: dict[str, Any]
) -> None:
    from transformers import CLIPTextModel, CLIPTokenizer

    encoder = CLIPTextModel.from_pretrained(folders[name] / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(folders[name] / "tokenizer")
    backbone = opened[name]
    length = backbone.text.positions
    for template, words in (
        ("a photo of a {}", "goldfish"),
        ("{}, a small school bus", "tabby cat"),
        ("{}", "golden retriever"),
        ("An IMAGE of  the {}!", "penguin"),
    ):
        text = template.replace("{}", words)
        given = tokenizer(
            text, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        )
        wanted = encoder(given.input_ids).last_hidden_state
        vectors = backbone.name_vectors(words, None)[None]
        found = backbone.condition(vectors, template).tensors["hidden"]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
        assert backbone.text.ids(text) == given.input_ids[0].tolist()
        plain = backbone.sentence(text).tensors["hidden"]
        torch.testing.assert_close(plain, wanted, rtol=1e-5, atol=1e-5)
    empty = tokenizer("", padding="max_length", max_length=length, return_tensors="pt")
    torch.testing.assert_close(
        backbone.unconditional().tensors["hidden"],
        encoder(empty.input_ids).last_hidden_state,
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("name", ["sd", "sd-kl-vocab-eps", "sd-77-sample"])
@torch.no_grad()
def test_unet_predicts_as_diffusers_does(
    name: str, folders: dict[str, Path], opened: dict[str, Any]
) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folders[name] / "unet").eval()
    backbone = opened[name]
    c = backbone.condition(prompts(backbone, 3, 2))
    x, t = latents(backbone, 3), torch.tensor([999, 500, 3])
    wanted = unet(x, t, encoder_hidden_states=c.tensors["hidden"]).sample
    torch.testing.assert_close(backbone.predict(x, t, c), wanted, rtol=1e-4, atol=1e-4)
    again = backbone.predict(x, t, c)  # keys and values are remembered by now
    assert torch.equal(again, backbone.predict(x, t, c))
    torch.testing.assert_close(again, wanted, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_attention_with_norms_predicts_as_diffusers_does(tmp_path: Path) -> None:
    """K-blocks normalise what they attend to: remembered keys and values would leave that out."""
    from diffusers import UNet2DConditionModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("KCrossAttnDownBlock2D", "KDownBlock2D"),
            mid_block_type=None,
            up_block_types=("KUpBlock2D", "KCrossAttnUpBlock2D"),
            resnet_time_scale_shift="scale_shift",
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=8,
        ).eval()
        norms = [m.norm_cross for n, m in unet.named_modules() if n.endswith(".attn2")]
        assert norms
        for norm in norms:  # what the text encoder gives has been through a plain one already
            norm.weight.normal_()
    path = tiny_sd(tmp_path / "sd")
    unet.save_pretrained(path / "unet")
    backbone: Any = open_backbone(str(path))
    c = backbone.condition(prompts(backbone, 2))
    x, t = latents(backbone, 2), torch.tensor([900, 3])
    wanted = unet(x, t, encoder_hidden_states=c.tensors["hidden"]).sample
    for _ in range(2):
        torch.testing.assert_close(backbone.predict(x, t, c), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.heavy
@torch.no_grad()
def test_mini_predicts_as_diffusers_does() -> None:
    """Its UNet also reads the prompt pooled; that is remembered as well."""
    from diffusers import UNet2DConditionModel

    from d3pack.backbones import mini_directory

    unet = UNet2DConditionModel.from_pretrained(mini_directory() / "unet").float().eval()
    backbone: Any = open_backbone("mini")
    x, t = latents(backbone, 2), torch.tensor([500, 3])
    for k in (1, 2):
        c = backbone.condition(prompts(backbone, 2, k))
        wanted = unet(x, t, encoder_hidden_states=c.tensors["hidden"]).sample
        for _ in range(2):
            torch.testing.assert_close(backbone.predict(x, t, c), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dit", "dit-untied"])
@torch.no_grad()
def test_dit_predicts_as_diffusers_does(
    name: str, folders: dict[str, Path], opened: dict[str, Any]
) -> None:
    from diffusers import DiTTransformer2DModel

    dit = DiTTransformer2DModel.from_pretrained(folders[name] / "transformer").eval()
    backbone = opened[name]
    x, t = latents(backbone, 3), torch.tensor([999, 500, 3])
    labels = torch.tensor([4, 10, 0])  # 10: the null class
    rows = Condition.cat(backbone.label(int(i)) for i in labels)
    wanted = dit(x, timestep=t, class_labels=labels).sample[:, :4]
    torch.testing.assert_close(backbone.predict(x, t, rows), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        backbone.unconditional().tensors["vector"], backbone.label(10).tensors["vector"]
    )
    if name == "dit":  # one table in all blocks: a learned vector can be a row of it
        vector = backbone.name_vectors("4")[None]
        known = backbone.predict(x[:1], t[:1], backbone.condition(vector))
        torch.testing.assert_close(known, wanted[:1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_reach_the_vectors(name: str, opened: dict[str, Any]) -> None:
    backbone = opened[name]
    vectors = prompts(backbone, 2).requires_grad_()
    x0, eps, t = latents(backbone, 2), latents(backbone, 2, 1), torch.tensor([900, 100])
    out = backbone.predict(backbone.levels.noised(x0, eps, t), t, backbone.condition(vectors))
    (out - backbone.levels.target(x0, eps, t)).square().mean().backward()
    assert vectors.grad is not None
    assert (vectors.grad.abs().amax(dim=(1, 2)) > 0).all()
    frozen = [p for p in backbone.named_tensors().values() if p.requires_grad]
    assert not frozen


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_denoise_and_predict_agree(name: str, opened: dict[str, Any]) -> None:
    backbone = opened[name]
    c = backbone.condition(prompts(backbone, 2))
    t = 700
    sigma = float(backbone.levels.sigmas[t])
    x = latents(backbone, 2) * math.sqrt(sigma**2 + 1)
    x_t, steps = x / math.sqrt(sigma**2 + 1), torch.tensor([t, t])
    wanted = backbone.levels.x0(x_t, steps, backbone.predict(x_t, steps, c))
    torch.testing.assert_close(backbone.denoise(x, sigma, c), wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sd", "dit"])
@torch.no_grad()
def test_autoencoder_encodes_and_decodes_as_diffusers_does(
    name: str, folders: dict[str, Path], opened: dict[str, Any]
) -> None:
    import diffusers

    backbone = opened[name]
    kind = type(backbone.autoencoder.model).__name__
    vae = getattr(diffusers, kind).from_pretrained(folders[name] / "vae").eval()
    z = latents(backbone, 2) * 2
    wanted = vae.decode(z / vae.config.scaling_factor).sample
    torch.testing.assert_close(backbone.decode_float(z), wanted, rtol=1e-4, atol=1e-4)
    pixels = backbone.decode(z)
    assert pixels.dtype == torch.uint8
    exact = wanted.double().clamp(-1, 1) * 127.5 + 127.5
    assert (pixels - exact).abs().max() <= 0.5 + 1e-3
    found = backbone.encode(pixels)
    ends = vae.encode(pixels.float() / 127.5 - 1)
    mode = ends.latents if kind == "AutoencoderTiny" else ends.latent_dist.mode()
    torch.testing.assert_close(found, mode * vae.config.scaling_factor, rtol=1e-4, atol=1e-4)
    assert found.shape[1:] == backbone.latent_shape


def test_shift_factor_is_applied(tmp_path: Path) -> None:
    import json

    path = tiny_sd(tmp_path / "shifted")
    config = json.loads((path / "vae/config.json").read_text())
    (path / "vae/config.json").write_text(json.dumps({**config, "shift_factor": 0.7}))
    plain, shifted = open_backbone(str(tiny_sd(tmp_path / "plain"))), open_backbone(str(path))
    z = latents(plain, 1)
    scale = float(config["scaling_factor"])
    moved = plain.decode_float(z + 0.7 * scale)
    torch.testing.assert_close(shifted.decode_float(z), moved, rtol=1e-4, atol=1e-4)


def test_mean_and_deviation_of_channels_are_applied(tmp_path: Path) -> None:
    """As diffusers' pipeline of Stable Diffusion XL does."""
    import json

    path = tiny_sd(tmp_path / "scaled", vae="kl")
    config = json.loads((path / "vae/config.json").read_text())
    mean, std = [0.3, -0.2, 0.1, 0.7], [2.0, 0.5, 1.5, 3.0]
    changed = {**config, "latents_mean": mean, "latents_std": std}
    (path / "vae/config.json").write_text(json.dumps(changed))
    backbone: Any = open_backbone(str(path))
    z = latents(backbone, 1)
    by_channel = [torch.tensor(values).view(1, 4, 1, 1) for values in (mean, std)]
    raw = z * by_channel[1] / config["scaling_factor"] + by_channel[0]
    wanted = backbone.autoencoder.model.decode(raw).sample
    torch.testing.assert_close(backbone.decode_float(z), wanted, rtol=1e-4, atol=1e-4)


def test_gradients_pass_decode_float(opened: dict[str, Any]) -> None:
    z = latents(opened["sd"], 1).requires_grad_()
    opened["sd"].decode_float(z).mean().backward()
    assert z.grad is not None
    assert z.grad.abs().max() > 0


def test_name_vectors_are_token_embeddings_or_table_rows(opened: dict[str, Any]) -> None:
    sd = opened["sd"]
    words = sd.name_vectors("school_bus", None)
    assert len(words) == 2
    assert torch.equal(sd.name_vectors("school_bus", 3), words[[0, 1, 0]])
    torch.testing.assert_close(sd.name_vectors("school_bus", 1), words.mean(0, keepdim=True))
    assert sd.name_vectors("", 2).shape == (2, 32)
    dit = opened["dit"]
    table = dit.denoiser.transformer_blocks[0].norm1.emb.table
    (known,) = dit._names["goldfish"]
    assert torch.equal(dit.name_vectors("Goldfish")[0], table[known])
    torch.testing.assert_close(dit.name_vectors("no such thing")[0], table[:-1].mean(0))


def test_name_of_two_classes_is_refused(tmp_path: Path) -> None:
    """ImageNet's rows 134 and 517 are both cranes; the first one is not always meant."""
    path = tiny_dit(tmp_path / "dit")
    index = path / "model_index.json"
    labels = {0: "tench, Tinca tinca", 3: "crane", 7: "crane", 8: "1"}
    index.write_text(json.dumps({"id2label": {str(k): v for k, v in labels.items()}}))
    dit = open_backbone(str(path))
    table = dit.denoiser.transformer_blocks[0].norm1.emb.table  # type: ignore[attr-defined]
    with raises_code("E_BACKBONE", match="2 classes called 'Crane': rows 3, 7"):
        dit.name_vectors("Crane")
    for name, row in (("7", 7), ("Tinca tinca", 0), ("1", 8), ("3", 3)):
        assert torch.equal(dit.name_vectors(name)[0], table[row])
    assert isinstance(dit, DiT)
    assert dit.unknown_names(["tench", "n02012849", "9"]) == ["n02012849", "9"]
    with raises_code("E_BACKBONE", match="rows 3, 7"):
        dit.unknown_names(["tench", "crane"])


def test_prompts_of_wrong_shape_are_refused(opened: dict[str, Any]) -> None:
    sd, dit = opened["sd"], opened["dit"]
    with raises_code("E_BACKBONE_PROMPT", match="32 wide"):
        sd.condition(torch.zeros(1, 1, 31))
    with raises_code("E_BACKBONE_PROMPT", match="of 16 positions"):
        sd.condition(torch.zeros(1, 14, 32))
    assert len(sd.condition(torch.zeros(1, 14, 32), "{}")) == 1
    for template in ("no place", "{} and {}"):
        with raises_code("E_RECIPE", match=r"one \{\}"):
            sd.condition(torch.zeros(1, 1, 32), template)
    for shape in ((1, 2, 32), (1, 1, 33)):
        with raises_code("E_BACKBONE_PROMPT", match="one vector of 32"):
            dit.condition(torch.zeros(shape))


def test_invalid_image_sizes_are_refused(opened: dict[str, Any]) -> None:
    assert opened["sd"].latent_shape_for((32, 96)) == (4, 4, 12)
    with pytest.raises(UsageError, match="multiples of 16"):
        opened["sd"].latent_shape_for((40, 64))
    with pytest.raises(UsageError, match="64x64 images only"):
        opened["dit"].latent_shape_for((32, 32))


@pytest.mark.parametrize("name", ["sd", "dit"])
@torch.no_grad()
def test_removed_adapter_leaves_every_bit_as_before(name: str, opened: dict[str, Any]) -> None:
    backbone = opened[name]
    named = backbone.named_tensors()
    bias = next(n for n in named if n.endswith("to_q.weight"))
    shape = named[bias].shape
    tuned = {
        f"{bias}.delta": torch.randn(shape) * 0.3,
        f"{bias}.scale": torch.rand(shape[0]),
        f"{bias}.lora_a": torch.randn(2, shape[1]),
        f"{bias}.lora_b": torch.randn(shape[0], 2),
        f"{'conv_in' if name == 'sd' else 'proj_out_2'}.bias.delta": torch.ones(
            named[f"{'conv_in' if name == 'sd' else 'proj_out_2'}.bias"].shape
        ),
    }
    check_adapter(backbone, tuned)
    before = {n: p.clone() for n, p in named.items()}
    c, x, t = backbone.condition(prompts(backbone, 1)), latents(backbone, 1), torch.tensor([500])
    plain = backbone.predict(x, t, c)
    with apply_adapter(backbone, tuned):
        wanted = before[bias] * tuned[f"{bias}.scale"][:, None] + tuned[f"{bias}.delta"]
        wanted = wanted + tuned[f"{bias}.lora_b"] @ tuned[f"{bias}.lora_a"]
        torch.testing.assert_close(named[bias].data, wanted)
        assert not torch.allclose(backbone.predict(x, t, c), plain)
    assert all(torch.equal(p, before[n]) for n, p in named.items())
    assert torch.equal(backbone.predict(x, t, c), plain)
    with pytest.raises(ZeroDivisionError), apply_adapter(backbone, tuned):
        raise ZeroDivisionError
    assert all(torch.equal(p, before[n]) for n, p in named.items())


def test_adapters_of_wrong_names_or_shapes_are_refused(opened: dict[str, Any]) -> None:
    name = "conv_in.weight"
    weight = opened["sd"].named_tensors()[name]
    good = {f"{name}.lora_a": torch.zeros(3, weight[0].numel())}
    for tensors, why in (
        ({"conv_in.weight": torch.zeros(1)}, "does not end in"),
        ({"conv_out.gamma.delta": torch.zeros(1)}, "does not have"),
        ({f"{name}.delta": torch.zeros(3)}, "does not fit"),
        ({f"{name}.scale": torch.zeros(3)}, "does not fit"),
        (good, "belong together"),
        ({**good, f"{name}.lora_b": torch.zeros(len(weight), 2)}, "belong together"),
    ):
        with raises_code("E_ADAPTER", match=why):
            check_adapter(opened["sd"], tensors)


def test_cached_keys_and_values_follow_weights_and_condition(opened: dict[str, Any]) -> None:
    """What attention remembers is dropped when the condition or the weights change."""
    backbone = opened["sd"]
    name = next(n for n in backbone.named_tensors() if n.endswith("attn2.to_k.weight"))
    weight = backbone.named_tensors()[name]
    x, t = latents(backbone, 1), torch.tensor([500])
    with torch.no_grad():
        one, two = (backbone.condition(p[None]) for p in prompts(backbone, 2))
        first = backbone.predict(x, t, one)
        assert not torch.equal(backbone.predict(x, t, two), first)
        assert torch.equal(backbone.predict(x, t, one), first)
        tuned = {f"{name}.scale": torch.full((len(weight),), 3.0)}
        with apply_adapter(backbone, tuned):
            assert not torch.equal(backbone.predict(x, t, one), first)
        assert torch.equal(backbone.predict(x, t, one), first)


def test_bfloat16_models_return_float32(folders: dict[str, Path]) -> None:
    for name in ("sd", "dit"):
        backbone = open_backbone(str(folders[name]), dtype=torch.bfloat16)
        with torch.no_grad():
            c = backbone.condition(prompts(backbone, 1))
            out = backbone.predict(latents(backbone, 1), torch.tensor([500]), c)
            assert out.dtype == torch.float32
            assert backbone.decode(latents(backbone, 1)).dtype == torch.uint8
        kinds = {p.dtype for p in backbone.named_tensors().values()}
        assert kinds == {torch.bfloat16}


def test_onednn_linear_layers_keep_values_and_gradients() -> None:
    from torch import nn

    from d3pack.backbones.kernels import _OneDnnLinear, optimize_for_cpu

    for bias in (True, False):
        plain = nn.Linear(37, 20, bias=bias)
        quick = nn.Sequential(nn.Linear(37, 20, bias=bias))
        quick[0].load_state_dict(plain.state_dict())
        optimize_for_cpu(quick)
        assert type(quick[0]) is _OneDnnLinear
        x = torch.randn(3, 5, 37)
        with torch.no_grad():
            torch.testing.assert_close(quick(x), plain(x), rtol=1e-5, atol=1e-5)
            turned = torch.randn(37, 6).t()
            torch.testing.assert_close(quick(turned), plain(turned), rtol=1e-5, atol=1e-5)
        grads = []
        for layer, frozen in ((plain, True), (quick, True), (quick, False)):
            layer.requires_grad_(not frozen)
            given = x.clone().requires_grad_()
            layer(given).square().sum().backward()
            grads.append(given.grad)
        torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(grads[0], grads[2], rtol=1e-4, atol=1e-4)
        assert quick[0].weight.grad is not None  # learns when it is told to
        assert quick.double()(x.double()).dtype == torch.float64
