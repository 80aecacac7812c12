"""The training loop that every stage shares, and its checkpoints."""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from d3pack.errors import UsageError
from d3pack.system import resolve_device, writing
from d3pack.train.config import LoopConfig
from d3pack.train.muon import Muon, grouped


def save_state(
    path: Path,
    *,
    module: torch.nn.Module,
    shadow: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
) -> None:
    """Write a checkpoint atomically."""
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
    with writing(path) as temporary:
        save_file(tensors, temporary, metadata={"state": json.dumps(state, sort_keys=True)})


def load_state(
    path: Path,
    *,
    module: torch.nn.Module,
    shadow: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
) -> dict[str, Any]:
    """Restore a checkpoint and return its `state` record."""
    parts: dict[str, dict[str, torch.Tensor]] = {"module": {}, "shadow": {}, "optimizer": {}}
    with safe_open(path, framework="pt") as stored:
        for key in stored.keys():  # noqa: SIM118 - safe_open is not a mapping
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
            # the fused optimizer needs weight and moments in the same memory layout
            tensor = torch.empty_like(weight, requires_grad=False).copy_(tensor)
        slots.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict(
        {"state": slots, "param_groups": optimizer.state_dict()["param_groups"]}
    )
    return state


Batch = dict[str, Tensor]
CHECKPOINT = "state.safetensors"
# first and last layers and tables of a UNet and of a DiT, which Muon does not update
EDGES = (
    "conv_in.",
    "conv_out.",
    "embedding.weight",
    "embedding_table.weight",
    "pos_embed.proj.",
    "proj_out_2.",
)


class Task(Protocol):
    """What a stage provides: a module whose forward returns losses, its data, its validation."""

    name: str

    def module(self) -> nn.Module: ...

    def batch(self, step: int, rank: int, world: int, progress: float) -> Batch: ...

    def validate(self, module: nn.Module) -> dict[str, float]: ...

    def preview(self, module: nn.Module, path: Path) -> None: ...


Report = Callable[[dict[str, Any]], None]


def accelerator_on(device: str | None) -> Accelerator:
    """Return the accelerator of this process; under a launcher, each process has its own device."""
    chosen = resolve_device(device)
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision="bf16")
    if accelerator.num_processes == 1:
        accelerator.state.device = chosen
    return accelerator


def learning_rate(config: LoopConfig, step: int, progress: float) -> float:
    """Return the learning rate: warm-up, plateau, and a fall to zero over the last `decay`."""
    rate = config.lr * min(1.0, (step + 1) / config.warmup)
    if progress > 1 - config.decay:
        left = max(0.0, (1 - progress) / config.decay)
        rate *= 0.5 - 0.5 * math.cos(math.pi * left)
    return rate


def _update_average(shadow: nn.Module, module: nn.Module, decay: float) -> None:
    with torch.no_grad():
        averages: list[Tensor] = list(shadow.parameters())
        weights: list[Tensor] = list(module.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)


def run_stage(
    task: Task,
    config: LoopConfig,
    folder: Path,
    accelerator: Accelerator,
    *,
    seconds: float | None,
    checkpoint_minutes: float,
    report: Report,
    compiled: bool = False,
    train: bool = True,
) -> nn.Module:
    """Train a stage and return the moving average of its module.

    Args:
        folder: checkpoints, previews and the loss curve; training resumes from it.
        seconds: end after this time, where it comes before the last step of `config`.
        train: False returns the average of the last checkpoint as it is.
    """
    module = task.module().to(accelerator.device)
    module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    shadow = copy.deepcopy(module).requires_grad_(False).eval()
    groups = grouped(module, EDGES if config.muon else ("",))
    optimizer = Muon(
        [group for group in groups if group["params"]],
        lr=config.lr,
        betas=config.betas,
        weight_decay=config.weight_decay,
        fused=True,
    )
    saved = folder / CHECKPOINT
    state: dict[str, Any] = {
        "step": 0,
        "seconds": 0.0,
        "done": False,
        "loss_sum": 0.0,
        "loss_steps": 0,
    }
    if saved.exists():
        state = load_state(saved, module=module, shadow=shadow, optimizer=optimizer)
    elif not train:
        raise UsageError(
            f"the stage {task.name!r} was never trained here",
            hint="add it to stages, or set init_from",
        )
    if state["done"] or not train:
        return shadow
    forward, optimizer = accelerator.prepare(module, optimizer)
    if compiled:
        forward = torch.compile(forward)
    folder.mkdir(parents=True, exist_ok=True)
    step, before, started = int(state["step"]), float(state["seconds"]), time.monotonic()
    last_saved, window_start, window_samples = started, started, 0
    # the running mean, saved with the checkpoint so that a resumed curve continues
    loss_sum = torch.tensor(state["loss_sum"], dtype=torch.float64, device=accelerator.device)
    loss_steps = int(state["loss_steps"])
    samples_per_step = config.batch * accelerator.num_processes

    def progress(at: int, spent: float) -> float:
        by_time = spent / seconds if seconds else 0.0
        return min(1.0, max(at / config.steps, by_time))

    def record(entry: dict[str, Any]) -> None:
        if accelerator.is_main_process:
            with (folder / "curve.jsonl").open("a") as out:
                out.write(json.dumps(entry) + "\n")
            report({"stage": task.name, **entry})

    def checkpoint(done: bool) -> None:
        if not accelerator.is_main_process:
            return
        spent = before + time.monotonic() - started
        now_state = {
            "step": step,
            "seconds": spent,
            "done": done,
            "loss_sum": float(loss_sum),
            "loss_steps": loss_steps,
        }
        save_state(saved, module=module, shadow=shadow, optimizer=optimizer, state=now_state)
        task.preview(shadow, folder / f"samples-{step:06d}.png")

    def elapsed() -> float:
        """Return the seconds trained so far, by one clock: all ranks stop at the same step."""
        spent = torch.tensor(before + time.monotonic() - started, device=accelerator.device)
        return (
            float(broadcast(spent)) if seconds and accelerator.num_processes > 1 else float(spent)
        )

    while True:
        done = progress(step, elapsed())
        if done >= 1.0:
            break
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(config, step, done)
        batch = task.batch(step, accelerator.process_index, accelerator.num_processes, done)
        with accelerator.autocast():
            losses = forward(**{k: v.to(accelerator.device) for k, v in batch.items()})
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(module.parameters(), config.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        _update_average(shadow, module, min(config.ema, step / (step + 9)))
        loss_sum += losses["loss"].detach()
        loss_steps += 1
        window_samples += samples_per_step
        if step % config.report_every == 0:
            now = time.monotonic()
            entry: dict[str, Any] = {
                "step": step,
                "samples": step * samples_per_step,
                "seconds": round(before + now - started, 1),
                "loss": round(float(loss_sum) / loss_steps, 5),
                "samples_per_s": round(window_samples / (now - window_start), 1),
                "progress": round(done, 4),
                "left": round((before + now - started) * (1 - done) / max(done, 1e-9)),
            }
            if step % config.validate_every == 0:
                entry |= {k: round(v, 5) for k, v in task.validate(shadow).items()}
            record(entry)
            loss_sum.zero_()
            loss_steps, window_samples, window_start = 0, 0, time.monotonic()
        if time.monotonic() - last_saved > 60 * checkpoint_minutes:
            checkpoint(done=False)
            last_saved = time.monotonic()
    end = {"step": step, "seconds": round(elapsed(), 1), "final": True}
    record({**end, **task.validate(shadow)})
    checkpoint(done=True)
    accelerator.wait_for_everyone()
    return shadow
