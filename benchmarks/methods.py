"""The methods of `encode` on one source: what each costs, and what its images teach.

    python -m benchmarks methods --real cifar10 --work work/methods --seen none
    python -m benchmarks methods --real cifar10 --work work/methods --only d3m,modes --ipc 10
    python -m benchmarks methods --list                        # the methods, from cheap to dear

`--real` has train/ and test/ with one folder a class, as CIFAR-10, or ten classes of photographs of
64 pixels, of which `mini` was trained on some; `--seen` says on which classes' photographs
`mini` was trained. Packs are made by `d3pack.encode.encode`, one after another from cheap to dear,
and students are trained on them. Every figure goes into `results/methods-NAME.json` as soon as it
is measured. Packs, students and the teacher are kept in `--work`: a run that was stopped goes on.
The file is one version of the code: rows of another are dropped.

Four ways to choose seeds have one guidance and one sampler, at all numbers of images: `d3m-seeds`,
`d3m-draws`, `d3m-teacher` and `d3m-s3`. `photographs` are random real ones without loss, another
draw for each student: what as many images could teach.

A pack of 10 images a class is an encoding of its own where the number decides about the images
(`modes` makes as many clusters, `d3m` picks from as many candidates or draws). Where it does not
(`codes`, `classcond`, `minimax`) it is the first 10 of the pack of 50, or of 300 where that was
made (`classcond-long`), whose encoding is timed.

`codes` gets random photographs of each class, `minimax` the backbone of `classcond`. All methods
ask one teacher, which is trained and timed once, before them. Seconds are those of all runs that it
took; what a stopped run had to do again counts twice. Precision, recall, density and coverage
(arXiv 2002.09797) are taken class by class in the features of that teacher, against as many real
images of the class as the pack has, k = 5 or as many neighbours as there are. A single image of a
class has none, and no such figures.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.results import RESULTS, code, command, load, save
from d3pack.decode import Decoder, local_backbone, unpack_backbone
from d3pack.encode import (
    ClassCondSettings,
    D3MSettings,
    EncodeSettings,
    MinimaxSettings,
    ModesSettings,
    encode,
)
from d3pack.evaluate import PROTOCOLS, Bench
from d3pack.evaluate.baselines import pack_entry, random_entry
from d3pack.format import EMBEDDED, Pack, read
from d3pack.sources import open_source
from d3pack.students import fit
from d3pack.students.real import RealImages, common_size
from d3pack.system import (
    Events,
    Journal,
    options_of,
    parse_duration,
    plain,
    replace_folder,
    resolve_device,
    write_json,
)
from d3pack.teachers import SAMPLES, Teacher, batched, teacher_config, train_teacher

WHAT = (__doc__ or "").partition("\n")[0]
MOST = 50  # images of a class
NEAREST = 5


def described(settings: EncodeSettings) -> dict[str, Any]:
    """Return the settings that differ from the defaults, the method's own among them."""
    own = settings.method_settings
    return plain(settings, private=False) | (plain(own, private=False) if own else {})


@dataclass(frozen=True)
class Way:
    """A method with settings."""

    settings: EncodeSettings
    first: bool = False  # whether fewer images are the first of more
    most: int = MOST  # images of a class in the pack of which fewer are the first
    after: str | None = None  # whose backbone it takes

    @property
    def title(self) -> str:
        """What stands behind `--method`."""
        words = [self.settings.method]
        settings, own = replace(self.settings, method="d3m"), self.settings.method_settings
        kinds = (EncodeSettings, *([] if own is None else [type(own)]))
        options = {entry.name: entry for kind in kinds for entry in options_of(kind)}
        for name, value in described(settings).items():
            flag = options[name].flag or f"--{name.replace('_', '-')}"
            unit = "s" if options[name].parse is parse_duration else ""
            words += [flag, *([] if value is True else [f"{value}{unit}"])]
        return " ".join(words)


