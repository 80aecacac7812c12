"""Textual inversion as diffusers' example does it, one class at a time: the peer of `encode`.

It follows the logic of `examples/textual_inversion/textual_inversion.py` with the settings of its
README: one new token, four images a step, 3000 steps, AdamW over the whole embedding table, all
other rows restored after every step, images flipped and encoded at every step, a constant rate.
The four are one batch, where the example accumulates batches of one: the same gradient, in half of
the processor time. Three more things are ours: the sentence is the template of `encode`, not one
of the example's, drawn at every step; images are encoded to the autoencoder's means, not samples;
and the token starts where the prompt of `encode` does, at the mean of the tokens of the name, of
which the example takes one. A run that was stopped goes on.
"""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn.functional import embedding, mse_loss

from d3pack.backbones import Backbone, Condition
from d3pack.system import Arrays, Journal

Array = npt.NDArray[Any]

SCRIPT: dict[str, Any] = {
    "steps": 3000,
    "accumulate": 4,
    "rate": 5e-4 * 4,  # --scale_lr
    "betas": (0.9, 0.999),
    "weight_decay": 1e-2,
    "eps": 1e-8,
}


class Peer:
    """One run for one class.

    Args:
        backbone: the frozen model; its own text encoder reads the sentence.
        start: vector (1, D) that the token starts at.
        images: uint8 (N, 3, H, W), to learn from.
        template: sentence around the token.
        rate: of AdamW.
        seed: decides what is drawn.
    """

    def __init__(
        self,
        backbone: Any,
        start: Array,
        images: Tensor,
        template: str,
        rate: float,
        seed: int,
    ) -> None:
        self._backbone, self._images = backbone, images
        text = backbone.text
        self._row = len(text.table)
        self._table = torch.nn.Parameter(torch.cat([text.table.detach(), torch.from_numpy(start)]))
        self._original = self._table.detach().clone()
        before, after = (text.words.ids(part) for part in template.split("{}"))
        sentence = [text.words.start, *before, self._row, *after, text.words.end]
        padding = [text.words.pad] * (text.positions - len(sentence))
        self._ids = torch.tensor([sentence + padding])
        self._optimizer = torch.optim.AdamW(
            [self._table],
            lr=rate,
            betas=SCRIPT["betas"],
            weight_decay=SCRIPT["weight_decay"],
            eps=SCRIPT["eps"],
        )
        self._rng = torch.Generator().manual_seed(seed)
        self.steps = 0
        self.seconds = 0.0  # of the processor, encoding included
        self.encoding = 0.0

    @property
    def vector(self) -> Array:
        """What the token is now: (1, D)."""
        value: Array = self._table[self._row :].detach().numpy().copy()
        return value

    def learn(self, steps: int) -> None:
        """Do so many steps, in the example's order of work."""
        others = torch.ones(len(self._table), dtype=torch.bool)
        others[self._row] = False
        for _ in range(steps):
            began = time.process_time()
            torch.autograd.backward([self._loss(SCRIPT["accumulate"])])
            self._optimizer.step()
            self._optimizer.zero_grad()
            with torch.no_grad():
                self._table[others] = self._original[others]
            self.seconds += time.process_time() - began
            self.steps += 1

    def _loss(self, count: int) -> Tensor:
        """Of a batch of images, each drawn with its flip, noise and timestep."""
        backbone, drawn = self._backbone, [self._draw() for _ in range(count)]
        images, noise, times = (torch.cat(parts) for parts in zip(*drawn, strict=True))
        began = time.process_time()
        with torch.no_grad():
            x0 = backbone.encode(images)
        self.encoding += time.process_time() - began
        hidden = backbone.text.encode(embedding(self._ids, self._table))
        condition = Condition({"hidden": hidden}).expand(count)
        out = backbone.predict(backbone.levels.noised(x0, noise, times), times, condition)
        return mse_loss(out, backbone.levels.target(x0, noise, times))

    def _draw(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return an image, noise and a timestep, each as a batch of one."""
        rng = self._rng
        image = self._images[int(torch.randint(len(self._images), (), generator=rng))][None]
        if float(torch.rand((), generator=rng)) < 0.5:
            image = image.flip(3)
        shape = (1, *self._backbone.latent_shape_for(tuple(image.shape[2:])))
        noise = torch.randn(shape, generator=rng)
        steps = len(self._backbone.levels.alphas_cumprod)
        return image, noise, torch.randint(steps, (1,), generator=rng)

    def state(self) -> Arrays:
        """All that a run needs to go on: of other rows nothing is left after a step."""
        moments = self._optimizer.state[self._table]
        return {
            "vector": self.vector,
            "exp_avg": moments["exp_avg"][self._row :].numpy(),
            "exp_avg_sq": moments["exp_avg_sq"][self._row :].numpy(),
            "rng": self._rng.get_state().numpy(),
        }

    def restore(self, state: Arrays, steps: int, seconds: float, encoding: float) -> None:
        """Go on from a state."""
        self.steps, self.seconds, self.encoding = steps, seconds, encoding
        moments: dict[str, Tensor] = {"step": torch.tensor(float(steps))}
        for name in ("exp_avg", "exp_avg_sq"):
            moments[name] = torch.zeros_like(self._table)
            moments[name][self._row :] = torch.from_numpy(state[name])
        self._optimizer.state[self._table] = moments
        self._rng.set_state(torch.from_numpy(state["rng"]))
        with torch.no_grad():
            self._table[self._row :] = torch.from_numpy(state["vector"])


def peer_trace(journal: Journal, name: str, peer: Peer, steps: int, every: int) -> Arrays:
    """Return samples, seconds, load and vectors of a run, kept in a journal every few steps."""
    known = journal.load(name)
    trace: Arrays = {
        "samples": np.zeros(1, np.int64),
        "seconds": np.zeros(1),
        "encoding": np.zeros(1),
        "load": np.array(os.getloadavg()[:1]),
        "vectors": peer.vector[None],
    }
    if known is not None:
        trace = {key: known[0][key] for key in trace}
        done = int(trace["samples"][-1]) // int(SCRIPT["accumulate"])
        peer.restore(known[0], done, float(trace["seconds"][-1]), float(trace["encoding"][-1]))
    while peer.steps < steps:
        peer.learn(min(every, steps - peer.steps))
        now: Arrays = {
            "samples": np.array(peer.steps * SCRIPT["accumulate"]),
            "seconds": np.array(peer.seconds),
            "encoding": np.array(peer.encoding),
            "load": np.array(os.getloadavg()[0]),
            "vectors": peer.vector,
        }
        trace = {key: np.concatenate([trace[key], now[key][None]]) for key in trace}
        journal.save(name, {**trace, **peer.state()}, {})
    return trace


def start_vector(backbone: Backbone, name: str) -> Array:
    """Return the vector (1, D) at which both sides start."""
    with torch.no_grad():
        vector: Array = backbone.name_vectors(name, 1).float().cpu().numpy()
    return vector
