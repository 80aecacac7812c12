"""Export the networks of `mini` as ONNX files, which the viewer runs in the browser.

    python viewer/export_onnx.py [--output viewer/model]

Writes `text.onnx` (token ids, and learned vectors in place of some, to hidden states),
`denoiser.onnx` (x_t, timestep and hidden states to the prediction), `decoder.onnx` (latents to
pixels around [-1, 1]), `tokenizer.json`, and `model.json`: lock, noise levels, shapes, and size and
SHA-256 of each file. Needs the package `onnx`; the files are made, not committed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from d3pack.backbones import mini_directory, open_backbone

HERE = Path(__file__).parent
OPSET = 17


class Text(nn.Module):
    """The text encoder, with learned vectors in place of some embeddings."""

    def __init__(self, text: Any) -> None:
        super().__init__()
        self.text, self.model, self.table = text, text.model, text.table

    def forward(self, ids: Tensor, vectors: Tensor, learned: Tensor) -> Tensor:
        """Return hidden states (B, T, D) of ids (B, T), vectors (B, T, D), learned (B, T, 1)."""
        embeddings = torch.where(learned > 0, vectors, self.table[ids])
        encoded: Tensor = self.text.encode(embeddings)
        return encoded


class Denoiser(nn.Module):
    """The UNet as the decoder calls it."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.unet = backbone.denoiser

    def forward(self, x_t: Tensor, timestep: Tensor, hidden: Tensor) -> Tensor:
        """Return the prediction at x_t (B, C, H, W)."""
        out: Tensor = self.unet(x_t, timestep, encoder_hidden_states=hidden, return_dict=False)[0]
        return out


class Decode(nn.Module):
    """From latents to pixels."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.autoencoder, self.model = backbone.autoencoder, backbone.autoencoder.model

    def forward(self, latents: Tensor) -> Tensor:
        """Return images around [-1, 1]."""
        images: Tensor = self.autoencoder.decode_float(latents)
        return images


def export(folder: Path) -> dict[str, Any]:
    """Write the files; return what model.json holds."""
    backbone: Any = open_backbone("mini")
    text, levels = backbone.text, backbone.levels
    channels, height, width = backbone.latent_shape
    positions, d = text.positions, text.width
    folder.mkdir(parents=True, exist_ok=True)
    # a prompt is encoded alone, in one shape
    prompt = {
        "ids": torch.zeros(1, positions, dtype=torch.long),
        "vectors": torch.zeros(1, positions, d),
        "learned": torch.zeros(1, positions, 1),
    }
    latents, hidden = torch.zeros(2, channels, height, width), torch.zeros(2, positions, d)
    noisy = {"x_t": latents, "timestep": torch.tensor(7.0), "hidden": hidden}
    pixels, states = {0: "batch", 2: "height", 3: "width"}, {0: "batch", 1: "tokens"}
    _export(Text(text), folder / "text.onnx", prompt, "hidden", {})
    axes = {"x_t": pixels, "hidden": states, "out": pixels}
    _export(Denoiser(backbone), folder / "denoiser.onnx", noisy, "out", axes)
    axes = {"latents": pixels, "images": pixels}
    _export(Decode(backbone), folder / "decoder.onnx", {"latents": latents}, "images", axes)
    shutil.copy(mini_directory() / "tokenizer" / "tokenizer.json", folder / "tokenizer.json")
    names = ("text.onnx", "denoiser.onnx", "decoder.onnx", "tokenizer.json")
    files = {name: (folder / name).read_bytes() for name in names}
    described = {
        "channels": channels,
        "factor": backbone.image_size[0] // height,
        "files": {name: [len(x), hashlib.sha256(x).hexdigest()] for name, x in files.items()},
        "lock": backbone.ref.lock,
        "pad": text.words.pad,
        "positions": positions,
        "prediction": levels.prediction,
        "sigmas": levels.sigmas.tolist(),
        "step": 2 ** (len(backbone.denoiser.config.block_out_channels) - 1),
        "width": d,
    }
    (folder / "model.json").write_text(json.dumps(described), encoding="utf-8")
    return described


def _export(
    module: nn.Module, path: Path, inputs: dict[str, Tensor], output: str, axes: dict[str, Any]
) -> None:
    """Write one network. Gradients stay on: without them, what a condition gives is kept."""
    for layer in module.modules():
        if isinstance(layer, nn.Linear):
            layer.__class__ = nn.Linear  # in place of oneDNN's
    import onnx

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter: of what it makes constant
        torch.onnx.export(
            module.eval(),
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=[output],
            dynamic_axes=axes,
            opset_version=OPSET,
            dynamo=False,
        )
    model = onnx.load(str(path))
    _halve(model.graph)
    onnx.checker.check_model(model)
    onnx.save(model, str(path))


def _halve(graph: Any) -> None:
    """Store weights in two bytes where that loses nothing: the shipped ones have no more."""
    from onnx import TensorProto, helper, numpy_helper

    casts = []
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if tensor.data_type != TensorProto.FLOAT or values.ndim == 0:
            continue
        half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(half, f"{name}.f16"))
        casts.append(helper.make_node("Cast", [f"{name}.f16"], [name], to=TensorProto.FLOAT))
    for cast in reversed(casts):
        graph.node.insert(0, cast)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "model")
    for name, (size, _) in export(parser.parse_args().output)["files"].items():
        print(f"{size:>10,} {name}")
