"""`d3pack encode` from end to end."""

from __future__ import annotations

import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encode_world import CLASSES, SHORT, call, picture, quick, save_classifier, settings_of
from PIL import Image
from places import ROOT
from tiny_backbones import tiny_dit

import d3pack
from d3pack.backbones import open_backbone
from d3pack.decode import Decoder, verify_probes
from d3pack.encode import EncodeSettings, contract, encode, estimate_encode
from d3pack.encode.finish import provenance, release
from d3pack.encode.methods.d3m.method import D3MJob, prepare
from d3pack.errors import D3MError
from d3pack.format import pack_bytes, to_plain
from d3pack.format.codecs import decode_labels, decode_picks, decode_prompts
from d3pack.sources import open_source

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def made(home: Path) -> tuple[d3pack.Pack, EncodeSettings]:
    settings = quick(
        home / "sd", labels="top2", modes=2, candidates=2, codec="i8", provenance="full"
    )
    return encode(home / "source", home / "made.d3m", settings), settings


# -- what comes out ---------------------------------------------------------------------------


def test_file_holds_the_pack_that_is_returned(
    home: Path, made: tuple[d3pack.Pack, EncodeSettings]
) -> None:
    assert d3pack.read(home / "made.d3m").root == made[0].root


def test_pack_has_what_the_settings_say(made: tuple[d3pack.Pack, EncodeSettings]) -> None:
    pack = made[0]
    assert pack.classes == CLASSES
    assert pack.prompts is not None
    assert decode_prompts(pack.prompts).shape == (3, 2, 1, 32)
    assert pack.picks is not None
    picks = decode_picks(pack.picks)
    assert picks.shape == (3, 4)
    assert (picks % 2 == np.arange(4) % 2).all()  # a candidate of its own mode
    assert all(len(set(row)) == 4 for row in picks.tolist())
    assert pack.labels is not None
    labels = decode_labels(pack.labels)
    assert labels.shape == (3, 4, 3)
    assert np.allclose(labels.sum(2), 1, atol=1e-5)


def test_labels_are_the_answers_on_the_decoded_images(
    home: Path, made: tuple[d3pack.Pack, EncodeSettings]
) -> None:
    from safetensors.torch import load_file

    from d3pack.teachers.resnet import SmallResNet, TrainedTeacher, teacher_config

    pack, options = made
    stored = [
        p for p in (home / "cache" / "teachers").iterdir()
        if p.stat().st_size == pack.provenance["teacher"]["bytes"]
    ]  # fmt: skip
    assert options.teacher_samples is not None
    config = teacher_config(16, options.teacher_samples, options.seed)
    net = SmallResNet(3, config.widths)
    net.load_state_dict(load_file(stored[0]))
    teacher = TrainedTeacher(net, config, CLASSES, {})
    decoder = Decoder(pack, path=home / "sd")
    logits = teacher.logits(decoder.images(range(len(pack)))).reshape(3, 4, 3)
    assert pack.labels is not None
    exact = logits.softmax(2).numpy()
    assert np.abs(decode_labels(pack.labels) - exact).max() < 0.05


def test_probes_verify_as_exact(home: Path, made: tuple[d3pack.Pack, EncodeSettings]) -> None:
    pack = made[0]
    assert verify_probes(pack, Decoder(pack, path=home / "sd")).verdict == "exact"


def test_provenance_names_no_places(home: Path, made: tuple[d3pack.Pack, EncodeSettings]) -> None:
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


def test_full_provenance_has_the_figures_of_the_codecs(
    made: tuple[d3pack.Pack, EncodeSettings],
) -> None:
    coding = made[0].provenance["coding"]
    assert sorted(coding) == ["labels", "prompts"]
    assert 0 < coding["prompts"]["error"]["rms"] < 0.05
    assert coding["labels"]["kept"]["min"] > 0


