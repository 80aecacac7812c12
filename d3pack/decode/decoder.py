"""The decoder: (class, index) to one uint8 image, the same whichever way it is asked for."""

from __future__ import annotations

import operator
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from d3pack.backbones import (
    Condition,
    apply_adapter,
    check_adapter,
    enable_fast_kernels,
    open_backbone,
    replace_autoencoder,
    to_grey,
    to_uint8,
)
from d3pack.decode import noise, samplers
from d3pack.decode.carried import unpack_backbone
from d3pack.decode.codes import chosen_noise
from d3pack.decode.numerics import Numerics, choose_numerics, exact_numerics
from d3pack.decode.pairs import Pair
from d3pack.errors import BackboneChangedError, BackboneError, UsageError
from d3pack.format.codecs import codes_at, coding_of, decode_adapter, decode_prompts
from d3pack.system import resolve_device, seconds_of

if TYPE_CHECKING:
    from torch import Tensor

    from d3pack.backbones import Backbone, FileProgress
    from d3pack.format import Array, Pack
    from d3pack.system import Counter

T = TypeVar("T")
# groups decoded in parallel, for backbones below and above this many parameters
_MAX_SMALL, _MAX_LARGE, _SMALL = 32, 4, 100_000_000
_TICK = 0.2  # seconds after which it is told how far groups are
_FEW_PIXELS = 1 << 16  # of images that are timed together
_MAX_CONDITIONS = 256 << 20  # bytes kept: of SD 1.5 in float32, 1100 classes


