"""Inversion of all classes in one batch against textual inversion class by class.

    python benchmarks/encode.py SOURCE --backbone mini --classes 10 --peer-classes 3

The peer follows the logic of diffusers' `examples/textual_inversion/textual_inversion.py` with the
settings of its README: one new token that starts as the name's first token, batch 1 with 4
accumulated, 3000 steps, AdamW (0.9, 0.999, weight decay 1e-2) at 5e-4 times 4 over the whole
embedding table, all other rows restored after every step, images flipped and encoded at every step.
Both sides learn from the same collages, with the same sentence and the same frozen networks, and
are examined on the same fixed (latent, t, noise) triples of collages that neither learns from and
that decide nothing for either; the time of examinations and judgements counts for neither. For each
class: the loss the peer's recipe ends with, its mean over the last steps (the rate never falls, so
the end is one point of a swing), the best it ever had, and how many forward-backward samples and
seconds each side needs to get there. Seconds are the processor's own: other work on the machine
does not count, so run it with one thread (OMP_NUM_THREADS=1).

The peer takes seven minutes a class and depends on nothing that ours could change, so its curves
may come from an earlier output (`--peers results/encode.json`), where that had the same backbone,
torch, recipe, seed and examination, and the same loss of the class name on it to the last digit.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from d3pack.backbones import Condition, open_backbone
from d3pack.encode import D3MSettings, EncodeSettings
from d3pack.encode.methods.d3m.collages import make_collages
from d3pack.encode.methods.d3m.inversion import DONE, Inversion
from d3pack.encode.methods.d3m.method import prepare, round_trip
from d3pack.encode.methods.d3m.samples import split_latents
from d3pack.sources import Source, open_source
from d3pack.system import Events
from d3pack.teachers import Cut

PEER: dict[str, Any] = {
    "steps": 3000,
    "accumulate": 4,
    "lr": 5e-4 * 4,  # --scale_lr
    "betas": (0.9, 0.999),
    "weight_decay": 1e-2,
    "eps": 1e-8,
}
JUDGE_EVERY = 100  # steps of the peer
LATE = 5  # judgements of the peer that its swing is averaged over
TRIPLES = 1536  # of the examination of a class: fewer tell luck from a gain of a thousandth badly


class Indifferent:
    """A teacher without an opinion: both sides get the same images, whichever they are."""

    classes: tuple[str, ...] = ()
    record: dict[str, Any] = {}  # noqa: RUF012

    def logits(self, images: Tensor) -> Tensor:
        return torch.zeros(len(images), len(self.classes))

    def features(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3))


class Exam:
    """Loss of vectors on fixed triples of latents that only judge, apart from the judge's own."""

    def __init__(self, backbone: Any, latents: list[NDArray[Any]], template: str) -> None:
        self.backbone, self.template, self.classes = backbone, template, len(latents)
        levels = len(backbone.levels.alphas_cumprod)
        self.t = torch.from_numpy((np.arange(TRIPLES) + 0.5) / TRIPLES * levels).long()
        rng = torch.Generator().manual_seed(0)
        self.x0, self.eps = [], []
        for each in latents:
            held = split_latents(len(each))[1]
            mixed = held[torch.randperm(TRIPLES, generator=rng).numpy() % len(held)]
            self.x0.append(torch.from_numpy(each[mixed].astype(np.float32)))
            self.eps.append(torch.randn(self.x0[-1].shape, generator=rng))

    @torch.no_grad()
    def loss(self, c: int, vectors: NDArray[Any]) -> float:
        levels = self.backbone.levels
        condition = self.backbone.condition(torch.from_numpy(vectors)[None], self.template)
        total = 0.0
        for part in torch.split(torch.arange(TRIPLES), 96):
            x0, eps, t = self.x0[c][part], self.eps[c][part], self.t[part]
            spread = Condition(
                {k: v.expand(len(part), *v.shape[1:]) for k, v in condition.tensors.items()}
            )
            out = self.backbone.predict(levels.noised(x0, eps, t), t, spread)
            error = out - levels.target(x0, eps, t)
            total += float(error.double().square().mean((1, 2, 3)).sum())
        return total / TRIPLES


class Stopwatch:
    """Keeps nothing; notes losses, samples and time at every judgement, judging itself left out."""

    def __init__(self, exam: Exam) -> None:
        self.exam = exam
        self.judging = 0.0
        self.began = time.process_time()
        self.rows: list[dict[str, Any]] = []

    def load(self) -> None:
        return None

    def save(self, state: dict[str, NDArray[Any]], *, last: bool = False) -> None:
        seconds = time.process_time() - self.began - self.judging
        done = state["status"] == DONE
        # what a row would be stored as: its running mean until the codec has had its way
        now = np.where(done[:, None, None], round_trip("i8")(state["vectors"]), state["mean"])
        loss = np.array([self.exam.loss(c, now[c]) for c in range(self.exam.classes)])
        self.rows.append({"seconds": seconds, "samples": state["samples"].copy(), "loss": loss})
        self.judging += time.process_time() - self.began - self.judging - seconds


