"""The viewer: a third reader and decoder, under node and in Chromium.

Needs Chromium and what `nox -s viewer` builds; what is missing skips tests, but not where
`D3PACK_TEST_VIEWER` is set.
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import struct
import subprocess
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fuzz
import numpy as np
import pytest
from draft import Draft
from viewer_pages import served

import d3pack
from d3pack.format import Codes, Coding, encode_codes
from d3pack.preview import viewer_directory

ROOT = Path(__file__).resolve().parents[2]
VIEWER, CORPUS = ROOT / "viewer", ROOT / "spec" / "vectors"
EXAMPLE = ROOT / "examples" / "cifar10.d3m"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
HAS_NODE = shutil.which("node") is not None and (VIEWER / "node_modules").is_dir()
HAS_PAGE = (viewer_directory() / "model" / "model.json").is_file()
SKIPS = not os.environ.get("D3PACK_TEST_VIEWER")
needs_node = pytest.mark.skipif(SKIPS and not HAS_NODE, reason="needs node and `npm ci` in viewer/")
needs_page = pytest.mark.skipif(
    SKIPS and not (HAS_NODE and CHROMIUM and HAS_PAGE),
    reason="needs Chromium, and the viewer built with its networks",
)


@pytest.mark.heavy
def test_vectors_are_what_d3pack_computes() -> None:
    made = runpy.run_path(str(VIEWER / "tests" / "make_vectors.py"))["vectors"]()
    committed = json.loads((VIEWER / "tests" / "vectors.json").read_text(encoding="utf-8"))
    assert json.loads(json.dumps(made)) == committed


@pytest.mark.slow
@needs_node
def test_reader_and_decoder_agree_with_the_corpus_under_node() -> None:
    done = subprocess.run(["npm", "test"], cwd=VIEWER, capture_output=True, check=False)
    assert done.returncode == 0, done.stdout.decode()[-2000:]


@pytest.mark.slow
@needs_node
def test_readers_agree_on_mutants() -> None:
    subprocess.run(["node", "build.mjs", "--tests"], cwd=VIEWER, check=True)
    rng = random.Random(25)
    packs = [path.read_bytes() for path in sorted((CORPUS / "valid").glob("*.d3m"))]
    packs = [data for data in packs if len(data) <= fuzz.LARGEST]
    drafts = [Draft(data) for data in packs]
    mutants = []
    for _ in range(5000):
        which = rng.randrange(len(packs))
        is_sealed = rng.random() < 0.6
        mutants.append(
            fuzz.sealed(drafts[which], rng) if is_sealed else fuzz.raw(packs[which], rng)
        )
    frames = b"".join(struct.pack("<I", len(data)) + data for data in mutants)
    command = ["node", "dist-tests/verdicts.mjs"]
    done = subprocess.run(command, cwd=VIEWER, input=frames, capture_output=True, check=True)
    codes = done.stdout.decode().splitlines()
    assert len(set(codes)) > 15
    assert codes == [fuzz.second_verdict(data) for data in mutants]


def visit(pack: Path, *options: str) -> dict[str, Any]:
    """Open a pack in Chromium; return what was seen."""
    with served(pack) as address:
        return visit_address(address, *options)


def visit_address(address: str, *options: str) -> dict[str, Any]:
    """Open the page in Chromium; return what was seen, after checks that hold for every page."""
    command = ["node", "tests/page.mjs", "--chromium", str(CHROMIUM), *options, address]
    done = subprocess.run(command, cwd=VIEWER, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    seen: dict[str, Any] = json.loads(done.stdout)
    assert seen["problems"] == []
    assert len(seen["hosts"]) == 1  # nothing is asked of another machine
    assert seen["unnamed"] == []
    assert seen["tabs"][:3] == ["file", "address", "Open"]
    return seen


def compare(file: Path, pixels: Path) -> dict[str, list[int]]:
    """Compare the page's images with those of the exact decoder, and return them."""
    made: dict[str, list[int]] = json.loads(pixels.read_text(encoding="utf-8"))
    pairs = [(int(c), int(j)) for c, j in map(str.split, made)]
    with d3pack.Decoder(d3pack.read(file), device="cpu") as decoder:
        exact = decoder.images(pairs).flatten(1).numpy().astype(int)
    gap = np.abs(exact - np.array(list(made.values())))
    assert gap.max() <= 4
    assert gap.mean() < 0.3
    return made