class Decoder:
    """Makes the images of a pack.

    Every forward pass has one shape, `recipe.group` images with padding, so an image is a function
    of pack, class and index alone. `numerics="fast"` gives that up for speed; `describe()` tells.

    A decoder is a context manager, `close` frees its backbone. It may be used by several threads.

    Args:
        pack: what to decode.
        device: "cpu", "cuda", "cuda:1", ...; by default that of `backbone`, else CUDA where there
            is one.
        numerics: "exact" for the same images everywhere, or "fast" for other images sooner.
        switches: of fast numerics, from "bf16", "channels_last", "fused_attention", "compile" and
            "tiny_vae"; by default the first three.
        tiny_vae: directory of a small autoencoder, for the switch of that name.
        group: images of one forward pass, for fast numerics; by default that of the recipe.
        workers: groups decoded in parallel on a CPU; by default as many as torch has threads.
        backbone: an open backbone to share, which must be the one that the pack names.
        path: directory of the backbone's files; by default they are carried by the pack, embedded
            in d3pack, or come from the Hub.
        progress: called with (file, bytes done, bytes in all) while files are hashed.

    Attributes:
        pack: the pack.
        device: where the models run.
        numerics: `Numerics`: name, dtype and switches.
        group: images of one forward pass.
        backbone: the open backbone.

    Raises:
        BackboneError: the backbone is missing, changed, refused, or does not fit the pack.
        UsageError: arguments contradict each other.

    Example:
        >>> import d3pack
        >>> pack = d3pack.read("cifar10.d3m")
        >>> with d3pack.Decoder(pack, device="cpu") as decoder:
        ...     images = decoder.images([(3, 0), (3, 1)])  # the best two cats
        >>> images.shape, images.dtype
        (torch.Size([2, 3, 64, 64]), torch.uint8)
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
            device = _device_of(backbone)
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
                hint='only numerics="fast" takes another group',
            )
        for name, value in (("group", group), ("workers", workers)):
            if value is not None and value < 1:
                raise UsageError(f"invalid {name} {value}: expected at least 1")
        self.group = group or recipe.group
        self.workers = workers
        self._steps = samplers.plan(recipe.sampler, recipe.sigmas, recipe.extra)
        self._coding = None if pack.codes is None else coding_of(pack.codes)
        self._resources = ExitStack()
        self._allocate("the backbone", partial(self._open, backbone, path, progress))
        self._conditions: OrderedDict[Pair, Condition] = OrderedDict()
        self._conditions_nbytes = 0
        self._unconditional: dict[bool, Condition] = {}  # by whether it guides
        self._lock = lock_of(self.backbone)
        self._pool: tuple[tuple[int, int], ThreadPoolExecutor] | None = None
        self._watch = threading.local()  # whom each thread tells of its steps

    def _open(
        self, backbone: Backbone | None, path: str | Path | None, progress: FileProgress | None
    ) -> None:
        """Open the backbone, and put the pack's adapter on the device."""
        pack = self.pack
        self.backbone = backbone or open_backbone(
            pack.recipe.backbone,
            path=path or unpack_backbone(pack),
            device=self.device,
            dtype=self.numerics.dtype,
            encoder=pack.recipe.template is not None,
            progress=progress,
        )
        self._check_backbone()
        # (C, m, k, D); what the backbone does not take could be far larger than the file
        prompts = np.zeros(0) if pack.prompts is None else decode_prompts(pack.prompts)
        self._prompts = torch.from_numpy(prompts.copy())
        tensors = decode_adapter(pack.adapter) if pack.adapter is not None else {}
        self._adapter = {n: torch.from_numpy(v.copy()).to(self.device) for n, v in tensors.items()}
        self._adapter_size = len(self._adapter)
        check_adapter(self.backbone, self._adapter)
        if self.numerics.fast and backbone is None:
            # for good, and before attention is fused: nobody else uses this backbone
            self._resources.enter_context(apply_adapter(self.backbone, self._adapter))
            self._adapter = {}
            if self.numerics.tiny_vae is not None:
                replace_autoencoder(self.backbone, self.numerics.tiny_vae)
            enable_fast_kernels(self.backbone, self.numerics.switches)

    def _check_backbone(self) -> None:
        recipe, backbone = self.pack.recipe, self.backbone
        if backbone.ref.lock != recipe.backbone.lock:
            raise BackboneChangedError("the open backbone is not the one that the pack names")
        device = _device_of(backbone)
        if backbone.dtype != self.numerics.dtype or device != self.device:
            raise UsageError(
                f"the open backbone is {backbone.dtype} on {device}",
                hint=f"this pack and numerics need {self.numerics.dtype} on {self.device}",
            )
        self.latent_shape = backbone.latent_shape_for(recipe.size)
        prompts = self.pack.prompts or self.pack.unconditional
        if not (backbone.output_shape[1] if recipe.template is None else backbone.prompt_shape[0]):
            raise BackboneError(
                f"the pack is made with {'outputs' if recipe.template is None else 'tokens'}, which"
                " the backbone does not take",
                code="E_BACKBONE_PROMPT",
                hint="the pack was made for another backbone",
            )
        if prompts is None:
            return
        least, most, width = (
            backbone.output_shape if recipe.template is None else (1, *backbone.prompt_shape)
        )
        _, k, d = prompts.params["shape"]
        if d != width or not least <= k <= most:
            span = f"up to {most}" if least <= 1 else f"{least} to {most}"
            what = "outputs" if recipe.template is None else "vectors"
            raise BackboneError(
                f"the pack holds {k} {what} of {d} a prompt, the backbone takes {span} of {width}",
                code="E_BACKBONE_PROMPT",
                hint="the pack was made for another backbone",
            )

    def __len__(self) -> int:
        return len(self.pack)

    def __enter__(self) -> Decoder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the backbone and everything computed with it. Closing twice is allowed."""
        self._conditions.clear()
        self._unconditional.clear()
        self._conditions_nbytes = 0
        if self._pool is not None:
            self._pool[1].shutdown()
            self._pool = None
        self._resources.close()
        self.__dict__.pop("backbone", None)

    def describe(self) -> dict[str, Any]:
        """Return how the images are made, as plain values for a log."""
        recipe, coding = self.pack.recipe, self._coding
        sampler: str = recipe.sampler
        steps, guidance = len(self._steps), recipe.guidance
        if coding is not None and self.pack.all_coded:
            sampler, steps, guidance = "codes", len(coding.atoms), coding.guidance
        return {
            "numerics": self.numerics.name,
            "switches": list(self.numerics.switches),
            "device": str(self.device),
            "dtype": str(self.numerics.dtype).removeprefix("torch."),
            "group": self.group,
            "backbone": recipe.backbone.repo or recipe.backbone.revision,
            "revision": recipe.backbone.revision,
            "sampler": sampler,
            "steps": steps,
            "guidance": guidance,
            "size": list(recipe.size),
            "adapter": self._adapter_size,
        }

    def pairs(self, items: Iterable[int | Pair]) -> list[Pair]:
        """Return (class, index) pairs; a number counts through the dataset, class after class."""
        classes, count = len(self.pack.classes), self.pack.images_per_class
        pairs = []
        for item in items:
            numbers = _to_integers(item)
            if len(numbers) == 1:
                if not 0 <= numbers[0] < classes * count:
                    raise UsageError(
                        f"image {numbers[0]} is out of range", hint=f"there are {classes * count}"
                    )
                pairs.append(divmod(numbers[0], count))
                continue
            c, i = numbers
            if not 0 <= c < classes:
                raise UsageError(f"class {c} is out of range", hint=f"there are {classes}")
            if not 0 <= i < count:
                raise UsageError(f"index {i} is out of range", hint=f"there are {count} a class")
            pairs.append((c, i))
        return pairs

    def images(self, items: Sequence[int | Pair] | Iterable[int | Pair], epoch: int = 0) -> Tensor:
        """Return images as uint8 (N, 3, H, W) on the device, in the given order.

        Args:
            items: numbers of images, or (class, index) pairs.
            epoch: above 0, other images of the same prompts: each epoch has its own noise.

        Raises:
            UsageError: an item is out of range.
            BackboneError: no memory (E_BACKBONE_MEMORY), or the images are not finite.
        """
        pairs = self.pairs(items)
        height, width = self.pack.recipe.size
        shape = (len(pairs), 3, height, width)
        out = self._allocate(
            f"{len(pairs)} images of {height}x{width} at once",
            partial(torch.empty, shape, dtype=torch.uint8, device=self.device),
        )
        for positions, images in self.stream(pairs, epoch):
            out[positions[0] : positions[-1] + 1] = images
        return out

    def stream(self, items: Iterable[int | Pair], epoch: int = 0) -> Iterator[tuple[range, Tensor]]:
        """Yield (positions, images) group by group, in memory that does not grow with the items.

        Args:
            items: numbers of images, or (class, index) pairs; they are read as they are needed.
            epoch: see `images`.
        """
        height, width = self.pack.recipe.size
        what = f"a group of {self.group} images of {height}x{width}"
        parallel = self.workers or self.parallel_groups()
        items, start = iter(items), 0
        while pairs := self.pairs(islice(items, parallel * self.group)):
            groups = [pairs[at : at + self.group] for at in range(0, len(pairs), self.group)]
            parts = [part for group in groups for part in self._kinds(group)]
            padded = [part + part[-1:] * (self.group - len(part)) for part in parts]
            results = iter(self._allocate(what, partial(self._decode, padded, epoch, parallel)))
            for group in groups:
                # a copy: tensors of inference mode cannot be changed in place outside of it
                kinds = self._kinds(group)
                made = [next(results)[: len(part)] for part in kinds]
                images = made[0] if len(made) == 1 else _merged(group, kinds, made)
                copy = images.clone(memory_format=torch.contiguous_format)
                yield range(start, start + len(group)), copy
                start += len(group)

    def plan(self, items: Iterable[int | Pair]) -> list[tuple[Pair, int]]:
        """Return each forward group that some images take: its first image, and its steps."""
        pairs = self.pairs(items)
        groups = (pairs[at : at + self.group] for at in range(0, len(pairs), self.group))
        firsts = [part[0] for group in groups for part in self._kinds(group)]
        return [(pair, self._steps_of(pair)) for pair in firsts]

    def _steps_of(self, pair: Pair) -> int:
        """Return the steps that an image takes."""
        coded = pair[1] < self.pack.coded_images
        return len(self._coding.sigmas) - 1 if coded and self._coding else len(self._steps)

    @contextmanager
    def watched(self, passed: Callable[[float], None] | None) -> Iterator[None]:
        """Call a function after every step of a group, or soon after, in the caller's thread.

        It must not use the decoder, which is at work.

        Args:
            passed: function of how many images' whole work the step was; None tells nobody.
        """
        before, self._watch.passed = self._watching(), passed
        try:
            yield
        finally:
            self._watch.passed = before

    def _watching(self) -> Callable[[float], None] | None:
        passed: Callable[[float], None] | None = getattr(self._watch, "passed", None)
        return passed

    @contextmanager
    def counted(self, progress: Counter | None, images: int) -> Iterator[None]:
        """Count images while their steps pass: a group may take minutes.

        Args:
            progress: function of (images done, in all); None counts nothing.
            images: how many are made meanwhile.
        """
        if progress is None:
            yield
            return
        done = 0.0

        def passed(share: float) -> None:
            nonlocal done
            done += share
            progress(min(int(done + 1e-6), images), images)

        with self.watched(passed):
            yield
        progress(images, images)

    @torch.inference_mode()
    def time_one(self, pair: Pair) -> tuple[float, float]:
        """Return the seconds that one image takes for a step, and for its pixels.

        A few small ones are timed together, because each takes less in a group.
        """
        height, width = self.pack.recipe.size
        few = min(self.group, max(1, min(4, _FEW_PIXELS // (height * width))))
        with self._at_work():
            pairs = [pair] * few
            model, x = self._model(pairs), self._noise(pairs, 0, 0)
            sigma = self.pack.recipe.sigmas[0]
            step = self._allocate(
                "one image", lambda: seconds_of(lambda: model(x, sigma), enough=1.0)
            )
            pixels = self._allocate(
                "one image", lambda: seconds_of(lambda: self.backbone.decode_float(x), enough=1.0)
            )
            return (step + self._noise_seconds(pairs)) / few, pixels / few

    def _noise_seconds(self, pairs: list[Pair]) -> float:
        """Return the seconds of the noise of a step: a code may choose a thousand atoms in each."""
        coding = self._coding
        if coding is None or pairs[0][1] >= self.pack.coded_images:
            return 0.0
        atoms, signs = self._choices(pairs)
        one, seed = replace(coding, atoms=(1,)), self.pack.seed
        code, shape, device = (atoms[:, :1], signs[:, :1]), self.latent_shape, self.device
        atom = seconds_of(lambda: chosen_noise(seed, one, 0, *code, shape, device), enough=1.0)
        return atom * sum(coding.atoms) / len(coding.atoms)

    def _kinds(self, group: list[Pair]) -> list[list[Pair]]:
        """Return the images of a group that are made of codes, and those of seeds.

        Codes have a sampler of their own: a group of both kinds is made in two parts.
        """
        coded = [pair for pair in group if pair[1] < self.pack.coded_images]
        seeded = [pair for pair in group if pair[1] >= self.pack.coded_images]
        return [part for part in (coded, seeded) if part]

    def parallel_groups(self) -> int:
        """Return how many groups to decode at once: an exact forward pass uses one core."""
        if self.device.type != "cpu" or self.numerics.fast:
            return 1
        parameters = sum(p.numel() for p in self.backbone.named_tensors().values())
        return min(torch.get_num_threads(), _MAX_SMALL if parameters < _SMALL else _MAX_LARGE)

    def _decode(self, groups: list[list[Pair]], epoch: int, parallel: int) -> list[Tensor]:
        """Return the images of full groups: another size would give other bits."""
        passed = self._watching()
        with self._at_work():
            if len(groups) == 1:
                model = self._reporting(groups[0], passed)
                return [self._decode_group(groups[0], model, epoch)]
            shares = SimpleQueue[float]()
            tell, pool = None if passed is None else shares.put, self._threads(parallel)
            models = [self._reporting(pairs, tell) for pairs in groups]
            jobs = [
                pool.submit(self._decode_group, pairs, model, epoch)
                for pairs, model in zip(groups, models, strict=True)
            ]
            try:
                if passed is not None:
                    _hand_on(shares, passed, jobs)
                return [job.result() for job in jobs]
            finally:
                for job in jobs:
                    job.cancel()

    def explore(self, items: Iterable[int | Pair], use: Callable[[samplers.Model, Tensor], T]) -> T:
        """Call a function with the model of seeded images and their first noise; return its result.

        Args:
            items: numbers of images, or (class, index) pairs.
            use: takes a model (x, sigma) -> x0 of all the images, and noise (N, C, H, W).
        """
        pairs = self.pairs(items)
        groups = [pairs[at : at + self.group] for at in range(0, len(pairs), self.group)]
        with self._at_work():
            models = [self._model(group) for group in groups]
            run = self._threads(self.parallel_groups()).map

            @torch.inference_mode()
            def call(model: samplers.Model, x: Tensor, sigma: float) -> Tensor:
                return model(x, sigma)

            def together(x: Tensor, sigma: float) -> Tensor:
                return torch.cat(list(run(call, models, x.split(self.group), repeat(sigma))))

            return use(together, torch.cat([self._noise(group, 0, 0) for group in groups]))

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """Have the backbone alone, with the pack's adapter and exact numerics."""
        with (
            self._lock,
            torch.autocast(self.device.type, enabled=False),  # a caller's would round sums
            exact_numerics(self.device, self.numerics),
            apply_adapter(self.backbone, self._adapter),
        ):
            yield

    def _threads(self, count: int) -> ThreadPoolExecutor:
        """Return at least `count` threads, which are kept: each has compiled kernels of its own.

        A forked child has none of its parent's threads and makes its own.
        """
        if self._pool is None or self._pool[0][0] != os.getpid() or self._pool[0][1] < count:
            # once a thread: setting it again would drop its compiled kernels
            pool = ThreadPoolExecutor(count, initializer=partial(torch.set_num_threads, 1))
            self._pool = ((os.getpid(), count), pool)
        return self._pool[1]

    @torch.inference_mode()
    def _decode_group(self, pairs: list[Pair], model: samplers.Model, epoch: int) -> Tensor:
        latents = self._latents(pairs, model, epoch)
        images = self.backbone.decode_float(latents)
        # one test of both, because on CUDA it waits for the device; a pixel that is not a number
        # would become an arbitrary colour
        if not torch.isfinite(latents.sum() + images.sum()):
            what = "pixels" if torch.isfinite(latents.sum()) else "latents"
            raise BackboneError(
                f"the backbone made {what} that are not finite",
                code="E_BACKBONE_NOT_FINITE",
                hint=f"{self.numerics.dtype} is too narrow for it, or the prompts have diverged",
            )
        pixels = to_uint8(images)
        return to_grey(pixels) if self.pack.recipe.grey else pixels

    def _noise(self, pairs: list[Pair], step: int, epoch: int) -> Tensor:
        words, candidates = self.pack.counters([c for c, _ in pairs], [i for _, i in pairs])
        return noise.normal_torch(
            self.pack.seed,
            words,
            candidates,
            self.latent_shape,
            draw=noise.draw_number(step, epoch),
            device=self.device,
        )

    def _latents(self, pairs: list[Pair], model: samplers.Model, epoch: int) -> Tensor:
        recipe, pack = self.pack.recipe, self.pack
        draw = partial(self._noise, pairs, epoch=epoch)
        if pairs[0][1] >= pack.coded_images:
            x = samplers.start(draw(0), recipe.sigmas)
            return samplers.sample(recipe.sampler, model, x, recipe.sigmas, draw, recipe.extra)
        coding, chosen = self._coding, self._choices(pairs)
        assert coding is not None

        def choice(level: int) -> Tensor:
            if not coding.atoms[level]:
                return draw(level)
            return chosen_noise(pack.seed, coding, level, *chosen, self.latent_shape, self.device)

        x = samplers.start(choice(0), coding.sigmas)
        extra = {"eta": coding.eta}
        return samplers.sample("ancestral", model, x, coding.sigmas, choice, extra)

    def _choices(self, pairs: list[Pair]) -> tuple[Array, Array]:
        """Return atoms and signs of the codes of images."""
        codes = self.pack.codes
        assert codes is not None
        classes, images = np.array(pairs).T
        return codes_at(codes, classes, images % codes.params["codes"])

    def _guidance(self, pairs: list[Pair]) -> tuple[float, bool]:
        """Return how strongly images of one kind are guided, and whether a prompt is used."""
        if self._coding is None or pairs[0][1] >= self.pack.coded_images:
            return self.pack.recipe.guidance, True
        return self._coding.guidance, self._coding.prompts

    @torch.inference_mode()
    def _model(self, pairs: list[Pair]) -> samplers.Model:
        """Return the denoiser with its conditions; guidance takes one pass of twice the group."""
        recipe, backbone = self.pack.recipe, self.backbone
        guidance, prompts = self._guidance(pairs)
        if prompts not in self._unconditional and not (prompts and guidance == 1.0):
            self._unconditional[prompts] = unconditional(backbone, self.pack, guides=prompts)
        if prompts:
            modes = self.pack.modes([i for _, i in pairs]).tolist()
            conditions = Condition.cat(
                self._condition(c, mode) for (c, _), mode in zip(pairs, modes, strict=True)
            )
        else:
            conditions = self._unconditional[False].expand(len(pairs))
        none = self._unconditional[True] if prompts and guidance != 1.0 else None
        return denoiser(backbone, conditions, none, guidance, recipe.guided_channels)

    def _reporting(
        self, pairs: list[Pair], passed: Callable[[float], None] | None
    ) -> samplers.Model:
        """Return the model of a group, which tells who watches of each step."""
        model = self._model(pairs)
        if passed is None:
            return model
        # the last image of a group may be repeated, to fill it
        share = len(set(pairs)) / self._steps_of(pairs[0])

        def report(x: Tensor, sigma: float) -> Tensor:
            x0 = model(x, sigma)
            passed(share)
            return x0

        return report

    def _condition(self, c: int, mode: int) -> Condition:
        """Return the condition of a prompt; it is computed alone, so no other can change its bits.

        Conditions are kept, and the one that was not used for longest is dropped first.
        """
        key = (c, mode)
        condition = self._conditions.get(key)
        if condition is None:
            prompt = self._prompts[c, mode][None].to(self.device)
            condition = self.backbone.condition(prompt, self.pack.recipe.template)
            self._conditions[key] = condition
            self._conditions_nbytes += _nbytes(condition)
            while self._conditions_nbytes > _MAX_CONDITIONS and len(self._conditions) > 1:
                self._conditions_nbytes -= _nbytes(self._conditions.popitem(last=False)[1])
        self._conditions.move_to_end(key)
        return condition

    def _allocate(self, what: str, make: Callable[[], T]) -> T:
        """Call a function that needs device memory for `what`."""
        try:
            return make()
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
        # outside of the handler nothing refers to the tensors made so far: their memory is free
        raise BackboneError(
            f"{self.device} has no memory for {what}",
            code="E_BACKBONE_MEMORY",
            hint="free memory, use a larger device, or encode the pack with a smaller group;"
            ' numerics="fast" also takes group= (other pixels)',
        )


