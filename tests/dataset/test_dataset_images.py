"""Images, labels and transforms of a dataset: the same however they are asked for."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from places import ROOT
from torch import Tensor
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    Subset,
    WeightedRandomSampler,
    random_split,
)

import d3pack
from d3pack.dataset import D3MDataset, TransformError
from d3pack.errors import D3MError, InvalidPackError, NotFoundError, UsageError
from d3pack.format import Pack, encode_weights
from d3pack.format.codecs import decode_labels

CACHES = ["cpu", "disk", None]
Make = Callable[..., D3MDataset]


@pytest.fixture
def make(pack: Pack, backbone: Path) -> Make:
    def build(what: Any = pack, **options: Any) -> D3MDataset:
        return D3MDataset(what, **{"backbone": backbone, "quiet": True, **options})

    return build


def same(images: Tensor, expected: Tensor) -> bool:
    return images.dtype == torch.uint8 and torch.equal(images, expected)


# The same images


@pytest.mark.parametrize("cache", CACHES)
def test_single_images_equal_those_of_the_decoder(make: Make, expected: Tensor, cache: Any) -> None:
    dataset = make(cache=cache)
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    for index in order + order[:5]:
        image, label = dataset[index]
        assert same(image, expected[index])
        assert type(label) is int
        assert label == index // 7


@pytest.mark.heavy
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 9, 64])
def test_batches_in_any_order_equal_those_of_the_decoder(
    make: Make, expected: Tensor, cache: Any, batch: int
) -> None:
    dataset = make(cache=cache)
    for epoch in range(3):
        torch.manual_seed(epoch)
        seen = 0
        for images, labels in DataLoader(dataset, batch_size=batch, shuffle=True):
            for image, label in zip(images, labels.tolist(), strict=True):
                index = int((expected == image).flatten(1).all(1).nonzero())
                assert label == index // 7
                seen += 1
        assert seen == len(dataset)


def test_repeated_and_negative_indices_are_allowed(make: Make, expected: Tensor) -> None:
    rows = make().__getitems__([5, 5, -1, 20, 5])
    assert same(torch.stack([image for image, _ in rows]), expected[[5, 5, 20, 20, 5]])
    assert [label for _, label in rows] == [0, 0, 2, 2, 0]
    assert make().__getitems__([]) == []


def test_samplers_subsets_and_splits_work(make: Make, expected: Tensor) -> None:
    dataset = make()
    weights = WeightedRandomSampler([1.0] * 21, 30, generator=torch.Generator().manual_seed(1))
    assert sum(len(labels) for _, labels in DataLoader(dataset, 8, sampler=weights)) == 30
    parts = random_split(dataset, [15, 6], torch.Generator().manual_seed(2))
    for part in parts:
        assert isinstance(part, Subset)
        images = torch.cat([images for images, _ in DataLoader(part, 4)])
        assert same(images, expected[list(part.indices)])
    ranks: list[DistributedSampler[Any]] = [
        DistributedSampler(dataset, num_replicas=2, rank=rank) for rank in range(2)
    ]
    got = [label for s in ranks for _, label in DataLoader(dataset, None, sampler=s)]
    assert sorted(got)[:7] == [0] * 7


def test_autocast_of_the_caller_does_not_change_images(make: Make, expected: Tensor) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert same(make(cache=None)[3][0], expected[3])
    with torch.inference_mode():
        assert same(make(cache="cpu")[3][0], expected[3])


def test_threads_do_not_change_images(make: Make, expected: Tensor) -> None:
    before = torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            images = torch.stack([image for image, _ in make(cache=None)])
            assert same(images, expected)
    finally:
        torch.set_num_threads(before)


def test_changing_a_returned_image_leaves_the_store_unchanged(make: Make, expected: Tensor) -> None:
    for cache in CACHES:
        dataset = make(cache=cache)
        for _ in range(2):
            dataset[0][0].zero_()
            next(iter(dataset.loader(4, shuffle=False)))[0].zero_()
        assert same(dataset[0][0], expected[0])


def test_dataset_is_an_ordinary_sequence(make: Make, expected: Tensor) -> None:
    dataset = make()
    assert len(list(dataset)) == len(dataset) == 21
    for index in (21, -22, 10**9):
        with pytest.raises(IndexError, match="the dataset has 21"):
            dataset[index]
        with pytest.raises(UsageError):
            dataset.__getitems__([0, index])
    with pytest.raises(TypeError):
        dataset["0"]  # type: ignore[index]
    assert same(dataset[torch.tensor(4)][0], expected[4])
    assert same(dataset[np.int64(4)][0], expected[4])


def test_dataset_opens_a_path_a_pack_and_a_pickle(make: Make, pack: Pack, tmp_path: Path) -> None:
    path = tmp_path / "tiny.d3m"
    d3pack.write(pack, path)
    first = make()[8][0]
    for dataset in (make(path), make(str(path)), pickle.loads(pickle.dumps(make()))):
        assert same(dataset[8][0], first)
        assert dataset.root == pack.root


# What it looks like


def test_dataset_has_the_attributes_of_image_folder(make: Make) -> None:
    dataset = make()
    assert dataset.classes == ["goldfish", "penguin", "tabby cat"]
    assert dataset.class_to_idx == {"goldfish": 0, "penguin": 1, "tabby cat": 2}
    assert dataset.targets == [0] * 7 + [1] * 7 + [2] * 7
    assert dataset.samples == list(enumerate(dataset.targets))
    assert dataset.select_classes([2]).first(2).samples == [(14, 0), (15, 0)]
    assert dataset.root in repr(dataset) or dataset.root[:12] in repr(dataset)


def test_selected_classes_and_first_images_are_unchanged(make: Make, expected: Tensor) -> None:
    dataset = make()
    part = dataset.select_classes(["tabby cat", 0]).first(2)
    assert part.classes == ["tabby cat", "goldfish"]
    assert part.class_to_idx == {"tabby cat": 0, "goldfish": 1}
    assert part.targets == [0, 0, 1, 1]
    images = torch.stack([image for image, _ in part])
    assert same(images, expected[[14, 15, 0, 1]])
    assert [label for _, label in part] == part.targets
    chosen = make(classes=[2, "goldfish"])
    assert chosen.classes == part.classes
    assert same(chosen[8][0], expected[1])
    again = part.select_classes(["goldfish"])
    assert same(again[1][0], expected[1])
    assert len(dataset) == 21, "a part leaves the dataset as it was"


def test_part_of_a_dataset_equals_the_dataset_of_a_part(make: Make, pack: Pack) -> None:
    by_pack = make(pack.select(["tabby cat", "goldfish"]).first(2), soft_labels=True)
    by_dataset = make(soft_labels=True).select_classes(["tabby cat", "goldfish"]).first(2)
    assert by_pack.root != by_dataset.root
    for (image, label), (other, other_label) in zip(by_pack, by_dataset, strict=True):
        assert same(image, other)
        torch.testing.assert_close(label, other_label, atol=2e-3, rtol=0)


@pytest.mark.parametrize("wanted", [["dog"], [3], [-1], [], [0, "goldfish"]])
def test_select_classes_refuses_unknown_and_repeated_classes(make: Make, wanted: list[Any]) -> None:
    with pytest.raises(UsageError):
        make().select_classes(wanted)


@pytest.mark.parametrize("classes", ["goldfish", 3, None])
def test_a_name_alone_is_no_list_of_classes(make: Make, classes: Any) -> None:
    with pytest.raises(UsageError, match="expected a list"):
        make().select_classes(classes)


@pytest.mark.parametrize("k", ["1", 1.0, True])
def test_first_takes_integers_alone(make: Make, k: Any) -> None:
    with pytest.raises(UsageError, match="is not a number of images"):
        make().first(k)


@pytest.mark.parametrize("index", [slice(0, 3), "0", 1.0, None])
def test_index_that_is_no_integer_is_refused(make: Make, index: Any) -> None:
    with pytest.raises(UsageError, match=r"invalid index .*: expected an integer") as caught:
        make()[index]
    assert isinstance(caught.value, TypeError)  # as sequences raise it


def test_target_transform_changes_labels_of_items_and_batches(make: Make) -> None:
    dataset = make(target_transform=lambda label: 10 * label)
    assert [label for _, label in dataset] == [10 * label for label in dataset.targets]
    _, labels = next(iter(dataset.loader(20, shuffle=False)))
    assert labels.tolist() == [10 * label for label in dataset.targets[:20]]
    soft = make(soft_labels=True, target_transform=lambda label: label.argmax().item())
    _, labels = next(iter(soft.loader(4, shuffle=False)))
    assert labels.tolist() == [label for _, label in (soft[i] for i in range(4))]


def test_dataset_is_closed_when_its_block_ends(make: Make, expected: Tensor) -> None:
    with make() as dataset:
        assert same(dataset[0][0], expected[0])
        decoder = dataset.images._decoder
    assert decoder is not None
    assert dataset.images._decoder is None
    assert same(dataset[1][0], expected[1]), "it opens again when an image is read"


@pytest.mark.parametrize("k", [0, 8, -1])
def test_first_refuses_more_images_than_there_are(make: Make, k: int) -> None:
    with pytest.raises(UsageError, match="images per class"):
        make().first(k)


# Output, labels, transforms


def test_output_is_uint8_float_or_pil(make: Make, expected: Tensor) -> None:
    image = make(output="float")[2][0]
    assert image.dtype == torch.float32
    assert torch.equal(image, expected[2] / 255)
    assert 0 <= image.min() <= image.max() <= 1
    picture = make(output="pil")[2][0]
    assert isinstance(picture, Image.Image)
    assert np.array_equal(np.array(picture), expected[2].permute(1, 2, 0).numpy())
    pictures, labels = next(iter(make(output="pil").loader(3, shuffle=False)))
    assert [type(each) for each in pictures] == [Image.Image] * 3
    assert labels.tolist() == [0, 0, 0]


def test_soft_labels_come_from_the_pack(make: Make, pack: Pack) -> None:
    dataset = make(soft_labels=True)
    assert pack.labels is not None
    stored = torch.from_numpy(decode_labels(pack.labels).reshape(21, 3))
    rows = dataset.__getitems__([20, 0, 9])
    for (_, label), index in zip(rows, [20, 0, 9], strict=True):
        assert torch.equal(label, stored[index])
    _, labels = next(iter(dataset.loader(21, shuffle=False)))
    assert torch.equal(labels, stored)
    part = dataset.select_classes([2, 1])
    given = part[0][1]
    torch.testing.assert_close(given, stored[14, [2, 1]] / stored[14, [2, 1]].sum())


def test_soft_labels_are_refused_without_any_in_the_pack(
    make: Make, pack: Pack, backbone: Path
) -> None:
    from dataset_packs import tiny_pack

    with pytest.raises(UsageError, match="no soft labels"):
        make(tiny_pack(backbone), soft_labels=True)


def test_weights_come_with_each_image(make: Make, pack: Pack, expected: Tensor) -> None:
    given = np.exp2(np.random.default_rng(2).integers(-16, 17, (3, 7)) / 16)
    weighted = replace(pack, weights=encode_weights(given))
    dataset = make(weighted, weights=True, soft_labels=True)
    flat = torch.from_numpy(given.reshape(21)).float()
    for index in (0, 9, 20):
        image, label, weight = dataset[index]
        assert same(image, expected[index])
        assert label.shape == (3,)
        assert weight == flat[index]
        assert weight.dtype == torch.float32
    *_, weights = next(iter(dataset.loader(21, shuffle=False)))
    assert torch.equal(weights, flat)
    *_, weights = next(iter(DataLoader(dataset, batch_size=21)))
    assert torch.equal(weights, flat)
    part = dataset.select_classes([2, 0]).first(2)
    assert [float(row[2]) for row in part] == flat[[14, 15, 0, 1]].tolist()
    assert len(make(weighted)[0]) == 2


def test_weights_of_a_pack_without_them_are_one(make: Make) -> None:
    *_, weights = next(iter(make(weights=True).loader(5, shuffle=True)))
    assert weights.tolist() == [1] * 5
    with pytest.raises(UsageError, match="no weights were asked for"):
        make().weights(np.array([0]))


class MeanTeacher:
    """Real logits from real pixels: the mean of each channel, one per class."""

    classes = ("tabby cat", "goldfish", "penguin", "another")

    def logits(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8
        mean = images.float().mean(dim=(2, 3)) / 10
        return torch.cat([mean, torch.full((len(images), 1), 50.0)], dim=1)


def test_teacher_labels_the_images(make: Make, expected: Tensor) -> None:
    dataset = make(teacher=MeanTeacher())
    image, label = dataset[4]
    mean = expected[4].float().mean(dim=(1, 2)) / 10
    torch.testing.assert_close(label, mean[[1, 2, 0]].softmax(0))
    assert same(image, expected[4])
    other = MeanTeacher()
    other.classes = ("tabby cat", "penguin")  # type: ignore[assignment]
    with pytest.raises(UsageError, match="does not know class 'goldfish'"):
        make(teacher=other)


def test_transforms_see_images_and_batches(make: Make, expected: Tensor) -> None:
    def one(image: Tensor) -> Tensor:
        assert image.shape == (3, 64, 64)
        return image[:, :8, :8].float()

    def many(images: Tensor) -> Tensor:
        assert images.ndim == 4
        return images.flip(3)

    dataset = make(transform=one, batch_transform=many)
    want = expected.flip(3)[:, :, :8, :8].float()
    assert torch.equal(dataset[6][0], want[6])
    assert torch.equal(torch.stack([i for i, _ in dataset.__getitems__([1, 2])]), want[1:3])
    batches = [images for images, _ in dataset.loader(5, shuffle=False)]
    assert torch.equal(torch.cat(batches), want)
    pil = make(output="pil", transform=lambda picture: picture.size)
    assert pil[0][0] == (64, 64)


def test_transform_error_names_the_image(make: Make) -> None:
    def picky(image: Tensor) -> Tensor:
        raise RuntimeError("no good")

    dataset = make(transform=picky)
    message = r"image 9 \(class 'penguin'\): RuntimeError: no good"
    with pytest.raises(TransformError, match=message) as caught:
        dataset[9]
    assert isinstance(caught.value, D3MError)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(TransformError, match=r"image \d+ \(class"):
        next(iter(dataset.loader(4, shuffle=True)))
    batched = make(batch_transform=picky)
    with pytest.raises(TransformError, match=r"images 9\.\.10 \(2, class 'penguin' first\)"):
        batched.__getitems__([9, 10])
    with pytest.raises(TransformError, match="returned 1 rows"):
        make(batch_transform=lambda images: images[:1]).__getitems__([0, 1])
    with pytest.raises(TransformError, match="returned NoneType"):
        make(batch_transform=lambda images: None)[0]


@pytest.mark.parametrize(
    "options",
    [
        {"output": "jpeg"},
        {"cache": "ram"},
        {"cache": "gpu", "device": "cpu"},
        {"output": "pil", "batch_transform": abs},
        {"fresh": True, "cache": "disk"},
        {"fresh": True, "soft_labels": True},
        {"fresh": True, "weights": True},
        {"soft_labels": True, "teacher": MeanTeacher()},
        {"device": "gpu"},
        {"device": "cuda:99"},
        {"device": "mps"},
    ],
)
def test_contradicting_arguments_are_refused(make: Make, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as caught:
        make(**options)
    assert "\n" not in str(caught.value)
    assert caught.value.hint or ": expected " in str(caught.value)


def test_invalid_and_missing_packs_are_refused(make: Make, pack: Pack, tmp_path: Path) -> None:
    path = tmp_path / "cut.d3m"
    path.write_bytes(d3pack.pack_bytes(pack)[:-7])
    with pytest.raises(InvalidPackError):
        make(path)
    with pytest.raises(NotFoundError):
        make(tmp_path / "none.d3m")


# Fresh images


@pytest.mark.heavy
def test_fresh_epochs_have_new_images(make: Make, expected: Tensor) -> None:
    dataset = make(fresh=True)
    epochs = []
    for epoch in range(3):
        dataset.set_epoch(epoch)
        epochs.append(torch.stack([image for image, _ in dataset]))
    assert same(epochs[0], expected), "epoch 0 has the images of the pack"
    assert len({image.numpy().tobytes() for images in epochs for image in images}) == 63
    again = make(fresh=True)
    again.set_epoch(2)
    for index in (20, 3, 11):
        assert same(again[index][0], epochs[2][index])
    loader = make(fresh=True).loader(4, shuffle=False)
    for images in epochs:
        assert same(torch.cat([batch for batch, _ in loader]), images)
    with pytest.raises(UsageError):
        dataset.set_epoch(-1)


def test_fresh_images_are_refused_where_none_is_new() -> None:
    vectors = ROOT / "spec" / "vectors" / "valid"
    with pytest.raises(UsageError, match="all images of the pack are made of codes"):
        D3MDataset(vectors / "codes-bare.d3m", fresh=True)
    assert D3MDataset(vectors / "codes-bare.d3m").pack.coded_images == 6
    D3MDataset(vectors / "codes-mixed.d3m", fresh=True)  # seeded images beside them are new


def test_set_epoch_does_nothing_unless_fresh(make: Make, expected: Tensor) -> None:
    dataset = make()
    dataset.set_epoch(5)
    assert dataset.epoch == 0
    assert same(dataset[1][0], expected[1])


@pytest.mark.slow
def test_torchvision_transforms_per_sample_and_per_batch(make: Make, expected: Tensor) -> None:
    v2 = pytest.importorskip("torchvision.transforms.v2", exc_type=ImportError)
    flip = v2.RandomHorizontalFlip(1.0)
    steps = v2.Compose([flip, v2.ToDtype(torch.float32, scale=True)])
    want = expected.flip(3).float() / 255
    torch.testing.assert_close(make(transform=steps)[5][0], want[5])
    batches = make(batch_transform=steps).loader(8, shuffle=False)
    torch.testing.assert_close(torch.cat([images for images, _ in batches]), want)
    pictures = make(output="pil", transform=v2.Compose([flip, v2.PILToTensor()]))
    assert same(pictures[5][0], expected[5].flip(2))