class Timed(Inversion):
    """Inversion whose judgements stop the clock."""

    watch: Stopwatch

    def _losses(self, rows: NDArray[Any], vectors: NDArray[Any]) -> NDArray[Any]:
        began = time.process_time()
        losses = super()._losses(rows, vectors)
        self.watch.judging += time.process_time() - began
        return losses


def ours(
    backbone: Any,
    names: list[str],
    latents: list[NDArray[Any]],
    settings: D3MSettings,
    template: str,
    seed: int,
    exam: Exam,
) -> Stopwatch:
    start = np.stack([backbone.name_vectors(name, 1).float().cpu().numpy() for name in names])
    watch = Stopwatch(exam)
    inversion = Timed(
        backbone,
        start,
        lambda row: latents[row],
        round_trip("i8"),
        settings,
        template=template,
        seed=seed,
        keeper=watch,
        events=Events(),
    )
    inversion.watch = watch
    watch.began = time.process_time()
    inversion.run()
    return watch


def peer(
    backbone: Any, name: str, images: Tensor, template: str, steps: int, seed: int
) -> Iterator[tuple[int, float, NDArray[Any]]]:
    """(samples, seconds, vector) after every few steps, in the script's own order of work."""
    text = backbone.text
    first = text.words.ids(name)[0]
    table = torch.nn.Parameter(torch.cat([text.table.detach(), text.table[first][None].detach()]))
    original = table.detach().clone()
    row = len(table) - 1
    before, after = (text.words.ids(part) for part in template.split("{}"))
    sentence = [text.words.start, *before, row, *after, text.words.end]
    ids = torch.tensor(sentence + [text.words.pad] * (text.positions - len(sentence)))
    optimizer = torch.optim.AdamW(
        [table],
        lr=PEER["lr"],
        betas=PEER["betas"],
        weight_decay=PEER["weight_decay"],
        eps=PEER["eps"],
    )
    others = torch.ones(len(table), dtype=torch.bool)
    others[row] = False
    rng = torch.Generator().manual_seed(seed)
    levels, spent = backbone.levels, 0.0
    for step in range(1, steps + 1):
        began = time.process_time()
        for _ in range(PEER["accumulate"]):
            image = images[int(torch.randint(len(images), (), generator=rng))][None]
            if float(torch.rand((), generator=rng)) < 0.5:
                image = image.flip(3)
            with torch.no_grad():
                x0 = backbone.encode(image)
            eps = torch.randn(x0.shape, generator=rng)
            t = torch.randint(len(levels.alphas_cumprod), (1,), generator=rng)
            hidden = text.encode(torch.nn.functional.embedding(ids[None], table))
            condition = type(backbone.unconditional())({"hidden": hidden})
            out = backbone.predict(levels.noised(x0, eps, t), t, condition)
            loss = torch.nn.functional.mse_loss(out, levels.target(x0, eps, t))
            torch.autograd.backward([loss / PEER["accumulate"]])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            table[others] = original[others]
        spent += time.process_time() - began
        if step % JUDGE_EVERY == 0 or step == steps:
            yield step * PEER["accumulate"], spent, table[row].detach().numpy()[None].copy()


def collages(
    source: Source, count: int, settings: D3MSettings, size: tuple[int, int], seed: int
) -> list[Tensor]:
    teacher = Indifferent()
    teacher.classes = source.classes
    cut = Cut(size, settings.pool, seed=seed)
    return [
        make_collages(source, c, teacher, cut, 1, settings.collages).images for c in range(count)
    ]


def known_curves(
    path: Path | None, same: dict[str, Any], start: dict[str, float]
) -> dict[str, list[dict[str, Any]]]:
    """The peer's, from an earlier output, if all that it depends on was the same there."""
    if path is None:
        return {}
    found = json.loads(path.read_text(encoding="utf-8"))
    for name, value in same.items():
        if found.get(name) != json.loads(json.dumps(value)):
            raise SystemExit(f"{path}: its {name} is {found.get(name)}, not {value}")
    classes = {one["class"]: one for one in found["classes"] if one["class"] in start}
    for name, one in classes.items():
        if one["start_loss"] != round(start[name], 6):
            raise SystemExit(f"{path}: {name!r} was examined on other collages there")
    return {name: one["curve"] for name, one in classes.items()}


