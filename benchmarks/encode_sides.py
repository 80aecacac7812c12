"""The two sides of `python -m benchmarks encode` on one data set, made piece by piece."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from benchmarks.encode_peer import SCRIPT, Peer, peer_trace, start_vector
from d3pack.backbones import Backbone, Condition, open_backbone
from d3pack.encode import D3MSettings, EncodeSettings
from d3pack.encode.methods.d3m.collages import Collages, make_collages
from d3pack.encode.methods.d3m.curvature import Curvature
from d3pack.encode.methods.d3m.inversion import DONE, Inversion
from d3pack.encode.methods.d3m.method import D3MJob, prepare, round_trip
from d3pack.encode.teaching import small_teacher
from d3pack.sources import Source, open_source
from d3pack.system import Arrays, Events, Journal, all_plain
from d3pack.teachers import Cut, Teacher, teacher_key, train_teacher

Array = npt.NDArray[Any]
Point = dict[str, Any]  # of a curve: samples, loss and seconds

OFTEN, UNTIL, SELDOM = 80, 1600, 400  # samples between judgements, and when that changes


@dataclass(frozen=True)
class Terms:
    """What is compared, and how."""

    backbone: str = "mini"
    classes: int = 10
    examined: int = 3
    peer_steps: int = SCRIPT["steps"]
    triples: int = 1536
    teacher_samples: int | None = None
    seed: int = 0
    own: D3MSettings = field(default_factory=D3MSettings)

    def drawn(self) -> list[int]:
        """Return the class that tunes the peer, then those that are examined."""
        order = np.random.default_rng(self.seed).permutation(self.classes).tolist()
        return [int(c) for c in order[: 1 + self.examined]]


class Exam:
    """Loss of a prompt of one class on fixed triples of its latents."""

    def __init__(self, backbone: Backbone, latents: Array, template: str, triples: int) -> None:
        self._backbone, self._template = backbone, template
        levels = len(backbone.levels.alphas_cumprod)
        rng = torch.Generator().manual_seed(0)
        self._t = torch.from_numpy((np.arange(triples) + 0.5) / triples * levels).long()
        mixed = torch.randperm(triples, generator=rng).numpy() % len(latents)
        self._x0 = torch.from_numpy(latents[mixed].astype(np.float32))
        self._eps = torch.randn(self._x0.shape, generator=rng)

    @torch.no_grad()
    def loss(self, vectors: Array) -> float:
        """Return the mean squared error with these vectors (k, D)."""
        backbone, levels, total = self._backbone, self._backbone.levels, 0.0
        condition = backbone.condition(torch.from_numpy(vectors)[None], self._template)
        for part in torch.split(torch.arange(len(self._t)), 96):
            x0, eps, t = self._x0[part], self._eps[part], self._t[part]
            spread = {n: v.expand(len(part), *v.shape[1:]) for n, v in condition.tensors.items()}
            out = backbone.predict(levels.noised(x0, eps, t), t, Condition(spread))
            error = out - levels.target(x0, eps, t)
            total += float(error.double().square().mean((1, 2, 3)).sum())
        return total / len(self._t)


class Watch:
    """A keeper that keeps nothing; notes prompts as a pack would hold them, samples and time."""

    def __init__(self, codec: str) -> None:
        self._through = round_trip(codec)
        self._began, self._aside = time.process_time(), 0.0
        self.judging = 0.0
        self.rows: list[Arrays] = []

    def load(self) -> None:
        return None

    def save(self, state: Arrays, *, last: bool = False) -> None:
        began = time.process_time()
        done = state["status"] == DONE
        # of a row at work, its running mean: what the method itself judges
        now = np.where(done[:, None, None], state["vectors"], state["mean"])
        row = {
            "samples": state["samples"].copy(),
            "validated": state["validated"].copy(),
            "done": done.copy(),
            "inversion": np.array(began - self._began - self._aside - self.judging),
            "judging": np.array(self.judging),
            "vectors": self._through(now),
        }
        self.rows.append(row)
        self._aside += time.process_time() - began

    def trace(self, c: int) -> Arrays:
        """Return what was noted of class c, to the moment when it was done."""
        done = [bool(row["done"][c]) for row in self.rows]
        rows = self.rows[: done.index(True) + 1]
        shares = [row["samples"][c] / max(1, row["samples"].sum()) for row in rows]
        trace = {k: np.array([row[k][c] for row in rows]) for k in ("samples", "validated")}
        for name in ("inversion", "judging"):
            seconds = [float(row[name]) * s for row, s in zip(rows, shares, strict=True)]
            trace[name] = np.array(seconds)
        return {**trace, "vectors": np.stack([row["vectors"][c] for row in rows])}


class Timed(Inversion):
    """Inversion whose judgements are timed apart."""

    watch: Watch

    def follow(self, rule: type[Curvature]) -> None:
        """Move along gradients by this rule."""
        self._curvature = rule(self._state["curvature"], self._state["seen"])

    def _losses(self, rows: Array, vectors: Array) -> Array:
        began = time.process_time()
        losses = super()._losses(rows, vectors)
        self.watch.judging += time.process_time() - began
        return losses


class Sides:
    """Both sides on one data set; what is there is not made again.

    Args:
        source: real images of classes.
        tests: other images of the same classes.
        terms: what is compared.
        folder: where everything is kept.
    """

    def __init__(self, source: Source, tests: Source, terms: Terms, folder: Path) -> None:
        if source.classes != tests.classes:
            raise SystemExit("training and test images have other classes")
        self.source, self.tests, self.terms, self.folder = source, tests, terms, folder
        settings = EncodeSettings(
            seed=terms.seed, backbone=terms.backbone, teacher_samples=terms.teacher_samples
        )
        self.settings, self.backbone = settings, open_backbone(terms.backbone)
        self.job: D3MJob = prepare(source, settings, terms.own, self.backbone)
        self.codec = self.job.plan.allocation.codec
        assert self.job.plan.allocation.vectors == self.job.plan.allocation.modes == 1
        assert not self.job.details.outputs
        values = {**asdict(terms), "own": all_plain(terms.own)}
        del values["examined"]  # more of them may follow
        key = {
            **values,
            "source": source.fingerprint(),
            "tests": tests.fingerprint(),
            "weights": self.backbone.ref.lock,
            "torch": torch.__version__,
            "codec": self.codec,
        }
        self.journal = Journal(folder, key)

    @classmethod
    def opened(cls, place: Path | str, terms: Terms, folder: Path) -> Sides:
        """Return the sides of a place with train/ and test/."""
        source, tests = (
            open_source(place, split=split, first=terms.classes) for split in ("train", "test")
        )
        return cls(source, tests, terms, folder)

    @property
    def template(self) -> str:
        """The sentence around prompts."""
        return self.job.details.template

    # -- what both sides learn from, and are examined on ---------------------------------------

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher of the source; a training that was stopped begins anew, to be timed."""
        plan = self.job.plan
        config = small_teacher(plan, self.settings, "cpu", choosing=not plan.asks_teacher)
        key, folder = teacher_key(self.source, config), self.folder / "teacher"
        if "teacher" not in self.journal:
            shutil.rmtree(folder, ignore_errors=True)
        began = time.process_time()
        with closing(Journal(folder / "work", {})) as work:
            teacher = train_teacher(
                self.source, config, work, Events(), cache=folder, device="cpu", key=key
            )
        if "teacher" not in self.journal:
            facts = {"seconds": time.process_time() - began, "load": os.getloadavg()[0]}
            self.journal.record("teacher", facts)
        return teacher

    def collages(self, c: int) -> tuple[Arrays, dict[str, Any]]:
        """Return images and latents of a class, and the seconds for each."""
        return self._kept(f"collages/{c:06d}", self.source, c)

    def exam(self, c: int) -> Exam:
        """Return the examination of a class, of test images that are chosen in the same way."""
        latents = self._kept(f"exams/{c:06d}", self.tests, c)[0]["latents"]
        return Exam(self.backbone, latents, self.template, self.terms.triples)

    def _kept(self, name: str, source: Source, c: int) -> tuple[Arrays, dict[str, Any]]:
        known = self.journal.load(name)
        if known is None:
            teacher = self.teacher
            began = time.process_time()
            images = self._chosen(source, teacher, c).images
            chosen = time.process_time()
            with torch.no_grad():
                latents = torch.cat([self.backbone.encode(p) for p in torch.split(images, 32)])
            known = (
                {"images": images.numpy(), "latents": latents.half().numpy()},
                {"collages": chosen - began, "latents": time.process_time() - chosen},
            )
            self.journal.save(name, *known)
        return known

    def _chosen(self, source: Source, teacher: Teacher, c: int) -> Collages:
        details, own = self.job.details, self.terms.own
        height, width = self.job.plan.size
        size = (height // details.factor, width // details.factor)
        cut = Cut(size, own.pool, details.crops, details.crop_scale, seed=self.settings.seed)
        return make_collages(source, c, teacher, cut, details.factor, own.collages)

    # -- the two sides -------------------------------------------------------------------------

    def ours(self) -> dict[str, Any]:
        """Learn the prompts of all classes; return samples and seconds of all of them."""
        count = len(self.source.classes)
        if "ours" not in self.journal:
            kept = [self.collages(c) for c in range(count)]
            watch = self.inverted([arrays["latents"] for arrays, _ in kept])
            for c in range(count):
                self.journal.save(f"ours/{c:06d}", watch.trace(c), {})
            last = watch.rows[-1]
            seconds = {
                "teacher": self.journal["teacher"]["seconds"],
                "collages": sum(facts["collages"] for _, facts in kept),
                "latents": sum(facts["latents"] for _, facts in kept),
                "judging": float(last["judging"]),
                "inversion": float(last["inversion"]),
            }
            figures = {
                "samples": int(last["samples"].sum()),
                "validated": int(last["validated"].sum()),
                "seconds": rounded(seconds),
                "load": os.getloadavg()[0],
            }
            self.journal.record("ours", figures)
        found: dict[str, Any] = self.journal["ours"]
        return found

    def inverted(self, latents: Sequence[Array], rule: type[Curvature] = Curvature) -> Watch:
        """Learn the prompts of all classes; the rule says how far to move along gradients."""
        start = np.stack([start_vector(self.backbone, name) for name in self.source.classes])
        watch = Watch(self.codec)
        inversion = Timed(
            self.backbone,
            start,
            lambda row: latents[row],
            round_trip(self.codec),
            self.terms.own,
            template=self.template,
            seed=self.job.plan.seed,
            keeper=watch,
            events=Events(),
        )
        inversion.watch = watch
        inversion.follow(rule)
        inversion.run()
        return watch

    def our_curve(self, c: int) -> list[Point]:
        """Return the curve of our prompt of a class."""
        self.ours()
        stored = self.journal.load(f"ours/{c:06d}")
        assert stored is not None
        start = start_vector(self.backbone, self.source.classes[c])
        trace = with_start(stored[0], round_trip(self.codec)(start[None]))
        return self._examined(f"ours/{c:06d}", c, trace, ("inversion", "judging"), ("validated",))

    def peer_curve(self, c: int, rate: float) -> list[Point]:
        """Return the curve of the peer for a class."""
        name, terms = peer_name(c, rate), self.terms
        images = torch.from_numpy(self.collages(c)[0]["images"])
        start = start_vector(self.backbone, self.source.classes[c])
        peer = Peer(self.backbone, start, images, self.template, rate, terms.seed + c)
        every = OFTEN // SCRIPT["accumulate"]
        trace = dict(peer_trace(self.journal, name, peer, terms.peer_steps, every))
        trace["inversion"], trace["latents"] = (
            trace["seconds"] - trace["encoding"],
            trace["encoding"],
        )
        return self._examined(name, c, trace, ("inversion", "latents"))

    def _examined(
        self,
        name: str,
        c: int,
        trace: Arrays,
        seconds: Sequence[str],
        counted: Sequence[str] = (),
    ) -> list[Point]:
        """Return a trace with its losses, at the moments that are judged."""
        places = moments(trace["samples"].tolist())
        known = self.journal.load(f"losses/{name}")
        losses = [] if known is None else known[0]["loss"].tolist()
        exam = self.exam(c) if len(losses) < len(places) else None
        for place in places[len(losses) :]:
            assert exam is not None
            losses.append(exam.loss(trace["vectors"][place]))
            self.journal.save(f"losses/{name}", {"loss": np.array(losses)}, {})
        report(f"{self.source.classes[c]}, {name}: {losses[0]:.6f} to {losses[-1]:.6f}")
        return [
            {
                "samples": int(trace["samples"][place]),
                **{key: int(trace[key][place]) for key in counted},
                "loss": round(loss, 6),
                "seconds": rounded({key: float(trace[key][place]) for key in seconds}),
            }
            for place, loss in zip(places, losses, strict=True)
        ]

    def load(self, c: int, rate: float) -> float:
        """Return the mean load of the machine while the peer was at work."""
        stored = self.journal.load(peer_name(c, rate))
        assert stored is not None
        return round(float(stored[0]["load"].mean()), 2)


def peer_name(c: int, rate: float) -> str:
    """Return where the journal keeps a run of the peer."""
    return f"peer/{c:06d}-{rate:g}"


def with_start(trace: Arrays, vectors: Array) -> Arrays:
    """Return a trace that begins before the first sample, with these vectors (1, k, D)."""
    first = {key: np.zeros_like(value[:1]) for key, value in trace.items()}
    first["vectors"] = vectors
    return {key: np.concatenate([first[key], trace[key]]) for key in trace}


def moments(samples: Sequence[int]) -> list[int]:
    """Return which of the moments of a run are judged: the same rule for both sides."""
    chosen = [0]
    for place in range(1, len(samples)):
        apart = OFTEN if samples[place] <= UNTIL else SELDOM
        if samples[place] - samples[chosen[-1]] >= apart or place == len(samples) - 1:
            chosen.append(place)
    return chosen


def rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    """Return seconds to the millisecond."""
    return {name: round(value, 3) for name, value in seconds.items()}


def report(line: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)
