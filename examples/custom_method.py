"""A method of one's own: prompts from the class names alone, nothing learned.

    python examples/custom_method.py photos/ names.d3m

A method is one class with `plan`, `estimate` and `encode`. Installed under the entry point group
"d3pack.methods" it is there for `d3pack encode --method names`; here it is called by hand.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from d3pack.backbones import Backbone, open_backbone
from d3pack.decode.samplers import schedule
from d3pack.encode import EncodeOptions, Plan, Run
from d3pack.encode.complete import provenance, with_probes
from d3pack.format import write
from d3pack.format.codecs import encode_prompts
from d3pack.format.pack import Pack
from d3pack.format.recipe import Recipe
from d3pack.sources import Source, open_source
from d3pack.system.events import Events
from d3pack.system.journal import Journal

VECTORS = 4


@dataclass(frozen=True)
class NamesPlan:
    """What this method will do."""

    backbone: Backbone
    classes: tuple[str, ...]

    def to_json(self) -> Mapping[str, Any]:
        return {"revision": self.backbone.ref.revision, "vectors": VECTORS}

    def lines(self) -> list[str]:
        return [f"{len(self.classes)} classes, prompted by their names"]


class Names:
    """The baseline that every learned prompt has to beat."""

    name = "names"

    def plan(self, source: Source, options: EncodeOptions, device: str) -> NamesPlan:
        return NamesPlan(open_backbone(options.backbone or "mini", device=device), source.classes)

    def estimate(self, source: Source, plan: Plan, options: EncodeOptions) -> Mapping[str, Any]:
        return {"bytes": 5000, "seconds": {}, "seconds_total": 1.0}

    def encode(self, run: Run) -> Pack:
        assert isinstance(run.plan, NamesPlan)
        backbone = run.plan.backbone
        vectors = [backbone.name_vectors(name, VECTORS).float().cpu() for name in run.plan.classes]
        prompts = np.stack([each.numpy() for each in vectors])[:, None]  # (C, 1 mode, k, D)
        pack = Pack(
            classes=run.plan.classes,
            images_per_class=run.options.images_per_class,
            recipe=Recipe(
                backbone=backbone.ref,
                size=backbone.image_size,
                sampler="dpmpp-2m",
                sigmas=schedule(backbone.levels.alphas_cumprod, "dpmpp-2m", 12),
                guidance=2.5,
            ),
            prompts=encode_prompts(prompts, "f16"),
            seed=run.options.seed,
            provenance=provenance(
                self.name,
                run.source,
                run.options,
                teacher=None,
                metrics={},
                seen=0,
                bad=0,
                fingerprint=run.source.fingerprint(),
            ),
        )
        return with_probes(pack, backbone, 2)


def main(folder: str, output: str, backbone: str = "mini") -> None:
    source, method = open_source(folder), Names()
    options = EncodeOptions(backbone=backbone, images_per_class=4)
    work = Path(output + ".work")
    journal = Journal(work, {"source": source.fingerprint()})
    plan = method.plan(source, options, "cpu")
    pack = method.encode(Run(source, options, plan, journal, Events(), "cpu", work))
    journal.close()
    write(pack, output)
    print(f"{output}: {pack.ledger().total} bytes, root {pack.root}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
