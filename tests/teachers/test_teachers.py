"""Teachers: trained once per source, or a classifier whose classes match by name."""

from __future__ import annotations

import json
import weakref
from collections.abc import Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_world import CLASSES, make_tree, picture, save_classifier
from safetensors.torch import load_file, save_file

from d3pack.sources import open_source
from d3pack.system import Events, Journal, Listener
from d3pack.teachers.resnet import (
    SmallResNet,
    TeacherConfig,
    TrainedTeacher,
    _normal,
    cache_or_work,
    gather,
    hold_back,
    newton_schulz,
    teacher_config,
    teacher_key,
    train_teacher,
)
from d3pack.teachers.teacher import (
    TeacherError,
    TransformersTeacher,
    batched,
    check_teacher,
    fit,
    match_labels,
)

CONFIG = TeacherConfig(size=16, samples=1200, batch=32, widths=(8, 16), held=0.1)


def train(
    folder: Path, root: Path, *, config: TeacherConfig = CONFIG, listeners: Sequence[Listener] = ()
) -> TrainedTeacher:
    journal = Journal(folder / "work", {})
    try:
        return train_teacher(
            open_source(root),
            config,
            journal,
            Events(list(listeners)),
            cache=folder / "teachers",
            device="cpu",
        )
    finally:
        journal.close()


def pictures(count: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures that no training has seen."""
    arrays = [np.asarray(picture(c, 500 + i)) for c in range(3) for i in range(count)]
    labels = torch.arange(3).repeat_interleave(count)
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2), labels


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tree(tmp_path_factory.mktemp("t") / "source", 30)


def test_a_trained_teacher_knows_the_source(tmp_path: Path, root: Path) -> None:
    teacher = train(tmp_path, root)
    images, labels = pictures()
    logits, features = batched(teacher, images)
    assert float((logits.argmax(1) == labels).float().mean()) > 0.9
    assert features.shape == (30, 16)
    assert torch.allclose(features.norm(dim=1), torch.ones(30), atol=1e-4)
    record = teacher.record
    assert record["kind"] == "trained"
    stored = next((tmp_path / "teachers").iterdir())
    assert record["bytes"] == stored.stat().st_size
    assert 0.8 < record["held_accuracy"] <= 1.0
    zeros = torch.tensor(teacher.zero).reshape(1, 3, 1, 1).expand(1, 3, 16, 16) / 255
    assert _normal(zeros).abs().max() < 0.5 / 255 / 0.25 + 1e-6
    large = torch.nn.functional.interpolate(images.float(), scale_factor=4).to(torch.uint8)
    assert torch.equal(teacher.logits(large).argmax(1), logits.argmax(1))


def test_teacher_that_knows_nothing_is_announced(tmp_path: Path, root: Path) -> None:
    notes: list[str] = []
    train(tmp_path, root, listeners=[lambda e: notes.append(str(e.get("text", "")))])
    assert any("images held out" in note for note in notes)
    assert not any("warning" in note for note in notes)


@pytest.mark.parametrize(("accuracy", "warns"), [(0.0, True), (0.3333, True), (0.34, False)])
def test_a_cached_teacher_that_knows_nothing_is_announced(
    tmp_path: Path, root: Path, accuracy: float, warns: bool
) -> None:
    notes: list[str] = []
    train(tmp_path, root)
    (stored,) = (tmp_path / "teachers").iterdir()
    figures = json.dumps({"held_accuracy": accuracy})
    save_file(load_file(stored), stored, metadata={"figures": figures})
    train(tmp_path, root, listeners=[lambda e: notes.append(str(e.get("text", "")))])
    assert any("no better than chance" in note for note in notes) == warns


def test_a_cache_is_used_where_it_has_the_teacher_or_can_be_written(tmp_path: Path) -> None:
    notes: list[str] = []
    events = Events([lambda event: notes.append(str(event.get("text", "")))])
    full, none = tmp_path / "full", Path("/proc/self/teachers")
    full.mkdir()
    (full / "a.safetensors").touch()
    with closing(Journal(tmp_path / "work", {})) as journal:
        assert cache_or_work(tmp_path / "new", journal, events, ["a"]) == tmp_path / "new"
        assert cache_or_work(full, journal, events, ["b", "a"]) == full
        assert not notes
        assert cache_or_work(none, journal, events, ["a"]) == journal.folder / "teachers"
        assert "cannot be written" in notes[0]


def test_it_is_trained_once(tmp_path: Path, root: Path) -> None:
    events: list[str] = []
    first = train(tmp_path, root, listeners=[lambda e: events.append(e["event"])])
    assert "step" in events
    events.clear()
    second = train(tmp_path, root, listeners=[lambda e: events.append(e["event"])])
    assert events == []
    assert first.record == second.record


def test_going_on_after_any_checkpoint(tmp_path: Path, root: Path) -> None:
    whole = train(tmp_path / "whole", root).record

    class StopError(Exception):
        pass

    seen = 0

    def stop(event: dict[str, Any]) -> None:
        nonlocal seen
        if event["event"] == "step" and event["stage"] == "train the teacher":
            seen += 1
            if seen == 2:
                raise StopError

    with pytest.raises(StopError):
        train(tmp_path / "stopped", root, listeners=[stop])
    assert (tmp_path / "stopped" / "work" / "teacher" / "state.safetensors").exists()
    assert train(tmp_path / "stopped", root).record == whole


@pytest.mark.parametrize("keep", [0, 6, 100, 5000])
def test_a_damaged_file_is_trained_again(tmp_path: Path, root: Path, keep: int) -> None:
    short = replace(CONFIG, samples=64)
    whole = train(tmp_path, root, config=short).record
    stored = next((tmp_path / "teachers").iterdir())
    stored.write_bytes(stored.read_bytes()[:keep])
    assert train(tmp_path, root, config=short).record == whole


def test_the_key_follows_the_threads(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They change a teacher's last bits, and those a pack's bytes: a cache may not hide it."""
    source, config = open_source(root), teacher_config(32, 1000, 0)
    found = set()
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.add(teacher_key(source, config))
        found.add(teacher_key(source, config, "cuda:0"))
    assert len(found) == 3


def test_the_key_follows_source_and_config(tmp_path: Path, root: Path) -> None:
    source = open_source(root)
    keys = {teacher_key(source, teacher_config(32, 1000, seed)) for seed in (0, 1)}
    keys.add(teacher_key(source, teacher_config(32, 2000, 0)))
    keys.add(
        teacher_key(open_source(make_tree(tmp_path / "other", 3)), teacher_config(32, 1000, 0))
    )
    assert len(keys) == 4


def test_larger_images_are_seen_larger() -> None:
    assert (teacher_config(32, 4000, 0).size, teacher_config(32, 4000, 0).samples) == (32, 4000)
    assert (teacher_config(500, 4000, 0).size, teacher_config(500, 4000, 0).samples) == (64, 1000)


def test_images_grow_while_it_learns(tmp_path: Path, root: Path) -> None:
    assert teacher_config(32, 4000, 0).stages() == [(0.4, 16), (0.75, 24), (1.0, 32)]
    seen: list[int] = []
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (
            seen.append(inputs[0].shape[-1])
            if isinstance(module, SmallResNet) and module.training
            else None
        )
    )
    with hook:
        train(tmp_path, root, config=replace(CONFIG, samples=320))
    assert seen == [8] * 4 + [12] * 4 + [16] * 2


