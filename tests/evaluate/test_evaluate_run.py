"""A whole evaluation with a real (tiny) backbone, by way of the command."""

from __future__ import annotations

import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli_schema import check_output
from evaluate_world import BLINK
from PIL import Image
from tiny_backbones import tiny_dit, tiny_pack, tiny_sd

import d3pack
from d3pack.cli import main
from d3pack.errors import NotFoundError, UsageError
from d3pack.evaluate import Bench, EvalSettings, baselines, evaluate, sweep, write_report
from d3pack.evaluate.bench import Spread
from d3pack.evaluate.entries import PayloadSettings
from d3pack.evaluate.evaluation import label_robust_score
from d3pack.format import Codes, Coding, encode_codes
from d3pack.format.codecs import encode_labels
from d3pack.sources import open_source
from d3pack.students.protocols import (
    DD_RANKING,
    PROTOCOLS,
    SGD,
    Epochs,
    Intervals,
    Updates,
)
from d3pack.students.real import RealImages
from d3pack.system import Events

pytestmark = pytest.mark.heavy


def public(pack: d3pack.Pack) -> d3pack.Pack:
    """The pack as if its backbone could be had on the Hub."""
    ref = replace(pack.recipe.backbone, repo="org/tiny")
    return replace(pack, recipe=replace(pack.recipe, backbone=ref))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, a pack with soft labels, and real images in train/ and test/."""
    root = tmp_path_factory.mktemp("world")
    backbone = tiny_sd(root / "backbone")
    plain = public(tiny_pack(backbone, images=6, steps=1, guidance=1.0))
    probs = np.random.default_rng(1).dirichlet(np.ones(3), size=(3, 6)).astype(np.float32)
    d3pack.write(replace(plain, labels=encode_labels(probs, "topk", k=2)), root / "pack.d3m")
    d3pack.write(plain, root / "plain.d3m")
    rng = np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 5)):
        for c, name in enumerate(plain.classes):
            folder = root / "real" / split / name.replace(" ", "_")
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (16, 16, 3))
                pixels[..., c] += 100
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{i}.png")
    return root


@pytest.fixture(autouse=True)
def fast(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    monkeypatch.setitem(PROTOCOLS, "quick", BLINK)


def command(world: Path, monkeypatch: pytest.MonkeyPatch, *args: str) -> int:
    """Run `d3pack eval` in this process; the exit code."""
    words = ["d3pack", "eval", "--backbone", str(world / "backbone"), *args]
    monkeypatch.setattr(sys, "argv", words)
    try:
        main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_the_whole_comparison(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (
        *(str(world / "pack.d3m"), "--real", str(world / "real")),
        *("--seeds", "2", "--whole", "--work", str(tmp_path / "work"), "--format", "json"),
        *("--report", str(tmp_path / "out.html"), "--sweep", "ipc=2,6", "--sweep", "labels=none"),
    )
    assert command(world, monkeypatch, *args) == 0
    first = capsys.readouterr()
    data = check_output("eval", first.out)
    entries = {entry["key"].split("-")[0]: entry for entry in data["entries"]}
    kinds = {"jpeg", "webp", "sheet", "avif"}
    assert set(entries) == {"pack", "hard", "random", *kinds, "names", "whole"}
    size = (world / "pack.d3m").stat().st_size
    assert entries["pack"]["bytes"] == data["ledger"]["pack"] == size
    assert entries["hard"]["bytes"] == size - data["ledger"]["labels"]
    assert entries["names"]["bytes"] < size
    assert 0 < entries["webp"]["bytes"] <= size
    assert entries["random"]["bytes"] is None
    assert {run["updates"] for entry in data["entries"] for run in entry["runs"]} == {4}
    assert {len(entry["runs"]) for entry in data["entries"]} == {2}
    for entry in data["entries"]:
        for run in entry["runs"]:
            assert np.sum(run["confusion"]) == 15
    backbone = sum(f.stat().st_size for f in (world / "backbone").rglob("*") if f.is_file())
    assert 0 < data["ledger"]["backbone"] <= backbone
    assert data["ledger"]["everything"] == size + data["ledger"]["backbone"]
    assert data["scores"] == {}  # of DD-Ranking: its protocol was not followed
    assert [p["title"] for p in data["sweep"]] == ["pack as it is", "ipc 2", "labels none"]
    assert any(p["front"] for p in data["sweep"])

    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.count("<svg") == 3
    assert page.count("<img") == 3
    for word in (
        "Accuracy per byte",
        "Sweep",
        "prefers-color-scheme",
        "@media print",
    ):
        assert word in page
    assert "DD-Ranking" not in page
    assert not re.search(r'(src|href)="(?!data:|#)', page)  # nothing beside the page
    assert str(world) not in page

    # Everything is there: a second run trains nothing and says the same.
    monkeypatch.setattr("d3pack.evaluate.bench.train_student", None)
    monkeypatch.setattr("d3pack.evaluate.bench.seconds_needed", None)
    assert command(world, monkeypatch, *args) == 0
    second = json.loads(capsys.readouterr().out)
    assert second == data


def test_a_table_for_people(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (
        *(str(world / "plain.d3m"), "--real", str(world / "real")),
        *("--seeds", "1", "--work", str(tmp_path / "work"), "--baseline", "none"),
    )
    assert command(world, monkeypatch, *args) == 0
    out, err = capsys.readouterr()
    assert out == ""
    assert "this pack" in err
    assert "about" in err  # the time it will take
    assert "JPEG files" in err


def test_a_tree_may_call_its_test_part_val(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = tmp_path / "real"
    shutil.copytree(world / "real" / "train", real / "train")
    shutil.copytree(world / "real" / "test", real / "val")
    args = (
        *(str(world / "plain.d3m"), "--real", str(real), "--seeds", "1"),
        *("--work", str(tmp_path / "work"), "--baseline", "none", "--format", "json"),
    )
    assert command(world, monkeypatch, *args) == 0
    assert json.loads(capsys.readouterr().out)["facts"]["test_images"] == 15


def test_a_row_of_smaller_batches_says_so(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    epochs = replace(BLINK, length=Epochs(((1 << 60, 2),)), batch=((1 << 60, 12),))
    monkeypatch.setitem(PROTOCOLS, "quick", epochs)
    for module in ("baselines", "evaluation"):  # room for a few images
        monkeypatch.setattr(f"d3pack.evaluate.{module}.sent_bytes", lambda pack: 500)
    args = (
        *(str(world / "plain.d3m"), "--real", str(world / "real")),
        *("--seeds", "1", "--work", str(tmp_path / "work"), "--baseline", "jpeg"),
        *("--report", str(tmp_path / "out.html"), "--format", "json"),
    )
    assert command(world, monkeypatch, *args) == 0
    pack, jpeg = json.loads(capsys.readouterr().out)["entries"]
    assert (pack["runs"][0]["batch"], jpeg["runs"][0]["batch"]) == (12, jpeg["runs"][0]["images"])
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert page.count("batches of") == 1


def test_hours_of_pilots_and_of_rows_to_come_are_not_overlooked(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    args = (
        *(str(world / "plain.d3m"), "--real", str(world / "real")),
        *("--seeds", "1", "--work", str(tmp_path / "work"), "--baseline", "random"),
    )
    assert command(world, monkeypatch, *args) == 0
    monkeypatch.setattr("d3pack.evaluate.bench.seconds_needed", lambda *_, **__: 2000.0)
    assert command(world, monkeypatch, *args) == 0  # all is there
    assert command(world, monkeypatch, *args, "--baseline", "webp") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "E_LONG" in last
    assert "1 student and 8 pilots" in last  # six of them are quarters of students: 9,000 s
    assert "choose protocol quick" in last
    assert command(world, monkeypatch, *args, "--baseline", "webp", "--yes") == 0
    monkeypatch.setitem(PROTOCOLS, "quick", replace(BLINK, name="quick"))
    assert command(world, monkeypatch, *args, "--baseline", "webp", "--seeds", "9") == 2
    assert "choose fewer baselines or seeds" in capsys.readouterr().err.splitlines()[-1]


def test_pilots_have_one_rate(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(PROTOCOLS, "quick", replace(BLINK, rates=(0.01, 0.05)))
    monkeypatch.setattr("d3pack.evaluate.bench.seconds_needed", lambda *_, **__: 400.0)
    args = (
        *(str(world / "plain.d3m"), "--real", str(world / "real"), "--baseline", "webp"),
        *("--seeds", "1", "--work", str(tmp_path / "work")),
    )
    # two students at two rates and eight pilots at one, six of them short: 1,600 s and 1,400 s
    assert command(world, monkeypatch, *args) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("classes", ["E_CLASSES", "only in the pack", "zebra"]),
        ("empty", ["E_SOURCE", "holds no image"]),
        ("same", ["same files", "--test"]),
        ("hours", ["E_LONG", "--yes"]),
        ("size", ["--size"]),
        ("protocol", ["invalid --protocol 'best'", "minimax-hard"]),
        ("student", ["invalid student 'vgg'", "convnet3"]),
        ("baseline", ["invalid --baseline 'png'", "jpeg"]),
        ("published", ["published at 224 px"]),
        ("sweep", ["invalid sweep 'colour=red'"]),
        ("chosen", ["baseline chosen needs a teacher", "--teacher", "train"]),
        ("report", [".html"]),
    ],
)
def test_bad_input_is_one_line(
    case: str,
    words: list[str],
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real, args = world / "real", ["--work", str(tmp_path / "work")]
    if case in {"classes", "empty", "size"}:
        other = tmp_path / "other"
        for c, name in enumerate(tiny_names(world)):
            folder = other / ("zebra" if case == "classes" and c == 0 else name)
            folder.mkdir(parents=True)
            if case != "empty" or c:
                side = 16 + 4 * c * (case == "size")
                Image.new("RGB", (side, side)).save(folder / "a.png")
        args += ["--test", str(other)]
    elif case == "same":
        real = world / "real" / "train"
    elif case == "hours":
        eternal = replace(BLINK, length=Updates(10**9))
        monkeypatch.setitem(PROTOCOLS, "quick", eternal)
    elif case == "protocol":
        args += ["--protocol", "best"]
    elif case == "student":
        args += ["--student", "vgg"]
    elif case == "baseline":
        args += ["--baseline", "png"]
    elif case == "published":
        args += ["--protocol", "minimax-hard", "--size", "32"]
    elif case == "sweep":
        args += ["--sweep", "colour=red"]
    elif case == "chosen":
        args += ["--baseline", "chosen"]
    elif case == "report":
        args += ["--report", str(tmp_path / "out.pdf")]
    code = command(world, monkeypatch, str(world / "plain.d3m"), "--real", str(real), *args)
    out, err = capsys.readouterr()
    assert code in {2, 7}
    assert out == ""
    assert "Traceback" not in err
    last = [line for line in err.splitlines() if line][-1]
    for word in words:
        assert word in last
    assert not list((tmp_path / "work").glob("pack-*.json"))


def tiny_names(world: Path) -> list[str]:
    return sorted(path.name for path in (world / "real" / "train").iterdir())


def test_codecs_and_labels_sweep_without_learning(world: Path) -> None:
    pack = d3pack.read(world / "pack.d3m")
    axes = sweep.parse_sweep(["codec=f16,i4", "labels=none,dense,top1"])
    learn = sweep.learner(pack, None, world, EvalSettings())  # type: ignore[arg-type]
    found = sweep.variants(pack, axes, learn)
    prompts = {v.title: v.pack.ledger().sections["prompts"] for v in found}
    assert prompts["codec i4"] < prompts["pack as it is"]
    sizes = {v.title: v.pack.ledger().total for v in found}
    assert sizes["labels none"] < sizes["labels top1"] < sizes["labels dense"]
    assert "codec f16" not in sizes  # the pack is that already
    with pytest.raises(UsageError, match="not made by method d3m"):
        sweep.variants(pack, {"vectors": ["2"]}, learn)
    with pytest.raises(UsageError, match="no soft labels"):
        sweep.variants(d3pack.read(world / "plain.d3m"), {"labels": ["top1"]}, learn)


def test_vectors_are_learned_anew_as_recorded(world: Path, tmp_path: Path) -> None:
    from encode_world import make_tree, quick

    from d3pack.encode import encode

    source = open_source(make_tree(tmp_path / "real", 12))
    options = quick(world / "backbone", modes=1, vectors=1, labels="none", candidates=1)
    pack = encode(source, tmp_path / "one.d3m", options, teachers=tmp_path / "cache")
    settings = EvalSettings(backbone=str(world / "backbone"))
    learn = sweep.learner(pack, source, tmp_path, settings)
    found = sweep.variants(pack, sweep.parse_sweep(["vectors=1,3"]), learn)
    assert [variant.title for variant in found] == ["pack as it is", "vectors 3"]
    learned = found[1].pack
    assert learned.prompts is not None
    assert learned.prompts.params["shape"][1] == 3
    assert learned.recipe == pack.recipe
    assert learned.images_per_class == pack.images_per_class
    assert learned.ledger().sections["prompts"] > pack.ledger().sections["prompts"]


def test_sweep_refuses_an_unknown_codec_and_unknown_recorded_settings(
    world: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pack = d3pack.read(world / "plain.d3m")
    other = replace(pack, provenance={"method": "d3m", "options": {"colour": "red"}})
    learn = sweep.learner(other, None, tmp_path, EvalSettings())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"invalid sweep vectors=2: .*'colour'"):
        sweep.variants(other, {"vectors": ["2"]}, learn)
    args = (
        *(str(world / "plain.d3m"), "--real", str(world / "real"), "--sweep", "codec=zip"),
        *("--work", str(tmp_path / "work")),
    )
    assert command(world, monkeypatch, *args) == 2
    assert "invalid sweep codec=zip" in capsys.readouterr().err


def test_vectors_are_not_swept_with_another_backbone(world: Path, tmp_path: Path) -> None:
    pack = replace(tiny_pack(world / "backbone"), provenance={"method": "d3m", "options": {}})
    learn = sweep.learner(pack, open_source(world / "real"), tmp_path, EvalSettings())
    with pytest.raises(UsageError, match="published nowhere"):
        learn(2)


def test_only_what_decides_about_accuracy_names_a_student(world: Path, tmp_path: Path) -> None:
    pack = d3pack.read(world / "plain.d3m")
    source = open_source(world / "real")
    train, test = (RealImages(source, pack.classes, 16, what) for what in ("training", "test"))

    def place(**changes: Any) -> Path:
        bench = Bench(train, test, len(pack), replace(BLINK, **changes), tmp_path)
        entry = baselines.random_entry(train, 2)
        return bench._place(entry.key, entry.identity, 0)

    assert place() == place(name="other", source="a citation in other words", seeds=9)
    assert place() != place(optimizer=SGD())
    assert place() != place(student="convnet4")
    assert place() != place(labels="hard")


def test_evaluate_takes_sources_and_packs_and_keeps_its_figures(
    world: Path, tmp_path: Path
) -> None:
    pack, real = d3pack.read(world / "plain.d3m"), world / "real"
    settings = EvalSettings(baselines=("random",), seeds=1, backbone=str(world / "backbone"))
    events: list[dict[str, Any]] = []
    evaluation = evaluate(
        pack,
        open_source(real),
        settings,
        test=open_source(real, split="test"),
        work=tmp_path / "work",
        listeners=[events.append],
    )
    kept = json.loads((tmp_path / "work" / "evaluation.json").read_text(encoding="utf-8"))
    assert kept == json.loads(json.dumps(evaluation.to_json()))
    assert evaluation.name == pack.root[:12]
    assert [result.entry.key for result in evaluation.results] == ["pack", "random-6"]
    assert evaluation.get("random") is evaluation.results[1]
    assert evaluation.get("webp") is None
    stages = [event["stage"] for event in events if event["event"] == "stage"]
    assert stages == ["this pack, seed 0", "random real images, 6 a class, seed 0"]
    assert sum(event["event"] == "step" for event in events) == 2 * 4
    write_report(evaluation, tmp_path / "out.html")
    assert pack.root[:12] in (tmp_path / "out.html").read_text(encoding="utf-8")
    with pytest.raises(UsageError, match="expected a name that ends in"):
        write_report(evaluation, tmp_path / "out.pdf")
    with pytest.raises(NotFoundError, match="is not a directory"):
        write_report(evaluation, tmp_path / "missing" / "out.html")
    with pytest.raises(UsageError, match="missing test images"):
        evaluate(pack, open_source(real), settings, work=tmp_path / "work")


def test_test_images_are_resized_once_to_the_side_that_is_cropped(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class StopError(Exception):
        pass

    def look(
        train: RealImages, test: RealImages, images: int, protocol: Any, *_: Any, **__: Any
    ) -> None:
        assert (train.size, test.size, protocol.size) == (28, 32, 28)
        assert {train.resample, test.resample} == {"bilinear"}
        raise StopError

    monkeypatch.setattr("d3pack.evaluate.evaluation.Bench", look)
    margin = replace(BLINK, test_margin=True, resample="bilinear")
    settings = EvalSettings(size=28, backbone=str(world / "backbone"))
    with pytest.raises(StopError):
        evaluate(world / "plain.d3m", world / "real", settings, protocol=margin, work=tmp_path)


@pytest.mark.parametrize("scores", [(0.4, 0.3), (0.3, 0.4)])
def test_the_format_with_the_better_pilots_is_taken(
    scores: tuple[float, float], world: Path, tmp_path: Path
) -> None:
    pack = d3pack.read(world / "plain.d3m")
    source = open_source(world / "real")
    train, test = (RealImages(source, pack.classes, 16, what) for what in ("training", "test"))
    bench = Bench(train, test, len(pack), BLINK, tmp_path)
    for format, score in zip(baselines.SHEETS, scores, strict=True):
        known = {
            "settings": {"quality": format.qualities[0], "side": 16},
            "score": score,
            "pilot": {format.name: score},
        }
        bench._pilot_place(format, 900, None).write_text(json.dumps(known), encoding="utf-8")
    settings, tried = bench.payload_settings(baselines.SHEETS, 900)
    better = baselines.SHEETS[scores.index(max(scores))]
    assert settings == PayloadSettings(better, better.qualities[0], 16)
    assert tried == dict(zip((f.name for f in baselines.SHEETS), scores, strict=True))


def test_hard_labels_are_the_classes_whatever_the_teacher_says(world: Path, tmp_path: Path) -> None:
    pack = d3pack.read(world / "pack.d3m")
    source = open_source(world / "real")
    train, test = (RealImages(source, pack.classes, 16, what) for what in ("training", "test"))
    bench = Bench(train, test, len(pack), BLINK, tmp_path, backbone=world / "backbone")
    content = bench.decode(pack)
    assert content.labels.tolist() == [0] * 6 + [1] * 6 + [2] * 6
    assert content.soft is not None
    assert (content.soft.argmax(1) != content.labels).any()
    plain = bench.decode(d3pack.read(world / "plain.d3m"))
    assert plain.soft is None
    assert torch.equal(plain.labels, content.labels)


def test_a_point_is_on_the_front_if_none_is_smaller_and_as_good() -> None:
    points = [(10, 0.3), (10, 0.2), (20, 0.3), (20, 0.4), (5, 0.1), (40, 0.35)]
    assert sweep.pareto(points) == [True, False, False, True, True, False]
    assert sweep.pareto([(1, 0.5), (1, 0.5)]) == [True, True]


def test_class_names_have_no_codes_of_photographs(world: Path, tmp_path: Path) -> None:
    pack = d3pack.read(world / "plain.d3m")
    source = open_source(world / "real")
    train, test = (RealImages(source, pack.classes, 16, what) for what in ("training", "test"))
    bench = Bench(train, test, len(pack), BLINK, tmp_path, backbone=world / "backbone")

    def made(coded: int) -> Any:
        atoms = np.zeros((len(pack.classes), coded, 2), np.int64)
        coding = Coding(sigmas=(8.0, 0.5, 0.0), atoms=(1, 1), bits=4)
        codes = encode_codes(Codes(coding, coded, atoms, np.ones_like(atoms)))
        return baselines.BASELINES["names"].make(bench, replace(pack, codes=codes))

    assert made(pack.images_per_class) is None
    plain, mixed = baselines.BASELINES["names"].make(bench, pack), made(2)
    assert plain is not None
    assert torch.equal(mixed.build(0).images, plain.build(0).images)
    assert mixed.build(0).nbytes == plain.build(0).nbytes


def test_class_names_cost_nothing_a_class(world: Path, tmp_path: Path) -> None:

    pack = d3pack.read(world / "pack.d3m")
    source = open_source(world / "real")
    train, test = (RealImages(source, pack.classes, 16, what) for what in ("training", "test"))
    bench = Bench(train, test, len(pack), BLINK, tmp_path, backbone=world / "backbone")
    entry = baselines.BASELINES["names"].make(bench, pack)
    assert entry is not None
    twin = entry.pack
    assert twin is not None
    assert twin.labels is None
    assert twin.recipe == pack.recipe
    assert (twin.seed, twin.images_per_class) == (pack.seed, pack.images_per_class)
    from d3pack.backbones import open_backbone
    from d3pack.format.codecs import decode_prompts

    opened = open_backbone(pack.recipe.backbone, path=world / "backbone")
    assert twin.prompts is not None
    values = torch.from_numpy(decode_prompts(twin.prompts))
    tokens = opened.name_vectors(pack.classes[0], values.shape[2])
    torch.testing.assert_close(values[0, 0], tokens.float(), rtol=1e-3, atol=1e-3)
    prompts = twin.ledger().sections["prompts"]
    assert baselines.prompt_bytes(twin) == prompts
    assert entry.build(0).nbytes == twin.ledger().total - prompts


@pytest.mark.parametrize(("known", "said"), [(1, "2 of 3 classes are unknown"), (0, "knows no")])
def test_class_names_that_a_class_table_lacks_are_told(
    known: int, said: str, world: Path, tmp_path: Path
) -> None:
    folder = tiny_dit(tmp_path / "dit")
    labels = {"id2label": {"4": "goldfish"}}
    (folder / "model_index.json").write_text(json.dumps(labels), encoding="utf-8")
    pack = replace(tiny_pack(folder, images=2, steps=1), classes=("goldfish", "no such", "other"))
    if not known:
        pack = replace(pack, classes=("none", *pack.classes[1:]))
    source = open_source(world / "real")
    train, test = (RealImages(source, source.classes, 16, what) for what in ("training", "test"))
    notes: list[str] = []
    events = Events([lambda event: notes.append(event.get("text", ""))])
    bench = Bench(train, test, 6, BLINK, tmp_path, backbone=folder, events=events)
    entry = baselines.BASELINES["names"].make(bench, pack)
    assert (entry is not None) == bool(known)
    assert said in "".join(notes)


def test_a_private_backbone_counts_and_its_class_table_is_no_baseline(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What `--method classcond` makes: the model must travel, and names are the pack's prompts."""
    from d3pack.backbones import open_backbone
    from d3pack.format.codecs import encode_prompts

    folder = tiny_dit(tmp_path / "backbone")
    opened = open_backbone(str(folder))
    pack = tiny_pack(folder, images=2, steps=1)
    names = tuple(name.split()[0] for name in pack.classes)  # the model has a row for each
    rows = torch.stack([opened.name_vectors(name) for name in names])[:, None].numpy()
    real = tmp_path / "real"
    for split in ("train", "test"):
        for old, name in zip(pack.classes, names, strict=True):
            shutil.copytree(world / "real" / split / old.replace(" ", "_"), real / split / name)
    for codec in ("f16", "i8", "i4"):
        pack = replace(pack, classes=names, prompts=encode_prompts(rows, codec))
        twin = baselines.names_pack(pack, opened.name_vectors, opened.prompt_shape[0])
        assert baselines.prompted_by_names(pack, twin)
        other = replace(pack, prompts=encode_prompts(rows[::-1], codec))
        assert not baselines.prompted_by_names(other, twin)
    d3pack.write(pack, tmp_path / "pack.d3m")
    args = (
        *(str(tmp_path / "pack.d3m"), "--real", str(real), "--seeds", "1"),
        *("--baseline", "names", "--baseline", "webp", "--work", str(tmp_path / "work")),
        *("--report", str(tmp_path / "out.html"), "--format", "json"),
    )
    assert command(world, monkeypatch, *args, "--backbone", str(folder)) == 0
    out, err = capsys.readouterr()
    assert "names: left out" in err
    data = json.loads(out)
    ledger = data["ledger"]
    assert ledger["sent"] == ledger["pack"] + ledger["backbone"]
    entries = {entry["key"]: entry for entry in data["entries"]}
    assert set(entries) == {"pack", f"webp-{ledger['sent']}"}
    assert entries[f"webp-{ledger['sent']}"]["runs"][0]["images"] == 36  # all that there are
    page = (tmp_path / "out.html").read_text(encoding="utf-8")
    assert "is not public" in page
    assert "shared by all packs" not in page


