"""The method of D3M (arXiv 2403.07142): one learned prompt a class, seeds, soft labels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from d3pack.backbones import Backbone, DiT, default_sampling, read_lora
from d3pack.decode import Decoder
from d3pack.encode.allocation import (
    LADDER,
    PICKY,
    SEEDS_LADDER,
    SHARE,
    SMALLEST,
    Allocation,
    allocate,
    expected_bytes,
)
from d3pack.encode.candidates import stored, stored_arrays
from d3pack.encode.codes import check_can_code, code_seconds, coding_alone, divided
from d3pack.encode.contract import Draft, EncodeContext, EncodeRun, Estimate
from d3pack.encode.estimate import teacher_seconds
from d3pack.encode.finish import SHEET_IMAGES, sample_provenance
from d3pack.encode.methods.d3m.collages import clusters, make_collages
from d3pack.encode.methods.d3m.guidance import MOST_CLASSES, best_guidance, trial_images
from d3pack.encode.methods.d3m.inversion import Fitted, Inversion, groups_of, solve_seconds
from d3pack.encode.methods.d3m.one_pass import CALLS, STATES, in_one_pass
from d3pack.encode.methods.dit import unknown_names_note
from d3pack.encode.pilots import can_choose, pilot_seconds
from d3pack.encode.plan import (
    SMALL,
    EncodePlan,
    backbone_json,
    chosen_backbone,
    dtype_for,
    sigmas_of,
    typical_side,
)
from d3pack.encode.sampler_fit import STEPS, can_fit, fitted_once, forwards_of, unfitted
from d3pack.encode.sampler_search import GUIDANCES
from d3pack.encode.sets import draw_seconds
from d3pack.encode.settings import D3MSettings, EncodeSettings
from d3pack.encode.teaching import open_teacher
from d3pack.encode.vectors import learns_outputs, no_class, start_vectors, tuned
from d3pack.errors import UsageError
from d3pack.format import (
    BackboneRef,
    Coded,
    Coding,
    Pack,
    Recipe,
    Sampler,
    decode_prompts,
    encode_adapter,
    encode_prompts,
)
from d3pack.sources import Source
from d3pack.system import Checkpoint, SettingError, seconds_of
from d3pack.teachers import Cut, Teacher

Array = npt.NDArray[Any]
TEMPLATES = {1: "a photo of a {}", 2: "a 2x2 collage of {}", 4: "a 4x4 collage of {}"}
WORTH_PICKING = 20  # images a class, from which on the manifest's entry of picks is a small share
THUMBNAIL = 128  # pixels, of the collages kept for the contact sheet
_GROUPS = "groups"  # folder of the journal: what was learned, by groups of rows


@dataclass(frozen=True, slots=True)
class Details:
    """What D3M adds to a plan."""

    backbone: BackboneRef
    width: int  # of one vector
    factor: int
    crops: int
    crop_scale: tuple[float, float]
    template: str
    lora: str  # hash of the adapter that rides in the pack, or ""
    outputs: bool  # of the text encoder are learned, from those of the template on
    sampler: Sampler
    sampler_steps: int
    fitted: bool  # whether its weights are fitted; otherwise they follow from the noise levels
    guidance: float | None  # None: by measurement, when the prompts are learned

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "backbone": backbone_json(self.backbone)}


class D3M:
    """Teacher, collages, inversion."""

    name = "d3m"
    settings = D3MSettings

    def prepare(
        self, source: Source, settings: EncodeSettings, own: D3MSettings, context: EncodeContext
    ) -> D3MJob:
        """Settle every setting; with a budget, choose what to spend it on."""
        backbone = chosen_backbone(settings, context.device)
        return prepare(source, settings, own, backbone)


def prepare(
    source: Source, settings: EncodeSettings, own: D3MSettings, backbone: Backbone
) -> D3MJob:
    """Return the job of learning prompts for a backbone that is open."""
    least, most = _numbers_of_vectors(settings, own, backbone)
    if settings.select == "teacher" and (settings.candidates or 1) > 2**16 // SHARE:
        raise UsageError(
            f"invalid candidates {settings.candidates}: expected at most {2**16 // SHARE}"
        )
    small = backbone.ref.repo == "mini"
    size, typical = settings.size or backbone.image_size, typical_side(source)
    adapter = _adapter(own, backbone)
    details = _details(settings, own, backbone, min(typical, *size), adapter)
    plan = EncodePlan.of(
        source,
        settings,
        size=size,
        dtype=dtype_for(backbone.device.type),
        allocation=SMALLEST,
        typical=typical,
        pilots=settings.pilots if can_choose(source, settings, backbone) else 0,
    )
    job = D3MJob(source, settings, own, backbone, plan, details, adapter)
    plan = replace(plan, coding=_coding(job, least))
    if plan.coding is not None:
        check_can_code(backbone, plan.coding)
    job = replace(job, plan=plan)
    picks = small and plan.seeded >= WORTH_PICKING
    allocation, notes = allocate(
        settings,
        job.expected_bytes,
        default=Allocation(codec="i4", candidates=PICKY if picks else 1, share=SHARE),
        own={"modes": own.modes, "vectors": own.vectors},
        least_vectors=least,
        most_vectors=most,
        ladder=SEEDS_LADDER if plan.pilots else LADDER,
        prompts=plan.needs_prompts,
    )
    # where images are cheap and a teacher picks among them, guidance is measured
    measured = small and allocation.candidates > 1 and allocation.select == "teacher"
    if details.guidance is None and not measured:
        details = replace(details, guidance=default_sampling(backbone).guidance)
    if own.one_pass and plan.needs_prompts:
        _check_one_pass(details)
    text = _text(plan, details, allocation, one_pass=own.one_pass)
    if all(name.isdecimal() or name[1:].isdecimal() for name in source.classes):
        text += ("class names are numbers or ids: class_names give inversion a better start",)
    if isinstance(backbone, DiT):
        text += unknown_names_note(backbone, source.classes)
    plan = replace(plan, allocation=allocation, details=details.to_json(), text=(*text, *notes))
    return replace(job, plan=plan, details=details)


def _numbers_of_vectors(
    settings: EncodeSettings, own: D3MSettings, backbone: Backbone
) -> tuple[int, int]:
    """Return the fewest and the most vectors of a prompt, and refuse what does not fit."""
    outputs = learns_outputs(backbone, own.condition)
    least, most, _ = backbone.output_shape if outputs else (1, *backbone.prompt_shape)
    if not least <= (own.vectors or least) <= most:
        raise UsageError(
            f"invalid vectors {own.vectors}: this backbone takes"
            f" {f'{least} to' if least > 1 else 'at most'} {most} vectors"
        )
    if outputs and least > 1 and settings.codec == "pq":  # zeros would not stay zeros
        raise SettingError("codec", "pq", "another, for the pooled vector of this backbone")
    return least, most


def _check_one_pass(details: Details) -> None:
    if details.guidance == 1.0:
        raise UsageError("one_pass needs guidance", hint="without guidance, one pass is all")
    if details.sampler == "lcm":
        raise UsageError("one_pass excludes the sampler lcm, which adds fresh noise")


def _coding(job: D3MJob, least: int) -> Coding | None:
    """Return how photographs are coded: without prompts, where these would cost too much."""
    plan, own = job.plan, job.own
    if plan.coding is None or plan.seeded:
        return plan.coding
    prompt = replace(
        SMALLEST,
        modes=own.modes or 1,
        vectors=own.vectors or least,
        codec=job.settings.codec or "i4",
    )
    return coding_alone(plan, partial(job.bytes_of, prompt))


def _adapter(own: D3MSettings, backbone: Backbone) -> Coded | None:
    """Return the LoRA of the settings as the pack holds it."""
    if own.lora is None:
        return None
    tensors = read_lora(own.lora, backbone)
    return encode_adapter({name: tensor.numpy() for name, tensor in tensors.items()})


def _details(
    settings: EncodeSettings,
    own: D3MSettings,
    backbone: Backbone,
    side: int,
    adapter: Coded | None,
) -> Details:
    """Fill in the defaults, for images that have that side at least."""
    backbone.latent_shape_for(settings.size or backbone.image_size)  # refuses sizes that do not fit
    factor = own.factor or (1 if side <= SMALL else 2)
    sampling = default_sampling(backbone)
    outputs = learns_outputs(backbone, own.condition)
    steps = _fitted_steps(settings, own, backbone)
    return Details(
        backbone=backbone.ref,
        width=backbone.output_shape[2] if outputs else backbone.prompt_shape[1],
        factor=factor,
        crops=own.crops or (1 if factor == 1 else 5),
        crop_scale=own.crop_scale or ((1.0, 1.0) if factor == 1 else (0.25, 1.0)),
        template=own.template or TEMPLATES[factor],
        lora="" if adapter is None else _digest(adapter),
        outputs=outputs,
        sampler="table" if steps else settings.sampler or sampling.sampler,
        sampler_steps=steps or settings.sampler_steps or sampling.steps,
        fitted=steps > 0,
        guidance=settings.guidance,
    )


def _fitted_steps(settings: EncodeSettings, own: D3MSettings, backbone: Backbone) -> int:
    """Return the steps of the sampler to fit; 0: none is fitted."""
    steps = own.fitted_steps
    if steps is None:
        usual = settings.sampler is None and settings.sampler_steps is None
        seeded = settings.codes != settings.images  # codes have a sampler of their own
        return STEPS if usual and seeded and backbone.ref.repo == "mini" else 0
    if steps and (settings.sampler or settings.sampler_steps):
        raise UsageError(
            "fitted_steps excludes sampler and sampler_steps",
            hint="a fitted sampler has weights of its own",
        )
    if steps and not can_fit(backbone):
        raise SettingError("fitted_steps", steps, "0: this backbone has few steps of its own")
    return steps


def _digest(adapter: Coded) -> str:
    data = b"".join(value.tobytes() for _, value in sorted(adapter.tensors.items()))
    return hashlib.sha256(str(adapter.params).encode() + data).hexdigest()


def _text(
    plan: EncodePlan, details: Details, allocation: Allocation, *, one_pass: bool
) -> tuple[str, ...]:
    name = details.backbone.repo or details.backbone.revision[:12]
    if not plan.needs_prompts:
        return (f"backbone {name}, {plan.size[0]}x{plan.size[1]}, {plan.dtype}; no prompts",)
    guidance = "by measurement" if details.guidance is None else f"{details.guidance:g}"
    condition = f"{'outputs for ' if details.outputs else ''}{details.template!r}"
    if one_pass:
        guidance += " in one pass"
    sampler = "fitted sampler of" if details.fitted else details.sampler
    return (
        f"backbone {name}, {plan.size[0]}x{plan.size[1]}, {plan.dtype}; {sampler} "
        f"{details.sampler_steps} steps, guidance {guidance}, {condition}",
        f"{allocation.prompts}, {allocation.seeds(plan.seeded)}, "
        f"labels {allocation.labels}, collages {details.factor}x{details.factor}",
    )


@dataclass(frozen=True, slots=True)
class D3MJob:
    """Prompts to be learned for a backbone."""

    source: Source
    settings: EncodeSettings
    own: D3MSettings
    backbone: Backbone
    plan: EncodePlan
    details: Details
    adapter: Coded | None = None

    def describe(self) -> EncodePlan:
        """Return the resolved settings."""
        return self.plan

    def recipe(self) -> Recipe:
        """Return how the images are made, as far as it is known before prompts are learned.

        The default guidance stands for one to measure, and weights for a sampler to be fitted.
        """
        details, plan = self.details, self.plan
        guidance = details.guidance
        sampler: Sampler = "dpmpp-2m" if details.fitted else details.sampler
        recipe = Recipe(
            backbone=details.backbone,
            size=plan.size,
            sampler=sampler,
            sigmas=sigmas_of(self.backbone, sampler, details.sampler_steps, plan.size),
            guidance=default_sampling(self.backbone).guidance if guidance is None else guidance,
            template=self._template,
            dtype=plan.dtype,
            group=plan.group,
            extra={"eta": 1.0} if details.sampler == "ancestral" else {},
        )
        return unfitted(recipe, details.sampler_steps) if details.fitted else recipe

    def expected_bytes(self, allocation: Allocation) -> int:
        """Return the bytes of the pack with that allocation."""
        return self.bytes_of(allocation, self.plan)

    def bytes_of(self, allocation: Allocation, plan: EncodePlan) -> int:
        """Return the bytes of the pack of a plan with that allocation."""
        seen = sum(min(count, self.own.pool) for count in self.source.counts)
        metrics: tuple[tuple[str, ...], dict[str, int], int]
        metrics = (("start_loss", "loss"), {"samples": 123456}, seen)
        if not plan.needs_prompts:  # nothing is learned
            metrics = ((), {}, sum(self.source.counts))
        record = sample_provenance(D3M.name, self.source, self.settings, *metrics)
        recipe, guided = self.recipe(), plan.needs_prompts and not self.own.one_pass
        return expected_bytes(
            plan,
            recipe if guided else replace(recipe, guidance=1.0),
            self.details.width,
            allocation,
            record,
            unconditional=guided and self._no_class(allocation.vectors) is not None,
            adapter=self.adapter,
        )

    @property
    def _template(self) -> str | None:
        return None if self.details.outputs else self.details.template

    @property
    def _only_chooses(self) -> bool:
        """Whether the teacher chooses patches, and neither picks nor labels images."""
        return not self.plan.asks_teacher

    def _no_class(self, k: int) -> Array | None:
        """Return the outputs that guidance compares with, where the pack has to hold them."""
        if not self.details.outputs or self.recipe().guidance == 1.0:
            return None
        with torch.no_grad():
            return no_class(self.backbone, k)

    def _start(self, name: str) -> Tensor:
        details, k = self.details, self.plan.allocation.vectors
        with torch.no_grad():
            vectors = start_vectors(self.backbone, name, k, details.template, details.outputs)
        return vectors.float()

    def estimate(self) -> Estimate:
        """Measure a little of every stage on this machine."""
        plan, own, details = self.plan, self.own, self.details
        classes, allocation = len(plan.classes), plan.allocation
        rows = classes * allocation.modes
        each = max(1, own.batch // len(groups_of(rows, own.slots)[0]))
        few = min(8, self.source.counts[0])
        read = seconds_of(lambda: [self.source.get(0, i) for i in range(few)]) / few
        looked = sum(min(count, own.pool) for count in self.source.counts)
        kept = min(own.collages, -(-looked // classes // details.factor**2)) * classes
        step, latents, image = self._seconds()
        solve = solve_seconds(rows, allocation.vectors, details.width, own.slots)
        stages = {}
        if self.settings.teacher == "train":
            stages["teacher"] = (
                teacher_seconds(
                    self.source,
                    plan,
                    self.settings,
                    str(self.backbone.device),
                    choosing=self._only_chooses,
                )
                + sum(self.source.counts) * read
            )
        if plan.needs_prompts:
            stages["collages"] = looked * (read + 2e-4 * details.crops) + kept * latents
            # about three quarters of the steps are used before a row stops gaining
            steps = 0.75 * own.steps + own.cool
            stages["inversion"] = steps * (rows * each * step + solve)
        if details.guidance is None and plan.needs_prompts and plan.seeded:
            images = trial_images(allocation) * min(classes, MOST_CLASSES)
            stages["guidance"] = image * images * len(GUIDANCES)
        if details.fitted and plan.needs_prompts and plan.seeded:
            weights = 1 if details.guidance is not None else len(GUIDANCES)
            latent = self.backbone.latent_shape_for(plan.size)
            fit = forwards_of(latent, details.sampler_steps)
            stages["sampler"] = image / details.sampler_steps * fit * weights
        if own.one_pass and plan.needs_prompts and plan.seeded:
            stages["one pass"] = rows * STATES * CALLS * step
        stages |= draw_seconds(plan, self.backbone.latent_shape_for(plan.size))
        images = (allocation.judged + (allocation.labels != "none")) * plan.seeded
        stages["images"] = image * images * classes
        settings = self.settings
        if settings.budget and plan.pilots:  # the most that they may lead to
            pilots = pilot_seconds(self.source, plan, settings, self.backbone, self.recipe(), image)
            return Estimate(settings.budget, {**stages, **pilots})
        if plan.coding is not None:
            code = code_seconds(self.backbone, plan, self.recipe(), settings)
            stages["codes"] = code * plan.codes * classes
        return Estimate(self.expected_bytes(allocation), stages)

    def _seconds(self) -> tuple[float, float, float]:
        """Of a sample of inversion, of the latents of a collage, and of a generated image."""
        plan, backbone, template = self.plan, self.backbone, self._template
        vectors = self._start(plan.classes[0])[None]
        picture = torch.zeros((8, 3, *plan.size), dtype=torch.uint8)
        x = torch.zeros((8, *backbone.latent_shape_for(plan.size)), device=backbone.device)
        t = torch.full((8,), 500, device=backbone.device)

        def fit() -> None:
            leaf = vectors.expand(8, -1, -1).clone().requires_grad_()
            out = backbone.predict(x, t, backbone.condition(leaf, template))
            torch.autograd.grad(out.square().mean(), [leaf])

        with torch.no_grad():
            latents = seconds_of(lambda: backbone.encode(picture)) / 8
        short = replace(self, details=replace(self.details, sampler_steps=2)).recipe()
        prompts = encode_prompts(np.zeros((1, *vectors.shape), np.float32), "f16")
        pack = Pack(("one",), plan.group, short, prompts, seed=0)
        decoder = Decoder(pack, device=backbone.device, backbone=backbone)
        image = seconds_of(lambda: decoder.images(range(plan.group))) / plan.group
        return seconds_of(fit) / 8, latents, image * self.details.sampler_steps / 2

    def run(self, run: EncodeRun) -> Draft:
        """Train a teacher, make collages, learn prompts, measure guidance."""
        plan, journal = self.plan, run.journal
        teacher = open_teacher(run, plan, choosing=self._only_chooses)
        if not plan.needs_prompts:
            seen = sum(self.source.counts)
            draft = Draft(self.recipe(), None, self.backbone, teacher=teacher, seen=seen)
            return replace(draft, adapter=self.adapter)
        with tuned(self.backbone, self.adapter):
            fitted = self._learn_prompts(run, teacher)
        seen, bad = self._seen(run)
        allocation = plan.allocation
        shape = (len(plan.classes), allocation.modes, allocation.vectors, self.details.width)
        draft = Draft(
            recipe=self.recipe(),
            prompts=fitted.vectors.reshape(shape),
            unconditional=self._no_class(allocation.vectors),
            adapter=self.adapter,
            backbone=self.backbone,
            teacher=teacher,
            metrics={
                "start_loss": _figure(fitted.start_loss),
                "loss": _figure(fitted.loss),
                "samples": int(fitted.samples.sum()),
            },
            seen=seen,
            bad=bad,
            real=lambda c, most: stored_arrays(journal, _name(c))["thumbs"][:most],
            title="Collages of real patches, and what the pack makes",
        )
        if not plan.seeded:  # codes have noise levels and guidance of their own
            return draft
        draft = self._guided(run, draft)
        if not self.own.one_pass or draft.recipe.guidance == 1.0:
            return draft
        fit, last = self.details.fitted, not plan.makes_images
        draft = in_one_pass(run, plan, draft, last=last and not fit)
        return fitted_once(run, plan, draft, last=last, name="sampler/one-pass") if fit else draft

    def _guided(self, run: EncodeRun, draft: Draft) -> Draft:
        """Measure the guidance, and fit the sampler to it, as the plan says."""
        fit, last = self.details.fitted, not (self.own.one_pass or self.plan.makes_images)
        if self.details.guidance is not None:
            return fitted_once(run, self.plan, draft, last=last) if fit else draft

        def features(c: int) -> torch.Tensor:
            return torch.from_numpy(stored_arrays(run.journal, _name(c))["features"])

        return best_guidance(run, self.plan, draft, features, fit=fit, last=last)

    def _make_collages(self, run: EncodeRun, teacher: Teacher, classes: Sequence[int]) -> None:
        """Keep the collages of these classes as latents in the journal."""
        seen, realism = 0, 0.0
        with run.events.stage("collages", len(classes), "classes", part="collages"):
            for done, c in enumerate(classes, 1):
                known = run.journal.load(_name(c))
                facts = self._collages_of(run, teacher, c) if known is None else known[1]
                seen += facts["seen"]
                realism += facts["realism"] / len(classes)
                run.events.step(done, samples=seen)
        run.events.note(f"patches: cross-entropy {realism:.3f} under the teacher")

    def _seen(self, run: EncodeRun) -> tuple[int, int]:
        """Return how many images were looked at for collages, and how many were bad."""
        facts = [stored(run.journal, _name(c))[1] for c in range(len(self.plan.classes))]
        return sum(fact["seen"] for fact in facts), sum(fact["bad"] for fact in facts)

    def _collages_of(self, run: EncodeRun, teacher: Teacher, c: int) -> Mapping[str, Any]:
        plan, details = self.plan, self.details
        height, width = plan.size
        cut = Cut(
            size=(height // details.factor, width // details.factor),
            pool=self.own.pool,
            crops=details.crops,
            scale=details.crop_scale,
            seed=plan.seed,
        )
        # what pilots are tested on teaches no prompt
        allowed = divided(self.source, plan, c)[0] if plan.pilots else None
        most = self.own.collages
        collages = make_collages(self.source, c, teacher, cut, details.factor, most, allowed)
        with torch.no_grad():
            latents = [self.backbone.encode(p).cpu() for p in torch.split(collages.images, 32)]
        arrays: dict[str, Array] = {
            "latents": torch.cat(latents).half().numpy(),
            "modes": clusters(collages.features, plan.allocation.modes, plan.seed),
            "thumbs": _shrunk(collages.images[:SHEET_IMAGES]),
        }
        if details.guidance is None:
            arrays["features"] = teacher.features(collages.unchosen).numpy()
        facts = {"seen": collages.seen, "bad": collages.bad, "realism": collages.realism}
        run.remember_skipped()
        run.journal.save(_name(c), arrays, facts)
        return facts

    def _learn_prompts(self, run: EncodeRun, teacher: Teacher) -> Fitted:
        """Fit a prompt to each mode of each class, from the class name on."""
        journal, modes = run.journal, self.plan.allocation.modes
        groups = groups_of(len(self.plan.classes) * modes, self.own.slots)
        names = [f"{_GROUPS}/{group:06d}" for group in range(len(groups))]
        missing = [g for g, name in enumerate(names) if run.owns(g) and not journal.has(name)]
        if missing:
            rows = np.concatenate([groups[group] for group in missing])
            self._make_collages(run, teacher, np.unique(rows // modes).tolist())
            fitted = self._invert(run, missing)
            for group in missing:
                arrays = {name: value[groups[group]] for name, value in asdict(fitted).items()}
                journal.save(names[group], arrays, {})
        details = self.details
        more = details.guidance is None or details.fitted or self.own.one_pass
        more = more or self.plan.makes_images
        assert not list(run.units("learn prompts", names, last=not more))
        parts = [stored_arrays(journal, name) for name in names]
        fitted = Fitted(
            **{name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        )
        run.events.note(
            f"loss {_figure(fitted.start_loss)} with class names, "
            f"{_figure(fitted.loss)} with learned prompts"
        )
        return fitted

    def _invert(self, run: EncodeRun, groups: Sequence[int]) -> Fitted:
        """Fit the rows of these groups."""
        backbone, plan, allocation = self.backbone, self.plan, self.plan.allocation
        names = [self._start(name).cpu().numpy() for name in plan.classes]

        def latents(row: int) -> Array:
            arrays = stored_arrays(run.journal, _name(row // allocation.modes))
            groups = arrays["modes"]
            # a class with fewer collages than modes: modes share them
            group = row % allocation.modes % (int(groups.max()) + 1)
            values: Array = arrays["latents"][groups == group]
            return values

        return Inversion(
            backbone,
            np.repeat(np.stack(names), allocation.modes, axis=0),
            latents,
            round_trip(allocation.codec),
            self.own,
            template=self._template,
            seed=plan.seed,
            keeper=Checkpoint(run.journal, "prompts"),
            events=run.events,
            groups=groups,
        ).run()


def round_trip(codec: str) -> Callable[[Array], Array]:
    """Return what a codec makes of rows of vectors; `pq`, which needs all rows, is left out."""
    if codec == "pq":
        return lambda rows: rows

    def through(rows: Array) -> Array:
        return decode_prompts(encode_prompts(rows[:, None], codec))[:, 0]

    return through


def _name(c: int) -> str:
    """Where the journal keeps the collages of a class."""
    return f"classes/{c:06d}"


def _shrunk(images: torch.Tensor) -> npt.NDArray[np.uint8]:
    step = max(1, images.shape[-1] // THUMBNAIL)
    return images[:, :, ::step, ::step].contiguous().numpy()


def _figure(losses: Array) -> float:
    return float(f"{float(np.mean(losses)):.5g}")