def _hand_on(
    shares: SimpleQueue[float], passed: Callable[[float], None], jobs: Sequence[Future[Tensor]]
) -> None:
    """Call a function, in this thread, with what other threads report until their jobs end."""
    waiting = True
    while waiting:
        waiting = bool(wait(jobs, _TICK, FIRST_EXCEPTION).not_done)
        waiting = waiting and not any(job.done() and job.exception() for job in jobs)
        while not shares.empty():
            passed(shares.get())


def denoiser(
    backbone: Backbone,
    conditions: Condition,
    none: Condition | None = None,
    guidance: float = 1.0,
    guided_channels: int = 0,
) -> samplers.Model:
    """Return the model of a sampler; guidance takes one pass of twice the images.

    Args:
        backbone: an open one.
        conditions: one for each image.
        none: the condition of no class, one row; None: no guidance.
        guidance: its weight.
        guided_channels: leading channels of the latent that are guided; 0: all.
    """
    if none is None or guidance == 1.0:
        return lambda x, sigma: backbone.denoise(x, sigma, conditions)
    both = Condition.cat([none.expand(len(conditions)), conditions])

    def guided(x: Tensor, sigma: float) -> Tensor:
        without, with_class = backbone.denoise(torch.cat([x, x]), sigma, both).chunk(2)
        mixed = (with_class - without) * guidance + without
        if not 0 < guided_channels < mixed.shape[1]:
            return mixed
        return torch.cat([mixed[:, :guided_channels], with_class[:, guided_channels:]], dim=1)

    return guided


