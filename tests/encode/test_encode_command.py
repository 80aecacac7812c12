"""`d3pack encode` from end to end, and one line for every bad input."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encode_world import CLASSES, make_tree, picture, quick
from PIL import Image
from places import ROOT
from tiny_backbones import tiny_dit, tiny_sd
from typer.testing import CliRunner

import d3pack
from d3pack.backbones import open_backbone
from d3pack.cli import app
from d3pack.codecs import decode_labels, decode_prompts
from d3pack.decode import Decoder, verify_probes
from d3pack.encode import EncodeOptions, dry_run, encode
from d3pack.encode import journal as journal_module
from d3pack.encode.journal import NoSpaceError
from d3pack.encode.plan import make_plan, make_recipe
from d3pack.errors import D3MError
from d3pack.format import pack_bytes
from d3pack.sources import open_source

SHORT = [
    "--ipc", "3", "--steps", "4", "--cool", "2", "--batch", "6", "--teacher-samples", "200",
    "--sampler-steps", "2", "--group", "3",
]  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A backbone and a source; the cache of teachers lies apart from the person's own."""
    folder = tmp_path_factory.mktemp("command")
    tiny_sd(folder / "sd")
    make_tree(folder / "source")
    before = os.environ.get("D3PACK_HOME")
    os.environ["D3PACK_HOME"] = str(folder / "cache")
    yield folder
    if before is None:
        del os.environ["D3PACK_HOME"]
    else:
        os.environ["D3PACK_HOME"] = before


def call(*args: Any) -> Any:
    return CliRunner().invoke(app, ["encode", *map(str, args)])


def fails(*args: Any) -> D3MError:
    found = call(*args).exception
    assert isinstance(found, D3MError), found
    assert "\n" not in str(found)
    return found


@pytest.fixture(scope="module")
def made(home: Path) -> tuple[d3pack.Pack, EncodeOptions]:
    options = quick(home / "sd", labels="top2", modes=2, candidates=2, codec="i8")
    return encode(open_source(home / "source"), options, home / "made.d3m"), options


# -- what comes out ---------------------------------------------------------------------------


def test_the_file_is_the_pack(home: Path, made: tuple[d3pack.Pack, EncodeOptions]) -> None:
    assert d3pack.read(home / "made.d3m").root == made[0].root


def test_the_pack_is_what_was_asked_for(made: tuple[d3pack.Pack, EncodeOptions]) -> None:
    pack = made[0]
    assert pack.classes == CLASSES
    assert decode_prompts(pack.prompts).shape == (3, 2, 1, 32)
    assert pack.picks is not None
    assert pack.picks.shape == (3, 4)
    assert (pack.picks % 2 == np.arange(4) % 2).all()
    assert all(len(set(row)) == 4 for row in pack.picks.tolist())
    assert pack.labels is not None
    labels = decode_labels(pack.labels)
    assert labels.shape == (3, 4, 3)
    assert np.allclose(labels.sum(2), 1, atol=1e-5)


def test_labels_answer_for_the_very_images(
    home: Path, made: tuple[d3pack.Pack, EncodeOptions]
) -> None:
    from safetensors.torch import load_file

    from d3pack.encode.resnet import SmallResNet, TrainedTeacher, lesson_for

    pack, options = made
    stored = [
        p for p in (home / "cache" / "teachers").iterdir()
        if p.stat().st_size == pack.provenance["teacher"]["bytes"]
    ]  # fmt: skip
    lesson = lesson_for(16, options.teacher_samples, options.seed)
    net = SmallResNet(3, lesson.widths)
    net.load_state_dict(load_file(stored[0]))
    teacher = TrainedTeacher(net, lesson, CLASSES, {})
    decoder = Decoder(pack, path=home / "sd")
    logits = teacher.logits(decoder.images(range(len(pack)))).reshape(3, 4, 3)
    assert pack.labels is not None
    exact = logits.softmax(2).numpy()
    assert np.abs(decode_labels(pack.labels) - exact).max() < 0.05


def test_probes_rebuild(home: Path, made: tuple[d3pack.Pack, EncodeOptions]) -> None:
    pack = made[0]
    assert verify_probes(pack, Decoder(pack, path=home / "sd")).verdict == "exact"