@pytest.fixture
def ranking(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DD-Ranking's protocol with fewer epochs and rates, for the sets of this module."""
    few: dict[str, Any] = {"length": Epochs(((1 << 60, 2),)), "tests": Intervals(every=1)}
    assert DD_RANKING.whole is not None
    whole = replace(DD_RANKING.whole, batch=((1 << 60, 9),), **few)
    brief = replace(DD_RANKING, rates=(1e-6, 0.05), whole=whole, batch=((1 << 60, 5),), **few)
    for module in ("students.protocols", "evaluate.evaluation"):
        monkeypatch.setattr(f"d3pack.{module}.DD_RANKING", brief)
    monkeypatch.setattr("d3pack.evaluate.evaluation.RANKED", ((3, 16),))
    monkeypatch.setitem(PROTOCOLS, "dd-ranking", brief)


def test_scores_where_the_ranking_is_followed(ranking: None, world: Path, tmp_path: Path) -> None:
    """Same labels in each term, the best rate and test, and the whole set by its own schedule."""
    settings = EvalSettings(
        protocol="dd-ranking",
        baselines=("random", "whole"),
        backbone=str(world / "backbone"),
        size=16,
    )
    pack = d3pack.read(world / "pack.d3m")  # it has soft labels, which must not count
    evaluation = evaluate(pack, world / "real", settings, work=tmp_path / "work")
    results = {result.entry.key.split("-")[0]: result for result in evaluation.results}
    assert {len(result.histories) for result in results.values()} == {5}
    for kind, images, updates in (("pack", 18, 8), ("random", 18, 8), ("whole", 36, 8)):
        for history in results[kind].histories:
            assert (history.images, history.updates) == (images, updates)
            assert history.rate in {1e-6, 0.05} if kind != "whole" else history.rate == 0.01
            assert history.best == max(accuracy for _, accuracy in history.curve)
    for seed in range(5):  # the labels of the pack are hard ones in either row
        pair = (results["pack"].histories[seed], results["hard"].histories[seed])
        assert pair[0].curve == pair[1].curve
    best = {k: [h.best for h in results[k].histories] for k in ("pack", "random", "whole")}
    gains = np.subtract(best["pack"], best["random"])
    lost = np.subtract(best["whole"], best["pack"])
    found = evaluation.scores()
    assert found["IOR"] == pytest.approx(gains.mean())
    assert found["HLR"] == pytest.approx(lost.mean())
    robust = (np.exp((gains - lost) / 2) - np.exp(-1)) / (np.exp(1) - np.exp(-1))
    assert found["LRS"] == pytest.approx(robust.mean())
    write_report(evaluation, tmp_path / "out.html")
    assert "DD-Ranking" in (tmp_path / "out.html").read_text(encoding="utf-8")
    for other in (
        replace(evaluation, protocol=replace(evaluation.protocol, rates=(0.05,))),
        replace(evaluation, protocol=replace(evaluation.protocol, student="convnet4")),
        replace(evaluation, facts={**evaluation.facts, "seeds": 3}),
        replace(evaluation, results=evaluation.results[:-1]),
        replace(evaluation, facts={**evaluation.facts, "size": 32}),
    ):
        assert other.scores() == {}


def test_whole_set_trains_the_student_that_was_chosen(
    ranking: None, world: Path, tmp_path: Path
) -> None:
    pack = d3pack.read(world / "plain.d3m")
    source = open_source(world / "real")
    train, test = (RealImages(source, pack.classes, 16, what) for what in ("training", "test"))
    protocol = PROTOCOLS["dd-ranking"].settled(3, student="convnet4", size=16)
    bench = Bench(train, test, 12, protocol, tmp_path)
    for entry in (baselines.random_entry(train, 4), baselines.whole_entry(train)):
        assert bench.run(entry, 1).histories[0].student == "convnet4"


def test_best_rate_of_each_seed_counts(ranking: None, world: Path, tmp_path: Path) -> None:
    pack = d3pack.read(world / "plain.d3m")
    source = open_source(world / "real")
    train, test = (RealImages(source, pack.classes, 16, what) for what in ("training", "test"))
    entry = baselines.random_entry(train, 4)
    found: dict[tuple[float, ...], Any] = {}
    for rates in ((1e-6, 0.05), (1e-6,), (0.05,)):
        protocol = replace(PROTOCOLS["dd-ranking"], rates=rates)
        bench = Bench(train, test, 12, protocol, tmp_path / str(len(found)))
        (found[rates],) = bench.run(entry, 1).histories
        assert not list((tmp_path / str(len(found) - 1)).glob("*.safetensors"))
    slow, fast, both = found[1e-6,], found[0.05,], found[1e-6, 0.05]
    assert fast.best > slow.best
    assert (both.best, both.rate, both.curve) == (fast.best, 0.05, fast.curve)


def test_label_robust_score_and_spread_follow_their_formulas() -> None:
    assert label_robust_score(recovery=-1, improvement=1) == pytest.approx(1)
    assert label_robust_score(recovery=1, improvement=-1) == pytest.approx(0)
    # DD-Ranking's own form: (e^a - e^-1) / (e - e^-1), a = 0.5 IOR - 0.5 HLR
    assert label_robust_score(0.3, 0.1) == pytest.approx(
        (0.9048374 - 0.3678794) / 2.3504024, rel=1e-5
    )
    assert Spread.of([0.5]) == Spread(0.5, 0.0)
    assert Spread.of([0.4, 0.6]).std == pytest.approx(0.1414214)
