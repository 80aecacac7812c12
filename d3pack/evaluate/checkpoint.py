"""A half-trained student on disk: one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    done: int,
    curve: list[tuple[int, float]],
    seconds: float,
) -> None:
    """Weights, buffers, the optimiser's tensors, and how far the run has come."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    for index, state in optimizer.state_dict()["state"].items():
        for key, value in state.items():
            if value is not None:
                tensors[f"optimizer.{index}.{key}"] = torch.as_tensor(value)
    meta = {"done": str(done), "curve": json.dumps(curve), "seconds": repr(seconds)}
    part = path.with_suffix(".part")
    save_file({name: value.contiguous() for name, value in tensors.items()}, part, meta)
    os.replace(part, path)


def load_checkpoint(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer
) -> tuple[int, list[tuple[int, float]], float]:
    """Put the stored state back; gives the updates done, the curve so far and the seconds spent.

    A file that is damaged, or that another version wrote, counts as none: the student begins anew.
    """
    state: dict[int, dict[str, torch.Tensor]] = {}
    weights = {}
    try:
        with safe_open(path, "pt") as file:
            meta = file.metadata()
            for name in file.keys():  # noqa: SIM118  (a handle, not a mapping)
                kind, _, rest = name.partition(".")
                if kind == "model":
                    weights[rest] = file.get_tensor(name)
                else:
                    index, _, key = rest.partition(".")
                    state.setdefault(int(index), {})[key] = file.get_tensor(name)
        curve = [(int(step), float(accuracy)) for step, accuracy in json.loads(meta["curve"])]
        done, seconds = int(meta["done"]), float(meta["seconds"])
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return 0, [], 0.0
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    if shapes != {name: value.shape for name, value in weights.items()}:
        return 0, [], 0.0
    model.load_state_dict(weights)
    groups = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    return done, curve, seconds
