"""The fine-tuning loop of minimax diffusion: resumable, each step a function of what was before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import DiT
from d3pack.encode.methods.minimax.criteria import Memories, criteria
from d3pack.encode.methods.minimax.difffit import DiffFit, fitted
from d3pack.encode.methods.minimax.variational import Posterior
from d3pack.encode.settings import MinimaxSettings
from d3pack.system import Arrays, Checkpoint, Events, seconds_of
from d3pack.train import Latents

SAVE_EVERY = 10  # steps; the keeper decides whether the disk is worth it
_AVERAGED = 100  # last steps, whose mean loss is reported


@dataclass(frozen=True, slots=True)
class Tuned:
    """What was learned, apart from the backbone."""

    adapter: Mapping[str, npt.NDArray[np.float32]]
    prompts: npt.NDArray[np.float32]  # (C, D)
    figures: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Losses:
    """The parts of one step's loss."""

    diffusion: Tensor
    near: Tensor
    far: Tensor
    predicted: Tensor  # x0, for the memories

    @property
    def total(self) -> Tensor:
        return self.diffusion + self.near + self.far


class FineTuning:
    """AdamW on the values of a `DiffFit`, and their moving average."""

    def __init__(
        self, fit: DiffFit, latents: Latents, settings: MinimaxSettings, steps: int, seed: int
    ) -> None:
        self.fit, self.latents, self.settings = fit, latents, settings
        self.steps, self.seed = steps, seed
        self.levels = fit.backbone.levels
        self.posterior = Posterior.of(self.levels)
        self.classes = len(fit.values["rows"])
        self.memories = Memories(self.classes, settings.memory)
        self.average = {n: v.detach().clone() for n, v in fit.values.items()}
        self.optimizer = torch.optim.AdamW(fit.values.values(), lr=settings.lr, weight_decay=0.0)
        self.step = 0
        self.recent: list[list[float]] = []

    def run(self, keeper: Checkpoint, events: Events) -> Tuned:
        """Train to the last step, from what the keeper has."""
        state = keeper.load()
        if state is not None:
            self._restore(state)
        with events.stage("tune the backbone", self.steps, "steps", part="tune"):
            while self.step < self.steps:
                losses = self._losses(self.step)
                self.optimizer.zero_grad(set_to_none=True)
                torch.autograd.backward([losses.total])
                self.optimizer.step()
                self.step += 1
                self._update_average()
                parts = (losses.diffusion, losses.near, losses.far)
                self.recent = [*self.recent, [float(p.detach()) for p in parts]][-_AVERAGED:]
                last = self.step == self.steps
                if self.step % SAVE_EVERY == 0 or last:
                    keeper.save(self._state(), last=last)
                    events.step(
                        self.step,
                        loss=round(float(np.mean(self.recent, axis=0).sum()), 5),
                        samples=self.step * self.settings.batch,
                    )
        diffusion, near, far = np.mean(self.recent, axis=0).tolist() if self.recent else [0.0] * 3
        events.note(
            f"loss {diffusion:.4f}, representative {near:.5f}, diverse {far:.5f} "
            f"(last {len(self.recent)} steps)"
        )
        self.fit.put(self.average)
        adapter = {name: value.numpy() for name, value in self.fit.adapter().items()}
        figures = {"loss": diffusion, "near": near, "far": far}
        return Tuned(
            adapter, self.fit.prompts().numpy(), {k: float(f"{v:.5g}") for k, v in figures.items()}
        )

    def rows(self, step: int) -> npt.NDArray[np.int64]:
        """Return the images of a step: each once a pass; what fills no batch is left out."""
        # latents hold every image and then, in the same order, its mirror image
        images = len(self.latents.labels) // 2
        batch = min(self.settings.batch, images)
        epoch, place = divmod(step, images // batch)
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 6, epoch]))
        return rng.permutation(images)[place * batch : (place + 1) * batch]

    def _losses(self, step: int) -> Losses:
        rows = self.rows(step)
        rng = np.random.Generator(np.random.Philox(key=[self.seed + 7, step]))
        mirrored = rng.integers(0, 2, len(rows)) * (len(self.latents.labels) // 2)
        device = self.fit.backbone.device
        x0 = torch.from_numpy(self.latents.values[rows + mirrored]).float().to(device)
        labels = torch.from_numpy(self.latents.labels[rows]).to(device)
        t = torch.from_numpy(rng.integers(0, len(self.levels.sigmas), len(rows))).to(device)
        noise = torch.from_numpy(rng.standard_normal(x0.shape, np.float32)).to(device)
        dropped = torch.from_numpy(rng.random(len(rows)) < self.settings.drop).to(device)
        losses = self.losses(x0, labels, t, noise, dropped)
        for c in sorted(set(labels.tolist())):
            in_class = labels == c
            self.memories.add(c, x0[in_class], losses.predicted[in_class])
        return losses

    def losses(
        self, x0: Tensor, labels: Tensor, t: Tensor, noise: Tensor, dropped: Tensor
    ) -> Losses:
        """Return the losses of a batch, with the memories as they are.

        An image whose label is dropped still counts for its class.
        """
        x_t = self.levels.noised(x0, noise, t)
        conditions = torch.where(dropped, torch.full_like(labels, self.classes), labels)
        output = self.fit.denoise(x_t, t, conditions)
        out, variance = output[:, : x0.shape[1]], output[:, x0.shape[1] :]
        diffusion = (out - self.levels.target(x0, noise, t)).square().flatten(1).mean(1)
        predicted = self.levels.x0(x_t, t, out)
        if variance.shape[1] == x0.shape[1]:
            diffusion = diffusion + self.posterior.bound(x0, x_t, t, predicted, variance)
        near, far = criteria(
            predicted, labels, self.memories, self.settings.representative, self.settings.diverse
        )
        return Losses(diffusion.mean(), near, far, predicted)

    @torch.no_grad()
    def _update_average(self) -> None:
        for name, value in self.fit.values.items():
            self.average[name].lerp_(value, 1 - self.settings.ema)

    def _state(self) -> Arrays:
        state: Arrays = {
            "step": np.asarray(self.step),
            "recent": np.asarray(self.recent, np.float64),
            **self.memories.state(),
        }
        for name, value in self.fit.values.items():
            state[f"value.{name}"] = value.detach().cpu().numpy()
            state[f"average.{name}"] = self.average[name].cpu().numpy()
            for slot, moment in self.optimizer.state[value].items():
                state[f"{slot}.{name}"] = moment.cpu().numpy()
        return state

    @torch.no_grad()
    def _restore(self, state: Mapping[str, npt.NDArray[Any]]) -> None:
        device = self.fit.backbone.device
        self.step, self.recent = int(state["step"].item()), state["recent"].tolist()
        self.memories.restore(state, device)
        for name, value in self.fit.values.items():
            value.copy_(torch.from_numpy(state[f"value.{name}"]))
            self.average[name].copy_(torch.from_numpy(state[f"average.{name}"]))
            moments = {
                slot: torch.from_numpy(state[f"{slot}.{name}"])
                for slot in ("step", "exp_avg", "exp_avg_sq")
                if f"{slot}.{name}" in state
            }
            if moments:  # a journal has no arrays without dimensions, the optimiser counts in one
                self.optimizer.state[value] = {
                    slot: moment.reshape(()) if slot == "step" else moment.to(device)
                    for slot, moment in moments.items()
                }


def full_adapter(backbone: DiT, classes: Sequence[str]) -> Mapping[str, Tensor]:
    """Return an adapter with every tensor that fine-tuning may move."""
    with fitted(backbone, classes) as fit, torch.no_grad():
        for value in fit.values.values():
            value.add_(0.01)
        return fit.adapter()


def tuning_seconds(backbone: DiT, classes: Sequence[str], batch: int) -> float:
    """Return the seconds of a step on this machine."""
    shape = backbone.latent_shape
    with fitted(backbone, classes) as fit:
        x = torch.zeros((batch, *shape), device=backbone.device)
        t = torch.full((batch,), 500, device=backbone.device)
        labels = torch.zeros(batch, dtype=torch.long, device=backbone.device)
        learning = list(fit.values.values())

        def step() -> None:
            loss = fit.denoise(x, t, labels).square().mean()
            torch.autograd.grad(loss, learning, allow_unused=True)

        return seconds_of(step)