def test_lean_provenance_keeps_what_ledger_and_sweep_read(
    home: Path, made: tuple[d3pack.Pack, EncodeSettings]
) -> None:
    source, full = open_source(home / "source"), made[0].provenance
    settings = replace(made[1], provenance="lean")

    def lean(**teacher: Any) -> dict[str, Any]:
        return provenance(
            "d3m", source, settings, teacher=teacher or None, metrics={"loss": 0.5},
            seen=60, bad=0, fingerprint="0" * 64, coding={},
        )  # fmt: skip

    record = lean(bytes=12, name="x")
    options = {k: v for k, v in full["options"].items() if k != "images_per_class"}
    assert record == {
        "d3pack": release(d3pack.__version__),
        "method": "d3m",
        "options": to_plain(options),
        "source": {"images": 60},
        "teacher": {"bytes": 12},
    }
    assert replace(made[0], provenance=record).ledger().teacher == 12
    assert "teacher" not in lean()


@pytest.mark.parametrize(
    ("version", "recorded"),
    [
        ("1.2.0", "1.2.0"),
        ("1.2.0rc1", "1.2.0rc1"),
        ("0.dev0", "dev"),
        ("1.2.1.dev3+g9364b2e1c", "dev"),
        ("1.2.0+distributor.1", "dev"),
    ],
)
def test_provenance_names_releases_alone(version: str, recorded: str) -> None:
    """Nothing else is the same in every checkout of one commit."""
    assert release(version) == recorded


def test_run_leaves_contact_sheet_and_log(
    home: Path, made: tuple[d3pack.Pack, EncodeSettings]
) -> None:
    work = home / "made.d3m.work"
    with Image.open(work / "sheets" / "000000.png") as sheet:
        assert sheet.width > 8 * 72
    assert "make and judge candidates" in (work / "log.txt").read_text()
    assert not (work / "classes").exists()  # what is done needs no latents


def test_sheet_shows_thumbnails_of_large_collages(home: Path) -> None:
    """The sheet shows both: thumbnails of real collages, and images as they are made."""
    settings = settings_of(
        images_per_class=1, backbone=str(home / "sd"), size=(256, 256), steps=0, cool=0,
        triples=1, collages=1, sampler_steps=1, group=1, probes=0, teacher_samples=100,
    )  # fmt: skip
    pack = encode(home / "source", home / "large.d3m", settings)
    assert pack.recipe.size == (256, 256)
    with Image.open(home / "large.d3m.work" / "sheets" / "000000.png") as sheet:
        assert sheet.height > 3 * 72


def test_estimate_has_the_bytes_of_the_pack(
    home: Path, made: tuple[d3pack.Pack, EncodeSettings]
) -> None:
    pack, settings = made
    estimate = estimate_encode(home / "source", settings)
    assert abs(estimate["bytes"] - len(pack_bytes(pack))) < 300
    assert estimate["seconds_total"] == pytest.approx(sum(estimate["seconds"].values()), abs=0.5)


def test_a_missing_teacher_is_refused_before_any_work(home: Path) -> None:
    for changes in ({"teacher": "nowhere"}, {"teacher": "a/b", "teacher_map": Path("nowhere")}):
        with pytest.raises(D3MError, match="nowhere"):
            estimate_encode(home / "source", quick(home / "sd", **changes))


def test_budget_is_spent_but_not_exceeded(home: Path) -> None:
    source = open_source(home / "source")
    for budget in (3_000, 12_000):
        settings = quick(
            home / "sd",
            budget=budget,
            no_codes=True,
            modes=None,
            candidates=None,
            labels=None,
            steps=2,
            cool=2,
        )
        pack = encode(source, home / f"budget{budget}.d3m", settings)
        assert len(pack_bytes(pack)) <= budget
    small, large = (d3pack.read(home / f"budget{b}.d3m") for b in (3_000, 12_000))
    assert large.prompts is not None
    assert small.prompts is not None
    assert decode_prompts(large.prompts).size > decode_prompts(small.prompts).size
    assert "budget 12,000 bytes: " in (home / "budget12000.d3m.work" / "log.txt").read_text()


def test_d3m_on_a_class_conditional_backbone(home: Path) -> None:
    settings = quick(tiny_dit(home / "dit"), modes=1, candidates=1, labels="none", codec="f16")
    pack = encode(home / "source", home / "dit.d3m", settings)
    assert pack.picks is None
    assert pack.labels is None
    assert Decoder(pack, path=home / "dit").images([0, 11]).shape == (2, 3, 64, 64)