PHOTOGRAPHS = "photographs"  # real ones, which no pack holds
MINI = EncodeSettings(backbone="mini")  # on a GPU, too
GUIDED = replace(MINI, guidance=1.5)  # of a measured guidance of 1 one pass has nothing to fit
SAMPLED = replace(GUIDED, sampler="dpmpp-2m", sampler_steps=12)
# The defaults of minimax are a day's work here, and a sampler for another DiT
TUNING = MinimaxSettings(train_steps=4000, ema=0.999, search_images=200)


def tuned(own: MinimaxSettings) -> Way:
    """Minimax with settings of its own, on the backbone of classcond."""
    settings = EncodeSettings(method="minimax", method_settings=own)
    return Way(settings, first=True, after="classcond")


# From cheap to dear
WAYS = {
    "codes": Way(replace(MINI, method="codes"), first=True),
    "modes": Way(replace(MINI, method="modes")),
    "modes-weighed": Way(replace(MINI, method="modes", method_settings=ModesSettings(weigh=True))),
    "d3m-seeds": Way(replace(SAMPLED, candidates=1)),
    "d3m-draws": Way(replace(SAMPLED, select="draws")),
    "d3m-teacher": Way(replace(SAMPLED, candidates=8)),
    "d3m-s3": Way(replace(SAMPLED, select="s3")),
    "d3m": Way(MINI),
    "d3m-one-pass": Way(replace(GUIDED, method_settings=D3MSettings(one_pass=True))),
    "classcond": Way(EncodeSettings(method="classcond"), first=True),
    "classcond-embedded": Way(
        EncodeSettings(
            method="classcond", method_settings=ClassCondSettings(embed=True, embed_bits=4)
        ),
        first=True,
    ),
    "classcond-long": Way(
        EncodeSettings(
            method="classcond",
            candidates=8,
            method_settings=ClassCondSettings(embed=True, embed_bits=4, train_seconds=6000),
        ),
        first=True,
        most=300,
    ),
    "minimax": tuned(TUNING),
    "minimax-without": tuned(replace(TUNING, representative=0.0, diverse=0.0)),
    "minimax-average": tuned(replace(TUNING, ema=0.9999)),  # as in the paper
}