def test_provenance_says_what_and_not_where(
    home: Path, made: tuple[d3pack.Pack, EncodeOptions]
) -> None:
    pack = made[0]
    record = pack.provenance
    assert record["method"] == "d3m"
    assert record["source"]["sha256"] == open_source(home / "source").fingerprint()
    assert (record["source"]["images"], record["source"]["seen"], record["source"]["bad"]) == (
        60,
        60,
        0,
    )
    assert record["teacher"]["bytes"] > 1000
    assert record["metrics"]["loss"] <= record["metrics"]["start_loss"]
    assert record["options"]["modes"] == 2
    text = pack_bytes(pack).decode("latin-1")
    for secret in (str(home), home.name, str(Path.home())):
        assert secret not in text


def test_contact_sheet_and_log(home: Path, made: tuple[d3pack.Pack, EncodeOptions]) -> None:
    work = home / "made.d3m.work"
    with Image.open(work / "sheets" / "000000.png") as sheet:
        assert sheet.width > 8 * 72
    assert "make and judge candidates" in (work / "log.txt").read_text()
    assert not (work / "classes").exists()  # what is done needs no latents


def test_the_size_was_foreseen(home: Path, made: tuple[d3pack.Pack, EncodeOptions]) -> None:
    pack, options = made
    found = dry_run(open_source(home / "source"), options)
    assert abs(found["bytes"] - len(pack_bytes(pack))) < 300
    assert found["seconds_total"] == pytest.approx(sum(found["seconds"].values()), abs=0.5)


def test_a_budget_is_kept(home: Path) -> None:
    source = open_source(home / "source")
    for budget in (6_500, 12_000):
        options = quick(
            home / "sd", budget=budget, modes=None, candidates=None, labels=None, steps=2, cool=2
        )
        pack = encode(source, options, home / f"budget{budget}.d3m")
        assert len(pack_bytes(pack)) <= budget
    small, large = (d3pack.read(home / f"budget{b}.d3m") for b in (6_500, 12_000))
    assert decode_prompts(large.prompts).size > decode_prompts(small.prompts).size
    assert "budget 12000 bytes: " in (home / "budget12000.d3m.work" / "log.txt").read_text()


def test_a_class_conditional_backbone(home: Path) -> None:
    options = quick(tiny_dit(home / "dit"), modes=1, candidates=1, labels="none", codec="f16")
    pack = encode(open_source(home / "source"), options, home / "dit.d3m")
    assert pack.picks is None
    assert pack.labels is None
    assert Decoder(pack, path=home / "dit").images([0, 11]).shape == (2, 3, 64, 64)


def test_json_events(home: Path) -> None:
    out = home / "events.d3m"
    done = call(home / "source", "-o", out, "--backbone", home / "sd", "--format", "json", *SHORT)
    assert done.exit_code == 0, done.exception
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert events[0]["event"] == "plan"
    assert events[-1] == {
        "event": "done", "root": d3pack.read(out).root, "bytes": out.stat().st_size,
    }  # fmt: skip
    stages = [event["stage"] for event in events if event["event"] == "stage"]
    learning = ["read for the teacher", "train the teacher", "collages", "invert"]
    assert stages == ["look through the source", *learning]


def test_dry_run_changes_nothing(home: Path) -> None:
    before = sorted(home.iterdir())
    done = call(home / "source", "--dry-run", "--backbone", home / "sd", *SHORT)
    assert done.exit_code == 0, done.exception
    assert "20  lemon" in done.stdout
    assert "bytes" in done.stdout
    assert sorted(home.iterdir()) == before
    as_json = call(
        home / "source", "--dry-run", "--format", "json", "--backbone", home / "sd", *SHORT
    )
    assert json.loads(as_json.stdout)["counts"] == [20, 20, 20]


# -- hard sources -----------------------------------------------------------------------------


def test_images_of_every_sort(home: Path, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "s", 8)
    odd = root / "lemon"
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(odd / "wide.png")
    picture(1, 90).convert("CMYK").save(odd / "cmyk.jpg")
    picture(1, 91).convert("L").save(odd / "grey.png")
    picture(1, 92).save(odd / "moving.gif", save_all=True, append_images=[picture(0, 1)])
    (odd / "broken.jpg").write_bytes(b"\xff\xd8\xff junk")
    done = call(root, "-o", tmp_path / "o.d3m", "--backbone", home / "sd", *SHORT)
    assert done.exit_code == 0, done.exception
    source = d3pack.read(tmp_path / "o.d3m").provenance["source"]
    assert (source["images"], source["seen"], source["bad"]) == (29, 28, 1)
    assert "broken.jpg" in (tmp_path / "o.d3m.work" / "skipped.txt").read_text()
    error = fails(
        root, "-o", tmp_path / "p.d3m", "--backbone", home / "sd", "--on-error", "fail", *SHORT
    )
    assert (error.code, error.exit_code) == ("E_SOURCE_IMAGE", 7)


