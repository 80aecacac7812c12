"""Random flow-matching backbones of about a megabyte, saved by diffusers and transformers.

    path = tiny_flow("prx", tmp_path / "prx")    # also "z-image", "flux2", "sana-sprint"
    pipeline = pipeline_of("prx", path)          # diffusers' own

Only the weights are random, and the vocabulary a few words.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tiny_backbones import WORDS

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)
LANGUAGE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
}
VAE: dict[str, Any] = {
    "block_out_channels": (8, 8, 16, 16),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 64,
}


def _qwen_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2Tokenizer

    empty: Any = Qwen2Tokenizer()._tokenizer
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = empty.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    learner.train_from_iterator([WORDS] * 3, trainer)
    model = json.loads(learner.to_str())["model"]
    vocab = {"<|endoftext|>": 0, **{word: i + 1 for word, i in model["vocab"].items()}}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[tuple(m) for m in model["merges"]])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(path)


def _gemma_tokenizer(path: Path) -> None:
    from tokenizers import Tokenizer, models, trainers
    from transformers import GemmaTokenizer

    empty: Any = GemmaTokenizer()._tokenizer
    learner = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    learner.normalizer, learner.pre_tokenizer = empty.normalizer, empty.pre_tokenizer
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    units = [*special, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, special_tokens=units)
    learner.train_from_iterator([WORDS] * 3, trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    tokenizer = GemmaTokenizer(
        vocab=model["vocab"], merges=merges, model_max_length=256, add_bos_token=True
    )
    tokenizer.save_pretrained(path)


def _encoder(path: Path, name: str) -> None:
    import transformers

    sizes = {**LANGUAGE, "vocab_size": 600}
    if name == "qwen":
        # the last of the layers that FLUX.2 reads is the 27th
        config = transformers.Qwen3Config(**{**sizes, "num_hidden_layers": 28})
        model: Any = transformers.Qwen3ForCausalLM(config)
    elif name == "gemma":
        model = transformers.Gemma2Model(transformers.Gemma2Config(**sizes))
    else:
        from transformers.models.t5gemma.configuration_t5gemma import T5GemmaConfig
        from transformers.models.t5gemma.modeling_t5gemma import T5GemmaEncoder

        both = T5GemmaConfig(encoder=sizes, decoder=sizes)
        model = T5GemmaEncoder(both.encoder)
        model.save_pretrained(path)
        both.architectures = ["T5GemmaEncoder"]  # as published: of both halves
        both.save_pretrained(path)
        return
    model.save_pretrained(path)


def _prx(path: Path) -> None:
    from diffusers import AutoencoderKL, PRXTransformer2DModel

    PRXTransformer2DModel(
        in_channels=4,
        context_in_dim=32,
        hidden_size=32,
        num_heads=4,
        depth=2,
        axes_dim=[4, 4],
    ).save_pretrained(path / "transformer")
    AutoencoderKL(**VAE, latent_channels=4, scaling_factor=0.4, shift_factor=0.1).save_pretrained(
        path / "vae"
    )


def _z_image(path: Path) -> None:
    from diffusers import AutoencoderKL, ZImageTransformer2DModel

    ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=32,
        axes_dims=[4, 6, 6],
        axes_lens=[128, 64, 64],
    ).save_pretrained(path / "transformer")
    AutoencoderKL(**VAE, latent_channels=4, scaling_factor=0.4, shift_factor=0.1).save_pretrained(
        path / "vae"
    )


def _flux2(path: Path) -> None:
    from diffusers import AutoencoderKLFlux2, Flux2Transformer2DModel

    Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=96,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    ).save_pretrained(path / "transformer")
    vae = AutoencoderKLFlux2(**VAE, latent_channels=4)
    vae.bn.running_mean.normal_(0, 0.1)
    vae.bn.running_var.uniform_(0.5, 2)
    vae.save_pretrained(path / "vae")


def _sana(path: Path) -> None:
    from diffusers import AutoencoderDC, SanaTransformer2DModel

    SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=4,
        attention_head_dim=8,
        num_layers=2,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=8,
        guidance_embeds=True,
        qk_norm="rms_norm_across_heads",
    ).save_pretrained(path / "transformer")
    AutoencoderDC(
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "ResBlock", "ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8, 16, 16),
        decoder_block_out_channels=(8, 8, 16, 16),
        encoder_layers_per_block=(1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1),
        encoder_qkv_multiscales=((), (), (), (5,)),
        decoder_qkv_multiscales=((), (), (), (5,)),
        scaling_factor=0.41407,
    ).save_pretrained(path / "vae")


SCM = {"_class_name": "SCMScheduler", "prediction_type": "trigflow", "sigma_data": 0.5}
FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
# models, text encoder, tokenizer, scheduler, pipeline
KINDS: dict[str, tuple[Callable[[Path], None], str, Callable[[Path], None], Any, str]] = {
    "prx": (_prx, "t5gemma", _gemma_tokenizer, FLOW, "PRXPipeline"),
    "z-image": (_z_image, "qwen", _qwen_tokenizer, FLOW, "ZImagePipeline"),
    "flux2": (
        _flux2,
        "qwen",
        _qwen_tokenizer,
        {**FLOW, "use_dynamic_shifting": True},
        "Flux2KleinPipeline",
    ),
    "sana-sprint": (_sana, "gemma", _gemma_tokenizer, SCM, "SanaSprintPipeline"),
}


def tiny_flow(kind: str, path: str | Path, seed: int = 0) -> Path:
    """Save a backbone whose parameters are all random: some would begin as zeros."""
    path = Path(path)
    make, encoder, tokenizer, scheduler, pipeline = KINDS[kind]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        make(path)
        _encoder(path / "text_encoder", encoder)
    _randomize(path / "transformer" / "diffusion_pytorch_model.safetensors", seed)
    tokenizer(path / "tokenizer")
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler))
    index = {"_class_name": pipeline, "default_sample_size": 64, "is_distilled": True}
    (path / "model_index.json").write_text(json.dumps(index))
    return path


def _randomize(path: Path, seed: int) -> None:
    from safetensors.torch import load_file, save_file

    generator = torch.Generator().manual_seed(seed)
    state = load_file(path)
    for name, tensor in state.items():
        noise = torch.randn(tensor.shape, generator=generator)
        if tensor.ndim == 1 and name.endswith("weight"):  # of a norm
            state[name] = 1 + 0.1 * noise
        else:
            state[name] = noise * (0.1 if tensor.ndim == 1 else 1.5 / tensor[0].numel() ** 0.5)
    save_file(state, path, metadata={"format": "pt"})


def pipeline_of(kind: str, path: Path) -> Any:
    """Return diffusers' pipeline of these files."""
    import diffusers
    import transformers

    name = KINDS[kind][4]
    classes: dict[str, tuple[str, str, dict[str, Any]]] = {
        "prx": ("PRXTransformer2DModel", "AutoencoderKL", {"default_sample_size": 64}),
        "z-image": ("ZImageTransformer2DModel", "AutoencoderKL", {}),
        "flux2": ("Flux2Transformer2DModel", "AutoencoderKLFlux2", {"is_distilled": True}),
        "sana-sprint": ("SanaTransformer2DModel", "AutoencoderDC", {}),
    }
    transformer, vae, extra = classes[kind]
    scheduler = getattr(diffusers, KINDS[kind][3]["_class_name"])
    if kind == "prx":
        from diffusers.pipelines.prx import T5GemmaEncoder

        encoder: Any = T5GemmaEncoder
    else:
        encoder = transformers.AutoModel if kind != "flux2" else transformers.Qwen3ForCausalLM
    pipeline = getattr(diffusers, name)(
        transformer=getattr(diffusers, transformer).from_pretrained(path / "transformer"),
        vae=getattr(diffusers, vae).from_pretrained(path / "vae"),
        scheduler=scheduler.from_pretrained(path / "scheduler"),
        text_encoder=encoder.from_pretrained(path / "text_encoder"),
        tokenizer=transformers.AutoTokenizer.from_pretrained(path / "tokenizer"),
        **extra,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
