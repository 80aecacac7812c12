"""Stable Diffusion XL against diffusers' own pipeline, step by step."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import tiny_pack, tiny_sdxl, without_text

from d3pack.backbones import (
    Condition,
    Sampling,
    default_sampling,
    lock_directory,
    open_backbone,
)
from d3pack.decode import Decoder, samplers
from d3pack.testing import raises_code

SENTENCE = "a photo of a goldfish"
TRAILING = {"timestep_spacing": "trailing"}
# scheduler, sampler, steps: base, Turbo, Lightning, LCM
TABLES: dict[str, tuple[str, str, int]] = {
    "base": ("EulerDiscreteScheduler", "euler", 6),
    "turbo": ("EulerAncestralDiscreteScheduler", "ancestral", 4),
    "turbo-1": ("EulerAncestralDiscreteScheduler", "ancestral", 1),
    "lightning": ("EulerDiscreteScheduler", "euler", 4),
    "lcm": ("LCMScheduler", "lcm", 4),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sdxl(tmp_path_factory.mktemp("sdxl") / "xl")


@pytest.fixture(scope="module")
def xl(folder: Path) -> Any:
    return open_backbone(str(folder))


@pytest.fixture(scope="module")
def pipeline(folder: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    pipeline = StableDiffusionXLPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def embedded(pipeline: Any, text: str = SENTENCE) -> tuple[torch.Tensor, ...]:
    """States, those of no class, pooled, and that of no class."""
    found: tuple[torch.Tensor, ...] = pipeline.encode_prompt(
        text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True
    )
    return found


def latents(xl: Any, count: int = 1, size: tuple[int, int] = (64, 64)) -> torch.Tensor:
    shape = xl.latent_shape_for(size)
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def test_states_and_pooled_vector_are_those_of_the_pipeline(xl: Any, pipeline: Any) -> None:
    hidden, _, pooled, _ = embedded(pipeline)
    vectors = xl.name_vectors("goldfish")[None]
    assert vectors.shape[2] == 24 + 40
    for c in (xl.sentence(SENTENCE), xl.condition(vectors, "a photo of a {}")):
        torch.testing.assert_close(c.tensors["hidden"], hidden, rtol=1e-5, atol=1e-4)
        torch.testing.assert_close(c.tensors["pooled"], pooled, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("zeros", [True, False])
@torch.no_grad()
def test_condition_of_no_class_is_that_of_the_pipeline(zeros: bool, tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    path = tiny_sdxl(tmp_path / "xl", zeros=zeros)
    xl: Any = open_backbone(str(path))
    _, hidden, _, pooled = embedded(StableDiffusionXLPipeline.from_pretrained(path))
    assert bool(hidden.any()) is not zeros
    none = xl.unconditional().tensors
    torch.testing.assert_close(none["hidden"], hidden, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(none["pooled"], pooled, rtol=1e-5, atol=1e-4)
    assert bool(xl.outputs("", 3).any()) is not zeros


@torch.no_grad()
def test_unet_predicts_as_diffusers_does(xl: Any, folder: Path) -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folder / "unet").eval()
    c = Condition.cat([xl.sentence(SENTENCE), xl.sentence("a bus")])
    for size in ((64, 64), (32, 96)):
        x, t = latents(xl, 2, size), torch.tensor([999, 3])
        ids = torch.tensor([[*size, 0, 0, *size]] * 2)
        added = {"text_embeds": c.tensors["pooled"], "time_ids": ids}
        wanted = unet(
            x, t, encoder_hidden_states=c.tensors["hidden"], added_cond_kwargs=added
        ).sample
        for _ in range(2):  # keys and values are remembered the second time
            torch.testing.assert_close(xl.predict(x, t, c), wanted, rtol=1e-4, atol=1e-4)
    other = Condition({**c.tensors, "pooled": c.tensors["pooled"] * 2})
    assert not torch.allclose(xl.predict(x, t, other), wanted, atol=1e-3)


@pytest.mark.parametrize("name", TABLES)
@torch.no_grad()
def test_steps_are_those_of_the_pipeline(name: str, xl: Any, pipeline: Any) -> None:
    import diffusers

    kind, sampler, steps = TABLES[name]
    old = pipeline.scheduler
    more = {} if kind == "LCMScheduler" else TRAILING
    pipeline.scheduler = getattr(diffusers, kind).from_config(old.config, **more)
    hidden, none, pooled, none_pooled = embedded(pipeline)
    guidance = 5.0 if name == "base" else 1.0
    x = latents(xl)
    wanted = pipeline(
        prompt_embeds=hidden,
        pooled_prompt_embeds=pooled,
        negative_prompt_embeds=none,
        negative_pooled_prompt_embeds=none_pooled,
        latents=x.clone(),
        height=64,
        width=64,
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(8),
        output_type="latent",
    ).images
    sigmas = samplers.schedule(xl.levels.alphas_cumprod, sampler, steps)
    scale = math.sqrt(sigmas[0] ** 2 + 1)
    if kind != "LCMScheduler":  # which starts at unit variance, as d3pack does
        scale = float(pipeline.scheduler.init_noise_sigma)
        theirs = pipeline.scheduler.sigmas.tolist()
        torch.testing.assert_close(list(sigmas), theirs, rtol=1e-5, atol=1e-5)
    pipeline.scheduler = old
    generator = torch.Generator().manual_seed(8)
    both = [Condition({"hidden": hidden, "pooled": pooled})]
    both += [Condition({"hidden": none, "pooled": none_pooled})]

    def model(x: torch.Tensor, sigma: float) -> torch.Tensor:
        with_class, without = (xl.denoise(x, sigma, c) for c in both)
        mixed: torch.Tensor = (with_class - without) * guidance + without
        return mixed

    def noise(step: int) -> torch.Tensor:
        return torch.randn(x.shape, generator=generator)

    found = samplers.sample(sampler, model, x * scale, sigmas, noise, {"eta": 1.0})
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"}, None),
        ({"_class_name": "EulerAncestralDiscreteScheduler", **TRAILING}, "ancestral"),
        ({"_class_name": "EulerDiscreteScheduler", **TRAILING}, "euler"),
        ({"_class_name": "EulerDiscreteScheduler", **TRAILING, "rescale_betas_zero_snr": 1}, None),
        ({"_class_name": "DDIMScheduler", **TRAILING}, None),
        ({"_class_name": "LCMScheduler", "timestep_spacing": "leading"}, "lcm"),
    ],
)
def test_distilled_models_are_known_by_their_schedulers(
    config: dict[str, Any], sampling: Any, tmp_path: Path
) -> None:
    xl = open_backbone(str(tiny_sdxl(tmp_path / "xl", scheduler=config)))
    wanted = Sampling(sampling, 4, 1.0) if sampling else Sampling("dpmpp-2m", 20, 5.0)
    assert default_sampling(xl) == wanted


@pytest.mark.parametrize("template", ["a photo of a {}", None])
def test_gradients_reach_the_vectors(template: str | None, xl: Any) -> None:
    start = xl.name_vectors("lemon", 2) if template else xl.outputs(SENTENCE, 3)
    vectors = start.detach()[None].repeat(2, 1, 1).requires_grad_()
    x0, eps, t = latents(xl, 2), latents(xl, 2) + 1, torch.tensor([900, 100])
    out = xl.predict(xl.levels.noised(x0, eps, t), t, xl.condition(vectors, template))
    (out - xl.levels.target(x0, eps, t)).square().mean().backward()
    assert vectors.grad is not None
    if template:  # both encoders
        parts = vectors.grad.split([24, 40], dim=2)
    else:  # states, and the pooled vector without what fills it up
        parts = (vectors.grad[:, :-1], vectors.grad[:, -1:, :20])
        assert not vectors.grad[:, -1, 20:].any()
    for part in parts:
        assert (part.abs().amax(dim=(1, 2)) > 0).all()
    assert not [p for p in xl.named_tensors().values() if p.requires_grad]


@torch.no_grad()
def test_all_outputs_of_a_sentence_are_its_condition(xl: Any) -> None:
    whole = xl.outputs(SENTENCE, 16 + 1)
    found, wanted = xl.condition(whole[None], None).tensors, xl.sentence(SENTENCE).tensors
    assert torch.equal(found["hidden"], wanted["hidden"])
    assert torch.equal(found["pooled"], wanted["pooled"])
    end = len(xl.texts[0].words.ids(SENTENCE)) + 1
    few = xl.outputs(SENTENCE, 3)
    assert torch.equal(few[:2], wanted["hidden"][0, end - 1 : end + 1])
    assert torch.equal(few[2, :20], wanted["pooled"][0])


def test_name_vectors_are_the_embeddings_of_both_encoders(xl: Any) -> None:
    vectors = xl.name_vectors("school_bus")
    assert torch.equal(vectors[:, :24], xl.texts[0].name_tokens("school_bus"))
    assert torch.equal(vectors[:, 24:], xl.texts[1].name_tokens("school_bus"))
    assert xl.name_vectors("", 2).shape == (2, 64)


def test_outputs_are_decoded_without_the_text_encoders(folder: Path, tmp_path: Path) -> None:
    pack = tiny_pack(folder, template=None, vectors=2)
    wanted = Decoder(pack, path=folder).images(range(4))
    bare = without_text(folder, tmp_path / "bare")
    assert not list(bare.glob("text*")) + list(bare.glob("tok*"))
    decoder = Decoder(pack, path=bare)
    assert torch.equal(decoder.images(range(4)), wanted)
    with raises_code("E_BACKBONE_MISSING", match="text encoder of this backbone is not open"):
        decoder.backbone.unconditional()
    with raises_code("E_BACKBONE_MISSING", match="text_encoder/config.json is missing"):
        Decoder(tiny_pack(folder), path=bare)


def test_prompts_of_wrong_shape_are_refused(xl: Any) -> None:
    with raises_code("E_BACKBONE_PROMPT", match=r"vectors here are 24 \+ 40 wide"):
        xl.condition(torch.zeros(1, 1, 24))
    for shape in ((1, 1, 64), (1, 18, 64), (1, 2, 63)):
        with raises_code("E_BACKBONE_PROMPT", match="takes 2 to 17 of width 64"):
            xl.condition(torch.zeros(shape), None)
    with raises_code("E_BACKBONE_PROMPT", match="more than 20 values"):
        xl.condition(torch.ones(1, 2, 64), None)


CONFIGS: dict[str, tuple[str, dict[str, Any], str]] = {
    "guidance embedding": ("unet", {"time_cond_proj_dim": 32}, "time_cond_proj_dim"),
    "five sizes": ("unet", {"projection_class_embeddings_input_dim": 48}, "do not fit into 48"),
    "no sizes": ("unet", {"addition_embed_type": None}, "not the UNet of a Stable Diffusion XL"),
    "other pooled": ("text_encoder_2", {"projection_dim": 21}, "has shape"),
    "one mean": ("vae", {"latents_mean": [0.1], "latents_std": [1] * 4}, "latents_mean has not 4"),
    "no deviation": ("vae", {"latents_mean": [0.1] * 4}, "latents_std has not 4"),
    "deviation of 0": ("vae", {"latents_mean": [0] * 4, "latents_std": [0.0] * 4}, "not above 0"),
    "one encoder twice": ("text_encoder_2", {"architectures": ["CLIPTextModel"]}, "CLIPTextModel"),
}


@pytest.mark.parametrize("case", CONFIGS)
def test_invalid_configs_are_refused(case: str, tmp_path: Path) -> None:
    part, values, why = CONFIGS[case]
    path = tiny_sdxl(tmp_path / "xl") / part / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))
    code = "E_BACKBONE_WEIGHTS" if why == "has shape" else "E_BACKBONE_CONFIG"
    with raises_code(code, match=why):
        open_backbone(str(tmp_path / "xl"))


def test_layout_with_two_text_encoders_is_sdxl(folder: Path) -> None:
    ref = lock_directory(folder)
    assert ref.kind == "sdxl"
    assert {"text_encoder_2/model.safetensors", "tokenizer_2/merges.txt"} < set(ref.files)
