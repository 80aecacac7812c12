"""A class-conditional DiT in diffusers' layout: sizes, class conditions, export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from diffusers.models.attention_processor import AttnProcessor
from numpy.typing import NDArray
from torch import nn

from d3pack.system import write_text
from d3pack.train.config import LoopConfig
from d3pack.train.diffusion import SCHEDULE
from d3pack.train.export import save_half, write_lock
from d3pack.train.loop import Batch

LABELS = "class_labels"
VAE_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
EXPORTED = (
    "model_index.json",
    "scheduler/scheduler_config.json",
    *(f"transformer/{name}" for name in VAE_FILES),
    *(f"vae/{name}" for name in VAE_FILES),
)


@dataclass(frozen=True, slots=True)
class DiTConfig:
    """Sizes and training settings of one model."""

    loop: LoopConfig
    layers: int
    width: int
    head_width: int
    patch: int
    max_side: int  # pixels; larger images are shrunk to it
    drop: float = 0.1  # share of labels left out, for classifier-free guidance
    finish: float = 0.1  # last part of a training for four bits, in which weights are rounded
    log_sigma: tuple[float, float] = (0.6, 1.2)  # mean and deviation of the levels trained on
    guidance: float = 2.0  # of the sample sheets
    hold_back: int = 10  # last images of each class, for the held-back loss
    checkpoint_minutes: float = 3.0


DIT_MODELS: dict[str, DiTConfig] = {
    # 5 million parameters on 16 tokens (32 pixels): one core trains 300 samples a second. On
    # CIFAR-10, in equal time, a wider and shallower model and lower rates (a fifth, a half) reached
    # a worse held-out loss
    "small": DiTConfig(
        loop=LoopConfig(batch=128, lr=1e-2, steps=8000, share=1.0, decay=0.4, ema=0.999, muon=True),
        layers=8,
        width=192,
        head_width=64,
        patch=1,
        max_side=64,
    ),
    # DiT-B, for an accelerator
    "base": DiTConfig(
        loop=LoopConfig(
            batch=256, lr=1e-3, steps=200_000, share=1.0, warmup=1000, ema=0.9999, muon=True
        ),
        layers=12,
        width=768,
        head_width=64,
        patch=2,
        max_side=256,
    ),
    # seconds on one core: for tests and for a first try
    "tiny": DiTConfig(
        loop=LoopConfig(
            batch=8, lr=2e-3, steps=12, share=1.0, warmup=2, ema=0.9, report_every=4, muon=True
        ),
        layers=2,
        width=32,
        head_width=16,
        patch=1,
        max_side=64,
        hold_back=2,
        checkpoint_minutes=0.005,
    ),
}


def build_dit(
    config: DiTConfig, channels: int, latent_size: int, classes: int
) -> DiTTransformer2DModel:
    """Build a DiT initialised as in its paper: every block an identity, one class table for all."""
    model = DiTTransformer2DModel(
        num_attention_heads=config.width // config.head_width,
        attention_head_dim=config.head_width,
        in_channels=channels,
        out_channels=channels,
        num_layers=config.layers,
        attention_bias=True,
        sample_size=latent_size,
        patch_size=config.patch,
        num_embeds_ada_norm=classes,
    )
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    patches = model.pos_embed.proj
    nn.init.xavier_uniform_(patches.weight.view(patches.weight.shape[0], -1))
    nn.init.zeros_(patches.bias)
    embedding = model.transformer_blocks[0].norm1.emb
    for weight in (
        embedding.class_embedder.embedding_table.weight,
        embedding.timestep_embedder.linear_1.weight,
        embedding.timestep_embedder.linear_2.weight,
    ):
        nn.init.normal_(weight, std=0.02)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.norm1.linear.weight)
    for last in (model.proj_out_1, model.proj_out_2):
        nn.init.zeros_(last.weight)
    tie(model)
    return model


def tie(model: DiTTransformer2DModel) -> None:
    """Share one embedding of time and class among all blocks, as DiT does; diffusers does not.

    The conditioner decides which labels are dropped: the model's own random numbers would differ
    when an interrupted training is resumed.
    """
    shared = model.transformer_blocks[0].norm1.emb
    shared.class_embedder.dropout_prob = 0.0
    for block in model.transformer_blocks[1:]:
        block.norm1.emb = shared
    # with so few tokens, plain attention trains faster than fused attention on a CPU
    for block in model.transformer_blocks:
        block.attn1.set_processor(AttnProcessor())


class ClassConditioner:
    """Class conditions: rows of the class table, of which the last one means no class."""

    def __init__(self, classes: int, drop: float) -> None:
        self.classes, self.drop = classes, drop

    def for_training(
        self, labels: NDArray[np.int64], collage: NDArray[np.bool_], rng: np.random.Generator
    ) -> Batch:
        dropped = rng.random(len(labels)) < self.drop
        return {LABELS: torch.from_numpy(np.where(dropped, self.classes, labels))}

    def for_sampling(self, labels: Sequence[int]) -> tuple[Batch, Batch]:
        rows = torch.tensor(labels, dtype=torch.int64)
        return {LABELS: rows}, {LABELS: torch.full_like(rows, self.classes)}


def export_dit(
    folder: Path, model: DiTTransformer2DModel, vae: Path, classes: Sequence[str], licence: str
) -> None:
    """Write transformer, autoencoder, scheduler and class names, then `lock.json` over them."""
    unshared = DiTTransformer2DModel.from_config(model.config)  # a file cannot share tensors
    unshared.load_state_dict(model.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    save_half(unshared, folder / "transformer")
    (folder / "vae").mkdir(exist_ok=True)
    for name in VAE_FILES:
        shutil.copyfile(vae / name, folder / "vae" / name)
    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": {str(c): name for c, name in enumerate(classes)},
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", json.loads((vae / "config.json").read_text())["_class_name"]],
    }
    write_text(folder / "model_index.json", json.dumps(index, indent=2, sort_keys=True) + "\n")
    write_lock(folder, licence)
