"""Flow-matching transformers against diffusers' own pipelines, and what learning needs of them."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_backbones import tiny_pack
from tiny_flow import KINDS, pipeline_of, tiny_flow

from d3pack.backbones import Condition, Sampling, lock_directory, open_backbone
from d3pack.backbones.levels import PURE
from d3pack.backbones.sana import INSTRUCTION
from d3pack.decode import Decoder, samplers
from d3pack.encode.plan import sigmas_of
from d3pack.errors import BackboneChangedError, BackboneError, UsageError
from d3pack.testing import raises_code

TEXT = "a photo of a Golden Retriever"
SIZE = {"height": 64, "width": 64, "output_type": "pt"}
IN_BINS = {"use_resolution_binning": False}

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("flow")
    return {kind: tiny_flow(kind, root / kind) for kind in KINDS}


@pytest.fixture(scope="module")
def opened(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: open_backbone(str(path)) for kind, path in folders.items()}


@pytest.fixture(scope="module")
def pipelines(folders: dict[str, Path]) -> dict[str, Any]:
    return {kind: pipeline_of(kind, path) for kind, path in folders.items()}


def noise(backbone: Any, count: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, *backbone.latent_shape_for((64, 64)), generator=generator)


def vectors(backbone: Any, count: int, k: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return torch.randn(count, k, backbone.output_shape[2], generator=generator)


@pytest.mark.parametrize("kind", KINDS)
def test_the_family_is_known_by_its_transformer(kind: str, opened: dict[str, Any]) -> None:
    assert opened[kind].ref.kind == kind
    assert opened[kind].prompt_shape[0] == 0


def encoded_by(kind: str, pipeline: Any, text: str) -> Any:
    """Outputs of the pipeline's text encoder, without padding."""
    if kind == "prx":
        # its cleaning of captions needs a package of its own; of plain words this is left
        pipeline.text_preprocessor.clean_text = lambda text: text.lower().strip()
        embeds, mask = pipeline.encode_prompt(text, do_classifier_free_guidance=False)[:2]
        return embeds[0][mask[0]]
    if kind == "z-image":
        return pipeline.encode_prompt(text, do_classifier_free_guidance=False)[0][0]
    if kind == "sana-sprint":
        lines = INSTRUCTION.split("\n")
        embeds, mask = pipeline.encode_prompt(text, complex_human_instruction=lines)
        return embeds[0][mask[0].bool()]
    embeds, _ = pipeline.encode_prompt(text)
    chat = pipeline.tokenizer.apply_chat_template(
        [{"role": "user", "content": text}],
        tokenize=False,
        add_generation_prompt=True,
        enable_thinking=False,
    )
    return embeds[0, : len(pipeline.tokenizer(chat).input_ids)]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_text_is_encoded_as_by_the_pipeline(
    kind: str, opened: dict[str, Any], pipelines: dict[str, Any]
) -> None:
    backbone = opened[kind]
    wanted = encoded_by(kind, pipelines[kind], TEXT)
    assert len(wanted) > 5
    torch.testing.assert_close(backbone.name_vectors(TEXT), wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(backbone.outputs(TEXT, 3), wanted[-3:], rtol=1e-4, atol=1e-4)
    many = backbone.outputs(TEXT, len(wanted) + 2)
    torch.testing.assert_close(many[len(wanted) :], wanted[:2], rtol=1e-4, atol=1e-4)
    none = encoded_by(kind, pipelines[kind], "")
    torch.testing.assert_close(backbone.outputs("", len(none)), none, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_long_text_is_cut_as_by_the_pipeline(
    kind: str, opened: dict[str, Any], pipelines: dict[str, Any]
) -> None:
    backbone, text = opened[kind], TEXT * 200
    wanted = encoded_by(kind, pipelines[kind], text)
    assert len(wanted) == backbone.output_shape[1]
    torch.testing.assert_close(backbone.name_vectors(text), wanted, rtol=1e-4, atol=1e-4)


def test_the_instruction_of_sana_is_that_of_its_pipeline() -> None:
    import inspect

    from diffusers import SanaSprintPipeline

    defaults = inspect.signature(SanaSprintPipeline.__call__).parameters
    assert defaults["complex_human_instruction"].default == INSTRUCTION.split("\n")
    assert defaults["max_timesteps"].default == 1.57080
    assert defaults["intermediate_timesteps"].default == 1.3
    assert defaults["guidance_scale"].default == 4.5


def ours(backbone: Any, times: list[float], x: torch.Tensor, model: Any, *fresh: Any) -> Any:
    """Images as the pipelines give them, of times of flow matching."""
    sigmas = [PURE if t >= 1 else t / (1 - t) for t in times]
    draws = iter(fresh)
    latents = samplers.sample(
        backbone.sampling.sampler, model, samplers.start(x, sigmas), sigmas, lambda _: next(draws)
    )
    return (backbone.decode_float(latents) / 2 + 0.5).clamp(0, 1)


@pytest.mark.parametrize("steps", [1, 4])
@torch.no_grad()
def test_prx_makes_the_images_of_its_pipeline(
    steps: int, opened: dict[str, Any], pipelines: dict[str, Any]
) -> None:
    """With guidance; the pipeline pads what it compares with, which is vectors of zeros here.

    It guides single images only.
    """
    backbone, pipeline = opened["prx"], pipelines["prx"]
    some, none = vectors(backbone, 1), backbone.outputs("", 5)[None]
    assert (none[0] != 0).any(-1).tolist() == [True, False, False, False, False]
    x = noise(backbone, 1)
    wanted = pipeline(
        prompt_embeds=some,
        negative_prompt_embeds=none,
        prompt_attention_mask=torch.ones(1, 5).bool(),
        negative_prompt_attention_mask=(none != 0).any(-1),
        guidance_scale=5.0,
        num_inference_steps=steps,
        latents=x,
        **SIZE,
        **IN_BINS,
    ).images
    both = [backbone.condition(part, None) for part in (none, some)]

    def model(x: torch.Tensor, sigma: float) -> Any:
        without, with_class = (backbone.denoise(x, sigma, c) for c in both)
        return (with_class - without) * 5.0 + without

    found = ours(backbone, pipeline.scheduler.sigmas.double().tolist(), x, model)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def call_z_image(pipeline: Any, embeds: torch.Tensor, x: torch.Tensor) -> Any:
    return pipeline(
        prompt_embeds=list(embeds),
        guidance_scale=0.0,
        num_inference_steps=8,
        latents=x,
        **SIZE,
    ).images


def call_flux2(pipeline: Any, embeds: torch.Tensor, x: torch.Tensor) -> Any:
    return pipeline(prompt_embeds=embeds, num_inference_steps=4, latents=x, **SIZE).images


@pytest.mark.parametrize(
    ("kind", "call", "k"),
    [("z-image", call_z_image, 5), ("z-image", call_z_image, 40), ("flux2", call_flux2, 5)],
)
@torch.no_grad()
def test_distilled_models_make_the_images_of_their_pipelines(
    kind: str, call: Callable[..., Any], k: int, opened: dict[str, Any], pipelines: dict[str, Any]
) -> None:
    backbone, pipeline = opened[kind], pipelines[kind]
    some, x = vectors(backbone, 2, k), noise(backbone, 2)
    wanted = call(pipeline, some, x)
    c = backbone.condition(some, None)
    times = pipeline.scheduler.sigmas.double().tolist()
    found = ours(backbone, times, x, lambda x, sigma: backbone.denoise(x, sigma, c))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    # the recipe's own levels, at the native size, are the pipeline's
    sampling = backbone.sampling
    sigmas = samplers.schedule(backbone.levels.alphas_cumprod, sampling.sampler, sampling.steps)
    assert [s / (1 + s) for s in sigmas] == pytest.approx(times, abs=2e-6)


@torch.no_grad()
def test_sana_sprint_makes_the_images_of_its_pipeline(
    opened: dict[str, Any], pipelines: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps, by angles there and by times of flow matching here; fresh noise in between."""
    backbone, pipeline = opened["sana-sprint"], pipelines["sana-sprint"]
    some, x, fresh = vectors(backbone, 2), noise(backbone, 2), noise(backbone, 2, 1)
    module = "diffusers.schedulers.scheduling_scm.randn_tensor"
    monkeypatch.setattr(module, lambda *_, **__: fresh)
    wanted = pipeline(
        prompt_embeds=some,
        prompt_attention_mask=torch.ones(2, 5),
        latents=x,
        **SIZE,
        **IN_BINS,
    ).images
    c = backbone.condition(some, None)
    sigmas = samplers.schedule(backbone.levels.alphas_cumprod, "lcm", 2)
    assert sigmas[1] == pytest.approx(torch.tensor(1.3).tan().item(), rel=1e-6)
    times = [s / (1 + s) for s in sigmas]
    model = lambda x, sigma: backbone.denoise(x, sigma, c)  # noqa: E731
    found = ours(backbone, [1.0, *times[1:]], x, model, fresh)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_vectors(kind: str, opened: dict[str, Any]) -> None:
    backbone = opened[kind]
    leaf = vectors(backbone, 2).requires_grad_()
    x0, eps, t = noise(backbone, 2), noise(backbone, 2, 1), torch.tensor([900, 100])
    out = backbone.predict(backbone.levels.noised(x0, eps, t), t, backbone.condition(leaf, None))
    (out - backbone.levels.target(x0, eps, t)).square().mean().backward()
    assert leaf.grad is not None
    assert (leaf.grad.abs().amax(dim=2) > 0).all()
    assert not [p for p in backbone.named_tensors().values() if p.requires_grad]


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_denoise_and_predict_agree(kind: str, opened: dict[str, Any]) -> None:
    backbone = opened[kind]
    c, x0, eps = (
        backbone.condition(vectors(backbone, 2), None),
        noise(backbone, 2),
        noise(backbone, 2, 1),
    )
    for step in (1, 500, 999):
        t, sigma = torch.tensor([step, step]), float(backbone.levels.sigmas[step])
        x_t = backbone.levels.noised(x0, eps, t)
        wanted = backbone.levels.x0(x_t, t, backbone.predict(x_t, t, c))
        found = backbone.denoise(x0 + sigma * eps, sigma, c)
        torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_images_become_latents_that_become_images(kind: str, opened: dict[str, Any]) -> None:
    """The encoder has the scale of the decoder: what one adds, the other takes away."""
    backbone = opened[kind]
    model, images = backbone.autoencoder.model, torch.rand(2, 3, 64, 64) * 2 - 1
    latents = backbone.encode(images)
    assert latents.shape == (2, *backbone.latent_shape_for((64, 64)))
    encoded = model.encode(images)
    raw = encoded.latent if hasattr(encoded, "latent") else encoded.latent_dist.mode()
    made = backbone.decode_float(latents)
    torch.testing.assert_close(made, model.decode(raw).sample, rtol=1e-4, atol=1e-4)
    pixels = ((images + 1) * 127.5).round().to(torch.uint8)
    torch.testing.assert_close(backbone.encode(pixels), latents, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_of_the_lock_is_refused_when_flipped(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    ref = lock_directory(folders[kind])
    assert len(ref.files) == 10
    for path in ref.files:
        root = Path(shutil.copytree(folders[kind], tmp_path / path.replace("/", "-")))
        data = bytearray((root / path).read_bytes())
        data[len(data) // 2] ^= 1
        (root / path).write_bytes(data)
        with pytest.raises(BackboneChangedError, match=path):
            open_backbone(ref, path=root)


@pytest.mark.parametrize("kind", KINDS)
def test_a_backbone_without_its_encoder_takes_outputs_alone(
    kind: str, folders: dict[str, Path], opened: dict[str, Any], tmp_path: Path
) -> None:
    ref = lock_directory(folders[kind])
    root = Path(shutil.copytree(folders[kind], tmp_path / "copy"))
    shutil.rmtree(root / "text_encoder")
    shutil.rmtree(root / "tokenizer")
    backbone: Any = open_backbone(ref, path=root, encoder=False)
    c, x = backbone.condition(vectors(backbone, 2), None), noise(backbone, 2)
    with torch.no_grad():
        assert torch.equal(backbone.denoise(x, 2.0, c), opened[kind].denoise(x, 2.0, c))
    with raises_code("E_BACKBONE_MISSING", match="text encoder"):
        backbone.name_vectors("cat")
    with raises_code("E_BACKBONE_MISSING", match="text encoder"):
        backbone.outputs("cat", 2)


BOS = {"SpecialToken": {"id": "<bos>", "type_id": 0}}


def template(single: Any) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": single}


@pytest.mark.parametrize(
    ("kind", "path", "values", "why"),
    [
        ("prx", "transformer/config.json", {"depth": 10**4}, "depth"),
        ("prx", "text_encoder/config.json", {"encoder": {"num_hidden_layers": 10**9}}, "num_hid"),
        ("z-image", "transformer/config.json", {"n_layers": 10**4}, "n_layers"),
        ("flux2", "transformer/config.json", {"num_single_layers": 10**4}, "num_single"),
        ("flux2", "transformer/config.json", {"in_channels": 8}, "has shape"),
        ("sana-sprint", "vae/config.json", {"decoder_layers_per_block": [10**4] * 4}, "decoder_la"),
        ("sana-sprint", "scheduler/scheduler_config.json", {}, "not a JSON object"),
        ("z-image", "scheduler/scheduler_config.json", {"shift": -1}, "shift"),
        ("z-image", "tokenizer/tokenizer.json", {"normalizer": {"type": "NFKC"}}, "normalizer"),
        ("prx", "tokenizer/tokenizer.json", {"pre_tokenizer": {"type": "Punct"}}, "pre_tokenizer"),
        ("prx", "tokenizer/tokenizer.json", {"post_processor": template(5)}, "16 pieces"),
        ("prx", "tokenizer/tokenizer.json", {"post_processor": template([BOS] * 17)}, "16 pieces"),
        ("prx", "scheduler/scheduler_config.json", {"shift": 10**400}, "shift"),
        ("prx", "scheduler/scheduler_config.json", {"shift": 1e-300}, "shift"),
        ("prx", "model_index.json", {"default_sample_size": 10**400}, "default_sample_size"),
        ("prx", "model_index.json", {"default_sample_size": 1e300}, "default_sample_size"),
        ("prx", "model_index.json", {"default_sample_size": 64.5}, "default_sample_size"),
        ("prx", "model_index.json", {"default_sample_size": 0}, "default_sample_size"),
        ("prx", "model_index.json", {"default_sample_size": -5}, "default_sample_size"),
        ("flux2", "model_index.json", {"default_sample_size": 10**6}, "default_sample_size"),
        ("flux2", "vae/config.json", {"batch_norm_eps": None}, "batch_norm_eps"),
        ("flux2", "vae/config.json", {"batch_norm_eps": -1}, "batch_norm_eps"),
        ("sana-sprint", "transformer/config.json", {"guidance_embeds_scale": "x"}, "embeds_scale"),
    ],
)
def test_files_that_lie_are_refused(
    kind: str, path: str, values: dict[str, Any], why: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(folders[kind], tmp_path / "copy"))
    changed = {**json.loads((root / path).read_text()), **values} if values else []
    (root / path).write_text(json.dumps(changed))

    def use() -> None:
        backbone: Any = open_backbone(str(root))
        backbone.name_vectors("cat")  # which opens the text encoder

    with pytest.raises(BackboneError, match=why) as caught:
        use()
    assert caught.value.code in ("E_BACKBONE_CONFIG", "E_BACKBONE_WEIGHTS")


def test_plain_sana_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import SanaTransformer2DModel

    root = Path(shutil.copytree(folders["sana-sprint"], tmp_path / "copy"))
    config = json.loads((root / "transformer/config.json").read_text())
    shutil.rmtree(root / "transformer")
    plain: Any = SanaTransformer2DModel.from_config({**config, "guidance_embeds": False})
    plain.save_pretrained(root / "transformer")
    with raises_code("E_BACKBONE_CONFIG", match="Sana-Sprint only"):
        open_backbone(str(root))


def test_a_tokenizer_without_its_unknown_word_is_refused(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(folders["prx"], tmp_path / "copy"))
    path = root / "tokenizer/tokenizer.json"
    value = json.loads(path.read_text())
    for word in ("<unk>", "<0x7F>"):  # bytes stand for unknown words where all are there
        del value["model"]["vocab"][word]
        value["added_tokens"] = [t for t in value["added_tokens"] if t["content"] != word]
        path.write_text(json.dumps(value))
        backbone: Any = open_backbone(str(root))
        if word == "<unk>":
            assert len(backbone.name_vectors("cat \u65e5"))
        else:
            with raises_code("E_BACKBONE_CONFIG", match="no word <unk>"):
                backbone.name_vectors("cat")


def test_a_model_that_is_not_distilled_has_its_own_sampling(
    folders: dict[str, Path], opened: dict[str, Any], tmp_path: Path
) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    root = Path(shutil.copytree(folders["flux2"], tmp_path / "copy"))
    index = json.loads((root / "model_index.json").read_text())
    (root / "model_index.json").write_text(json.dumps({**index, "is_distilled": False}))
    backbone: Any = open_backbone(str(root))
    assert opened["flux2"].sampling == Sampling("euler", 4, 1.0)
    assert backbone.sampling == Sampling("euler", 50, 4.0)
    for found, steps in ((opened["flux2"], 4), (backbone, 50)):
        shift = math.exp(compute_empirical_mu(16, steps))
        assert found.levels.sigmas[499] == pytest.approx(shift)  # at time 1/2


def test_recipes_have_the_levels_of_their_size(opened: dict[str, Any]) -> None:
    from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu

    backbone = opened["flux2"]
    for size, steps in (((64, 64), 4), ((512, 1024), 8)):
        tokens = size[0] * size[1] // 16**2
        first, second = sigmas_of(backbone, "euler", steps, size)[:2]
        assert first > PURE / 2
        shift = math.exp(compute_empirical_mu(tokens, steps))
        assert second == pytest.approx(shift * (steps - 1), rel=1e-5)
    assert backbone.levels_for((8192, 8192), 4).sigmas[499] == pytest.approx(100)


@pytest.mark.parametrize("kind", KINDS)
def test_fast_numerics_make_nearly_the_same_images(
    kind: str, folders: dict[str, Path], opened: dict[str, Any]
) -> None:
    sampling = opened[kind].sampling
    pack = tiny_pack(
        folders[kind],
        template=None,
        vectors=2,
        sampler=sampling.sampler,
        steps=2,
        guidance=sampling.guidance,
        size=(64, 64),
    )
    exact = Decoder(pack, path=folders[kind]).images(range(4)).float()
    apart = (exact.roll(1, 0) - exact).abs().mean()
    for switches, near in ((["channels_last", "fused_attention"], 0.01), (None, 0.3)):
        fast = Decoder(pack, path=folders[kind], numerics="fast", switches=switches)
        assert (fast.images(range(4)) - exact).abs().mean() < near * apart


@pytest.mark.parametrize(
    ("kind", "side"), [("prx", 512), ("z-image", 1024), ("flux2", 1024), ("sana-sprint", 1024)]
)
def test_the_side_is_that_of_the_family_where_no_file_says_it(
    kind: str, side: int, folders: dict[str, Path], tmp_path: Path
) -> None:
    root = Path(shutil.copytree(folders[kind], tmp_path / "copy"))
    index = json.loads((root / "model_index.json").read_text())
    del index["default_sample_size"]
    (root / "model_index.json").write_text(json.dumps(index))
    assert open_backbone(str(root)).image_size == (side, side)


@pytest.mark.parametrize("kind", KINDS)
def test_what_does_not_fit_is_refused(kind: str, opened: dict[str, Any]) -> None:
    backbone = opened[kind]
    width = backbone.output_shape[2]
    with raises_code("E_BACKBONE_PROMPT", match="not vectors in a sentence"):
        backbone.condition(torch.zeros(1, 1, width), "a photo of a {}")
    for shape in ((1, 1, width + 1), (1, 0, width), (1, 513, width), (1, width)):
        with raises_code("E_BACKBONE_PROMPT", match="takes 1 to"):
            backbone.condition(torch.zeros(shape), None)
    with pytest.raises(UsageError, match="multiples of"):
        backbone.latent_shape_for((60, 64))
    assert len(Condition.cat([backbone.unconditional()] * 2)) == 2
