"""A method of one's own: prompts from the class names alone, nothing learned.

    python examples/custom_method.py photos/ names.d3m

As an entry point of the group "d3pack.methods" it is there for `d3pack encode --method names`.
"""

import sys
from dataclasses import dataclass

import torch

from d3pack.backbones import Backbone, open_backbone
from d3pack.decode import schedule
from d3pack.encode import Allocation, Draft, EncodeContext, EncodePlan, EncodeRun, Estimate, encode
from d3pack.encode import EncodeSettings as Settings
from d3pack.format import Recipe
from d3pack.sources import Source
from d3pack.system import option


@dataclass(frozen=True)
class NamesSettings:
    vectors: int = option(4, "Vectors per class, of its name.", ge=1)


@dataclass(frozen=True)
class NamesJob:
    plan: EncodePlan
    backbone: Backbone

    def describe(self) -> EncodePlan:
        return self.plan

    def estimate(self) -> Estimate:
        return Estimate(nbytes=5000, seconds={"prompts": 1.0})

    def run(self, run: EncodeRun) -> Draft:
        plan, backbone = self.plan, self.backbone
        vectors = [backbone.name_vectors(name, plan.allocation.vectors) for name in plan.classes]
        prompts = torch.stack(vectors)[:, None].float().cpu().numpy()  # (C, 1 mode, k, D)
        sigmas = schedule(backbone.levels.alphas_cumprod, "dpmpp-2m", 12)
        recipe = Recipe(backbone.ref, plan.size, "dpmpp-2m", sigmas, guidance=2.5)
        return Draft(recipe, prompts, backbone)


class Names:
    name, settings = "names", NamesSettings

    def prepare(
        self, source: Source, settings: Settings, own: NamesSettings, context: EncodeContext
    ) -> NamesJob:
        backbone = open_backbone(settings.backbone or "mini", device=context.device)
        parts = Allocation(vectors=own.vectors, codec="f16", probes=2)
        plan = EncodePlan.of(source, settings, size=backbone.image_size, allocation=parts)
        return NamesJob(plan, backbone)


if __name__ == "__main__":
    encode(sys.argv[1], sys.argv[2], Settings(4), method=Names())
