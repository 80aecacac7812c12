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
from d3pack.system import fast_bfloat16, resolve_device, writing
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
    """Return the accelerator of this process; under a launcher, each process has its own device.

    Products are bfloat16 where the device is not slower with them.
    """
    chosen = resolve_device(device)
    precision = "bf16" if fast_bfloat16(chosen) else "no"
    accelerator = Accelerator(cpu=chosen.type == "cpu", mixed_precision=precision)
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


class _Stage:
    """A stage at work: module, moving average and optimizer, and how far they are."""

    def __init__(
        self, task: Task, config: LoopConfig, folder: Path, accelerator: Accelerator
    ) -> None:
        self.task, self.config, self.folder = task, config, folder
        self.accelerator = accelerator
        self.module = task.module().to(accelerator.device)
        self.module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.shadow = copy.deepcopy(self.module).requires_grad_(False).eval()
        groups = grouped(self.module, EDGES if config.muon else ("",))
        self.optimizer: torch.optim.Optimizer = Muon(
            [group for group in groups if group["params"]],
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.saved = folder / CHECKPOINT
        state: dict[str, Any] = {}
        if self.saved.exists():
            state = load_state(
                self.saved, module=self.module, shadow=self.shadow, optimizer=self.optimizer
            )
        self.done = bool(state.get("done", False))
        self.step = int(state.get("step", 0))
        self.before = float(state.get("seconds", 0.0))
        # the running mean, saved with the checkpoint so that a resumed curve continues
        sum_before = state.get("loss_sum", 0.0)
        self.loss_sum = torch.tensor(sum_before, dtype=torch.float64, device=accelerator.device)
        self.loss_steps = int(state.get("loss_steps", 0))

    def train(
        self, report: Report, *, seconds: float | None, checkpoint_minutes: float, compiled: bool
    ) -> None:
        """Train to the end of the steps or of the time."""
        forward, self.optimizer = self.accelerator.prepare(self.module, self.optimizer)
        if compiled:
            forward = torch.compile(forward)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.started = self.window_start = last_saved = time.monotonic()
        self.window_step = self.step
        while (progress := self._progress(seconds)) < 1.0:
            self._update(forward, progress)
            if self.step % self.config.report_every == 0:
                self._record(self._window(progress), report)
            if time.monotonic() - last_saved > 60 * checkpoint_minutes:
                self._checkpoint(done=False)
                last_saved = time.monotonic()
        end = {"step": self.step, "seconds": round(self._elapsed(seconds), 1), "final": True}
        self._record({**end, **self.task.validate(self.shadow)}, report)
        self._checkpoint(done=True)
        self.accelerator.wait_for_everyone()

    def _progress(self, seconds: float | None) -> float:
        by_time = self._elapsed(seconds) / seconds if seconds else 0.0
        return min(1.0, max(self.step / self.config.steps, by_time))

    def _elapsed(self, seconds: float | None) -> float:
        """Return the seconds trained so far, by one clock: all ranks stop at the same step."""
        if not seconds or self.accelerator.num_processes == 1:
            return self._spent()
        return float(broadcast(torch.tensor(self._spent(), device=self.accelerator.device)))

    def _spent(self) -> float:
        return self.before + time.monotonic() - self.started

    def _update(self, forward: Callable[..., dict[str, Tensor]], progress: float) -> None:
        """Take a step."""
        accelerator, config = self.accelerator, self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(config, self.step, progress)
        rank, world = accelerator.process_index, accelerator.num_processes
        batch = self.task.batch(self.step, rank, world, progress)
        with accelerator.autocast():
            losses = forward(**{k: v.to(accelerator.device) for k, v in batch.items()})
        accelerator.backward(losses["loss"])
        accelerator.clip_grad_norm_(self.module.parameters(), config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        decay = min(config.ema, self.step / (self.step + 9))
        averages: list[Tensor] = list(self.shadow.parameters())
        with torch.no_grad():
            torch._foreach_lerp_(averages, list(self.module.parameters()), 1 - decay)
        self.loss_sum += losses["loss"].detach()
        self.loss_steps += 1

    def _window(self, progress: float) -> dict[str, Any]:
        """Return the figures since the last report, and begin anew."""
        now, spent = time.monotonic(), self._spent()
        each = self.config.batch * self.accelerator.num_processes
        samples = (self.step - self.window_step) * each
        entry: dict[str, Any] = {
            "step": self.step,
            "samples": self.step * each,
            "seconds": round(spent, 1),
            "loss": round(float(self.loss_sum) / self.loss_steps, 5),
            "samples_per_s": round(samples / (now - self.window_start), 1),
            "progress": round(progress, 4),
            "left": round(spent * (1 - progress) / max(progress, 1e-9)),
        }
        if self.step % self.config.validate_every == 0:
            entry |= {k: round(v, 5) for k, v in self.task.validate(self.shadow).items()}
        self.loss_sum.zero_()
        self.loss_steps, self.window_step, self.window_start = 0, self.step, time.monotonic()
        return entry

    def _record(self, entry: dict[str, Any], report: Report) -> None:
        if self.accelerator.is_main_process:
            with (self.folder / "curve.jsonl").open("a") as out:
                out.write(json.dumps(entry) + "\n")
            report({"stage": self.task.name, **entry})

    def _checkpoint(self, *, done: bool) -> None:
        if not self.accelerator.is_main_process:
            return
        state = {
            "step": self.step,
            "seconds": self._spent(),
            "done": done,
            "loss_sum": float(self.loss_sum),
            "loss_steps": self.loss_steps,
        }
        save_state(
            self.saved,
            module=self.module,
            shadow=self.shadow,
            optimizer=self.optimizer,
            state=state,
        )
        self.task.preview(self.shadow, self.folder / f"samples-{self.step:06d}.png")


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
    stage = _Stage(task, config, folder, accelerator)
    if not train and not stage.saved.exists():
        raise UsageError(
            f"the stage {task.name!r} was never trained here",
            hint="add it to stages, or set init_from",
        )
    if train and not stage.done:
        stage.train(
            report, seconds=seconds, checkpoint_minutes=checkpoint_minutes, compiled=compiled
        )
    return stage.shadow
