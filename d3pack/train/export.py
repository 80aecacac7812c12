"""Write a trained backbone in diffusers' Stable Diffusion layout, in fp16, with its lock."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffusers import AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from d3pack.backbones import lock_directory, write_list
from d3pack.system import disk_full_as_error, write_text, writing
from d3pack.train.diffusion import SCHEDULE

PIPELINE = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderTiny"],
}
# names where a config came from, which differs from machine to machine
_PRIVATE = ("_name_or_path",)


def export_backbone(
    folder: Path,
    *,
    autoencoder: AutoencoderTiny,
    text: CLIPTextModel,
    tokenizer: CLIPTokenizer,
    unet: UNet2DConditionModel,
    licence: str,
) -> None:
    """Write all parts of a text-to-image backbone, then `lock.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    DDIMScheduler(**SCHEDULE).save_pretrained(folder / "scheduler")
    words = tokenizer.backend_tokenizer  # it would store the padding of its last call
    words.no_padding()
    words.no_truncation()
    tokenizer.save_pretrained(folder / "tokenizer")
    for part, model in (("vae", autoencoder), ("text_encoder", text), ("unet", unet)):
        save_half(model, folder / part)
    write_text(folder / "model_index.json", json.dumps(PIPELINE, indent=2, sort_keys=True) + "\n")
    write_lock(folder, licence)


@disk_full_as_error()
def save_half(model: Any, folder: Path) -> None:
    """Save a model with its weights in fp16; the model in memory keeps its dtype."""
    model.save_pretrained(folder)
    for path in folder.glob("*.safetensors"):
        tensors = {name: tensor.half().contiguous() for name, tensor in load_file(path).items()}
        with writing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors makes files that only their owner can read
    config = json.loads((folder / "config.json").read_text())
    for key in _PRIVATE:
        config.pop(key, None)
    if "dtype" in config:
        config["dtype"] = "float16"
    write_text(folder / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")


def write_lock(folder: Path, licence: str) -> None:
    """Write `lock.json`: the licence and the files of a backbone with sizes and hashes."""
    write_list(folder, lock_directory(folder, licence=licence))
