"""The decoder: (class, index) -> the same uint8 image, however it is asked for."""

from __future__ import annotations

import operator
import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from d3pack.backbones import (
    Condition,
    apply_adapter,
    check_adapter,
    enable_fast_kernels,
    open_backbone,
    to_uint8,
)
from d3pack.decode import noise, samplers
from d3pack.decode.embedded import unpack_backbone
from d3pack.decode.locks import lock_of
from d3pack.decode.modes import Numerics, choose_numerics, exact_numerics
from d3pack.errors import BackboneChangedError, BackboneError, UsageError
from d3pack.format.codecs import decode_adapter, decode_prompts
from d3pack.system import resolve_device

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.backbones import Backbone, FileProgress
    from d3pack.format.pack import Pack

Made = TypeVar("Made")
Pair = tuple[int, int]
_MOST_SMALL, _MOST_LARGE, _SMALL = 32, 4, 100_000_000  # groups at once, by parameters
_KEPT = 256 << 20  # bytes of conditions kept: SD 1.5 in float32 has room for 1100 classes


class Decoder:
    """Rebuilds the images of a pack.

    Every forward runs at one shape, `recipe.group` images, padded; so an image is a function of
    pack, class and index alone. `numerics="fast"` gives that up for speed; `describe()` says so.
    """

    def __init__(
        self,
        pack: Pack,
        *,
        device: str | torch.device | None = None,
        numerics: str = "exact",
        switches: Iterable[str] | None = None,
        tiny_vae: str | Path | None = None,
        group: int | None = None,
        workers: int | None = None,
        backbone: Backbone | None = None,
        path: str | Path | None = None,
        progress: FileProgress | None = None,
    ) -> None:
        self.pack = pack
        if device is None and backbone is not None:
            device = next(iter(backbone.named_tensors().values())).device
        self.device = resolve_device(device)
        recipe = pack.recipe
        if backbone is not None and numerics == "fast":
            if switches or tiny_vae:
                raise UsageError(
                    "switches would change a backbone that is shared",
                    hint="let the decoder open its own",
                )
            switches = ["bf16"] if backbone.dtype == torch.bfloat16 else []
        self.numerics: Numerics = choose_numerics(numerics, switches, recipe.dtype, tiny_vae)
        if group is not None and group != recipe.group and not self.numerics.fast:
            raise UsageError(
                f"exact images need the recipe's group of {recipe.group}",
                hint='another group is a switch of numerics="fast"',
            )
        for name, value in (("group", group), ("workers", workers)):
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}", hint="at least 1, or leave it out")
        self.group = group or recipe.group
        self.workers = workers  # groups at once on a CPU; None: as many as torch has threads
        self._steps = samplers.plan(recipe.sampler, recipe.sigmas, recipe.extra)
        self._prompts = torch.from_numpy(decode_prompts(pack.prompts).copy())  # (C, m, k, D)
        self._open = ExitStack()
        self._with_room("the backbone", partial(self._enter, backbone, path, progress))
        self._conditions: OrderedDict[Pair, Condition] = OrderedDict()
        self._kept = 0
        self._nothing: Condition | None = None
        self._lock = lock_of(self.backbone)
        self._pool: tuple[tuple[int, int], ThreadPoolExecutor] | None = None

    def _enter(
        self, backbone: Backbone | None, path: str | Path | None, progress: FileProgress | None
    ) -> None:
        """The backbone and what the pack puts on it, on the device."""
        pack = self.pack
        self.backbone = backbone or open_backbone(
            pack.recipe.backbone,
            path=path or unpack_backbone(pack),
            device=self.device,
            dtype=self.numerics.dtype,
            progress=progress,
        )
        self._check()
        tuned = decode_adapter(pack.adapter) if pack.adapter is not None else {}
        self._adapter = {n: torch.from_numpy(v.copy()).to(self.device) for n, v in tuned.items()}
        self._tuned = len(self._adapter)
        check_adapter(self.backbone, self._adapter)
        if self.numerics.fast and backbone is None:
            # for good, and before attention is fused: nobody else sees this backbone
            self._open.enter_context(apply_adapter(self.backbone, self._adapter))
            self._adapter = {}
            enable_fast_kernels(self.backbone, self.numerics.switches, self.numerics.tiny_vae)

    def _check(self) -> None:
        recipe, backbone = self.pack.recipe, self.backbone
        if dict(backbone.ref.files) != dict(recipe.backbone.files):
            raise BackboneChangedError("the open backbone is not the one that the pack names")
        # of the weights: a backbone may have been opened on "cuda", which names no device for good
        there = next(iter(backbone.named_tensors().values())).device
        if backbone.dtype != self.numerics.dtype or there != self.device:
            raise UsageError(
                f"the open backbone is {backbone.dtype} on {there}",
                hint=f"this pack and mode want {self.numerics.dtype} on {self.device}",
            )
        self.latent_shape = backbone.latent_shape_for(recipe.size)
        most, width = backbone.prompt_shape
        k, d = self._prompts.shape[2:]
        if d != width or k > most:
            raise BackboneError(
                f"the pack holds {k} vectors of {d} a prompt, the backbone takes up to {most}"
                f" of {width}",
                code="E_BACKBONE_PROMPT",
                hint="the pack was made for another backbone",
            )

    def __len__(self) -> int:
        return len(self.pack.classes) * self.pack.images_per_class

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the backbone and everything computed from it."""
        self._conditions.clear()
        self._nothing = None
        self._kept = 0
        if self._pool is not None:
            self._pool[1].shutdown()
            self._pool = None
        self._open.close()
        self.__dict__.pop("backbone", None)  # a second time there is none

    def describe(self) -> dict[str, Any]:
        """How the images are made: what a log should say."""
        recipe = self.pack.recipe
        return {
            "numerics": self.numerics.name,
            "switches": list(self.numerics.switches),
            "device": str(self.device),
            "dtype": str(self.numerics.dtype).removeprefix("torch."),
            "group": self.group,
            "backbone": recipe.backbone.repo or recipe.backbone.revision,
            "revision": recipe.backbone.revision,
            "sampler": recipe.sampler,
            "steps": len(self._steps),
            "guidance": recipe.guidance,
            "size": list(recipe.size),
            "adapter": self._tuned,
        }

    def pairs(self, wanted: Iterable[int | Pair]) -> list[Pair]:
        """(class, index) pairs; a plain number counts through the dataset, class after class."""
        classes, count = len(self.pack.classes), self.pack.images_per_class
        found = []
        for item in wanted:
            words = _whole_numbers(item)
            if len(words) == 1:
                if not 0 <= words[0] < classes * count:
                    raise UsageError(
                        f"image {words[0]} is out of range", hint=f"there are {classes * count}"
                    )
                found.append(divmod(words[0], count))
                continue
            c, i = words
            if not 0 <= c < classes:
                raise UsageError(f"class {c} is out of range", hint=f"there are {classes}")
            if not 0 <= i < count:
                raise UsageError(f"index {i} is out of range", hint=f"there are {count} a class")
            found.append((c, i))
        return found

    def images(self, wanted: Sequence[int | Pair] | Iterable[int | Pair], epoch: int = 0) -> Tensor:
        """uint8 (N, 3, H, W) on the device, in the order asked. `epoch` > 0: fresh noise."""
        pairs = self.pairs(wanted)
        height, width = self.pack.recipe.size
        shape = (len(pairs), 3, height, width)
        out = self._with_room(
            f"{len(pairs)} images of {height}x{width} at once",
            partial(torch.empty, shape, dtype=torch.uint8, device=self.device),
        )
        for positions, made in self.stream(pairs, epoch):
            out[positions[0] : positions[-1] + 1] = made
        return out

    def stream(
        self, wanted: Iterable[int | Pair], epoch: int = 0
    ) -> Iterator[tuple[range, Tensor]]:
        """(positions, images) group by group: memory does not grow with the number of images."""
        pairs = self.pairs(wanted)
        height, width = self.pack.recipe.size
        what = f"a group of {self.group} images of {height}x{width}"
        starts = range(0, len(pairs), self.group)
        side_by_side = self.workers or self._side_by_side()
        for round_start in range(0, len(starts), side_by_side):
            now = starts[round_start : round_start + side_by_side]
            parts = [pairs[first : first + self.group] for first in now]
            padded = [part + part[-1:] * (self.group - len(part)) for part in parts]
            made = self._with_room(what, partial(self._made, padded, epoch, side_by_side))
            for first, part, images in zip(now, parts, made, strict=True):
                # a copy: what inference mode made could not be changed in place outside
                whole = images[: len(part)].clone(memory_format=torch.contiguous_format)
                yield range(first, first + len(part)), whole

    def _side_by_side(self) -> int:
        """Groups at once. An exact forward keeps to one core, so every core gets a group."""
        if self.device.type != "cpu" or self.numerics.fast:
            return 1
        weights = sum(p.numel() for p in self.backbone.named_tensors().values())
        return min(torch.get_num_threads(), _MOST_SMALL if weights < _SMALL else _MOST_LARGE)

    def _made(self, groups: list[list[Pair]], epoch: int, side_by_side: int) -> list[Tensor]:
        """Groups of one size. Never another size: a smaller one would give other bits."""
        with (
            self._lock,
            torch.autocast(self.device.type, enabled=False),  # a caller's would round our sums
            exact_numerics(self.device, self.numerics),
            apply_adapter(self.backbone, self._adapter),
        ):
            models = [self._model(pairs) for pairs in groups]
            if len(groups) == 1:
                return [self._images(groups[0], models[0], epoch)]
            run = self._threads(side_by_side).map
            return list(run(self._images, groups, models, [epoch] * len(groups)))

    def _threads(self, count: int) -> ThreadPoolExecutor:
        """At least this many, kept between calls: each has compiled kernels of its own.

        A forked child has none of its parent's threads and makes its own.
        """
        if self._pool is None or self._pool[0][0] != os.getpid() or self._pool[0][1] < count:
            # a thread is told once: telling it again would throw its compiled kernels away
            start = lambda: torch.set_num_threads(1)  # noqa: E731
            self._pool = ((os.getpid(), count), ThreadPoolExecutor(count, initializer=start))
        return self._pool[1]

    @torch.inference_mode()
    def _images(self, pairs: list[Pair], model: samplers.Model, epoch: int) -> Tensor:
        latents = self._latents(pairs, model, epoch)
        images = self.backbone.decode_float(latents)
        # one look at both: on CUDA it waits for the device; and a pixel that is no number would
        # become some colour
        if not torch.isfinite(latents.sum() + images.sum()):
            what = "pixels" if torch.isfinite(latents.sum()) else "latents"
            raise BackboneError(
                f"the backbone made {what} that are not finite",
                code="E_BACKBONE_NOT_FINITE",
                hint=f"{self.numerics.dtype} is too narrow for it, or the prompts have diverged",
            )
        return to_uint8(images)

    def _latents(self, pairs: list[Pair], model: samplers.Model, epoch: int) -> Tensor:
        recipe, pack = self.pack.recipe, self.pack
        c = np.array([c for c, _ in pairs])
        i = np.array([i for _, i in pairs])
        words, candidates = pack.counters(c, i)

        def fresh(step: int) -> Tensor:
            return noise.normal_torch(
                pack.seed,
                words,
                candidates,
                self.latent_shape,
                draw=noise.draw_number(step, epoch),
                device=self.device,
            )

        x = samplers.start(fresh(0), recipe.sigmas)
        return samplers.sample(recipe.sampler, model, x, recipe.sigmas, fresh, recipe.extra)

    @torch.inference_mode()
    def _model(self, pairs: list[Pair]) -> samplers.Model:
        """The denoiser with its conditions, guided in one forward of twice the group."""
        recipe, backbone = self.pack.recipe, self.backbone
        modes = self._prompts.shape[1]
        given = Condition.cat(self._condition(c, i % modes) for c, i in pairs)
        if recipe.guidance == 1.0:
            return lambda x, sigma: backbone.denoise(x, sigma, given)
        if self._nothing is None:
            self._nothing = backbone.unconditional()
        both = Condition.cat([self._nothing.expand(len(pairs)), given])
        channels = recipe.guided_channels or self.latent_shape[0]

        def guided(x: Tensor, sigma: float) -> Tensor:
            without, with_class = backbone.denoise(torch.cat([x, x]), sigma, both).chunk(2)
            mixed = (with_class - without) * recipe.guidance + without
            if channels >= mixed.shape[1]:
                return mixed
            return torch.cat([mixed[:, :channels], with_class[:, channels:]], dim=1)

        return guided

    def _condition(self, c: int, mode: int) -> Condition:
        """Computed alone, so that no neighbour can change a bit; kept, the oldest dropped first."""
        key = (c, mode)
        found = self._conditions.get(key)
        if found is None:
            prompt = self._prompts[c, mode][None].to(self.device)
            found = self.backbone.condition(prompt, self.pack.recipe.template)
            self._conditions[key] = found
            self._kept += _bytes(found)
            while self._kept > _KEPT and len(self._conditions) > 1:
                self._kept -= _bytes(self._conditions.popitem(last=False)[1])
        self._conditions.move_to_end(key)
        return found

    def _with_room(self, what: str, make: Callable[[], Made]) -> Made:
        try:
            return make()
        except RuntimeError as error:
            if not _out_of_memory(error):
                raise
        # out here nothing refers to what was made so far, and its memory is free again
        raise BackboneError(
            f"{self.device} has no room for {what}",
            code="E_BACKBONE_MEMORY",
            hint="free memory, use a larger device, or encode the pack with a smaller group;"
            ' numerics="fast" also takes group= (other pixels)',
        )


def _whole_numbers(item: Any) -> tuple[int, ...]:
    """(number,) or (class, index), of Python, numpy or torch."""
    try:
        return (operator.index(item),)
    except TypeError:
        pass
    try:
        c, i = (operator.index(part) for part in item)
    except (TypeError, ValueError):
        shown = " ".join(repr(item).split())
        raise UsageError(
            f"{shown:.40} is no image", hint="give a number, or a pair (class, index)"
        ) from None
    return c, i


def _bytes(condition: Condition) -> int:
    return sum(t.numel() * t.element_size() for t in condition.tensors.values())


# how allocators, CUDA and its libraries put it
_NO_ROOM = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def _out_of_memory(error: RuntimeError) -> bool:
    words = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(w in words for w in _NO_ROOM)