@pytest.mark.slow
@needs_page
def test_page_reads_the_corpus_and_rebuilds_a_pack(tmp_path: Path) -> None:
    pixels = tmp_path / "pixels.json"
    options = ["--images", "80", "--pixels", str(pixels), "--shots", str(tmp_path)]
    seen = visit(EXAMPLE, *options, "--corpus", str(CORPUS))
    print({name: round(value) for name, value in seen["timings"].items()}, seen["note"])

    index = json.loads((CORPUS / "index.json").read_text(encoding="utf-8"))
    expected = {f"valid/{name}": "valid" for name in index["valid"]}
    expected |= {f"invalid/{name}": row["code"] for name, row in index["invalid"].items()}
    assert seen["corpus"] == expected

    assert seen["heading"] == "cifar10.d3m"
    assert seen["verdict"].startswith("Valid.")
    assert seen["probes"].startswith(("Probes: exact.", "Probes: within tolerance."))
    assert seen["timings"]["ready"] <= 3000

    made = compare(EXAMPLE, pixels)
    # opened again, with the same networks
    first = next(iter(made.values()))[:8]
    assert seen["again"]["image"] == " ".join(map(str, first))
    assert seen["again"]["workers"] <= 4


@pytest.mark.slow
@needs_page
def test_page_rebuilds_its_example_in_a_folder_of_any_static_host(tmp_path: Path) -> None:
    """As the documentation site carries it."""
    shutil.copytree(viewer_directory(), tmp_path / "site" / "viewer")
    pixels = tmp_path / "pixels.json"
    with static_host(tmp_path / "site") as host:
        for name in ("model", "ort"):
            terms = urllib.request.urlopen(f"{host}/viewer/{name}/LICENSE.txt").read().decode()
            assert ("non-commercial" if name == "model" else "MIT License") in terms
        address = f"{host}/viewer/?pack=cifar10.d3m"
        seen = visit_address(address, "--images", "80", "--pixels", str(pixels))
    assert seen["heading"] == "cifar10.d3m"
    assert seen["tabs"][3] == "Open an example"
    # nothing is left to stop
    assert seen["enabled"] == [f"Rebuild all {len(d3pack.read(EXAMPLE)):,} images"]
    assert len(compare(EXAMPLE, pixels)) >= 80


@contextmanager
def static_host(folder: Path) -> Iterator[str]:
    """Serve a folder by Python's own server, on this machine; give its address."""
    handler = partial(SimpleHTTPRequestHandler, directory=str(folder))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def coded_pack(*, prompts: bool) -> d3pack.Pack:
    """Return the example with guidance, and two codes of each class before the seeded images.

    With prompts, the images are wider than high; without, they are grey.
    """
    coding = Coding(
        (14.6146, 6.0, 2.0, 0.5, 0.0), (3, 4, 0, 1), 8, 0.9, 2.0 if prompts else 1.0, prompts
    )
    rng = np.random.default_rng(7)
    atoms = np.stack([
        np.concatenate([np.sort(rng.permutation(coding.entries)[:m]) for m in coding.atoms])
        for _ in range(4)
    ]).reshape(2, 2, -1)  # fmt: skip
    signs = rng.choice([-1, 1], atoms.shape)
    pack = d3pack.read(EXAMPLE).select([0, 1])
    return replace(
        pack,
        images_per_class=4,
        codes=encode_codes(Codes(coding, 2, atoms, signs)),
        picks=None,
        probes=None,
        recipe=replace(
            pack.recipe,
            guidance=3.0,
            guided_channels=7,
            size=(48, 80) if prompts else (64, 64),
            grey=not prompts,
        ),
    )


@pytest.mark.slow
@needs_page
@pytest.mark.parametrize("prompts", [True, False])
def test_page_makes_guided_images_and_codes(tmp_path: Path, prompts: bool) -> None:
    file, pixels = tmp_path / "coded.d3m", tmp_path / "pixels.json"
    d3pack.write(coded_pack(prompts=prompts), file)
    visit(file, "--images", "8", "--pixels", str(pixels))
    assert len(compare(file, pixels)) == 8


@pytest.mark.slow
@needs_page
def test_page_refuses_with_the_code(tmp_path: Path) -> None:
    seen = visit(CORPUS / "invalid" / "adapter-nan.d3m")
    assert seen["verdict"].startswith("Refused: E_ADAPTER.")
    assert "Recipe" not in seen["body"]


@pytest.mark.slow
@needs_page
def test_class_names_are_text(tmp_path: Path) -> None:
    name = "<img src=x onerror=alert(1)>"
    pack = d3pack.read(EXAMPLE).select([0, 1])
    file = tmp_path / "hostile.d3m"
    d3pack.write(replace(pack, classes=(name, "&amp;")), file)
    assert f"{name}&amp;" in visit(file)["body"]