def test_a_class_with_one_image(home: Path, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "s", 4)
    for i in range(1, 4):
        (root / "lemon" / f"{i:03d}.png").unlink()
    dials = ["--modes", "2", "--factor", "2"]
    done = call(root, "-o", tmp_path / "o.d3m", "--backbone", home / "sd", *dials, *SHORT)
    assert done.exit_code == 0, done.exception
    assert len(d3pack.read(tmp_path / "o.d3m")) == 9


def test_one_line_for_every_bad_input(home: Path, tmp_path: Path) -> None:
    sd = home / "sd"
    good = make_tree(tmp_path / "good", 2)
    empty = make_tree(tmp_path / "empty", 2)
    (empty / "nothing").mkdir()
    one = tmp_path / "one"
    make_tree(one, 2, ("lemon",))
    unreadable = make_tree(tmp_path / "unreadable", 2)
    for file in (unreadable / "lemon").iterdir():
        file.write_bytes(b"junk")
    twice = tmp_path / "names.csv"
    twice.write_text("goldfish,fish\nlemon,fish\nschool bus,bus\n")
    out = tmp_path / "o.d3m"
    common = ["-o", out, "--backbone", sd, *SHORT]
    cases = [
        ((empty, *common), "E_SOURCE", "class 'nothing' holds no image"),
        ((one, *common), "E_SOURCE", "has 1 class;"),
        ((unreadable, *common), "E_SOURCE", "no image of class 'lemon' can be read"),
        ((tmp_path / "nowhere", *common), "E_NOT_FOUND", "no source at nowhere"),
        ((good, "--class-names", twice, *common), "E_SOURCE", "two classes have the name 'fish'"),
        ((good, "-o", out, "--backbone", tmp_path / "no", *SHORT), "E_NOT_FOUND", "no"),
        ((good, "-o", out, "--backbone", good, *SHORT), "E_BACKBONE_CONFIG", "diffusers' layout"),
        ((good, "--teacher", tmp_path / "no", *common), "E_TEACHER", "no teacher directory"),
        ((good, "--vectors", "99", *common), "E_USAGE", "at most 14 vectors"),
        ((good, "--size", "33", *common), "E_USAGE", "do not fit this backbone"),
        ((good, "--budget", "1KB", *common), "E_USAGE", "1000 bytes are too few"),
        ((good, "--budget", "lots", *common), "E_USAGE", "is no size"),
        ((good, "--method", "magic", *common), "E_USAGE", "there is no method 'magic'"),
        ((good, "--labels", "some", *common), "E_USAGE", "labels 'some' are not none"),
        ((good, "-o", tmp_path / "o.zip", "--backbone", sd), "E_USAGE", "must end in .d3m"),
        ((good, "-o", tmp_path / "a" / "o.d3m", "--backbone", sd), "E_USAGE", "no folder a"),
        ((good, "--backbone", sd), "E_USAGE", "no output"),
    ]
    for arguments, code, text in cases:
        error = fails(*arguments)
        assert error.code == code, (arguments, error)
        assert text in str(error), error
        assert not out.exists()


