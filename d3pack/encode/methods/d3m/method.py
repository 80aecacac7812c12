"""The method of D3M (arXiv 2403.07142): one learned prompt a category, seeds, soft labels."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from d3pack.backbones import Backbone, default_backbone, open_backbone
from d3pack.encode import budget, skipped
from d3pack.encode.complete import Told, finish, sample_record
from d3pack.encode.generate import SHOWN
from d3pack.encode.method import Plan, Run
from d3pack.encode.methods.d3m.collages import CollageOptions, clusters, make_collages
from d3pack.encode.methods.d3m.estimate import estimate
from d3pack.encode.methods.d3m.guidance import best_guided
from d3pack.encode.methods.d3m.inversion import Fitted, Inversion, InversionOptions
from d3pack.encode.methods.d3m.plan import (
    D3MPlan,
    expected_bytes,
    make_plan,
    make_recipe,
    with_dials,
)
from d3pack.encode.options import EncodeOptions, no_settings
from d3pack.encode.plan import dtype_for
from d3pack.encode.teaching import open_teacher
from d3pack.format.codecs import decode_prompts, encode_prompts
from d3pack.format.pack import Pack
from d3pack.sources import Source
from d3pack.system.keeper import JournalKeeper
from d3pack.teachers import Teacher

Array = npt.NDArray[Any]
THUMB = 128  # pixels, of the collages kept for the contact sheet


class D3M:
    """Teacher, collages, inversion, seeds, labels."""

    name = "d3m"

    def __init__(self) -> None:
        self._backbone: Backbone | None = None

    def plan(self, source: Source, options: EncodeOptions, device: str) -> D3MPlan:
        """Settle every setting; with a budget, choose the dials."""
        no_settings(self.name, options)
        self._backbone = open_backbone(
            options.backbone or default_backbone(device),
            device=device,
            dtype=getattr(torch, dtype_for(device)),
        )
        plan = make_plan(source, options, self._backbone)
        if options.budget is None:
            return plan
        dials, size = budget.spend(
            options.budget,
            options,
            self._backbone.prompt_shape[0],
            lambda trial: expected_bytes(plan, _sample_record(source, options), trial),
        )
        note = budget.describe(dials, size, options)
        return with_dials(plan, dials, options.guidance, note)

    def estimate(self, source: Source, plan: Plan, options: EncodeOptions) -> Mapping[str, Any]:
        """Measure a little of everything on this machine."""
        assert isinstance(plan, D3MPlan)
        assert self._backbone is not None
        size = expected_bytes(plan, _sample_record(source, options))
        return {"bytes": size, **estimate(source, plan, self._backbone, options)}

    def encode(self, run: Run) -> Pack:
        """All stages; each goes on where it was stopped."""
        plan, backbone = run.plan, self._backbone
        assert isinstance(plan, D3MPlan)
        assert backbone is not None
        teacher = open_teacher(run, plan.typical)
        collages = self._collages(run, plan, teacher)
        fitted = self._invert(run, plan)
        dials = plan.dials
        rows = fitted.vectors.reshape(len(plan.classes), dials.modes, dials.vectors, plan.width)
        pack = Pack(
            classes=plan.classes,
            images_per_class=plan.images_per_class,
            recipe=make_recipe(plan, backbone),
            prompts=encode_prompts(rows, dials.codec),
            seed=plan.seed,
        )
        if plan.guidance is None:
            pack = best_guided(run, pack, dials, backbone, teacher, partial(_features, run))
        metrics: dict[str, Any] = {
            "start_loss": _figure(fitted.start_loss),
            "loss": _figure(fitted.loss),
            "samples": int(fitted.samples.sum()),
        }
        return finish(
            run,
            pack,
            dials,
            backbone,
            teacher,
            Told(
                self.name,
                metrics,
                seen=collages["seen"],
                bad=collages["bad"],
                shown=lambda c: _thumbs(run, c),
                title="Collages of real patches, and what the pack makes",
            ),
        )

    def _collages(self, run: Run, plan: D3MPlan, teacher: Teacher) -> dict[str, Any]:
        """Collages of each class as latents in the journal; what was seen on the way."""
        backbone, options = self._backbone, run.options
        assert backbone is not None
        cut = CollageOptions(
            size=plan.size,
            factor=plan.factor,
            pool=options.pool,
            crops=plan.crops,
            scale=plan.crop_scale,
            count=options.collages,
            seed=plan.seed,
        )
        total: dict[str, Any] = {"seen": 0, "bad": 0, "realism": 0.0}
        with run.events.stage("collages", len(plan.classes), "classes"):
            for c in range(len(plan.classes)):
                name = f"classes/{c:06d}"
                found = run.journal.load(name) if _exists(run, name) else None
                if found is None:
                    made = make_collages(run.source, c, teacher, cut)
                    with torch.no_grad():
                        latents = [backbone.encode(p).cpu() for p in torch.split(made.images, 32)]
                    arrays: dict[str, Array] = {
                        "latents": torch.cat(latents).half().numpy(),
                        "modes": clusters(made.features, plan.dials.modes, plan.seed),
                        "thumbs": _shrink(made.images[:SHOWN]),
                    }
                    if plan.guidance is None:
                        arrays["features"] = teacher.features(made.usual).numpy()
                    facts = {"seen": made.seen, "bad": made.bad, "realism": made.realism}
                    skipped.remember(run.journal, run.source)
                    run.journal.save(name, arrays, facts)
                else:
                    facts = found[1]
                total["seen"] += facts["seen"]
                total["bad"] += facts["bad"]
                total["realism"] += facts["realism"] / len(plan.classes)
                run.events.step(c + 1, samples=total["seen"])
        run.events.note(f"patches: cross-entropy {total['realism']:.3f} under the teacher")
        return total

    def _invert(self, run: Run, plan: D3MPlan) -> Fitted:
        backbone, options, dials = self._backbone, run.options, plan.dials
        assert backbone is not None
        start = [
            backbone.name_vectors(name, dials.vectors).detach().float().cpu().numpy()
            for name in plan.classes
        ]
        rows = np.repeat(np.stack(start), dials.modes, axis=0)

        def latents(row: int) -> Array:
            found = run.journal.load(f"classes/{row // dials.modes:06d}")
            assert found is not None
            groups = found[0]["modes"]
            # a class with fewer collages than modes: modes share them
            chosen = groups == row % dials.modes % (int(groups.max()) + 1)
            values: Array = found[0]["latents"][chosen]
            return values

        settings = InversionOptions(
            template=plan.template,
            lr=options.lr,
            steps=options.steps,
            cool=options.cool,
            batch=options.batch,
            slots=options.slots,
            validate_every=options.validate_every,
            triples=options.triples,
            patience=options.patience,
            tolerance=options.tolerance,
            seed=plan.seed,
        )
        keeper = JournalKeeper(run.journal, "prompts")
        fitted = Inversion(
            backbone, rows, latents, round_trip(dials.codec), settings, keeper, run.events
        ).run()
        run.events.note(
            f"loss {_figure(fitted.start_loss)} with class names, "
            f"{_figure(fitted.loss)} with learned prompts"
        )
        return fitted


def _sample_record(source: Source, options: EncodeOptions) -> dict[str, Any]:
    """Provenance as long as the real one will be, without hashing the source for it."""
    figures = ("start_loss", "loss", *(["agreement"] if options.labels else []))
    seen = sum(min(count, options.pool) for count in source.counts)
    return sample_record(D3M.name, source, options, figures, {"samples": 123456}, seen)


def round_trip(codec: str) -> Any:
    """What the codec makes of rows of vectors; one whose codebook all rows share stays outside."""
    if codec == "pq":
        return lambda rows: rows

    def through(rows: Array) -> Array:
        return decode_prompts(encode_prompts(rows[:, None], codec))[:, 0]

    return through


def _exists(run: Run, name: str) -> bool:
    return (run.journal.folder / f"{name}.safetensors").exists()


def _features(run: Run, c: int) -> torch.Tensor:
    """The teacher's, of collages of a class that nobody chose."""
    found = run.journal.load(f"classes/{c:06d}")
    assert found is not None
    return torch.from_numpy(found[0]["features"])


def _thumbs(run: Run, c: int) -> npt.NDArray[np.uint8]:
    found = run.journal.load(f"classes/{c:06d}")
    assert found is not None
    return found[0]["thumbs"]


def _shrink(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    step = max(1, images.shape[-1] // THUMB)
    return images[:, :, ::step, ::step].contiguous().numpy()


def _figure(losses: Array) -> float:
    return float(f"{float(np.mean(losses)):.5g}")
