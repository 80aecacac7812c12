"""DiffFit on a DiT: biases, scale factors and class rows are trained, every other value is frozen.

As in the code of minimax diffusion (vimar-gu/MinimaxDiffusion, arXiv 2311.15529): all biases; in
the first half of the blocks factors on queries, keys and values, on attention's output and on both
residual branches; and the class table. Its rule goes by names ("bias", "norm", "gamma",
"y_embed"); the norms of a DiT have no values of their own, so "norm" adds nothing there. Rows of
other classes than the pack's cannot matter and are left out.

What was learned becomes an adapter: a factor scales the rows of the layer before it (`gain`) and
is folded into that layer's bias (`delta`). The row of no class moves as well; since the embedding
adds row and time, its move goes into the last bias of the time embedding and comes off the prompts:
the same sums, for no bytes at all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from d3pack.backbones import DiT
from d3pack.errors import UsageError

NULL = "null"
ROWS = "rows"
_LAST_TIME_BIAS = "norm1.emb.timestep_embedder.linear_2.bias"


class DiffFit:
    """The trainable values of an open DiT by name, while `fitted` holds it."""

    def __init__(self, backbone: DiT, names: Sequence[str]) -> None:
        self.backbone = backbone
        model = backbone.denoiser
        blocks = model.transformer_blocks
        tables = [block.norm1.emb.table for block in blocks]
        if any(not torch.equal(tables[0], table) for table in tables[1:]):
            raise UsageError(
                "the blocks of this DiT have different class tables",
                hint="one vector a class cannot stand for several",
            )
        self.biases = _biases(model)
        self.original = {name: p.detach().clone() for name, p in self.biases.items()}
        self.groups = _groups(model, self.biases)
        start = torch.cat([backbone.name_vectors(name) for name in names]).float()
        device = backbone.device
        self.values: dict[str, nn.Parameter] = {
            **{group[0]: self.biases[group[0]] for group in self.groups},
            **{
                f"{layer}.{which}": nn.Parameter(torch.ones(width, device=device))
                for layer, which, width in _factors(model)
            },
            ROWS: nn.Parameter(start.to(device)),
            NULL: nn.Parameter(tables[0][-1].detach().float().clone()),
        }

    def vectors(self, labels: Tensor) -> Tensor:
        """Return what blocks take for (B,) classes; the number of classes stands for none."""
        table = torch.cat([self.values[ROWS], self.values[NULL][None]])
        blocks = len(self.backbone.denoiser.transformer_blocks)
        return table[labels][:, None].expand(-1, blocks, -1)

    def denoise(self, x_t: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        """Return the whole output of the transformer, with its learned sigma."""
        out: Tensor = self.backbone.denoiser(
            x_t, timestep=t, class_labels=self.vectors(labels), return_dict=False
        )[0]
        return out

    def factor(self, layer: str) -> Tensor | None:
        """Return the product of the factors behind a layer, or None where there is none."""
        names = [f"{layer}.inner", f"{layer}.outer"]
        factors = [self.values[name] for name in names if name in self.values]
        return torch.stack(list(factors)).prod(0) if factors else None

    @torch.no_grad()
    def put(self, values: dict[str, Tensor]) -> None:
        """Replace values, for instance by a moving average."""
        for name, value in values.items():
            self.values[name].copy_(value)

    @torch.no_grad()
    def adapter(self) -> dict[str, Tensor]:
        """Return what turns the frozen backbone into this one; call it inside `fitted`."""
        shift = self.values[NULL] - self.backbone.denoiser.transformer_blocks[0].norm1.emb.table[-1]
        tensors: dict[str, Tensor] = {}
        for name, bias in self.biases.items():
            layer = name.removesuffix(".bias")
            value, factor = bias.float(), self.factor(layer)
            if factor is not None:
                tensors[f"{layer}.weight.gain"] = factor - 1
                value = value * factor
            if name.endswith(_LAST_TIME_BIAS):
                value = value + shift
            tensors[f"{name}.delta"] = value - self.original[name].float()
        return {name: tensor.cpu() for name, tensor in tensors.items() if tensor.any()}

    @torch.no_grad()
    def prompts(self) -> Tensor:
        """Return the rows (C, D) less the move of the row of no class, which is in the adapter."""
        table = self.backbone.denoiser.transformer_blocks[0].norm1.emb.table
        rows: Tensor = self.values[ROWS] - (self.values[NULL] - table[-1])
        return rows.cpu()


def learned(model: Any) -> dict[str, tuple[int, ...]]:
    """Return names and shapes of all that an adapter of this model can hold."""
    gains = {f"{layer}.weight.gain": (width,) for layer, _, width in _factors(model)}
    biases = {f"{n}.delta": tuple(p.shape) for n, p in _biases(model).items()}
    return gains | biases


def _biases(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if name.endswith(".bias")}


@contextmanager
def fitted(backbone: DiT, names: Sequence[str]) -> Iterator[DiffFit]:
    """Yield the trainable values of a backbone; afterwards it is what it was, bit for bit."""
    if backbone.dtype != torch.float32:
        raise UsageError("DiffFit trains in float32", hint="open the backbone so")
    fit = DiffFit(backbone, names)
    model = backbone.denoiser
    handles: list[Any] = []
    try:
        for parameter in fit.biases.values():
            parameter.requires_grad_(True)
        for group in fit.groups:
            for twin in group[1:]:
                _replace(model, twin, fit.biases[group[0]])
        fit.biases.update({t: fit.biases[g[0]] for g in fit.groups for t in g[1:]})
        for layer in sorted({layer for layer, _, _ in _factors(model)}):
            hook = _Scale(fit, layer)
            handles.append(model.get_submodule(layer).register_forward_hook(hook))
        yield fit
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for name, value in fit.original.items():
                _replace(model, name, nn.Parameter(value, requires_grad=False))
        backbone.changed()


class _Scale:
    """A hook that multiplies the output of a layer by its factors."""

    def __init__(self, fit: DiffFit, layer: str) -> None:
        self._fit, self._layer = fit, layer

    def __call__(self, module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
        factor = self._fit.factor(self._layer)
        assert factor is not None
        return out * factor


def _replace(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    layer, _, last = name.rpartition(".")
    setattr(model.get_submodule(layer), last, parameter)


def _factors(model: Any) -> list[tuple[str, str, int]]:
    """(layer, which of its factors, width): attention's own, and those of the residual branches."""
    factors = []
    for i in range(len(model.transformer_blocks) // 2):
        at, width = f"transformer_blocks.{i}", int(model.inner_dim)
        factors += [(f"{at}.attn1.to_{part}", "inner", width) for part in "qkv"]
        factors += [(f"{at}.attn1.to_out.0", which, width) for which in ("inner", "outer")]
        factors.append((f"{at}.ff.net.2", "outer", width))
    return factors


def _groups(model: nn.Module, biases: dict[str, nn.Parameter]) -> list[list[str]]:
    """Names of biases that are one: DiT shares the time embedding, diffusers has it per block."""
    groups: dict[str, list[str]] = {}
    first: dict[str, str] = {}
    for name, bias in biases.items():
        _, mark, part = name.partition("norm1.emb.timestep_embedder.")
        owner = first.setdefault(part, name) if mark else name
        if mark and not _same_layer(model, owner, name, bias, biases[owner]):
            owner = name
        groups.setdefault(owner, []).append(name)
    return list(groups.values())


def _same_layer(
    model: nn.Module, one: str, other: str, bias: nn.Parameter, first: nn.Parameter
) -> bool:
    weights = [model.get_parameter(n.removesuffix("bias") + "weight") for n in (one, other)]
    return torch.equal(bias, first) and torch.equal(weights[0], weights[1])
