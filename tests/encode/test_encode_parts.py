"""The parts of encode that need no backbone: options, budget, journal, collages, seeds, events."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from encode_world import CLASSES, make_tree
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

from d3pack.encode import EncodeOptions, budget, method, open_method
from d3pack.encode import journal as journal_module
from d3pack.encode.collages import (
    CollageOptions,
    best_patches,
    clusters,
    crop_box,
    make_collages,
    tile,
)
from d3pack.encode.events import Events, json_lines, log_file
from d3pack.encode.generate import Judged, probabilities
from d3pack.encode.journal import Journal, JournalError, NoSpaceError, write_whole
from d3pack.encode.live import View, spark
from d3pack.encode.options import label_kind, parse_size
from d3pack.encode.plan import Dials
from d3pack.encode.seeds import choose_order
from d3pack.errors import D3MError, SourceError, UsageError
from d3pack.sources import open_source

# -- options ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"), [("20KB", 20_000), ("6000", 6000), ("1.5MB", 1_500_000), ("4 KiB", 4096)]
)
def test_sizes(text: str, value: int) -> None:
    assert parse_size(text) == value


@pytest.mark.parametrize("text", ["", "KB", "-3KB", "0", "5 potatoes", "1e400", "nanKB"])
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="is no size"):
        parse_size(text)


def test_labels() -> None:
    assert label_kind("none") == ("none", 0)
    assert label_kind("dense") == ("dense", 0)
    assert label_kind("top5") == ("topk", 5)
    for text in ("top", "top0", "topx", "all"):
        with pytest.raises(UsageError):
            label_kind(text)


@pytest.mark.parametrize(
    "bad",
    [
        {"images_per_class": 0},
        {"modes": 0},
        {"codec": "zip"},
        {"factor": 3},
        {"sampler": "table"},
        {"template": "no place"},
        {"guidance": float("nan")},
        {"lr": 0.0},
        {"labels": "all"},
        {"crop_scale": (0.9, 0.1)},
        {"probes": 65},
        {"seed": -1},
        {"label_temperature": 0.0},
    ],
    ids=str,
)
def test_options_that_cannot_be_meant(bad: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        EncodeOptions(**bad)  # type: ignore[arg-type]


def test_only_what_was_chosen_is_recorded() -> None:
    assert EncodeOptions().plain() == {}
    assert EncodeOptions(modes=2, lr=0.05).plain() == {"modes": 2, "lr": 0.05}


def test_unknown_method() -> None:
    with pytest.raises(UsageError, match=r"there is no method 'magic'; known: .*d3m"):
        open_method("magic")
    assert "d3m" in method.methods()


# -- budget -----------------------------------------------------------------------------------


def toy_size(dials: Dials) -> int:
    """A pack of ten classes and ten images, by hand."""
    bits = {"i4": 4, "i8": 8, "f16": 16}[dials.codec]
    labels = {"none": 0, "top3": 400, "top5": 700, "top10": 1300, "dense": 2000}[dials.labels]
    prompts = 10 * dials.modes * dials.vectors * 192 * bits // 8
    return 4000 + prompts + (100 if dials.candidates > 1 else 0) + 250 * dials.probes + labels


def test_budget_is_spent_but_not_exceeded() -> None:
    sizes = []
    for total in range(6_000, 60_000, 2_000):
        dials, size = budget.spend(total, EncodeOptions(), 16, toy_size)
        assert size == toy_size(dials) <= total - budget.MARGIN
        sizes.append(size)
    assert sizes == sorted(sizes)
    assert sizes[-1] > 4 * sizes[0]


def test_budget_keeps_what_was_set_by_hand() -> None:
    dials, _ = budget.spend(50_000, EncodeOptions(modes=3, labels="none"), 16, toy_size)
    assert (dials.modes, dials.labels) == (3, "none")
    assert dials.vectors > 1


def test_budget_respects_the_backbone() -> None:
    dials, _ = budget.spend(10**6, EncodeOptions(), 2, toy_size)
    assert dials.vectors == 2


def test_budget_that_is_too_small() -> None:
    with pytest.raises(UsageError, match="300 bytes are too few: the smallest pack"):
        budget.spend(300, EncodeOptions(), 16, toy_size)


# -- journal ----------------------------------------------------------------------------------


def test_journal_remembers(tmp_path: Path) -> None:
    first = Journal(tmp_path / "w", {"source": "abc"})
    first.record("one", {"a": [1, 2]})
    first.save("deep/er", {"x": np.arange(6).reshape(2, 3)}, {"note": "é"})
    first.close()
    second = Journal(tmp_path / "w", {"source": "abc"})
    assert second["one"] == {"a": [1, 2]}
    found = second.load("deep/er")
    assert found is not None
    assert np.array_equal(found[0]["x"], np.arange(6).reshape(2, 3))
    assert found[1] == {"note": "é"}
    assert second.load("other") is None
    second.close()


def test_half_written_files_are_forgotten(tmp_path: Path) -> None:
    first = Journal(tmp_path / "w", {})
    first.path("classes/000001.safetensors.part").write_bytes(b"half")
    first.close()
    second = Journal(tmp_path / "w", {})
    assert second.load("classes/000001") is None
    assert not list((tmp_path / "w").glob("**/*.part"))
    second.close()


def test_one_process_at_a_time(tmp_path: Path) -> None:
    first = Journal(tmp_path / "w", {})
    with pytest.raises(JournalError, match="another process works in w"):
        Journal(tmp_path / "w", {})
    first.close()
    Journal(tmp_path / "w", {}).close()


def test_restart_forgets(tmp_path: Path) -> None:
    first = Journal(tmp_path / "w", {"source": "abc"})
    first.save("classes/000000", {"x": np.zeros(2)}, {})
    first.close()
    with pytest.raises(UsageError, match="the source has changed"):
        Journal(tmp_path / "w", {"source": "xyz"})
    second = Journal(tmp_path / "w", {"source": "xyz"}, restart=True)
    assert second.load("classes/000000") is None
    second.close()


def test_nothing_done_is_nothing_lost(tmp_path: Path) -> None:
    """A run that failed at once may be run again with mended options."""
    Journal(tmp_path / "w", {"source": "abc", "option teacher": "typo"}).close()
    Journal(tmp_path / "w", {"source": "abc", "option teacher": "right"}).close()


@pytest.mark.parametrize("text", ["", "{", "[]", '{"version": 9, "key": {}, "facts": {}}'])
def test_a_damaged_journal(tmp_path: Path, text: str) -> None:
    (tmp_path / "w").mkdir()
    (tmp_path / "w" / "journal.json").write_text(text)
    with pytest.raises(JournalError, match="--restart"):
        Journal(tmp_path / "w", {})


@pytest.mark.parametrize("keep", [0, 5, 60])
def test_damaged_arrays(tmp_path: Path, keep: int) -> None:
    journal = Journal(tmp_path / "w", {})
    journal.save("a", {"x": np.zeros(20)}, {})
    path = tmp_path / "w" / "a.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(JournalError, match="damaged"):
        journal.load("a")
    journal.close()


def test_disk_full(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    (tmp_path / "x.part").symlink_to(full)
    with pytest.raises(NoSpaceError, match=r"no space left to write x; free some and run the same"):
        write_whole(tmp_path / "x", b"1" * 10_000)
    assert not (tmp_path / "x").exists()


def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_whole(tmp_path / "x", b"old")

    def fails(fd: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(journal_module.os, "fsync", fails)
    with pytest.raises(JournalError, match="cannot write x: Input/output error"):
        write_whole(tmp_path / "x", b"new")
    assert (tmp_path / "x").read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["x"]


# -- collages ---------------------------------------------------------------------------------


class Brightness:
    """A teacher one can compute by hand: class c likes its own colour channel."""

    classes = CLASSES
    record: ClassVar[dict[str, object]] = {}

    def logits(self, images: Tensor) -> Tensor:
        return images.float().mean((2, 3)) / 25

    def features(self, images: Tensor) -> Tensor:
        return images.float().mean(3).flatten(1)


def cut(**changes: object) -> CollageOptions:
    settings: dict[str, object] = {
        "size": (16, 16),
        "factor": 2,
        "pool": 100,
        "crops": 3,
        "scale": (0.2, 0.8),
        "count": 10,
        "seed": 3,
    }
    return CollageOptions(**{**settings, **changes})  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 500),
    st.integers(1, 500),
    st.floats(0.25, 4),
    st.floats(0.01, 1),
    st.integers(0, 2**32),
)
def test_crops_lie_inside(width: int, height: int, aspect: float, low: float, seed: int) -> None:
    x0, y0, x1, y1 = crop_box(width, height, aspect, (low, 1.0), np.random.default_rng(seed))
    assert 0 <= x0 < x1 <= width
    assert 0 <= y0 < y1 <= height


def test_a_crop_of_everything_is_the_middle() -> None:
    assert crop_box(30, 10, 1.0, (1.0, 1.0), np.random.default_rng(0)) == (10, 0, 20, 10)


def test_tiles_go_row_by_row() -> None:
    patches = np.arange(4, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 2, 2), np.uint8)
    assert tile(patches, 2)[0, 0].tolist() == [
        [0, 0, 1, 1],
        [0, 0, 1, 1],
        [2, 2, 3, 3],
        [2, 2, 3, 3],
    ]
    assert np.array_equal(tile(patches, 1), patches)


def test_collages_take_the_most_believed_patches(tmp_path: Path) -> None:
    source = open_source(make_tree(tmp_path / "s", 24))
    patches, costs, bad = best_patches(source, 1, Brightness(), cut())
    assert patches.shape == (24, 3, 8, 8)
    assert bad == 0
    made = make_collages(source, 1, Brightness(), cut(count=3))
    assert made.images.shape == (3, 3, 16, 16)
    best = patches[np.argsort(costs, kind="stable")[:12]]
    assert np.array_equal(made.images.numpy(), tile(best, 2))
    assert made.realism < float(costs.mean())
    again = make_collages(source, 1, Brightness(), cut(count=3))
    assert torch.equal(made.images, again.images)
    other = make_collages(source, 1, Brightness(), cut(count=3, seed=4))
    assert not torch.equal(made.images, other.images)


def test_more_crops_find_better_patches(tmp_path: Path) -> None:
    source = open_source(make_tree(tmp_path / "s", 12))
    one = best_patches(source, 0, Brightness(), cut(crops=1))[1]
    many = best_patches(source, 0, Brightness(), cut(crops=9))[1]
    assert many.mean() < one.mean()


def test_one_image_still_fills_a_collage(tmp_path: Path) -> None:
    source = open_source(make_tree(tmp_path / "s", 1))
    made = make_collages(source, 0, Brightness(), cut(factor=4))
    assert made.images.shape == (1, 3, 16, 16)
    assert made.seen == 1


def test_bad_images_are_replaced_by_others(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "s", 10)
    for i in range(0, 10, 2):
        (root / "lemon" / f"{i:03d}.png").write_bytes(b"junk")
    made = make_collages(open_source(root), 1, Brightness(), cut(factor=1, pool=4))
    assert made.seen == 4
    assert 0 <= made.bad <= 5
    for i in range(1, 10, 2):
        (root / "lemon" / f"{i:03d}.png").write_bytes(b"junk")
    with pytest.raises(SourceError, match="no image of class 'lemon' can be read"):
        make_collages(open_source(root), 1, Brightness(), cut())


@pytest.mark.parametrize(("rows", "count"), [(9, 4), (10, 3), (12, 4), (7, 7), (40, 1)])
def test_clusters_are_equal_in_size(rows: int, count: int) -> None:
    points = torch.from_numpy(np.random.default_rng(0).standard_normal((rows, 5)))
    sizes = np.bincount(clusters(points, count, 0), minlength=count)
    assert sizes.sum() == rows
    assert sizes.max() - sizes.min() <= 1


def test_clusters_find_what_belongs_together() -> None:
    rng = np.random.default_rng(0)
    truth = rng.permutation(np.repeat(np.arange(3), 20))
    points = torch.from_numpy(np.eye(3)[truth] * 10 + rng.standard_normal((60, 3)))
    found = clusters(points, 3, 0)
    assert len({(a, b) for a, b in zip(truth.tolist(), found.tolist(), strict=True)}) == 3


def test_fewer_images_than_clusters() -> None:
    assert clusters(torch.zeros(2, 4), 5, 0).tolist() == [0, 1]


# -- seeds and labels -------------------------------------------------------------------------


def judged(count: int = 24, seed: int = 0) -> Judged:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((count, 6))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    return Judged(
        rng.standard_normal((count, 3)).astype(np.float32) * 3, features.astype(np.float32)
    )


@pytest.mark.parametrize("modes", [1, 2, 3])
def test_the_first_k_are_the_best_k(modes: int) -> None:
    whole = choose_order(judged(), 1, 12, modes)
    assert len(set(whole.tolist())) == 12
    assert (whole % modes == np.arange(12) % modes).all()
    for k in (1, 5, 8):
        assert np.array_equal(choose_order(judged(), 1, k, modes), whole[:k])


def test_picks_are_believed_and_unlike() -> None:
    found = judged()
    logp = np.log(probabilities(found.logits, 1.0))[:, 1]
    order = choose_order(found, 1, 8, 1)
    assert order[0] == logp.argmax()
    assert logp[order].mean() > np.sort(logp)[-12:].mean() - 1.0
    twins = Judged(np.zeros((4, 2), np.float32), np.eye(2, dtype=np.float32)[[0, 0, 0, 1]])
    assert set(choose_order(twins, 0, 2, 1).tolist()) == {0, 3}


def test_probabilities_soften_with_temperature() -> None:
    logits = np.array([[2.0, 0.0, -1.0]], np.float32)
    sharp, soft = probabilities(logits, 1.0), probabilities(logits, 4.0)
    assert np.allclose(sharp, np.exp(logits) / np.exp(logits).sum())
    assert soft.max() < sharp.max()
    assert abs(soft.sum() - 1) < 1e-6


# -- events -----------------------------------------------------------------------------------


def told(listeners: list) -> None:
    events = Events(listeners)
    events.emit("plan", lines=["3 classes"])
    with events.stage("invert", 5, "rows"):
        for i in range(1, 6):
            events.step(i, samples=100 * i, loss=1.0 / i)
    events.note("all good")


def test_json_lines_and_log(tmp_path: Path) -> None:
    out = io.StringIO()
    told([json_lines(out), log_file(tmp_path / "log.txt")])
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e["event"] for e in events] == ["plan", "stage", *["step"] * 5, "stage-done", "note"]
    assert events[3] == {
        "event": "step", "stage": "invert", "done": 2, "total": 5, "samples": 200, "loss": 0.5,
    }  # fmt: skip
    assert len((tmp_path / "log.txt").read_text().splitlines()) == len(events)


def test_the_live_view_shows_what_matters() -> None:
    view = View()
    told([view.listen])
    console = Console(file=io.StringIO(), width=120)
    console.print(view)
    text = console.file.getvalue()
    for part in (
        "3 classes",
        "invert",
        "5/5 rows",
        "all good",
        "loss 1.0000",
        "0.2000",
    ):
        assert part in text, part


def test_spark_falls() -> None:
    assert spark([3.0, 2.0, 1.0]) == "█▄▁"
    assert len(spark([float(i) for i in range(1000)])) <= 40
    assert spark([1.0, 1.0]) == "▁▁"


def test_errors_have_codes_of_their_own() -> None:
    codes = {error.code for error in (JournalError, NoSpaceError)}
    assert len(codes) == 2
    assert D3MError.code not in codes
