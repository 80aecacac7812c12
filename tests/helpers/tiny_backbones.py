"""Random backbones of a few hundred kilobytes, in diffusers' layout, made in about a second.

    path = tiny_sd(tmp_path / "sd")      # text to image, 64 px
    path = tiny_dit(tmp_path / "dit")    # class to image, 64 px
    pack = tiny_pack(path)               # of 3 classes with 8 images; Decoder(pack, path=path)

They are real models with real configs and a real tokenizer; only the weights are random.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = (
    "a photo of the goldfish penguin tabby cat dog lemon bus school golden retriever orange "
    "castle bridge ship truck airplane automobile bird deer frog horse picture image an small"
)


def tiny_tokenizer(path: Path, *, layout: str = "json") -> None:
    """Train a byte-pair tokenizer on a few words; "json" is one file, "vocab" the older two."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

    start, end = "<|startoftext|>", "<|endoftext|>"
    pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    learner = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    learner.pre_tokenizer = pre_tokenizer
    # every byte and every byte that ends a word, in one order: ids break ties between merges
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    units = [*alphabet, *(f"{unit}</w>" for unit in alphabet)]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        show_progress=False,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        special_tokens=units,
    )
    learner.train_from_iterator([WORDS] * 3, trainer)
    merges = [tuple(merge) for merge in json.loads(learner.to_str())["model"]["merges"]]
    units = [start, end, *units, *("".join(merge) for merge in merges)]
    ids = {unit: i for i, unit in enumerate(dict.fromkeys(units))}
    tokenizer = Tokenizer(
        models.BPE(vocab=ids, merges=merges, end_of_word_suffix="</w>", unk_token=end)
    )
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.add_special_tokens([start, end])
    tokenizer.post_processor = processors.RobertaProcessing((end, ids[end]), (start, ids[start]))
    path.mkdir(parents=True, exist_ok=True)
    settings = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": end}
    _write(path / "tokenizer_config.json", {"tokenizer_class": "CLIPTokenizer", **settings})
    if layout == "json":
        tokenizer.save(str(path / "tokenizer.json"))
        return
    _write(path / "vocab.json", ids)
    lines = ["#version: 0.2", *(" ".join(merge) for merge in merges), ""]
    (path / "merges.txt").write_text("\n".join(lines), encoding="utf-8")


def tiny_sd(
    path: str | Path,
    *,
    vae: str = "tiny",
    prediction: str = "v_prediction",
    tokenizer: str = "json",
    positions: int = 16,
    width: int = 32,
    side: int = 8,
    seed: int = 0,
    scheduler: dict[str, Any] | None = None,
) -> Path:
    """Save a Stable Diffusion of about 1 MB: 8x8x4 latents, 64 px, `width` wide prompts.

    Another `side` of the latents makes images of eight times that.
    """
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel

    path = Path(path)
    tiny_tokenizer(path / "tokenizer", layout=tokenizer)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        text = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=1000,
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=2,
                num_attention_heads=4,
                max_position_embeddings=positions,
                bos_token_id=0,
                eos_token_id=2,
                initializer_factor=20.0,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=side,
            in_channels=4,
            out_channels=4,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            cross_attention_dim=width,
            attention_head_dim=4,
            norm_num_groups=8,
        )
        with torch.no_grad():  # so that the prompt shows in the image
            for name, weight in unet.named_parameters():
                if ".attn2.to_out" in name:
                    weight.mul_(20)
        _save_vae(path / "vae", vae)
    text.save_pretrained(path / "text_encoder")
    unet.save_pretrained(path / "unet")
    _save_scheduler(path, prediction, "scaled_linear", 0.00085, 0.012, scheduler)
    _write(path / "model_index.json", {"_class_name": "StableDiffusionPipeline"})
    return path