def test_a_full_disk(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk fills while collages are kept; with room again the same call ends the work."""
    real = os.fsync
    writes = 0

    def full(fd: int) -> None:
        nonlocal writes
        writes += 1
        if writes > 5:
            raise OSError(28, "No space left on device")
        real(fd)

    source = open_source(home / "source")
    options = quick(home / "sd", steps=2, cool=2)
    monkeypatch.setattr(journal_module.os, "fsync", full)
    with pytest.raises(NoSpaceError, match="free some and run the same command"):
        encode(source, options, tmp_path / "o.d3m")
    assert not (tmp_path / "o.d3m").exists()
    monkeypatch.undo()
    resumed = encode(source, options, tmp_path / "o.d3m")
    assert encode(source, options, tmp_path / "p.d3m").root == resumed.root


# a shell's background jobs ignore SIGINT, and so would their children
INTERRUPTIBLE = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
from d3pack.cli import main
main()
"""


def test_ctrl_c_says_how_to_go_on(home: Path, tmp_path: Path) -> None:
    command = [
        sys.executable, "-c", INTERRUPTIBLE, "encode", str(home / "source"),
        "-o", str(tmp_path / "o.d3m"), "--backbone", str(home / "sd"), "--format", "json",
        "--steps", "5000", "--patience", "5000", "--teacher-samples", "200",
    ]  # fmt: skip
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if json.loads(line).get("stage") == "invert":
                time.sleep(0.2)
                run.send_signal(signal.SIGINT)
                break
        _, errors = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "run the same command again and it goes on" in errors
    assert "Traceback" not in errors


# -- a thousand classes -----------------------------------------------------------------------


def test_a_thousand_classes_plan_and_stream(home: Path, tmp_path: Path) -> None:
    """1000 x 1300 files: planned in bounded memory, the first classes encoded for real."""
    classes, count = 1000, 1300
    seeds = [tmp_path / f"seed{i}.png" for i in range(4)]
    for i, path in enumerate(seeds):
        picture(i, 0).save(path)
    listing = tmp_path / "big"
    for c in range(classes):
        folder = listing / f"class {c:04d}"
        folder.mkdir(parents=True)
        # hard links take an inode's worth of nothing; a whole tree of them is still 1.3 M names
        for i in range(count if c < 20 else 13):
            os.link(seeds[(c + i) % 4], folder / f"{i:06d}.png")
    command = [
        sys.executable, "-c", MEASURE, str(listing), str(tmp_path / "o.d3m"), str(home / "sd"),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["classes"] == 1000
    assert found["images"] == 20 * count + 980 * 13
    assert found["bytes"] < 200_000
    assert found["plan_growth"] < 60_000  # kB: a few listings, the backbone, no images
    assert found["encoded"] == 12


MEASURE = """
import json, resource, sys
from pathlib import Path
from d3pack.encode import EncodeOptions, dry_run, encode
from d3pack.sources import open_source
import torch, diffusers, transformers
from d3pack.backbones import open_backbone
open_backbone(sys.argv[3])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
options = EncodeOptions(images_per_class=4, backbone=sys.argv[3], steps=2, cool=2, batch=4, pool=64,
                        sampler_steps=2, teacher_samples=500, candidates=1)
before = peak()
plan = dry_run(open_source(sys.argv[1]), options)
growth = peak() - before
first = open_source(sys.argv[1], first=3)
pack = encode(first, options, sys.argv[2], cache=Path(sys.argv[2]).parent)
found = {"classes": len(plan["classes"]), "images": sum(plan["counts"]), "bytes": plan["bytes"]}
print(json.dumps({**found, "plan_growth": growth, "encoded": len(pack)}))
"""


# -- defaults ---------------------------------------------------------------------------------


def test_defaults_follow_the_resolution(home: Path, tmp_path: Path) -> None:
    backbone = open_backbone(str(home / "sd"))
    for c, name in enumerate(("1", "2")):
        (tmp_path / "large" / name).mkdir(parents=True)
        picture(c, 0, 150).save(tmp_path / "large" / name / "0.png")
    small = make_plan(open_source(home / "source"), EncodeOptions(), backbone)
    assert (small.factor, small.crops, small.template) == (1, 1, "a photo of a {}")
    large = open_source(tmp_path / "large")
    plan = make_plan(large, EncodeOptions(size=(128, 128)), backbone)
    assert (plan.typical, plan.factor, plan.crops) == (150, 2, 5)
    assert plan.template == "a 2x2 collage of {}"
    assert "--class-names" in plan.notes[0]
    chosen = make_plan(large, EncodeOptions(size=(128, 128), factor=1, template="{}"), backbone)
    assert (chosen.factor, chosen.template) == (1, "{}")
    sigmas = make_recipe(plan, backbone).sigmas
    levels = [backbone.levels.timestep(sigma) for sigma in sigmas[:-1]]
    assert all(level == int(level) for level in levels)  # rounded, they still name exact levels


# -- plugins ----------------------------------------------------------------------------------


def test_the_example_of_a_method_works(home: Path, tmp_path: Path) -> None:
    example = ROOT / "examples" / "custom_method.py"
    spec = importlib.util.spec_from_file_location("custom_method", example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_method"] = module  # its dataclass looks itself up there
    try:
        spec.loader.exec_module(module)
        output = tmp_path / "names.d3m"
        module.main(str(home / "source"), str(output), str(home / "sd"))
    finally:
        del sys.modules["custom_method"]
    pack = d3pack.read(output)
    assert pack.provenance["method"] == "names"
    assert verify_probes(pack, Decoder(pack, path=home / "sd")).verdict == "exact"


def test_an_installed_method_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from d3pack.encode import method

    entry = EntryPoint("mine", "d3pack.encode.d3m:D3M", method.GROUP)
    monkeypatch.setattr(method, "entry_points", lambda group: [entry])
    method.methods.cache_clear()
    try:
        assert method.open_method("mine").name == "d3m"
        assert "d3m" in method.methods()
    finally:
        method.methods.cache_clear()
