"""Training state as one safetensors file: module, moving average, optimiser. No pickle."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from d3pack.system.files import plain_errors


@plain_errors()
def save_state(
    path: Path,
    *,
    module: torch.nn.Module,
    shadow: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> None:
    """Write atomically: a reader sees the old checkpoint or the new one, never a part."""
    tensors: dict[str, torch.Tensor] = {}
    for prefix, owner in (("module", module), ("shadow", shadow)):
        for name, tensor in owner.state_dict().items():
            tensors[f"{prefix}/{name}"] = tensor.detach().to("cpu", copy=True).contiguous()
    for index, slots in optimizer.state_dict()["state"].items():
        for slot, value in slots.items():
            tensors[f"optimizer/{index}/{slot}"] = (
                torch.as_tensor(value).detach().cpu().contiguous()
            )
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(tensors, part, metadata={"state": json.dumps(state, sort_keys=True)})
    os.replace(part, path)


def load_state(
    path: Path,
    *,
    module: torch.nn.Module,
    shadow: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Put a saved state back into place and return its `state` record."""
    parts: dict[str, dict[str, torch.Tensor]] = {"module": {}, "shadow": {}, "optimizer": {}}
    with safe_open(path, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118 - safe_open is no mapping
            prefix, _, name = key.partition("/")
            parts[prefix][name] = stored.get_tensor(key)
        state: dict[str, Any] = json.loads(stored.metadata()["state"])
    module.load_state_dict(parts["module"])
    shadow.load_state_dict(parts["shadow"])
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    slots: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in parts["optimizer"].items():
        index, _, slot = name.partition("/")
        weight = weights[int(index)]
        if tensor.shape == weight.shape:
            # the fused optimiser walks weight and moments in memory order: lay both out alike
            tensor = torch.empty_like(weight, requires_grad=False).copy_(tensor)
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict(
        {"state": slots, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return state