def manifold(real: Tensor, made: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage of features, by balls around the k-th neighbour.

    There are none where an image has no neighbour.
    """
    k = min(NEAREST, len(real) - 1, len(made) - 1)
    if k < 1:
        return {}

    def radii(x: Tensor) -> Tensor:
        return torch.cdist(x, x).kthvalue(k + 1, dim=1).values

    across = torch.cdist(real, made)
    inside = across <= radii(real)[:, None]
    return {
        "precision": float(inside.any(0).double().mean()),
        "recall": float((across <= radii(made)[None]).any(1).double().mean()),
        "density": float(inside.double().sum(0).mean() / k),
        "coverage": float((across.min(1).values <= radii(real)).double().mean()),
    }


def likeness(teacher: Teacher, train: RealImages, images: Tensor) -> dict[str, float]:
    """Means over classes, and the share of images that the teacher gives to their class."""
    found: dict[str, list[float]] = {}
    logits, _ = batched(teacher, images)
    count = len(images) // len(train.order)
    answers = logits.argmax(1).reshape(-1, count)
    found["right"] = (answers == torch.arange(len(answers))[:, None]).double().mean(1).tolist()
    for c in range(len(train.order)):
        places = range(min(4 * count, train.counts[c]))
        drawn = [image for i in places if (image := train.get(c, i)) is not None]
        real = torch.stack(drawn[:count])
        pair = teacher.features(torch.cat([real, images[c * count : (c + 1) * count]])).double()
        for name, value in manifold(pair[: len(real)], pair[len(real) :]).items():
            found.setdefault(name, []).append(value)
    return {name: round(float(np.mean(values)), 4) for name, values in found.items()}


def speed(pack: Pack, folder: Path | None, rounds: int = 2) -> dict[str, float]:
    """Images a second of the exact decoder, the better of the rounds."""
    best = {"images_per_second": 0.0, "images_per_cpu_second": 0.0}
    best["threads"] = torch.get_num_threads()
    with Decoder(pack, path=folder) as decoder:
        count = 4 * decoder.group * torch.get_num_threads()
        numbers = [i % len(pack) for i in range(count)]
        decoder.images(numbers[: decoder.group])
        for _ in range(rounds):
            wall, cpu = time.perf_counter(), time.process_time()
            decoder.images(numbers)
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            best["images_per_second"] = max(best["images_per_second"], round(count / wall, 2))
            best["images_per_cpu_second"] = max(
                best["images_per_cpu_second"], round(count / cpu, 2)
            )
    return best


@dataclass
class Clock:
    """Seconds of work that may be stopped and go on, kept in a file; it listens to events."""

    path: Path
    figures: dict[str, Any] = field(init=False)

    def __post_init__(self) -> None:
        known = json.loads(self.path.read_text("utf-8")) if self.path.exists() else {}
        self.figures = {"seconds": 0.0, "cpu_seconds": 0.0, "finished": False, **known}
        self._last = self._now()

    def _now(self) -> tuple[float, float]:
        return time.monotonic(), time.process_time()

    def __call__(self, event: Mapping[str, Any], *, finished: bool = False) -> None:
        """Write what has passed: at events, if the last writing is a second ago, and at the end."""
        now = self._now()
        if self.finished or (now[0] - self._last[0] < 1 and not finished):
            return
        for name, after, before in zip(("seconds", "cpu_seconds"), now, self._last, strict=True):
            self.figures[name] += after - before
        self._last = now
        threads = torch.get_num_threads()
        write_json(self.path, self.figures | {"finished": finished, "threads": threads})

    @property
    def finished(self) -> bool:
        done: bool = self.figures["finished"]
        return done

    def finish(self) -> dict[str, Any]:
        """Stop, and return the figures."""
        self({}, finished=True)
        figures = json.loads(self.path.read_text("utf-8"))
        return {
            **{name: round(figures[name], 1) for name in ("seconds", "cpu_seconds")},
            "threads": figures["threads"],
        }


@dataclass(frozen=True)
class Made:
    """A pack, where its backbone lies if it is not `mini`, and what encoding took."""

    pack: Pack
    folder: Path | None
    encode: dict[str, Any]


class Run:
    """The real images, the teacher, and the packs and students in a work directory.

    Args:
        ways: by name, from cheap to dear.
    """

    def __init__(
        self,
        real: Path,
        work: Path,
        *,
        ways: Mapping[str, Way] = WAYS,
        teacher_samples: int = SAMPLES,
    ) -> None:
        train, test = (open_source(real, split=split) for split in ("train", "test"))
        self.size = common_size(test)
        self.train = RealImages(train, train.classes, self.size, "training")
        self.test = RealImages(test, train.classes, self.size, "test")
        self.ways, self.samples = ways, teacher_samples
        self.code = code()
        self.work = work / self.code  # another version makes other packs, and trains other students
        self.work.mkdir(parents=True, exist_ok=True)
        self.events = Events([lambda event: say(event["text"]) if "text" in event else None])

    @cached_property
    def teacher(self) -> tuple[Teacher, dict[str, Any]]:
        """The one that all methods ask, and what its training took."""
        folder = self.work / f"teacher-{self.samples}"
        clock = Clock(folder.with_suffix(".json"))
        device = str(resolve_device(None))
        config = teacher_config(self.size, self.samples, 0, device)
        with closing(Journal(folder, {"samples": self.samples})) as journal:
            teacher = train_teacher(
                self.train.source,
                config,
                journal,
                Events([clock]),
                cache=self.work / "teachers",
                device=device,
            )
        return teacher, {"samples": self.samples, **clock.finish()}

    def photographs(self, count: int) -> Path:
        """A folder of the first of a draw of photographs of each class, without loss."""
        folder = self.work / f"photographs-{count}"
        if not folder.exists():
            with replace_folder(folder) as temporary:
                drawn = self.train.by_class(count, 0)
                for name, images in zip(self.train.source.classes, drawn, strict=True):
                    (temporary / name).mkdir()
                    for i, pixels in enumerate(images.permute(0, 2, 3, 1).numpy()):
                        Image.fromarray(pixels).save(temporary / name / f"{i:04d}.png")
        return folder

    def settings(self, name: str, ipc: int) -> EncodeSettings:
        """The settings of an encoding, but for the backbone that another one makes."""
        settings = replace(self.ways[name].settings, teacher_samples=self.samples)
        # codes takes all images that it gets
        return settings if settings.method == "codes" else replace(settings, images_per_class=ipc)

    def described(self, name: str, ipc: int) -> dict[str, Any]:
        """All settings that decide about a pack, those of the one whose backbone it takes, too."""
        if name == PHOTOGRAPHS:
            return {}
        value, after = described(self.settings(name, ipc)), self.ways[name].after
        if after is not None:
            value["after"] = self.described(after, self.ways[after].most)
        return value

    def path(self, name: str, ipc: int) -> Path:
        settings = json.dumps(self.described(name, ipc), sort_keys=True)
        return self.work / f"{name}-{ipc}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}.d3m"

    def made(self, name: str, ipc: int) -> Made:
        """The pack of a method, encoded when it is not there."""
        way = self.ways[name]
        count = max(way.most, ipc) if way.first else ipc
        path, settings = self.path(name, count), self.settings(name, count)
        if way.after is not None:
            settings = replace(settings, backbone=str(self.backbone(way.after)))
        figures = path.with_suffix(".json")
        if not Clock(figures).finished:
            teachers = self.teacher and self.work / "teachers"  # timed apart; encode finds it there
            say(f"encode: {way.title}, {count} of each class")
            source: Any = (
                self.photographs(count) if settings.method == "codes" else self.train.source
            )
            clock = Clock(figures)
            encode(source, path, settings, listeners=[clock], teachers=teachers)
            clock.finish()
        pack = read(path)
        folder = local_backbone(path, pack)
        if folder is None and settings.backbone not in (None, "mini"):
            folder = Path(settings.backbone)
        took = {"images_per_class": count, **Clock(figures).finish()}
        return Made(pack.first(ipc), folder, took)

    def backbone(self, name: str) -> Path:
        """The directory of the backbone that a method has trained, beside its pack or inside."""
        made = self.made(name, self.ways[name].most)
        folder = made.folder or unpack_backbone(made.pack)
        if folder is None:
            raise ValueError(f"{name} trains no backbone")
        return folder

    def bench(self, made: Made | None, ipc: int, protocol: str) -> Bench:
        return Bench(
            self.train,
            self.test,
            ipc * len(self.train.classes),
            PROTOCOLS[protocol],
            self.work / "students",
            backbone=made.folder if made else None,
            events=self.events,
        )

    def row_of_photographs(self, ipc: int) -> dict[str, Any]:
        """What can be said of random photographs; the images are those of the first student."""
        return {
            "way": PHOTOGRAPHS,
            "title": "random photographs, without loss",
            "after": None,
            "settings": self.described(PHOTOGRAPHS, ipc),
            "images_per_class": ipc,
            "likeness": likeness(self.teacher[0], self.train, self.train.draw(ipc, 0).images),
            "students": {},
        }

    def row(self, name: str, made: Made) -> dict[str, Any]:
        """Everything about a pack but its students."""
        pack, recipe, way = made.pack, made.pack.recipe, self.ways[name]
        ipc, ledger, teacher = pack.images_per_class, pack.ledger(), self.teacher[0]
        images = self.bench(made, ipc, next(iter(PROTOCOLS))).decode(pack).images
        return {
            "way": name,
            "title": way.title,
            "after": way.after,
            "settings": self.described(name, ipc),
            "images_per_class": ipc,
            "root": pack.root,
            "bytes": ledger.total,
            "adapter_bytes": ledger.sections.get("adapter", 0),
            "backbone_bytes": ledger.backbone,  # beside the pack
            "own_backbone": made.folder is not None or EMBEDDED in pack.extensions,
            "sampler": [recipe.sampler, len(recipe.sigmas) - 1, recipe.guidance],
            "provenance": json.loads(json.dumps(pack.provenance, default=dict)),
            "asks_teacher": "teacher" in pack.provenance,
            "encode": made.encode,
            "speed": speed(pack, made.folder),
            "likeness": likeness(teacher, self.train, fit(images, self.size)),  # as a student sees
            "students": {},
        }

    def measure(
        self,
        figures: dict[str, Any],
        *,
        only: Sequence[str],
        ipc: Sequence[int],
        protocols: Sequence[str],
        seeds: int,
        keep: Callable[[dict[str, Any]], None],
    ) -> None:
        """Add what is missing to the figures, and hand them to `keep` after each."""
        rows = figures.setdefault("rows", {})
        names = [name for name in (PHOTOGRAPHS, *self.ways) if name in only]
        for name, count in ((name, count) for name in names for count in ipc):
            key = f"{name} {count}"
            if key in rows and rows[key]["settings"] != self.described(name, count):
                del rows[key]
            taught = rows[key]["students"] if key in rows else {}
            lacking = [p for p in protocols if len(taught.get(p, {"runs": ()})["runs"]) < seeds]
            if key in rows and not lacking:
                continue
            made = None if name == PHOTOGRAPHS else self.made(name, count)
            benches = {protocol: self.bench(made, count, protocol) for protocol in lacking}
            if key not in rows:
                rows[key] = self.row_of_photographs(count) if made is None else self.row(name, made)
                figures["teacher"] = self.teacher[1]
                keep(figures)
            for protocol, bench in benches.items():
                if made is None:
                    entry = random_entry(self.train, count)
                else:
                    total, title = made.pack.ledger().total, f"{key}, {protocol}"
                    entry = pack_entry(bench, f"{name}-{count}", title, made.pack, total)
                for seed in range(seeds):
                    result = bench.run(entry, seed + 1)
                    rows[key]["students"][protocol] = result.to_json()
                    keep(figures)


def say(text: str) -> None:
    print(text, flush=True)


def seen_classes(text: str, classes: Sequence[str]) -> dict[str, bool]:
    """Return of each class whether the backbone was trained on its photographs."""
    names = {"none": (), "all": classes}.get(text, text.split(","))
    if unknown := set(names) - set(classes):
        raise SystemExit(f"--seen names no class of the source: {', '.join(sorted(unknown))}")
    return {name: name in names for name in classes}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--real", type=Path)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--name", help="of the target [that of the folder of --real]")
    parser.add_argument("--seen", help="all, none, or classes, as a,b: trained on by mini")
    names = (PHOTOGRAPHS, *WAYS)
    parser.add_argument("--only", default=",".join(names), help="methods, as d3m,modes")
    parser.add_argument("--ipc", default="10,50")
    parser.add_argument("--protocols", default="quick,standard")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--teacher-samples", type=int, default=SAMPLES)
    parser.add_argument("--list", action="store_true", help="name the methods, measure nothing")
    args = parser.parse_args(arguments)
    if args.list:
        for name, way in WAYS.items():
            say(f"{name:18} d3pack encode --method {way.title}")
        return
    if args.real is None or args.work is None or args.seen is None:
        parser.error("--real, --work and --seen are needed to measure")
    only, protocols = args.only.split(","), args.protocols.split(",")
    if unknown := [*{*only} - {*names}, *{*protocols} - {*PROTOCOLS}]:
        parser.error(f"unknown: {', '.join(unknown)}")
    run = Run(args.real, args.work, teacher_samples=args.teacher_samples)
    name = args.name or args.real.resolve().name
    path = RESULTS / f"methods-{name}.json"
    figures = load(path)
    if figures.get("code") != run.code:
        figures = {}
    figures |= {
        "target": name,
        "code": run.code,
        "ways": [*names],
        "classes": seen_classes(args.seen, run.train.classes),
        "images": {"train": sum(run.train.counts), "test": sum(run.test.counts)},
    }
    run.measure(
        figures,
        only=only,
        ipc=[int(count) for count in args.ipc.split(",")],
        protocols=protocols,
        seeds=args.seeds,
        keep=lambda figures: save(path, WHAT, command("methods", arguments), figures),
    )
