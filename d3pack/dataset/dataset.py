"""D3MDataset: a pack where an ImageFolder was."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from d3pack.dataset.choice import CACHE_SIZE, Cache, Wish
from d3pack.dataset.images import Images
from d3pack.dataset.labels import SoftLabels
from d3pack.dataset.loader import D3MLoader
from d3pack.dataset.options import check_choices, opened, usable
from d3pack.dataset.order import BatchOrder, Ints, check_state
from d3pack.dataset.transforms import Output, Transform, apply_batch, apply_one, as_output, as_pil
from d3pack.decode import local_backbone
from d3pack.errors import UsageError
from d3pack.format.pack import Pack

if TYPE_CHECKING:
    import datasets

    from d3pack.backbones import Backbone


class Teacher(Protocol):
    """Whatever labels images on the fly."""

    classes: Sequence[str]

    def logits(self, images: Tensor) -> Tensor:
        """uint8 NCHW in, (N, classes) out."""
        ...


class IndexOutOfRangeError(UsageError, IndexError):
    """No such image; also an IndexError, so that plain iteration ends where it should."""


class D3MDataset(Dataset[Any]):
    """The images of a pack with their labels, decoded once and kept in a store.

    `transform` is applied to each image, `batch_transform` to whole NCHW batches before that. Both
    are given what `output` says: a uint8 tensor, a float tensor in [0, 1], or (`transform` only) a
    PIL image. Labels are ints; vectors of probabilities with `soft_labels=True` (from the pack) or
    `teacher=`. With `classes=` it holds some classes; of a pack on the Hub only theirs are read.
    With `fresh=True` every epoch has new images: `set_epoch`, or a loader of ours, says which.
    """

    def __init__(
        self,
        pack: str | PathLike[str] | Pack,
        *,
        classes: Sequence[str | int] | None = None,
        device: str | torch.device | None = None,
        transform: Transform | None = None,
        batch_transform: Transform | None = None,
        output: Output = "uint8",
        soft_labels: bool = False,
        cache: Cache = "auto",
        fresh: bool = False,
        teacher: Teacher | None = None,
        quiet: bool = False,
        mode: str = "exact",
        backbone: str | Path | Backbone | None = None,
        cache_dir: str | PathLike[str] | None = None,
        cache_size: int = CACHE_SIZE,
    ) -> None:
        self.pack, rest = opened(pack, classes)
        self.device = usable(device)
        check_choices(
            device=self.device,
            mode=mode,
            backbone=backbone,
            output=output,
            batched=batch_transform is not None,
            soft_labels=soft_labels,
            cache=cache,
            fresh=fresh,
            taught=teacher is not None,
        )
        self.transform = transform
        self.batch_transform = batch_transform
        self.output: Output = output
        self.teacher = teacher
        self._fresh = fresh
        # In shared memory, so that workers which outlive an epoch hear of the next one.
        self._epoch: Tensor | None = None
        if fresh:
            self._epoch = torch.zeros((), dtype=torch.int64)
            self._epoch.share_memory_()  # type: ignore[no-untyped-call]
        if backbone is None and not isinstance(pack, Pack):
            backbone = local_backbone(fspath(pack), self.pack)
        folder = None if cache_dir is None else Path(cache_dir).expanduser().absolute()
        self.images = Images(
            self.pack,
            device=self.device,
            mode=mode,
            backbone=backbone,
            wish=Wish(None if fresh else cache, folder, cache_size),
            fresh=fresh,
            quiet=quiet,
        )
        self._soft_labels = soft_labels
        self._select(np.arange(len(self.pack.classes)), self.pack.images_per_class)
        if rest is not None:
            self._select(self._chosen(rest), self._per_class)

    def _select(self, classes: Ints, per_class: int) -> None:
        """Become these classes of the pack, with this many images each; the store stays shared."""
        self._numbers = classes
        self._per_class = per_class
        self.classes = [self.pack.classes[number] for number in classes.tolist()]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        total = len(self.pack.classes)
        self._labels = SoftLabels(self.pack.labels, classes, total) if self._soft_labels else None
        self._columns = self._teacher_columns()

    def _teacher_columns(self) -> Tensor | None:
        if self.teacher is None:
            return None
        column = {name: number for number, name in enumerate(self.teacher.classes)}
        unknown = [name for name in self.classes if name not in column]
        if unknown:
            raise UsageError(
                f"the teacher does not know class {unknown[0]!r} ({len(unknown)} unknown in all)",
                hint="give a teacher trained on this pack's classes, or select_classes()",
            )
        return torch.tensor([column[name] for name in self.classes])

    # What it looks like

    @property
    def root(self) -> str:
        """The identity of the pack."""
        return self.pack.root

    @property
    def targets(self) -> list[int]:
        """The class index of every image, as ImageFolder has it."""
        return np.repeat(np.arange(len(self.classes)), self._per_class).tolist()

    @property
    def probabilities(self) -> bool:
        """Whether labels are vectors of probabilities."""
        return self._labels is not None or self.teacher is not None

    def __len__(self) -> int:
        return len(self.classes) * self._per_class

    def __repr__(self) -> str:
        height, width = self.pack.recipe.size
        return (
            f"D3MDataset({self.root[:12]}, {len(self):,} images of {len(self.classes):,} classes, "
            f"{height}x{width}, {self.device})"
        )

    def select_classes(self, classes: Iterable[str | int]) -> D3MDataset:
        """Some classes, in this order; labels count anew from 0, the images stay the same."""
        return self._part(self._chosen(classes), self._per_class)

    def _chosen(self, classes: Iterable[str | int]) -> Ints:
        """Classes of the pack, by name or by label in this dataset."""
        chosen = []
        for wanted in classes:
            if isinstance(wanted, str):
                label = self.class_to_idx.get(wanted, -1)
            elif isinstance(wanted, int | np.integer) and not isinstance(wanted, bool):
                label = int(wanted)
            else:
                raise UsageError(f"{wanted!r} is no class", hint="give names or numbers")
            if not 0 <= label < len(self.classes):
                raise UsageError(f"the dataset has no class {wanted!r}", hint="see .classes")
            chosen.append(label)
        if not chosen or len(set(chosen)) != len(chosen):
            raise UsageError("a selection needs classes, none of them twice")
        numbers: Ints = self._numbers[np.array(chosen)]
        return numbers

    def first(self, k: int) -> D3MDataset:
        """The first k images of every class: what an encoder would have chosen for k."""
        if not 1 <= k <= self._per_class:
            raise UsageError(f"first({k}): there are {self._per_class} images per class")
        return self._part(self._numbers, k)

    def _part(self, classes: Ints, per_class: int) -> D3MDataset:
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part._select(classes, per_class)
        return part

    # Images and labels

    def __getitem__(self, index: int) -> tuple[Any, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[tuple[Any, Any]]:
        """Many images at once, decoded as one request: the hook that DataLoader calls."""
        chosen = np.array([self._checked(index) for index in indices], dtype=np.int64)
        if not chosen.size:
            return []
        images, labels = self._samples(chosen, self.images.get(self.numbers(chosen), self.epoch))
        return list(zip(images, labels if self.probabilities else labels.tolist(), strict=True))

    def _checked(self, index: int) -> int:
        number = operator.index(index)
        if not -len(self) <= number < len(self):
            raise IndexOutOfRangeError(f"no image {number}: the dataset has {len(self)}")
        return number % len(self)

    def numbers(self, indices: Ints) -> Ints:
        """Indices of this dataset as image numbers of the whole pack."""
        label, image = np.divmod(indices, self._per_class)
        return self._numbers[label] * self.pack.images_per_class + image

    def hard_labels(self, indices: Ints) -> list[int]:
        """The class index of these images."""
        labels: list[int] = (indices // self._per_class).tolist()
        return labels

    def _samples(self, indices: Ints, images: Tensor) -> tuple[Any, Tensor]:
        """Transformed images (a tensor, or a list once a transform saw each) and their labels."""
        labels = self.label(indices, images)
        rows: Any = as_output(images, self.output)
        if self.batch_transform is not None:
            first = self.classes[self.hard_labels(indices[:1])[0]]
            rows = apply_batch(self.batch_transform, rows, indices.tolist(), first)
        if self.output == "pil":
            rows = [as_pil(row) for row in rows]
        if self.transform is not None:
            rows = [
                apply_one(self.transform, row, index, self.classes[label])
                for row, index, label in zip(
                    rows, indices.tolist(), self.hard_labels(indices), strict=True
                )
            ]
        return rows, labels

    def label(self, indices: Ints, images: Tensor) -> Tensor:
        """The labels that a training loop sees for these (uint8) images."""
        label, image = np.divmod(indices, self._per_class)
        if self._labels is not None:
            return self._labels.take(self._numbers[label], image).to(self.device)
        if self.teacher is not None:
            assert self._columns is not None
            with torch.no_grad():
                logits = self.teacher.logits(images)
            return logits[:, self._columns.to(logits.device)].float().softmax(1).to(self.device)
        return torch.from_numpy(label).to(self.device)

    def finish(self, indices: Ints, images: Tensor) -> tuple[Any, Tensor]:
        """One batch of a loader: transformed and collated."""
        rows, labels = self._samples(indices, images)
        if isinstance(rows, list) and not isinstance(rows[0], Image.Image):
            rows = default_collate(rows)
        return rows, labels

    # Epochs, order and state

    @property
    def epoch(self) -> int:
        """Which fresh images there are; 0 for a dataset that is not fresh."""
        return 0 if self._epoch is None else int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Turn to the fresh images of an epoch; without `fresh=True` there is nothing to turn."""
        if epoch < 0:
            raise UsageError(f"epoch {epoch}", hint="epochs count from 0")
        if self._epoch is not None:
            self._epoch.fill_(epoch)

    def loader(
        self,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
        background: bool | None = None,
    ) -> D3MLoader:
        """Batches on the device; rank and world default to torch.distributed's.

        `background` decodes the batches to come while the caller trains; the default is to do so
        on a GPU. A decoder on the CPU has every core busy, and takes turns with the training.
        Exact images on CUDA are decoded in the caller's thread in any case: the settings that they
        need are the whole process's, and a training beside them would lose its TF32.
        """
        if self.images.holds_cuda:
            background = False
        elif background is None:
            background = self.device.type != "cpu"
        order = self.batch_order(
            batch_size, shuffle=shuffle, seed=seed, rank=rank, world=world, drop_last=drop_last
        )
        return D3MLoader(self, order, background)

    def batch_order(
        self,
        batch_size: int,
        shuffle: bool = True,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
    ) -> BatchOrder:
        """The loader's order as a batch sampler, for a DataLoader or a StatefulDataLoader."""
        if (rank is None) != (world is None):
            raise UsageError("rank and world go together", hint="give both or none")
        if rank is None or world is None:
            spread = torch.distributed.is_available() and torch.distributed.is_initialized()
            rank = torch.distributed.get_rank() if spread else 0
            world = torch.distributed.get_world_size() if spread else 1
        return BatchOrder(
            len(self),
            batch_size,
            shuffle=shuffle,
            seed=seed,
            rank=rank,
            world=world,
            drop_last=drop_last,
            identity=self.identity,
        )

    @property
    def identity(self) -> str:
        """What a state belongs to: the pack, and which part of it."""
        whole = np.array_equal(self._numbers, np.arange(len(self.pack.classes)))
        if whole and self._per_class == self.pack.images_per_class:
            return self.root
        part = f"{self._per_class}:{self._numbers.tolist()}"
        return f"{self.root}/{sha256(part.encode()).hexdigest()[:16]}"

    def state_dict(self) -> dict[str, Any]:
        """Pack and epoch, for loaders that ask their dataset; the order is the loader's."""
        return {"state": 1, "pack": self.identity, "images": len(self), "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Turn to the epoch of a state; refuses the state of another pack."""
        check_state(state, identity=self.identity, images=len(self))
        try:
            epoch = int(state["epoch"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not a dataset state: {error!r}") from error
        self.set_epoch(epoch)

    def close(self) -> None:
        """Free the decoder and the store; both come back when an image is asked for."""
        self.images.close()

    def to_hf(self) -> datasets.Dataset:
        """The images and labels as a Hugging Face `datasets.Dataset` (PNG in Arrow, on disk)."""
        from d3pack.dataset.export import to_hf

        return to_hf(self)