def test_command_prints_events_as_json_lines(home: Path) -> None:
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


@pytest.mark.parametrize(("output", "said"), [("noext", ".d3m"), ("none/x.d3m", "does not exist")])
def test_dry_run_refuses_what_the_run_refuses(home: Path, output: str, said: str) -> None:
    for more in ((), ("--dry-run",)):
        done = call(home / "source", "-o", home / output, "--backbone", home / "sd", *more)
        assert done.exit_code != 0
        assert said in done.stderr


@pytest.mark.parametrize("teacher", ["source", "nowhere/", "/no/dir"])
def test_dry_run_refuses_a_teacher_that_the_run_refuses(
    home: Path, tmp_path: Path, teacher: str
) -> None:
    name = home / teacher if teacher == "source" else teacher
    for more in ((), ("--dry-run",)):
        out = ("-o", tmp_path / "t.d3m", "--backbone", home / "sd", *SHORT)
        done = call(home / "source", *out, "--teacher", name, *more)
        assert done.exit_code != 0
        said = f"{name} holds no safetensors" if teacher == "source" else f"directory {name};"
        assert said in done.stderr
    assert list(tmp_path.iterdir()) == [], "no work directory is left"


@pytest.mark.parametrize(
    ("labels", "table", "said"),
    [
        (["cat", "dog"], None, "no label for 3 of 3 classes"),
        (CLASSES[:2], None, "no label for 1 of 3 classes"),
        (CLASSES, '["a"', "is not a table of class names"),
    ],
)
def test_dry_run_refuses_a_teacher_of_other_classes(
    home: Path, tmp_path: Path, labels: list[str], table: str | None, said: str
) -> None:
    words = ["--teacher", save_classifier(tmp_path / "resnet", labels)]
    if table is not None:
        (tmp_path / "map.json").write_text(table)
        words += ["--teacher-map", tmp_path / "map.json"]
    for more in ((), ("--dry-run",)):
        out = ("-o", tmp_path / "t.d3m", "--backbone", home / "sd", *SHORT)
        done = call(home / "source", *out, *words, *more)
        assert done.exit_code != 0
        assert said in done.stderr
    assert not list(tmp_path.glob("t.d3m*")), "no work directory is left"


@pytest.mark.parametrize(
    "words",
    [
        ("--triples", 10**11), ("--batch", 10**9), ("--crops", 10**6), ("--pool", 10**9),
        ("--slots", 10**9), ("--group", 1025), ("--sampler-steps", 1001), ("--vectors", 1025),
        ("--steps", 2**53), ("--teacher-samples", 10**20),
    ],
)  # fmt: skip
def test_numbers_that_no_machine_can_hold_are_refused_at_once(
    home: Path, words: tuple[str, int]
) -> None:
    done = call(home / "source", "-o", home / "x.d3m", "--backbone", home / "sd", *words)
    assert done.exit_code == 2
    assert f"invalid {words[0]} '{words[1]}': expected an integer" in done.stderr, done.stderr


@pytest.mark.linux
def test_dry_run_refuses_a_folder_in_which_nothing_can_be_written(home: Path) -> None:
    for more in ((), ("--dry-run",)):
        done = call(home / "source", "-o", "/proc/self/x.d3m", "--backbone", home / "sd", *more)
        assert done.exit_code != 0
        assert "the directory /proc/self of the output cannot be written" in done.stderr


def test_dry_run_refuses_an_output_that_exists(home: Path, tmp_path: Path) -> None:
    (tmp_path / "x.d3m").write_bytes(b"mine")
    (tmp_path / "y.backbone").mkdir()
    for name, taken in (("x.d3m", "x.d3m"), ("y.d3m", "y.backbone")):
        out = ("-o", tmp_path / name, "--backbone", home / "sd", *SHORT)
        for more in ((), ("--restart",), ("--dry-run",)):
            done = call(home / "source", *out, *more)
            assert done.exit_code == 2
            assert f"{taken} exists; name another output, or use --overwrite" in done.stderr
        assert call(home / "source", *out, "--dry-run", "--overwrite").exit_code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["x.d3m", "y.backbone"]


