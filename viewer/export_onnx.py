"""Export the networks of `mini` as ONNX files, which the viewer runs in the browser.

    python viewer/export_onnx.py [--output viewer/model]

Writes `text.onnx` (token ids, and learned vectors in place of some, to hidden states),
`denoiser.onnx` (x_t, timestep and hidden states to the prediction), `decoder.onnx` (latents to
pixels around [-1, 1]), beside each its weights in half precision (`.f16`), `tokenizer.json`, and
`model.json`: lock, noise levels, shapes, and size and SHA-256 of each file. Needs the package
`onnx`; the files are made, not committed.
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
KINDS = ("onnx", "f16")  # a graph, and its weights
WEIGHTS = "weights"  # what a graph calls the file of its weights
SMALL = 64  # numbers; so many or fewer stay in the graph
# of inputs from which is seen what depends on sizes, and how
SIZES = (
    {"batch": 1, "tokens": 20, "height": 8, "width": 8},
    {"batch": 3, "tokens": 5, "height": 8, "width": 12},
    {"batch": 2, "tokens": 7, "height": 12, "width": 10},
)


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
    networks = [f"{name}.{kind}" for name in ("text", "denoiser", "decoder") for kind in KINDS]
    names = (*networks, "tokenizer.json")
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
    module: nn.Module,
    path: Path,
    inputs: dict[str, Tensor],
    output: str,
    axes: dict[str, Any],
) -> None:
    """Write one network as a graph, and its weights beside it in two bytes each.

    Gradients stay on: without them, what a condition gives is kept.
    """
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
    fold_shapes(model, [_resized(inputs, axes, sizes) for sizes in SIZES])
    weights = _take_weights(model.graph)
    path.write_bytes(model.SerializeToString())
    path.with_suffix(".f16").write_bytes(weights.tobytes())


def _resized(
    inputs: dict[str, Tensor], axes: dict[str, Any], sizes: dict[str, int]
) -> dict[str, np.ndarray]:
    """Return inputs of other sizes along their axes that have names."""
    resized = {}
    for name, tensor in inputs.items():
        shape = [sizes.get(axes.get(name, {}).get(i, ""), n) for i, n in enumerate(tensor.shape)]
        resized[name] = np.ones(shape, tensor.numpy().dtype)
    return resized


def fold_shapes(model: Any, examples: list[dict[str, np.ndarray]]) -> None:
    """Compute here what a graph computes of shapes alone, over and over in every pass.

    Args:
        model: is changed.
        examples: inputs of several sizes. What is equal for all of them becomes a constant; a
            shape to give to a tensor becomes one with 0 and -1, for a size that is kept and
            for one that is left.
    """
    from onnx import numpy_helper

    graph = model.graph
    follows: set[str] = set()  # from shapes alone
    for node in graph.node:
        if node.op_type == "Shape" or all(name in follows for name in node.input if name):
            follows.update(node.output)
    reshapes = [node for node in graph.node if node.op_type == "Reshape"]
    values = [_values(model, follows | {node.input[0] for node in reshapes}, x) for x in examples]
    folded = {}
    for name in sorted(follows):
        seen = [example[name] for example in values]
        if all(np.array_equal(seen[0], other) for other in seen):
            folded[name] = seen[0]
    for node in reshapes:
        data, wanted = node.input
        if wanted in follows and wanted not in folded:
            shapes = [example[data].shape for example in values]
            if (free := _free_shape(shapes, [example[wanted] for example in values])) is not None:
                node.input[1] = f"{wanted} of {data}"
                folded[node.input[1]] = free
    for name, value in folded.items():
        graph.initializer.append(numpy_helper.from_array(value, name))
    _keep_used(graph, set(folded))


def _values(model: Any, names: set[str], inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return tensors inside a graph by name."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    open_model = onnx.ModelProto()
    open_model.CopyFrom(model)
    del open_model.graph.output[:]
    wanted = sorted(names)
    open_model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in wanted)
    found = ReferenceEvaluator(open_model).run(None, inputs)
    return dict(zip(wanted, map(np.asarray, found), strict=True))


def _free_shape(given: list[tuple[int, ...]], wanted: list[np.ndarray]) -> np.ndarray | None:
    """Return the one shape with 0 and -1 that stands for all of them, if there is one."""
    shape = []
    for i, sizes in enumerate(zip(*wanted, strict=True)):
        if len(set(sizes)) == 1:
            shape.append(int(sizes[0]))
        elif all(i < len(known) and known[i] == n for known, n in zip(given, sizes, strict=True)):
            shape.append(0)
        else:
            shape.append(-1)
    return np.array(shape, np.int64) if shape.count(-1) <= 1 else None


def _keep_used(graph: Any, constant: set[str]) -> None:
    """Drop the nodes whose outputs are constant or used by none."""
    used = {output.name for output in graph.output}
    kept = []
    for node in reversed(graph.node):
        if used.intersection(node.output) and not constant.issuperset(node.output):
            used.update(node.input)
            kept.append(node)
    initializers = [tensor for tensor in graph.initializer if tensor.name in used]
    for field, values in (("node", reversed(kept)), ("initializer", initializers)):
        values = list(values)
        graph.ClearField(field)
        getattr(graph, field).extend(values)


def _take_weights(graph: Any) -> np.ndarray:
    """Move weights out of a graph; return them in two bytes, as the shipped ones have no more.

    The graph names their places in a file of float32, which the page makes of the halves.
    """
    from onnx import TensorProto, numpy_helper

    taken: list[np.ndarray] = []
    at = 0
    for tensor in graph.initializer:
        values = numpy_helper.to_array(tensor)
        if values.dtype != np.float32 or values.size <= SMALL:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(half, values):
            continue
        tensor.ClearField("raw_data")
        tensor.ClearField("float_data")
        tensor.data_location = TensorProto.EXTERNAL
        for key, value in (("location", WEIGHTS), ("offset", at), ("length", values.nbytes)):
            tensor.external_data.add(key=key, value=str(value))
        taken.append(half.ravel())
        at += values.nbytes
    return np.concatenate(taken)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", type=Path, default=HERE / "model")
    for name, (size, _) in export(parser.parse_args().output)["files"].items():
        print(f"{size:>10,} {name}")
