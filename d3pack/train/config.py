"""The presets of `d3pack train`, with all their settings."""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """How a stage is optimised. It ends after `steps`, or `share` of the time budget."""

    batch: int
    lr: float
    steps: int
    share: float
    warmup: int = 200
    decay: float = 0.25  # the last part of the run, in which the learning rate falls to zero
    ema: float = 0.999
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.99)
    clip: float = 1.0
    muon: bool = False  # weight matrices by Muon instead of AdamW
    report_every: int = 50
    validate_every: int = 500


@dataclass(frozen=True, slots=True)
class AutoencoderConfig:
    loop: LoopConfig
    latent_channels: int = 16
    width: int = 64
    encoder_blocks: tuple[int, int, int, int] = (0, 0, 1, 3)
    decoder_blocks: tuple[int, int, int, int] = (5, 3, 2, 0)
    crop: int = 32
    latent_noise: float = 0.05
    anchor: tuple[float, float] = (1.0, 0.02)  # pull towards the PCA code: at the start, at the end
    # std of raw latents: small, so that the tanh of the decoder stays linear
    raw_scale: float = 0.25
    l1: float = 0.25


@dataclass(frozen=True, slots=True)
class TextConfig:
    loop: LoopConfig
    vocabulary: int = 4096
    width: int = 192
    layers: int = 3
    heads: int = 4
    max_tokens: int = 20


@dataclass(frozen=True, slots=True)
class DiffusionConfig:
    """The denoiser, with attention at the coarse level only, where it costs little.

    One core trains 200 samples a second at these widths, and 120 to 150 with attention on both
    levels.
    """

    loop: LoopConfig
    channels: tuple[int, ...] = (128, 160)
    attention: tuple[bool, ...] = (False, True)
    time_width: int = 256
    layers: int = 1
    head_width: int = 32
    caption_drop: float = 0.1
    collage_share: float = 0.12
    # mean and deviation of the noise levels trained on: the class matters most above sigma 4, where
    # the held-out loss with and without the caption differs ten times more than at 1
    log_sigma: tuple[float, float] = (1.0, 1.1)
    guidance: float = 3.0  # of the previews
    previews: int = 64  # images of a preview


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """One preset: a complete backbone, from pixels to prompts."""

    name: str
    autoencoder: AutoencoderConfig
    text: TextConfig
    diffusion: DiffusionConfig
    image_size: int = 64
    hold_back: int = 20  # last images of each class, which no stage trains on
    seed: int = 0
    checkpoint_minutes: float = 3.0


_MINI = TrainConfig(
    name="mini",
    autoencoder=AutoencoderConfig(loop=LoopConfig(batch=128, lr=1e-3, steps=40_000, share=0.2)),
    text=TextConfig(loop=LoopConfig(batch=256, lr=1e-3, steps=4000, share=0.1, ema=0.99)),
    diffusion=DiffusionConfig(
        loop=LoopConfig(
            batch=64, lr=1e-3, steps=1_000_000, share=0.7, decay=0.3, ema=0.9995, muon=True
        )
    ),
)

PRESETS: dict[str, TrainConfig] = {
    "mini": _MINI,
    # the same model for a GPU
    "mini-gpu": replace(
        _MINI,
        name="mini-gpu",
        autoencoder=replace(
            _MINI.autoencoder, loop=replace(_MINI.autoencoder.loop, batch=512, lr=2e-3)
        ),
        text=replace(_MINI.text, loop=replace(_MINI.text.loop, batch=1024)),
        diffusion=replace(
            _MINI.diffusion,
            loop=replace(_MINI.diffusion.loop, batch=512, lr=2e-3, warmup=1000, ema=0.9999),
        ),
    ),
    # seconds on one core, for tests
    "tiny": TrainConfig(
        name="tiny",
        image_size=32,
        hold_back=2,
        autoencoder=AutoencoderConfig(
            loop=LoopConfig(
                batch=16, lr=2e-3, steps=40, share=0.3, warmup=5, ema=0.9, report_every=10
            ),
            latent_channels=4,
            width=16,
            encoder_blocks=(0, 0, 1, 1),
            decoder_blocks=(1, 1, 1, 0),
            crop=16,
        ),
        text=TextConfig(
            loop=LoopConfig(
                batch=16, lr=2e-3, steps=30, share=0.2, warmup=5, ema=0.9, report_every=10
            ),
            vocabulary=640,
            width=32,
            layers=1,
            heads=2,
        ),
        diffusion=DiffusionConfig(
            loop=LoopConfig(
                batch=16,
                lr=2e-3,
                steps=40,
                share=0.5,
                warmup=5,
                ema=0.9,
                report_every=10,
                muon=True,
            ),
            channels=(32, 32),
            time_width=32,
            head_width=16,
            previews=4,
        ),
    ),
}