def unconditional(backbone: Backbone, pack: Pack, *, guides: bool = True) -> Condition:
    """Return the condition of no class: the pack's, or that of the backbone.

    Args:
        backbone: an open one.
        pack: its recipe and vectors.
        guides: guidance compares a prompt with it, so it has as many vectors; otherwise codes are
            made under it.
    """
    template, prompts = pack.recipe.template, pack.prompts
    if pack.unconditional is not None:
        none = torch.from_numpy(decode_prompts(pack.unconditional)[0].copy())
    elif template is None:
        fewest, _, width = backbone.output_shape
        shape = prompts.params["shape"][1:] if prompts and guides else (fewest, width)
        none = torch.zeros(1, *shape)
    else:
        return backbone.unconditional()
    return backbone.condition(none.to(backbone.device), template)


def _merged(group: list[Pair], kinds: list[list[Pair]], made: list[Tensor]) -> Tensor:
    """Return images of two kinds in the order of their group."""
    places = {pair: place for place, pair in enumerate(pair for part in kinds for pair in part)}
    return torch.cat(made)[[places[pair] for pair in group]]


# One lock for all decoders of an open backbone, because each applies its own adapter to it.
_locks: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()
_locks_access = threading.Lock()


def lock_of(backbone: Backbone) -> Any:
    """Return the lock of an open backbone. Keep it as long as the backbone: the key is its id."""
    with _locks_access:
        return _locks.setdefault(id(backbone), threading.Lock())


def _reset_locks() -> None:
    """Let a forked child not wait for threads that it does not have."""
    global _locks_access
    _locks.clear()
    _locks_access = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_locks)


def _device_of(backbone: Backbone) -> torch.device:
    """Return the device of the weights: a backbone may have been opened on "cuda", of no index."""
    return next(iter(backbone.named_tensors().values())).device


def _to_integers(item: Any) -> tuple[int, ...]:
    """Return (number,) or (class, index) of integers of Python, NumPy or torch."""
    try:
        return (operator.index(item),)
    except TypeError:
        pass
    try:
        c, i = (operator.index(part) for part in item)
    except (TypeError, ValueError):
        text = " ".join(repr(item).split())
        raise UsageError(
            f"invalid image {text:.40}: expected a number or a pair (class, index)"
        ) from None
    return c, i


def _nbytes(condition: Condition) -> int:
    return sum(t.numel() * t.element_size() for t in condition.tensors.values())


# messages of allocators, CUDA and its libraries
_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
)


def _is_out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return isinstance(error, torch.OutOfMemoryError) or any(m in text for m in _OUT_OF_MEMORY)