def reach(rows: list[dict[str, Any]], c: int, target: float) -> dict[str, Any] | None:
    """Samples of class c, and its share of the seconds, when its loss is first at the target."""
    for row in rows:
        if row["loss"][c] <= target:
            share = float(row["samples"][c]) / float(row["samples"].sum())
            return {"samples": int(row["samples"][c]), "seconds": round(row["seconds"] * share, 3)}
    return None


def against(point: dict[str, Any], rows: list[dict[str, Any]], c: int) -> dict[str, Any]:
    """A moment of the peer, and what ours needs to come to the same loss."""
    mine = reach(rows, c, point["loss"])
    found = {"peer": point, "ours": mine}
    if mine is not None:
        found["fewer_samples"] = round(point["samples"] / max(1, mine["samples"]), 1)
        found["less_time"] = round(point["seconds"] / max(1e-9, mine["seconds"]), 1)
    return found


def worst(classes: list[dict[str, Any]], kind: str, ratio: str) -> float:
    """The smallest ratio of all classes; 0 where ours never gets there."""
    return min((c[kind].get(ratio, 0.0) for c in classes), default=0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("--backbone", default="mini")
    parser.add_argument("--classes", type=int, default=10, help="that ours learns together")
    parser.add_argument(
        "--peer-classes", type=int, default=3, help="that the peer learns, one by one"
    )
    parser.add_argument("--peer-steps", type=int, default=PEER["steps"])
    parser.add_argument("--peers", type=Path, help="earlier output to take the peer's curves from")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent / "results/encode.json"
    )
    args = parser.parse_args()
    source = open_source(args.source, first=args.classes)
    backbone = open_backbone(args.backbone)
    settings = D3MSettings()
    job = prepare(source, EncodeSettings(seed=args.seed), settings, backbone)
    template = job.details.template
    names = list(source.classes)
    images = collages(source, len(names), settings, job.plan.size, args.seed)
    with torch.no_grad():
        latents = [
            torch.cat([backbone.encode(part) for part in torch.split(every, 32)]).numpy()
            for every in images
        ]
    exam = Exam(backbone, latents[: args.peer_classes], template)
    start = [
        exam.loss(c, backbone.name_vectors(names[c], 1).float().numpy())
        for c in range(exam.classes)
    ]
    watch = ours(backbone, names, latents, settings, template, args.seed, exam)
    final = watch.rows[-1]
    classes = []
    same = {
        "backbone": {"repo": backbone.ref.repo, "revision": backbone.ref.revision},
        "torch": torch.__version__,
        "peer_recipe": {**PEER, "steps": args.peer_steps},
        "exam": {"triples": TRIPLES, "peer_every": JUDGE_EVERY * PEER["accumulate"]},
        "seed": args.seed,
    }
    known = known_curves(args.peers, same, dict(zip(names, start, strict=False)))
    for c in range(exam.classes):
        curve = known.get(names[c])
        measured = curve is None
        if curve is None:
            seen = images[c][torch.from_numpy(split_latents(len(images[c]))[0])]
            curve = [
                {
                    "samples": samples,
                    "seconds": round(seconds, 2),
                    "loss": round(exam.loss(c, vector), 6),
                }
                for samples, seconds, vector in peer(
                    backbone, names[c], seen, template, args.peer_steps, args.seed + c
                )
            ]
        end, best = curve[-1], min(curve, key=lambda point: point["loss"])
        late = {**end, "loss": round(float(np.mean([p["loss"] for p in curve[-LATE:]])), 6)}
        found = {
            "class": names[c],
            "peer_curve": "of this run" if measured else "of an earlier output",
            "start_loss": round(start[c], 6),
            "ours": {
                "samples": int(final["samples"][c]),
                "loss": round(float(final["loss"][c]), 6),
            },
            # the script has no judgement of its own: its recipe is paid in full
            "recipe": against(end, watch.rows, c),
            "late_mean": against(late, watch.rows, c),
            # what an oracle that stopped it at its best moment would have paid
            "best_moment": against(best, watch.rows, c),
            "peer_at_our_loss": next((p for p in curve if p["loss"] <= final["loss"][c]), None),
            "curve": curve,
        }
        classes.append(found)
        print(json.dumps({k: v for k, v in found.items() if k != "curve"}), flush=True)
        result = {
            **same,
            "machine": {"processor": platform.machine(), "threads": torch.get_num_threads()},
            "source": {"sha256": source.fingerprint(), "classes": len(names)},
            "ours_all_classes": {
                "samples": int(final["samples"].sum()),
                "seconds": round(final["seconds"], 1),
            },
            "classes": classes,
            "worst": {
                kind: {
                    ratio: worst(classes, kind, ratio) for ratio in ("fewer_samples", "less_time")
                }
                for kind in ("recipe", "late_mean", "best_moment")
            },
        }
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
