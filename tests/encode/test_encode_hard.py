"""Hard sources, bad input, a full disk, a thousand classes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from encode_world import SHORT, call, fails, make_tree, picture, quick
from PIL import Image

import d3pack
from d3pack.encode import encode
from d3pack.errors import NoSpaceError
from d3pack.sources import open_source

pytestmark = pytest.mark.heavy


def test_source_with_images_of_every_format(home: Path, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "s", 8)
    odd = root / "lemon"
    Image.fromarray(np.full((9, 9), 40_000, np.uint16)).save(odd / "wide.png")
    picture(1, 90).convert("CMYK").save(odd / "cmyk.jpg")
    picture(1, 91).convert("L").save(odd / "grey.png")
    picture(1, 92).save(odd / "moving.gif", save_all=True, append_images=[picture(0, 1)])
    (odd / "broken.jpg").write_bytes(b"\xff\xd8\xff junk")
    full = ("--provenance", "full")
    done = call(root, "-o", tmp_path / "o.d3m", "--backbone", home / "sd", *full, *SHORT)
    assert done.exit_code == 0, done.exception
    source = d3pack.read(tmp_path / "o.d3m").provenance["source"]
    assert (source["images"], source["seen"], source["bad"]) == (29, 28, 1)
    assert "broken.jpg" in (tmp_path / "o.d3m.work" / "skipped.txt").read_text()
    error = fails(
        root, "-o", tmp_path / "p.d3m", "--backbone", home / "sd", "--on-error", "fail", *SHORT
    )
    assert (error.code, error.exit_code) == ("E_SOURCE_IMAGE", 7)


def test_class_with_one_image_is_encoded(home: Path, tmp_path: Path) -> None:
    root = make_tree(tmp_path / "s", 4)
    for i in range(1, 4):
        (root / "lemon" / f"{i:03d}.png").unlink()
    dials = ["--modes", "2", "--factor", "2"]
    done = call(root, "-o", tmp_path / "o.d3m", "--backbone", home / "sd", *dials, *SHORT)
    assert done.exit_code == 0, done.exception
    assert len(d3pack.read(tmp_path / "o.d3m")) == 9


def test_bad_input_is_refused_in_one_line(home: Path, tmp_path: Path) -> None:
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
        ((tmp_path / "nowhere", *common), "E_NOT_FOUND", "there is no source nowhere"),
        ((good, "--class-names", twice, *common), "E_SOURCE", "two classes have the name 'fish'"),
        ((good, "-o", out, "--backbone", tmp_path / "no", *SHORT), "E_NOT_FOUND", "no"),
        ((good, "-o", out, "--backbone", good, *SHORT), "E_BACKBONE_CONFIG", "diffusers' layout"),
        ((good, "--teacher", tmp_path / "no", *common), "E_TEACHER", "no teacher directory"),
        ((good, "--vectors", "99", *common), "E_USAGE", "at most 14 vectors"),
        ((good, "--size", "33", *common), "E_USAGE", "invalid image size 33x33"),
        ((good, "--budget", "1KB", *common), "E_USAGE", "1000 bytes are too few"),
        ((good, "--budget", "lots", *common), "E_USAGE", "invalid size 'lots'"),
        ((good, "--method", "magic", *common), "E_USAGE", "unknown method 'magic'"),
        ((good, "--labels", "some", *common), "E_USAGE", "invalid --labels 'some'"),
        ((good, "-o", tmp_path / "o.zip", "--backbone", sd), "E_USAGE", "ends in .d3m"),
        (
            (good, "-o", tmp_path / "a" / "o.d3m", "--backbone", sd),
            "E_NOT_FOUND",
            f"directory {tmp_path / 'a'} of",
        ),
        ((good, "--backbone", sd), "E_USAGE", "no output"),
    ]
    for arguments, code, text in cases:
        error = fails(*arguments)
        assert error.code == code, (arguments, error)
        assert text in str(error), error
        assert not out.exists()


def test_output_that_cannot_be_written_is_refused_in_one_line(home: Path, tmp_path: Path) -> None:
    def refused(output: Path, *more: str) -> str:
        error = fails(home / "source", "-o", output, "--backbone", home / "sd", *more, *SHORT)
        assert error.code in {"E_JOURNAL", "E_USAGE"}
        return str(error)

    (tmp_path / "a.d3m.work").write_text("a file")
    assert "cannot work in a.d3m.work: File exists; name another output" in refused(
        tmp_path / "a.d3m"
    )
    assert "File name too long" in refused(tmp_path / f"{'x' * 253}.d3m")
    if Path("/sys").is_dir():  # where nobody makes a folder, root neither
        assert "cannot work in x.d3m.work" in refused(Path("/sys/x.d3m"))
    (tmp_path / "folder.d3m").mkdir()
    assert "folder.d3m is a directory" in refused(tmp_path / "folder.d3m", "--overwrite")
    assert not (tmp_path / "folder.d3m.work").exists()


def test_run_continues_after_a_full_disk(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    settings = quick(home / "sd", steps=2, cool=2)
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoSpaceError, match="free some and run the same command"):
        encode(source, tmp_path / "o.d3m", settings)
    assert not (tmp_path / "o.d3m").exists()
    monkeypatch.undo()
    resumed = encode(source, tmp_path / "o.d3m", settings)
    assert encode(source, tmp_path / "p.d3m", settings).root == resumed.root


def test_thousand_classes_are_planned_in_bounded_memory(home: Path, tmp_path: Path) -> None:
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
from d3pack.encode import D3MSettings, EncodeSettings, encode, estimate_encode
from d3pack.sources import open_source
import torch, diffusers, transformers
from d3pack.backbones import open_backbone
open_backbone(sys.argv[3])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
settings = EncodeSettings(images_per_class=4, backbone=sys.argv[3], sampler_steps=2,
                          teacher_samples=500, candidates=1,
                          method_settings=D3MSettings(steps=2, cool=2, batch=4, pool=64))
before = peak()
plan = estimate_encode(sys.argv[1], settings)
growth = peak() - before
first = open_source(sys.argv[1], first=3)
pack = encode(first, sys.argv[2], settings, teachers=Path(sys.argv[2]).parent)
found = {"classes": len(plan["classes"]), "images": sum(plan["counts"]), "bytes": plan["bytes"]}
print(json.dumps({**found, "plan_growth": growth, "encoded": len(pack)}))
"""