@pytest.mark.parametrize("shape", [(6, 4, 3, 3), (40, 4, 1, 1)])  # wide, and high
def test_steps_of_convolutions_are_orthogonal(shape: tuple[int, ...]) -> None:
    gradient = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, _, v = torch.linalg.svd(gradient.flatten(1), full_matrices=False)
    step = newton_schulz(gradient.flatten(1), rounds=3).reshape(shape)
    assert step.shape == gradient.shape
    turned = u.T @ step.flatten(1) @ v.T  # diagonal: the same directions, of about one length
    assert torch.allclose(turned, turned.diagonal().diag(), atol=1e-5)
    assert turned.diagonal().min() > 0.4
    assert turned.diagonal().max() < 1.3


def test_one_image_a_class_is_enough_to_run(tmp_path: Path) -> None:
    teacher = train(tmp_path, make_tree(tmp_path / "source", 1))
    assert "held_accuracy" not in teacher.record
    assert torch.isfinite(teacher.logits(pictures(2)[0])).all()


def test_every_class_keeps_an_image_to_learn_from() -> None:
    labels = np.repeat([0, 1, 2], [7, 1, 2])
    order = np.array([7, 8, 0, 9, 1, 2, 3, 4, 5, 6])
    held, taught = hold_back(labels, order, 0.4)
    assert held.tolist() == [0, 9]  # not 7, all that class 1 has, nor all of class 2
    assert taught.tolist() == [7, 8, 1, 2, 3, 4, 5, 6]
    held, taught = hold_back(labels, order[::-1], 0.4)  # none is emptied: as drawn
    assert (held.tolist(), taught.tolist()) == ([6, 5, 4, 3], [2, 1, 9, 0, 8, 7])
    held, taught = hold_back(np.arange(5), np.arange(5), 0.4)
    assert (len(held), len(taught)) == (0, 5)


