"""The training loop: exact chunks, exact resume, the same student for the same seed."""

from __future__ import annotations

import errno
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from d3pack.errors import UsageError
from d3pack.students import protocols, training
from d3pack.students.images import LabelledImages
from d3pack.students.networks import build_student
from d3pack.students.protocols import CutMix, Epochs, Flip, Intervals, Protocol, Updates
from d3pack.students.training import (
    IMAGENET,
    History,
    fit,
    lengths,
    seconds_needed,
    statistics,
    train_student,
)
from d3pack.testing import raises_code

SMALL = replace(
    protocols.QUICK,
    batch=((1 << 60, 8),),
    length=Updates(6),
    tests=Intervals(parts=3),
    precision="float32",
)


def coloured(per_class: int, seed: int, size: int = 8) -> LabelledImages:
    """Three classes that a student can tell by colour."""
    rng = torch.Generator().manual_seed(seed)
    labels = torch.arange(3).repeat_interleave(per_class)
    images = torch.randint(0, 120, (len(labels), 3, size, size), generator=rng)
    images[torch.arange(len(labels)), labels] += 100
    return LabelledImages(images.to(torch.uint8), labels)


def train(protocol: Protocol, seed: int = 0, **options: object) -> History:
    return train_student(coloured(5, 1), coloured(20, 2), protocol, seed, **options)  # type: ignore[arg-type]


def test_a_student_learns() -> None:
    history = train(replace(SMALL, length=Updates(40), batch_ops=(Flip(),)))
    assert history.last > 0.9
    assert history.best >= history.last
    assert sum(map(sum, history.confusion)) == 60
    right = sum(row[c] for c, row in enumerate(history.confusion))
    assert history.last == pytest.approx(right / 60)
    assert [step for step, _ in history.curve] == [13, 26, 39, 40]


def test_a_weight_counts_like_as_many_copies() -> None:
    """Of a whole batch: copies of an image, or the image with a weight."""
    images, labels = coloured(4, 1).images, coloured(4, 1).labels
    copies = torch.tensor([3, 1, 1, 1] * 3)
    many = LabelledImages(images.repeat_interleave(copies, 0), labels.repeat_interleave(copies))
    weighted = LabelledImages(images, labels, weights=copies.float())
    fixed: dict[str, Any] = {"normalise": IMAGENET, "batch_ops": (), "pixel_ops": (), "mix": None}
    protocol = replace(SMALL, length=Updates(1), size=8, **fixed)
    found = []
    for content in (many, weighted, LabelledImages(images, labels)):
        whole = replace(protocol, batch=((1 << 60, len(content.images)),))
        run = training._Run(content, coloured(2, 2), whole, 0, 3, None, None, torch.device("cpu"))
        run.update(torch.arange(len(content.images)))
        grads = [p.grad for p in run.model.parameters() if p.grad is not None]
        found.append(torch.cat([grad.flatten() for grad in grads]))
    assert torch.allclose(found[0], found[1], atol=1e-6)
    assert not torch.allclose(found[0], found[2], atol=1e-3)


def test_mixed_images_have_mixed_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    content = replace(coloured(4, 1), weights=torch.tensor([2.0, 1.0, 0.5, 0.5] * 3))
    protocol = replace(SMALL, size=8, labels="teacher", mix=CutMix(p=1.0, beta=1.0))
    run = training._Run(
        content, coloured(2, 2), protocol, 0, 3, None, lambda x: torch.zeros(len(x), 3),
        torch.device("cpu"),
    )  # fmt: skip
    _, targets = run._batch(torch.arange(12), torch.Generator().manual_seed(1))
    assert targets.sum() == pytest.approx(12)
    assert len(set(targets.sum(1).tolist())) > 3


def test_the_seed_decides() -> None:
    one, same, other = train(SMALL), train(SMALL), train(SMALL, seed=1)
    assert replace(one, seconds=0.0) == replace(same, seconds=0.0)
    assert one.confusion != other.confusion


def test_cudnn_is_held_while_a_student_learns() -> None:
    cudnn: Any = torch.backends.cudnn  # its flags are properties that types do not know
    seen: list[tuple[bool, bool, str]] = []

    def look(done: int, total: int) -> None:
        del done, total
        seen.append((cudnn.enabled, cudnn.benchmark, cudnn.conv.fp32_precision))

    cudnn.benchmark = True
    try:
        train(SMALL, progress=look)
        assert cudnn.benchmark
    finally:
        cudnn.benchmark = False
    assert set(seen) == {(True, False, "ieee")}


# Plain gradient descent: AdamW would blow the last bit of a tiny gradient up to a whole step.
GENTLE = replace(SMALL, optimizer=protocols.SGD(0.02))