@pytest.mark.parametrize("method", ["d3m", "modes"])
def test_dry_run_refuses_a_name_that_the_backbone_has_twice(home: Path, method: str) -> None:
    path = tiny_dit(home / f"twice-{method}")
    last = sorted(place.name for place in (home / "source").iterdir())[-1]
    labels = {"2": last, "5": last}
    (path / "model_index.json").write_text(json.dumps({"id2label": labels}), encoding="utf-8")
    done = call(home / "source", "--dry-run", "--backbone", path, "--method", method)
    assert done.exit_code != 0
    assert f"2 classes called '{last}': rows 2, 5" in done.stderr


def test_dry_run_changes_nothing(home: Path) -> None:
    (home / "cache").mkdir(exist_ok=True)  # where it is remembered that a backbone's files are good
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


# -- defaults ---------------------------------------------------------------------------------


def test_defaults_follow_the_resolution(home: Path, tmp_path: Path) -> None:
    backbone = open_backbone(str(home / "sd"))
    for c, name in enumerate(("1", "2")):
        (tmp_path / "large" / name).mkdir(parents=True)
        picture(c, 0, 150).save(tmp_path / "large" / name / "0.png")

    def job(source: Path, **values: Any) -> D3MJob:
        settings = settings_of(**values)
        return prepare(open_source(source), settings, settings.method_settings, backbone)

    small = job(home / "source").details
    assert (small.factor, small.crops, small.template) == (1, 1, "a photo of a {}")
    large = job(tmp_path / "large", size=(128, 128))
    details = large.details
    assert (large.plan.typical, details.factor, details.crops) == (150, 2, 5)
    assert details.template == "a 2x2 collage of {}"
    assert "class_names" in large.plan.lines()[-1]
    own = job(tmp_path / "large", size=(128, 128), factor=1, template="{}").details
    assert (own.factor, own.template) == (1, "{}")
    sigmas = large.recipe().sigmas
    levels = [backbone.levels.timestep(sigma) for sigma in sigmas[:-1]]
    assert all(level == int(level) for level in levels)  # rounded, they still name exact levels


# -- plugins ----------------------------------------------------------------------------------


def test_example_of_a_method_makes_a_valid_pack(home: Path, tmp_path: Path) -> None:
    example = ROOT / "examples" / "custom_method.py"
    spec = importlib.util.spec_from_file_location("custom_method", example)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["custom_method"] = module  # its dataclass looks itself up there
    try:
        spec.loader.exec_module(module)
        output = tmp_path / "names.d3m"
        settings = EncodeSettings(4, backbone=str(home / "sd"))
        encode(home / "source", output, settings, method=module.Names())
    finally:
        del sys.modules["custom_method"]
    pack = d3pack.read(output)
    assert pack.provenance["method"] == "names"
    assert verify_probes(pack, Decoder(pack, path=home / "sd")).verdict == "exact"


def test_method_of_a_plugin_is_found(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    entry = EntryPoint("mine", "d3pack.encode.methods.d3m.method:D3M", contract.GROUP)
    monkeypatch.setattr(contract, "entry_points", lambda group: [entry])
    contract._plugins.cache_clear()
    try:
        assert contract.open_method("mine").name == "d3m"
        assert contract.method_settings("mine").__name__ == "D3MSettings"
        assert {"d3m", "mine"} <= set(contract.available_methods())
    finally:
        contract._plugins.cache_clear()


def test_the_parts_of_an_estimate_come_in_the_order_of_the_stages(
    home: Path, tmp_path: Path
) -> None:
    events: list[dict[str, Any]] = []
    encode(
        home / "source",
        tmp_path / "x.d3m",
        quick(home / "sd", seed=77, guidance=None),
        listeners=[events.append],
        estimate=True,
        teachers=tmp_path / "teachers",
    )
    (estimate,) = (event["seconds"] for event in events if event["event"] == "estimate")
    parts = [event["part"] for event in events if event["event"] == "stage" and event["part"]]
    assert list(dict.fromkeys(parts)) == list(estimate)