def test_large_images_are_never_held_together(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(root)
    alive, most = 0, 0
    real = source.get

    def gone() -> None:
        nonlocal alive
        alive -= 1

    def watched(c: int, i: int) -> object:
        nonlocal alive, most
        image = real(c, i)
        alive += 1
        most = max(most, alive)
        weakref.finalize(image, gone)
        return image

    monkeypatch.setattr(source, "get", watched)
    pixels, labels = gather(source, CONFIG, Events())
    assert pixels.shape == (90, 3, 16, 16)
    assert labels.tolist() == [c for c in range(3) for _ in range(30)]
    assert most <= 2


def test_fit_keeps_what_fits() -> None:
    images = torch.randint(0, 256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(fit(images, (8, 8)), images.float() / 255)
    assert fit(images, (4, 4)).shape == (2, 3, 4, 4)
    assert torch.allclose(fit(images, (4, 4)).mean(), images.float().mean() / 255, atol=0.02)


# -- by name ----------------------------------------------------------------------------------

LABELS = ("tench, Tinca tinca", "golden_retriever", "Lemon", "crane", "crane")


def test_labels_match_by_name_and_synonym() -> None:
    assert match_labels(["lemon", "tinca tinca", "golden retriever"], LABELS) == [2, 0, 1]


def test_a_table_settles_the_rest() -> None:
    assert match_labels(["citrus", "fish"], LABELS, {"citrus": "lemon", "fish": "tench"}) == [2, 0]


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        (["lemon", "zebra", "yak"], "no label for 2 of 3 classes, first 'zebra'"),
        (["lemon", "crane"], "several labels for 1 of 2 classes, first 'crane'"),
        (["tench", "tinca tinca"], "two classes have the same label"),
    ],
)
def test_teachers_with_other_classes(classes: list[str], message: str) -> None:
    with pytest.raises(TeacherError, match=message):
        match_labels(classes, LABELS)


# -- transformers -----------------------------------------------------------------------------


def test_a_transformers_classifier(tmp_path: Path) -> None:
    from transformers import ResNetForImageClassification

    labels = ("school bus", "extra", "Lemon, fruit", "goldfish")
    path = save_classifier(tmp_path / "resnet", labels)
    teacher = TransformersTeacher(str(path), CLASSES)
    images = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8)
    model = ResNetForImageClassification.from_pretrained(path).eval()
    with torch.no_grad():
        expected = model((images.float() / 255 - 0.4) / 0.2).logits[:, [3, 2, 0]]
    assert torch.allclose(teacher.logits(images), expected, atol=1e-5)
    weights = path / "model.safetensors"
    assert teacher.record["bytes"] == weights.stat().st_size
    assert str(tmp_path) not in json.dumps(dict(teacher.record))


def test_a_classifier_of_other_classes(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "resnet", ("cat", "dog"))
    with pytest.raises(TeacherError, match="teacher_map"):
        TransformersTeacher(str(path), CLASSES)
    table = tmp_path / "map.json"
    table.write_text(json.dumps({"goldfish": "cat", "lemon": "dog"}))
    assert TransformersTeacher(str(path), CLASSES[:2], table=str(table)).classes == CLASSES[:2]


@pytest.mark.parametrize(
    "text",
    [
        "[", "[]", "3", "[" * 100_000, '{"size": "x"}', '{"size": 0}', '{"size": 4096}',
        '{"size": {"height": null}}', '{"size": [1, 2, 3]}', '{"size": {"height": 1e999}}',
        '{"image_mean": "abc"}', '{"image_mean": [0.5]}', '{"image_mean": [NaN, 0, 0]}',
        '{"image_std": [0, 1, 1]}', '{"image_std": {"a": 1}}',
    ],
)  # fmt: skip
def test_a_classifier_that_says_nonsense_about_images(tmp_path: Path, text: str) -> None:
    path = save_classifier(tmp_path / "resnet", CLASSES)
    (path / "preprocessor_config.json").write_text(text)
    with pytest.raises(TeacherError, match=r"preprocessor_config\.json"):
        TransformersTeacher(str(path), CLASSES)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    path = save_classifier(tmp_path / "resnet", CLASSES)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    with pytest.raises(TeacherError, match="holds no safetensors weights"):
        TransformersTeacher(str(path), CLASSES)


@pytest.mark.parametrize("damage", ["weights", "config", "kind"])
def test_a_damaged_classifier(tmp_path: Path, damage: str) -> None:
    path = save_classifier(tmp_path / "resnet", CLASSES)
    if damage == "weights":
        (path / "model.safetensors").write_bytes(b"\x10" + bytes(40))
    elif damage == "config":
        (path / "config.json").write_text("{}")
    else:
        (path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    with pytest.raises(TeacherError, match="is not an image classifier"):
        TransformersTeacher(str(path), CLASSES)


@pytest.mark.parametrize("name", ["./nowhere", "/no/dir", "nowhere/", "nowhere", "org/na me"])
def test_a_teacher_that_is_not_there(name: str) -> None:
    with pytest.raises(TeacherError, match=f"no teacher directory {name};"):
        TransformersTeacher(name, CLASSES)


def test_a_teacher_is_checked_without_loading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_classifier(tmp_path / "resnet", CLASSES)
    check_teacher(str(path))
    (path / "config.json").unlink()
    with pytest.raises(TeacherError, match=r"holds no config\.json"):
        check_teacher(str(path))
    check_teacher("org/none")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(TeacherError, match="cannot fetch the teacher org/none: "):
        check_teacher("org/none")