@pytest.mark.parametrize("protocol", [GENTLE, replace(GENTLE, length=Epochs(((1 << 60, 3),)))])
def test_chunks_do_not_change_the_student(
    protocol: Protocol, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = []
    build = build_student

    def remember(*args: object, **kwargs: object) -> torch.nn.Module:
        models.append(build(*args, **kwargs))  # type: ignore[arg-type]
        return models[-1]

    monkeypatch.setattr(training, "build_student", remember)
    for chunk in (8, 3, 1):
        monkeypatch.setattr(training, "_CPU_CHUNK", chunk)
        train(protocol)
    whole, *chunked = [torch.cat([p.flatten() for p in m.parameters()]) for m in models]
    for other in chunked:
        torch.testing.assert_close(other, whole, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optimizer = protocols.SGD(0.02) if name == "sgd" else protocols.AdamW()
    protocol = replace(SMALL, length=Updates(12), optimizer=optimizer, mix=CutMix(0.5))
    unbroken = train(protocol)

    place = tmp_path / "student.safetensors"
    monkeypatch.setattr(training, "_SAVE_EVERY", -1.0)

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        if done == 7:
            raise StopError

    with pytest.raises(StopError):
        train(protocol, checkpoint=place, progress=stop)
    assert place.exists()
    seen: list[int] = []
    resumed = train(protocol, checkpoint=place, progress=lambda done, total: seen.append(done))
    assert seen == [7, 8, 9, 10, 11, 12]  # the interrupted step had not been kept
    assert resumed.curve == unbroken.curve
    assert resumed.confusion == unbroken.confusion


def test_a_checkpoint_that_does_not_fit_is_left_alone(tmp_path: Path) -> None:
    unbroken = train(SMALL)
    place = tmp_path / "student.safetensors"
    place.write_bytes(b"not a checkpoint")
    assert train(SMALL, checkpoint=place).confusion == unbroken.confusion
    other = build_student("convnet3", 7, 8)
    optimizer = torch.optim.SGD(other.parameters(), lr=0.1)
    training.save_checkpoint(place, other, optimizer, 3, [], 0.0)
    assert train(SMALL, checkpoint=place).confusion == unbroken.confusion


def test_history_survives_json() -> None:
    import json

    history = train(SMALL)
    assert History.from_json(json.loads(json.dumps(history.to_json()))) == history


@pytest.mark.heavy
def test_soft_labels_are_followed_and_hard_ones_on_request() -> None:
    known, tests = coloured(5, 1), coloured(20, 2)
    images, labels = known.images, known.labels
    # Soft labels that call class 0 mostly class 1: a student that follows them says so.
    soft = torch.eye(3)[labels]
    soft[labels == 0] = torch.tensor([0.1, 0.9, 0.0])
    protocol = replace(SMALL, length=Updates(40), batch_ops=())
    content = LabelledImages(images, labels, soft=soft)
    followed = train_student(content, tests, protocol, 0)
    assert followed.confusion[0][1] > followed.confusion[0][0]
    # hard labels are the classes, not what the teacher believes most
    strict = train_student(content, tests, replace(protocol, labels="hard"), 0)
    assert strict.last > 0.9


@pytest.mark.heavy
def test_a_teacher_labels_what_the_student_sees() -> None:
    seen: list[Tensor] = []

    def teach(images: Tensor) -> Tensor:
        seen.append(images)
        brightest = images.float().mean((2, 3)).argmax(1)
        return torch.eye(3)[brightest] * 10

    protocol = replace(
        protocols.PROTOCOLS["rded-soft-small"],
        student="convnet3",
        norm="instance",
        length=Epochs(((1 << 60, 60),)),
        temperature=1.0,
    )
    known, tests = coloured(5, 1), coloured(20, 2)
    images, labels = known.images, known.labels
    wrong = (labels + 1) % 3  # the stored labels do not matter
    history = train_student(LabelledImages(images, wrong), tests, protocol, 0, teacher=teach)
    assert history.last > 0.8
    assert seen[0].dtype == torch.uint8
    with pytest.raises(UsageError, match="needs a teacher"):
        train_student(known, tests, protocol, 0)


@pytest.mark.heavy
def test_batch_norm_students_train_on_whole_batches() -> None:
    protocol = replace(SMALL, student="resnet18", norm="batch", length=Updates(2))
    assert 0 <= train(protocol).last <= 1


def test_statistics_move_as_in_two_forwards_of_a_batch() -> None:
    """RDED's loop passes each batch through in training mode twice, once without a gradient."""
    x = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 3 + 1
    once, twice = (build_student("resnet18", 3, 8, norm="batch") for _ in range(2))
    training._update_norms_often(once, 2)
    for _ in range(2):
        with torch.no_grad():
            twice(x)
    with torch.no_grad():
        once(x)
    moved = {k: v for k, v in twice.state_dict().items() if k.endswith(("running_mean", "_var"))}
    assert len(moved) == 40
    for name, value in moved.items():
        torch.testing.assert_close(once.state_dict()[name], value)


def test_a_run_takes_margin_resampling_and_statistics_from_its_protocol() -> None:
    """RDED tests on the centre of images resized to 8/7, and moves statistics twice a step."""
    fixed: dict[str, Any] = {"normalise": IMAGENET, "student": "resnet18", "norm": "batch"}
    changes = {**fixed, "size": 28, "test_margin": True, "norm_updates": 2, "resample": "bilinear"}
    protocol = replace(SMALL, **changes)
    images, others = coloured(2, 1, size=40), coloured(3, 2, size=40)
    run = training._Run(images, others, protocol, 0, 3, None, None, torch.device("cpu"))

    def resized(content: LabelledImages, side: int) -> Tensor:
        made = torch.nn.functional.interpolate(
            content.images.float(), (side, side), mode="bilinear", antialias=True
        )
        return made.round().clamp(0, 255).to(torch.uint8)

    assert torch.equal(run.images, resized(images, 28))
    assert torch.equal(run.test_images, resized(others, 32)[:, :, 2:30, 2:30])
    norms = [m for m in run.model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(norms) == 20
    assert [norm.momentum for norm in norms] == pytest.approx([1 - 0.9**2] * 20)


def test_epochs_cover_every_image_once() -> None:
    protocol = replace(SMALL, length=Epochs(((1 << 60, 4),)))
    length = lengths(protocol, 15, 3)
    chosen = list(training._indices(length, 15, 3, 0))
    assert [len(c) for c in chosen] == [8, 7] * 4
    for epoch in range(4):
        assert sorted(torch.cat(chosen[2 * epoch : 2 * epoch + 2]).tolist()) == list(range(15))
    assert all(
        torch.equal(a, b)
        for a, b in zip(chosen[3:], training._indices(length, 15, 3, 3), strict=True)
    )


def test_updates_run_on_from_epoch_to_epoch() -> None:
    length = lengths(SMALL, 15, 3)
    chosen = list(training._indices(length, 15, 3, 0))
    assert [len(c) for c in chosen] == [8] * 6
    stream = torch.cat(chosen)
    for epoch in range(3):
        assert sorted(stream[15 * epoch : 15 * epoch + 15].tolist()) == list(range(15))
    for start in range(6):
        again = list(training._indices(length, 15, 3, start))
        assert all(torch.equal(a, b) for a, b in zip(chosen[start:], again, strict=True))


def test_fit_crops_the_middle_and_keeps_what_fits() -> None:
    images = torch.randint(256, (2, 3, 20, 30), dtype=torch.uint8)
    assert torch.equal(fit(images, 20), images[:, :, :, 5:25])
    assert fit(images, 10).shape == (2, 3, 10, 10)
    assert fit(images, 40).shape == (2, 3, 40, 40)
    assert torch.equal(fit(images, 14, side=20), images[:, :, 3:17, 8:22])
    coarse = fit(images, 10, resample="bilinear")
    exact = torch.nn.functional.interpolate(
        images.float(), [10, 15], mode="bilinear", antialias=True, align_corners=False
    )
    assert torch.equal(coarse, exact.round().to(torch.uint8)[:, :, :, 2:12])
    flat = torch.full((1, 3, 9, 9), 77, dtype=torch.uint8)
    assert torch.equal(fit(flat, 5), torch.full((1, 3, 5, 5), 77, dtype=torch.uint8))


def test_statistics_are_mean_and_deviation_of_channels() -> None:
    images = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    images[:2, 1] = 255
    mean, std = statistics(images)
    assert mean == pytest.approx((0, 0.5, 0))
    assert std == pytest.approx((1e-3, 0.5164, 1e-3), abs=1e-3)


def test_nothing_to_learn_or_to_test() -> None:
    known = coloured(2, 1)
    none = LabelledImages(known.images[:0], known.labels[:0])
    with pytest.raises(UsageError, match="no training images"):
        train_student(none, known, SMALL, 0, classes=3)
    with pytest.raises(UsageError, match="no test images"):
        train_student(known, none, SMALL, 0)
    oblong = LabelledImages(known.images[:, :, :4], known.labels)
    with pytest.raises(UsageError, match="square"):
        train_student(known, oblong, SMALL, 0)


def test_time_needed_grows_with_the_work() -> None:
    brief = seconds_needed(SMALL, 3, 16, 30, 10)
    long = seconds_needed(replace(SMALL, length=Updates(60_000)), 3, 16, 30, 10)
    assert 0 < brief < 60
    assert long > 100 * brief


def test_interrupted_save_keeps_the_earlier_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = tmp_path / "student.safetensors"
    model = build_student("convnet3", 3, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training.save_checkpoint(place, model, optimizer, 3, [(3, 0.5)], 1.0)
    before = place.read_bytes()

    def half(tensors: object, path: Path, meta: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(training, "save_file", half)
    with raises_code("E_NO_SPACE"):
        training.save_checkpoint(place, model, optimizer, 4, [], 2.0)
    assert place.read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [place.name]
    assert training.load_checkpoint(place, model, optimizer) == (3, [(3, 0.5)], 1.0)
