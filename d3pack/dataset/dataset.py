"""D3MDataset: a pack in the place of an ImageFolder."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from hashlib import sha256
from os import PathLike, fspath
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, SupportsIndex

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, default_collate

from d3pack.dataset.images import Images
from d3pack.dataset.loader import D3MLoader
from d3pack.dataset.order import BatchOrder, Ints, check_state
from d3pack.dataset.samples import (
    OUTPUTS,
    Output,
    SoftLabels,
    Transform,
    apply_batch,
    apply_one,
    as_output,
    as_pil,
)
from d3pack.dataset.store import CACHE_SIZE, CACHES, Cache, CacheSettings
from d3pack.decode import local_backbone
from d3pack.errors import NotFoundError, UsageError
from d3pack.format import Pack, check_classes, decode_weights, to_index
from d3pack.hub import is_remote, load, read_classes
from d3pack.system import expand_user, resolve_device

if TYPE_CHECKING:
    import datasets

    from d3pack.backbones import Backbone


class LabelTeacher(Protocol):
    """A classifier that labels images when they are read."""

    classes: Sequence[str]

    def logits(self, images: Tensor) -> Tensor:
        """Return logits (N, classes) for uint8 images in NCHW."""
        ...


class IndexOutOfRangeError(UsageError, IndexError):
    """There is no such image. Also an IndexError, as sequences raise it."""


class InvalidIndexError(UsageError, TypeError):
    """An index is no integer. Also a TypeError, as sequences raise it."""


class D3MDataset(Dataset[Any]):
    """The images of a pack with their labels, decoded once and kept in a store.

    An ordinary map-style PyTorch dataset of `(image, label)`, with `classes`, `class_to_idx`,
    `targets` and `samples` as `ImageFolder` has them. It works with a `DataLoader`; `loader` gives
    a faster one.

    Attributes:
        pack: the pack.
        classes: names of the classes, in the order of their labels.
        class_to_idx: label of each name.
        device: where images are decoded.

    Example:
        >>> from d3pack import D3MDataset
        >>> dataset = D3MDataset("examples/cifar10.d3m", device="cpu", cache=None)
        >>> image, label = dataset[0]
        >>> image.shape, image.dtype, dataset.classes[label]
        (torch.Size([3, 64, 64]), torch.uint8, 'airplane')
    """

    def __init__(
        self,
        pack: str | PathLike[str] | Pack,
        *,
        classes: Sequence[str | int] | None = None,
        device: str | torch.device | None = None,
        transform: Transform | None = None,
        target_transform: Callable[[Any], Any] | None = None,
        batch_transform: Transform | None = None,
        output: Output = "uint8",
        soft_labels: bool = False,
        weights: bool = False,
        cache: Cache = "auto",
        fresh: bool = False,
        teacher: LabelTeacher | None = None,
        quiet: bool = False,
        numerics: str = "exact",
        backbone: str | Path | Backbone | None = None,
        cache_dir: str | PathLike[str] | None = None,
        cache_size: int = CACHE_SIZE,
    ) -> None:
        """Open a pack; nothing is decoded yet.

        Args:
            pack: path of a `.d3m` file, address on the Hub (`hf://datasets/org/name/file.d3m` or
                `org/name`) or in an object store (`s3://bucket/file.d3m`), or an open `Pack`.
            classes: names or numbers of the classes to keep, in this order. Of a pack elsewhere
                only their part is downloaded.
            device: where images are decoded and batches of `loader` lie: "cpu", "cuda", "cuda:1"
                or "mps". None: CUDA where there is one, else the CPU.
            transform: function of one image, applied last.
            target_transform: function of one label: a number, or a vector of probabilities.
            batch_transform: function of a batch (NCHW tensor) that returns one row an image,
                applied before `transform`.
            output: what transforms and the caller are given: "uint8" for tensors, "float" for
                tensors in [0, 1], "pil" for PIL images.
            soft_labels: give labels as the vectors of probabilities that the pack holds, instead
                of class numbers.
            weights: give `(image, label, weight)`, where the weight says how much the image counts
                in the loss of a training; 1 in a pack that has no weights.
            cache: where decoded images are kept: "disk", shared by processes and later runs;
                "cpu" or "gpu" memory; None, decoded each time; "auto", the fastest that fits.
            fresh: decode new images in every epoch, which `set_epoch` or a loader counts. Nothing
                is kept then. Images made of codes stay the same; with nothing else it is refused.
            teacher: classifier that labels each image with probabilities when it is read.
            quiet: print no progress and no choice of store.
            numerics: "exact" gives the images of the pack, bit for bit where the machine allows;
                "fast" allows 16-bit floats and other orders of sums.
            backbone: directory of the backbone, or an open one. None: the one that the pack names,
                downloaded if need be, or one that lies beside the file.
            cache_dir: directory of the stores on disk. None: d3pack's own (`D3PACK_HOME`).
            cache_size: bytes that all stores of the directory may take; those that were not used
                for longest are evicted.

        Raises:
            InvalidPackError: the file is not a valid pack.
            NotFoundError: there is no such file, repository or backbone directory.
            HubError: the Hub cannot be reached, or refuses.
            StorageError: the object store cannot be reached, or refuses.
            UsageError: arguments that contradict each other, or a device that is not there.
        """
        self.pack, selection = _open_pack(pack, classes)
        self.device = resolve_device(device)
        _check_names(numerics, output, cache, backbone)
        if cache == "gpu" and self.device.type == "cpu":
            raise UsageError("cache='gpu' with device='cpu'", hint="use cache='cpu' or 'disk'")
        if output == "pil" and batch_transform is not None:
            raise UsageError("batch_transform takes tensors, not PIL images", hint="use transform=")
        if fresh:
            _check_fresh(self.pack, cache, soft_labels, weights)
        if soft_labels and teacher is not None:
            raise UsageError("soft_labels=True and teacher= both give labels", hint="choose one")
        self.transform = transform
        self.target_transform = target_transform
        self.batch_transform = batch_transform
        self.output: Output = output
        self.teacher = teacher
        # in shared memory, so that workers that outlive an epoch see the next one
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_() if fresh else None
        if backbone is None and not isinstance(pack, Pack):
            backbone = local_backbone(fspath(pack), self.pack)
        directory = None if cache_dir is None else expand_user(cache_dir).absolute()
        self._images = Images(
            self.pack,
            device=self.device,
            numerics=numerics,
            backbone=backbone,
            cache=CacheSettings(None if fresh else cache, directory, cache_size),
            fresh=fresh,
            quiet=quiet,
        )
        self._soft_labels = soft_labels
        self._weights = _all_weights(self.pack) if weights else None
        self._select(np.arange(len(self.pack.classes)), self.pack.images_per_class)
        if selection is not None:
            self._select(self._class_numbers(selection), self._per_class)

    @property
    def images(self) -> Images:
        """The images of the whole pack, which all selections share."""
        self._images.among = None if self._is_whole else self._all_numbers
        return self._images

    def _all_numbers(self) -> Ints:
        return self.numbers(np.arange(len(self)))

    def _select(self, classes: Ints, per_class: int) -> None:
        """Become these classes of the pack, with so many images each; the store stays shared."""
        self._numbers = classes
        self._per_class = per_class
        self.classes = [self.pack.classes[number] for number in classes.tolist()]
        self.class_to_idx = {name: label for label, name in enumerate(self.classes)}
        total = len(self.pack.classes)
        self._is_whole = len(classes) == total and per_class == self.pack.images_per_class
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

    @property
    def root(self) -> str:
        """Identity of the pack, a SHA-256 in hex."""
        return self.pack.root

    @property
    def targets(self) -> list[int]:
        """Class number of every image, as ImageFolder has it."""
        return np.repeat(np.arange(len(self.classes)), self._per_class).tolist()

    @property
    def samples(self) -> list[tuple[int, int]]:
        """Number in the pack, where ImageFolder has a path, and class number of every image."""
        numbers = self.numbers(np.arange(len(self)))
        return list(zip(numbers.tolist(), self.targets, strict=True))

    @property
    def probabilities(self) -> bool:
        """Whether labels are vectors of probabilities."""
        return self._labels is not None or self.teacher is not None

    @property
    def weighted(self) -> bool:
        """Whether each image comes with its weight."""
        return self._weights is not None

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.classes) * self._per_class

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """Yield every image with its label, in order."""
        return (self[index] for index in range(len(self)))

    def __repr__(self) -> str:
        height, width = self.pack.recipe.size
        return (
            f"D3MDataset({self.root[:12]}, {len(self):,} images of {len(self.classes):,} classes, "
            f"{height}x{width}, {self.device})"
        )

    def select_classes(self, classes: Iterable[str | int]) -> D3MDataset:
        """Return a dataset of some classes in this order, labelled from 0; images are the same.

        Args:
            classes: names, or labels in this dataset.

        Raises:
            UsageError: a class is unknown or repeated, or there is none.
        """
        return self._part(self._class_numbers(classes), self._per_class)

    def _class_numbers(self, classes: Iterable[str | int]) -> Ints:
        """Return the pack's numbers of classes, which are given by name or by label here."""
        labels = []
        check_classes(classes)
        for name in classes:
            if isinstance(name, str):
                label = self.class_to_idx.get(name, -1)
            elif isinstance(name, int | np.integer) and not isinstance(name, bool):
                label = int(name)
            else:
                raise UsageError(f"invalid class {name!r}: expected a name or a number")
            if not 0 <= label < len(self.classes):
                raise UsageError(f"the dataset has no class {name!r}", hint="see .classes")
            labels.append(label)
        if not labels or len(set(labels)) != len(labels):
            raise UsageError("invalid selection: expected at least one class, none of them twice")
        numbers: Ints = self._numbers[np.array(labels)]
        return numbers

    def first(self, k: int) -> D3MDataset:
        """Return a dataset of the first k images of every class, which are the best k.

        Raises:
            UsageError: k is less than 1 or more than there are.
        """
        k = to_index(k, "a number of images")
        if not 1 <= k <= self._per_class:
            raise UsageError(f"invalid k {k}: expected 1 to {self._per_class} images per class")
        return self._part(self._numbers, k)

    def _part(self, classes: Ints, per_class: int) -> D3MDataset:
        part = object.__new__(type(self))
        part.__dict__.update(self.__dict__)
        part._select(classes, per_class)
        return part

    # Images and labels

    def __getitem__(self, index: SupportsIndex) -> tuple[Any, ...]:
        """Return an image and its label, and its weight where that was asked for.

        Raises:
            IndexError: the index is out of range.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[SupportsIndex]) -> list[tuple[Any, ...]]:
        """Return many images with their labels, decoded together: DataLoader calls this."""
        chosen = np.array([self._checked(index) for index in indices], dtype=np.int64)
        if not chosen.size:
            return []
        images, labels = self._samples(chosen, self.images.get(self.numbers(chosen), self.epoch))
        columns = [images, self._targets(labels)]
        if self.weighted:
            columns.append(self.weights(chosen))
        return list(zip(*columns, strict=True))

    def _targets(self, labels: Tensor) -> Iterable[Any]:
        """Return what the caller is given for labels."""
        targets: Iterable[Any] = labels if self.probabilities else labels.tolist()
        return targets if self.target_transform is None else map(self.target_transform, targets)

    def _checked(self, index: SupportsIndex) -> int:
        try:
            number = operator.index(index)
        except TypeError:
            raise InvalidIndexError(
                f"invalid index {index!r}: expected an integer",
                hint="torch.utils.data.Subset takes several",
            ) from None
        if not -len(self) <= number < len(self):
            raise IndexOutOfRangeError(f"no image {number}: the dataset has {len(self)}")
        return number % len(self)

    def numbers(self, indices: Ints) -> Ints:
        """Return the numbers that images have in the whole pack."""
        label, image = np.divmod(indices, self._per_class)
        return self._numbers[label] * self.pack.images_per_class + image

    def hard_labels(self, indices: Ints) -> list[int]:
        """Return the class numbers of images."""
        labels: list[int] = (indices // self._per_class).tolist()
        return labels

    def labels(self, indices: Ints, images: Tensor) -> Tensor:
        """Return the labels that a training loop sees for these (uint8) images."""
        label, image = np.divmod(indices, self._per_class)
        if self._labels is not None:
            return self._labels.take(self._numbers[label], image).to(self.device)
        if self.teacher is not None:
            assert self._columns is not None
            with torch.no_grad():
                logits = self.teacher.logits(images)
            return logits[:, self._columns.to(logits.device)].float().softmax(1).to(self.device)
        return torch.from_numpy(label).to(self.device)

    def weights(self, indices: Ints) -> Tensor:
        """Return how much images count in the loss of a training, float32.

        Raises:
            UsageError: the dataset was not asked for weights.
        """
        if self._weights is None:
            raise UsageError("no weights were asked for", hint="D3MDataset(..., weights=True)")
        label, image = np.divmod(indices, self._per_class)
        return torch.from_numpy(self._weights[self._numbers[label], image]).to(self.device)

    def _samples(self, indices: Ints, images: Tensor) -> tuple[Any, Tensor]:
        """Return transformed images (a list once a transform took single ones) and labels."""
        labels = self.labels(indices, images)
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

    def collate(self, indices: Ints, images: Tensor) -> tuple[Any, ...]:
        """Return one batch of a loader: transformed images, labels, weights if asked for."""
        batch = self._labelled(indices, images)
        return (*batch, self.weights(indices)) if self.weighted else batch

    def _labelled(self, indices: Ints, images: Tensor) -> tuple[Any, Any]:
        rows, labels = self._samples(indices, images)
        if isinstance(rows, list) and not isinstance(rows[0], Image.Image):
            rows = default_collate(rows)
        if self.target_transform is not None:
            targets = default_collate(list(self._targets(labels)))
            return rows, targets.to(self.device) if isinstance(targets, Tensor) else targets
        return rows, labels

    # Epochs, order and state

    @property
    def epoch(self) -> int:
        """Epoch of the fresh images; 0 for a dataset that is not fresh."""
        return 0 if self._epoch is None else int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the fresh images; without `fresh=True` this does nothing."""
        if epoch < 0:
            raise UsageError(f"invalid epoch {epoch}: expected 0 or more")
        if self._epoch is not None:
            self._epoch.fill_(epoch)

    def loader(
        self,
        batch_size: int,
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
        background: bool | None = None,
    ) -> D3MLoader:
        """Return a loader of batches on the device, which can be saved and resumed.

        Args:
            batch_size: images that a rank takes in a step.
            shuffle: whether each epoch has an order of its own, as trainings want it.
            seed: seed of the orders.
            rank: number of this process; the default is that of torch.distributed.
            world: number of processes; the default is that of torch.distributed.
            drop_last: whether to leave out the last images where they do not fill a step.
            background: decode the next batches while the caller trains. None: on a GPU. On a CPU
                the decoder uses all cores, and takes turns with the training. Exact images on CUDA
                are always decoded in the caller's thread: the settings that they need hold for the
                whole process, and a training would lose its TF32.
        """
        if self._images.changes_cuda_settings:
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
        shuffle: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world: int | None = None,
        drop_last: bool = False,
    ) -> BatchOrder:
        """Return the loader's order as a batch sampler, for DataLoader or StatefulDataLoader.

        The arguments are those of `loader`.
        """
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
        all_classes = np.array_equal(self._numbers, np.arange(len(self.pack.classes)))
        if all_classes and self._per_class == self.pack.images_per_class:
            return self.root
        part = f"{self._per_class}:{self._numbers.tolist()}"
        return f"{self.root}/{sha256(part.encode()).hexdigest()[:16]}"

    def state_dict(self) -> dict[str, Any]:
        """Return pack and epoch, for loaders that ask their dataset; the order is the loader's."""
        return {"state": 1, "pack": self.identity, "images": len(self), "epoch": self.epoch}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Set the epoch of a state.

        Raises:
            UsageError: the state is not valid, or belongs to another pack or selection.
        """
        check_state(state, identity=self.identity, images=len(self))
        try:
            epoch = int(state["epoch"])
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"invalid dataset state: {error!r}") from error
        self.set_epoch(epoch)

    def close(self) -> None:
        """Free the decoder and the store; both are opened again when an image is read."""
        self._images.close()

    def __enter__(self) -> D3MDataset:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def to_hf(self) -> datasets.Dataset:
        """Return images and labels, without transforms, as a Hugging Face dataset on disk.

        Raises:
            UsageError: the package `datasets` is not installed.
        """
        from d3pack.dataset.export import to_hf

        return to_hf(self)


def _open_pack(
    pack: str | PathLike[str] | Pack, classes: Sequence[str | int] | None
) -> tuple[Pack, Sequence[str | int] | None]:
    """Return the pack, and the classes that are still to be selected from it."""
    if classes is not None:
        check_classes(classes)
    if isinstance(pack, Pack):
        return pack, classes
    if classes is not None and is_remote(pack):
        return read_classes(pack, classes), None
    return load(pack), classes


def _check_names(numerics: str, output: str, cache: Cache, backbone: object) -> None:
    if numerics not in ("exact", "fast"):
        raise UsageError(f"invalid numerics {numerics!r}: expected exact or fast")
    if isinstance(backbone, str | PathLike) and not Path(backbone).is_dir():
        raise NotFoundError(
            f"there is no backbone directory {fspath(backbone)}",
            hint="give the directory that holds the backbone's model_index.json",
        )
    if output not in OUTPUTS:
        raise UsageError(f"invalid output {output!r}: expected {', '.join(OUTPUTS)}")
    if cache not in CACHES:
        raise UsageError(f"invalid cache {cache!r}: expected auto, gpu, cpu, disk or None")


def _all_weights(pack: Pack) -> npt.NDArray[np.float32]:
    """Return the weights of all images of a pack."""
    if pack.weights is None:
        return np.ones((len(pack.classes), pack.images_per_class), dtype=np.float32)
    return decode_weights(pack.weights)


def _check_fresh(pack: Pack, cache: Cache, soft_labels: bool, weights: bool) -> None:
    if pack.codes is not None and pack.all_coded and all(pack.codes.params["atoms"]):
        raise UsageError(
            "fresh=True, but all images of the pack are made of codes: these never change",
            hint="use fresh=False",
        )
    if cache not in ("auto", None):
        raise UsageError(
            f"fresh=True with cache={cache!r}: fresh images are used once", hint="use cache=None"
        )
    if soft_labels:
        raise UsageError(
            "the pack's soft labels are of its own images, not of fresh ones",
            hint="give teacher=, or train on hard labels",
        )
    if weights:
        raise UsageError(
            "the pack's weights are of its own images, not of fresh ones", hint="use weights=False"
        )