def tiny_sdxl(
    path: str | Path,
    *,
    positions: int = 16,
    prediction: str = "epsilon",
    zeros: bool = True,
    scheduler: dict[str, Any] | None = None,
) -> Path:
    """Save a Stable Diffusion XL of about 1 MB: 64 px, tokens of 24 + 40, a pooled vector of 20."""
    import torch
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers.models.clip.configuration_clip import CLIPTextConfig
    from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelWithProjection

    path = Path(path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for end, width, cls in (("", 24, CLIPTextModel), ("_2", 40, CLIPTextModelWithProjection)):
            tiny_tokenizer(path / f"tokenizer{end}", layout="vocab" if end else "json")
            settings = path / f"tokenizer{end}" / "tokenizer_config.json"
            more = {"model_max_length": positions, **({"pad_token": "!"} if end else {})}
            _write(settings, {**json.loads(settings.read_text()), **more})
            cls(
                CLIPTextConfig(
                    vocab_size=1000,
                    hidden_size=width,
                    intermediate_size=2 * width,
                    projection_dim=20,
                    num_hidden_layers=3,
                    num_attention_heads=4,
                    max_position_embeddings=positions,
                    bos_token_id=0,
                    eos_token_id=1,
                    hidden_act="gelu" if end else "quick_gelu",
                    initializer_factor=4.0,
                )
            ).save_pretrained(path / f"text_encoder{end}")
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(32, 64),
            layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=64,
            attention_head_dim=(4, 8),
            norm_num_groups=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=20 + 6 * 8,
        )
        with torch.no_grad():  # so that prompt and pooled vector show in the image
            for name, weight in unet.named_parameters():
                if ".attn2.to_out" in name or name.startswith("add_embedding"):
                    weight.mul_(5)
        _save_vae(path / "vae", "kl")
    unet.save_pretrained(path / "unet")
    config = {"_class_name": "EulerDiscreteScheduler", **(scheduler or {})}
    _save_scheduler(path, prediction, "scaled_linear", 0.00085, 0.012, config)
    parts = {
        "scheduler": ["diffusers", config["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    index = {"_class_name": "StableDiffusionXLPipeline", **parts}
    _write(path / "model_index.json", {**index, "force_zeros_for_empty_prompt": zeros})
    return path


def tiny_dit(
    path: str | Path,
    *,
    vae: str = "kl",
    classes: int = 10,
    learned_sigma: bool = True,
    tied: bool = True,
    seed: int = 0,
) -> Path:
    """Save a DiT of about 1 MB: 64 px, 8x8x4 latents, 32-wide class vectors, 10 classes + null."""
    import torch
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    path = Path(path)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        dit = DiTTransformer2DModel(
            num_attention_heads=4,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8 if learned_sigma else 4,
            num_layers=3,
            attention_bias=True,
            sample_size=8,
            patch_size=2,
            num_embeds_ada_norm=classes,
        )
        if tied:  # as in the published weights: one table, copied into each block
            for block in dit.transformer_blocks[1:]:
                block.norm1.emb.load_state_dict(dit.transformer_blocks[0].norm1.emb.state_dict())
        _save_vae(path / "vae", vae)
    dit.save_pretrained(path / "transformer")
    _save_scheduler(path, "epsilon", "linear", 0.0001, 0.02, None)
    names = WORDS.split()[4:]
    labels = {str(i): names[i % len(names)] for i in range(classes)}
    _write(path / "model_index.json", {"_class_name": "DiTPipeline", "id2label": labels})
    return path


def tiny_pack(
    path: str | Path,
    *,
    classes: int = 3,
    images: int = 8,
    modes: int = 1,
    vectors: int = 1,
    sampler: str = "dpmpp-2m",
    steps: int = 3,
    guidance: float = 2.0,
    group: int = 4,
    dtype: str = "float32",
    size: tuple[int, int] | None = None,
    template: str | None = "a photo of a {}",
    backbone: Any = None,
    **more: Any,
) -> Any:
    """A valid pack of random prompts for a backbone directory, or an open one; `more`: `Pack`."""
    import numpy as np

    from d3pack import Pack, Recipe
    from d3pack.backbones import open_backbone
    from d3pack.decode import samplers
    from d3pack.format.codecs import encode_prompts

    backbone = backbone or open_backbone(str(path))
    levels = samplers.schedule(backbone.levels.alphas_cumprod, sampler, steps)
    recipe = Recipe(
        backbone=backbone.ref,
        size=size or backbone.image_size,
        sampler=sampler,  # type: ignore[arg-type]
        sigmas=levels,
        guidance=guidance,
        group=group,
        dtype=dtype,  # type: ignore[arg-type]
        template=template,
        guided_channels=more.pop("guided_channels", 0),
        extra=more.pop("extra", {}),
    )
    width = backbone.prompt_shape[1] if template else backbone.output_shape[2]
    shape = (classes, modes, vectors, width)
    values = np.random.default_rng(5).normal(size=shape).astype(np.float32)
    if template is None and backbone.ref.kind == "sdxl":
        values[:, :, -1, 20:] = 0  # what fills a pooled vector up
    names = tuple(f"{WORDS.split()[4 + c % 20]} {c}" for c in range(classes))
    return Pack(
        classes=names,
        images_per_class=images,
        recipe=recipe,
        prompts=encode_prompts(values),
        seed=more.pop("seed", 11),
        **more,
    )


def without_text(path: str | Path, copy: Path) -> Path:
    """A copy of a backbone directory that lacks the files of its text encoders."""
    for source in Path(path).rglob("*"):
        folder = source.relative_to(path).parts[0]
        if source.is_file() and not folder.startswith(("text_encoder", "tokenizer")):
            target = copy / source.relative_to(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    return copy


def _save_vae(path: Path, kind: str) -> None:
    if kind == "tiny":
        import torch
        from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTiny

        model = AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8, 8),
            decoder_block_out_channels=(8, 8, 8, 8),
            num_encoder_blocks=(1, 1, 1, 1),
            num_decoder_blocks=(1, 1, 1, 1),
            scaling_factor=1.3,
        )
        with torch.no_grad():  # contrast
            model.decoder.layers[-1].weight.mul_(20)
        model.save_pretrained(path)
        return
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    AutoencoderKL(
        block_out_channels=(8, 8, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
        scaling_factor=0.18215,
    ).save_pretrained(path)


def _save_scheduler(
    path: Path, prediction: str, name: str, start: float, end: float, more: dict[str, Any] | None
) -> None:
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "beta_schedule": name,
        "beta_start": start,
        "beta_end": end,
        "num_train_timesteps": 1000,
        "prediction_type": prediction,
        "clip_sample": False,
        "set_alpha_to_one": True,
    }
    _write(path / "scheduler" / "scheduler_config.json", {**config, **(more or {})})


def _write(path: Path, value: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
