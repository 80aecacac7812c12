"""A class-conditional model of the source's own: killed, resumed, opened; the sampler's choice."""

from __future__ import annotations

import json
import re
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import Result, invoke
from encode_server import Server
from encode_world import CLASSES, make_tree, settings_of
from places import ROOT

from d3pack.backbones import Sampling
from d3pack.backbones.dit import DiT
from d3pack.dataset import D3MDataset
from d3pack.decode import Decoder, backbone_path, local_backbone
from d3pack.encode import (
    ClassCondSettings,
    D3MSettings,
    EncodeSettings,
    MinimaxSettings,
    ModesSettings,
    encode,
    estimate_encode,
)
from d3pack.encode.sampler_search import GUIDANCES, Speed, Trial, choose, energy_distance, grid
from d3pack.errors import BackboneChangedError, UsageError
from d3pack.format import read
from d3pack.format.codecs import decode_prompts
from d3pack.sources import open_source
from d3pack.system import SettingError, options_of
from d3pack.testing import raises_code
from d3pack.train.dit import DIT_MODELS, ClassConditioner, build_dit

pytestmark = pytest.mark.heavy

TINY: dict[str, Any] = {"model": "tiny", "search_images": 12}
CHANGES: dict[str, Any] = {
    "method": "classcond",
    "size": [16, 16],
    "guidance": 1.5,
    **TINY,
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server(tmp_path_factory.mktemp("classcond"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def undisturbed(server: Server) -> bytes:
    answer = server.run("undisturbed.d3m", backbone="", changes=CHANGES)
    assert "error" not in answer, answer
    return server.bytes_of("undisturbed.d3m")


KILLS = [
    ["step", "train the teacher", 1],
    ["stage", "encode the images", 1],
    ["step", "train the diffusion model", 1],
    ["step", "train the diffusion model", 2],
    ["stage", "choose the sampler", 1],
    ["step", "make and judge candidates", 2],
    ["sheets", "", 1],
]


def test_killed_in_every_stage(server: Server, undisturbed: bytes) -> None:
    for kill in KILLS:
        answer = server.run("killed.d3m", backbone="", kill_at=kill, changes=CHANGES)
        assert answer["status"] == signal.SIGKILL, (kill, answer)
        assert not (server.folder / "killed.d3m").exists()
    answer = server.run("killed.d3m", backbone="", changes=CHANGES)
    assert "error" not in answer, answer
    assert server.bytes_of("killed.d3m") == undisturbed
    for file in sorted((server.folder / "undisturbed.backbone").rglob("*")):
        twin = (
            server.folder
            / "killed.backbone"
            / file.relative_to(server.folder / "undisturbed.backbone")
        )
        assert file.is_dir() or file.read_bytes() == twin.read_bytes(), file.name


def test_images_are_read_and_encoded_once(server: Server, undisturbed: bytes) -> None:
    kill = ["stage", "train the diffusion model", 1]
    server.run("once.d3m", backbone="", kill_at=kill, changes=CHANGES)
    cache = server.folder / "once.d3m.work" / "training" / "cache"
    before = {p.name: p.stat().st_mtime_ns for p in cache.iterdir()}
    assert {"photos.npy", "latents.npy"} <= before.keys()
    kill = ["stage", "choose the sampler", 1]
    server.run("once.d3m", backbone="", kill_at=kill, changes=CHANGES)
    assert {p.name: p.stat().st_mtime_ns for p in cache.iterdir()} == before
    answer = server.run("once.d3m", backbone="", changes=CHANGES)
    assert "error" not in answer, answer
    assert server.bytes_of("once.d3m") == undisturbed


def test_minimax_goes_on_to_the_same_bytes(server: Server, undisturbed: bytes) -> None:
    """On the backbone that classcond has just made."""
    changes = {
        "method": "minimax",
        "size": [16, 16],
        "guidance": 1.5,
        "train_steps": 25,
        "ema": 0.9,
        "adapter": "i8",
    }
    backbone = str(server.folder / "undisturbed.backbone")
    answer = server.run("whole.d3m", backbone=backbone, changes=changes)
    assert "error" not in answer, answer
    for kill in (
        ["stage", "tune the backbone", 1],
        ["step", "tune the backbone", 1],
        ["step", "tune the backbone", 2],
        ["step", "make and judge labels", 1],
    ):
        answer = server.run("parts.d3m", backbone=backbone, kill_at=kill, changes=changes)
        assert answer["status"] == signal.SIGKILL, (kill, answer)
    answer = server.run("parts.d3m", backbone=backbone, changes=changes)
    assert "error" not in answer, answer
    assert server.bytes_of("parts.d3m") == server.bytes_of("whole.d3m")
    pack = read(server.folder / "whole.d3m")
    assert pack.adapter is not None
    assert pack.adapter.codec == "i8"
    assert (
        pack.recipe.backbone.files == read(server.folder / "undisturbed.d3m").recipe.backbone.files
    )


def test_the_pack_opens_with_the_backbone_beside_it(server: Server, undisturbed: bytes) -> None:
    pack = read(server.folder / "undisturbed.d3m")
    beside = backbone_path(server.folder / "undisturbed.d3m")
    decoder = Decoder(pack, path=beside)
    images = decoder.images(range(len(pack)))
    assert tuple(images.shape) == (3 * 4, 3, 16, 16)
    assert decoder.backbone.ref == pack.recipe.backbone
    backbone = decoder.backbone
    assert isinstance(backbone, DiT)
    table = backbone.denoiser.transformer_blocks[0].norm1.emb.table[:-1].half().float()
    assert pack.prompts is not None
    assert np.array_equal(decode_prompts(pack.prompts)[:, 0, 0], table.numpy())
    assert pack.classes == tuple(sorted(CLASSES))
    assert torch.equal(backbone.name_vectors("lemon")[0].half().float(), table[1])
    assert pack.provenance["method"] == "classcond"
    assert "vae" not in str(pack.provenance)


def test_a_backbone_beside_the_pack_is_found_and_held_to_its_lock(
    server: Server, undisturbed: bytes, tmp_path: Path
) -> None:
    file = tmp_path / "moved.d3m"
    file.write_bytes(undisturbed)

    def dataset() -> D3MDataset:
        return D3MDataset(file, cache_dir=tmp_path / "cache", quiet=True)

    with raises_code("E_BACKBONE_MISSING", match=r"next to the pack as NAME\.backbone"):
        dataset()[0]
    shutil.copytree(backbone_path(server.folder / "undisturbed.d3m"), backbone_path(file))
    images = Decoder(read(file), path=backbone_path(file)).images(range(12))
    assert torch.equal(dataset()[7][0], images[7])
    verified = invoke("verify", "--decode", str(file))
    assert verified.exit_code == 0
    assert "exact" in verified.output
    words = ["decode", str(file), "-o", str(tmp_path / "images"), "--ipc", "1"]
    assert invoke(*words).exit_code == 0
    weights = backbone_path(file) / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(BackboneChangedError):
        Decoder(read(file), path=local_backbone(file, read(file)))


def test_a_backbone_of_another_run_is_not_replaced(tmp_path: Path) -> None:
    make_tree(tmp_path / "source", 6)
    (tmp_path / "out.backbone").mkdir()
    settings = settings_of(method="classcond", size=(16, 16), **TINY)
    with pytest.raises(UsageError, match=r"out\.backbone exists"):
        encode(tmp_path / "source", tmp_path / "out.d3m", settings)
    shutil.rmtree(tmp_path / "out.backbone")


def trial(steps: int, guidance: float, distance: float) -> Trial:
    return Trial(Sampling("dpmpp-2m", steps, guidance), 0.5, distance)


def test_search_takes_the_cheapest_of_the_best_that_are_fast_enough() -> None:
    speed = Speed(forward=0.01, rest=0.02)
    trials = [
        trial(4, 1.0, 0.9),
        trial(8, 1.0, 0.31),
        trial(8, 2.0, 0.205),
        trial(16, 2.0, 0.2),
    ]
    assert choose(trials, speed, 0.0) == trials[2]  # within the slack of the nearest
    assert choose(trials, speed, 0.15) == trials[1]
    assert choose(trials, speed, 0.08) == trials[0]
    with pytest.raises(UsageError, match=r"0\.0600 s at least"):
        choose(trials, speed, 0.05)


def test_grid_keeps_what_the_user_has_set() -> None:
    assert len(grid(EncodeSettings(), fit=False)) == 20
    fixed = EncodeSettings(sampler="ddim", sampler_steps=5, guidance=2.0)
    assert [str(sampling) for sampling in grid(fixed, fit=True)] == ["ddim 5 steps, guidance 2"]
    assert Sampling("ddim", 5, 2.0).forwards == 10
    assert Sampling("ddim", 5, 1.0).forwards == 5


def test_grid_has_a_fitted_sampler_at_each_guidance() -> None:
    usual, more = (grid(EncodeSettings(), fit=fit) for fit in (False, True))
    assert more[:20] == usual
    assert [str(sampling) for sampling in more[20:]] == [
        f"table 5 steps, guidance {weight:g}" for weight in GUIDANCES
    ]
    for changes in ({"sampler": "euler"}, {"sampler_steps": 6}):
        settings = EncodeSettings(**changes)
        assert grid(settings, fit=True) == grid(settings, fit=False)


def test_energy_distance_is_the_slow_formula() -> None:
    random = np.random.default_rng(0)
    a, b = random.normal(size=(5, 3)), random.normal(1.0, 1.0, size=(7, 3))

    def mean(x: np.ndarray, y: np.ndarray, same: bool) -> float:
        pairs = [
            np.linalg.norm(p - q)
            for i, p in enumerate(x)
            for j, q in enumerate(y)
            if not (same and i == j)
        ]
        return float(np.mean(pairs))

    wanted = (2 * mean(a, b, False) - mean(a, a, True) - mean(b, b, True)) / mean(b, b, True)
    assert energy_distance(torch.from_numpy(a), torch.from_numpy(b)) == pytest.approx(wanted)


def test_a_fresh_model_says_nothing_and_has_one_table() -> None:
    model = build_dit(DIT_MODELS["tiny"], 4, 2, 3)
    x = torch.randn(2, 4, 2, 2)
    out = model(x, torch.tensor([5, 900]), torch.tensor([0, 3])).sample
    assert torch.equal(out, torch.zeros_like(x))
    tables = {block.norm1.emb.class_embedder.embedding_table for block in model.transformer_blocks}
    assert len(tables) == 1


def test_dropped_labels_are_a_function_of_the_step() -> None:
    conditioner = ClassConditioner(3, 0.5)
    labels, collage = np.zeros(64, np.int64), np.zeros(64, bool)
    given = [
        conditioner.for_training(labels, collage, np.random.default_rng(seed))[
            "class_labels"
        ].tolist()
        for seed in (1, 1, 2)
    ]
    assert given[0] == given[1] != given[2]
    assert set(given[0]) == {0, 3}
    assert 16 < given[0].count(3) < 48


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"backbone": "mini"}, "trains its own"),
        ({"method_settings": D3MSettings(modes=2)}, "classcond takes ClassCondSettings"),
        ({"method_settings": ClassCondSettings(vae=Path(__file__).parent)}, "no config.json"),
        ({"size": (20, 20)}, "invalid size 20x20: expected a square .* multiple of 8"),
    ],
)
def test_classcond_refuses(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    source = make_tree(tmp_path / "source", 4)
    with pytest.raises(UsageError, match=message):
        estimate_encode(source, EncodeSettings(method="classcond", **values))


def test_settings_of_another_method_are_refused(tmp_path: Path) -> None:
    source = make_tree(tmp_path / "source", 4)
    settings = EncodeSettings(method_settings=ClassCondSettings(model="tiny"))
    with pytest.raises(UsageError, match="the method d3m takes D3MSettings"):
        estimate_encode(source, settings)


def test_four_bits_are_for_a_model_in_the_pack() -> None:
    assert ClassCondSettings(embed=True, embed_bits=4).embed_bits == 4
    with pytest.raises(UsageError, match="embed_bits=4 is for a carried backbone"):
        ClassCondSettings(embed_bits=4)
    with pytest.raises(SettingError, match="invalid embed_bits 5: expected 4 or 8"):
        ClassCondSettings(embed=True, embed_bits=5)  # type: ignore[arg-type]


def test_settings_are_read_from_text() -> None:
    read = {entry.name: entry.read for entry in options_of(ClassCondSettings)}
    assert (read["train_steps"]("40"), read["train_seconds"]("90m")) == (40, 5400.0)


def test_estimate_measures_classcond(tmp_path: Path) -> None:
    source = open_source(str(make_tree(tmp_path / "source", 6)))
    estimate = estimate_encode(source, settings_of(method="classcond", **TINY))
    assert estimate["plan"]["size"] == (16, 16)
    assert 1000 < estimate["bytes"] < 3000
    assert estimate["seconds"]["train"] > 0
    assert "draws" not in estimate["seconds"]
    drawn = estimate_encode(source, settings_of(method="classcond", select="draws", **TINY))
    assert drawn["seconds"]["draws"] > 0
    assert drawn["seconds"]["images"] == 0, "draws are chosen without images"
    assert "codes" not in drawn["seconds"]
    coded = estimate_encode(source, settings_of(method="classcond", codes=2, **TINY))
    assert coded["seconds"]["codes"] > 0
    embedded = estimate_encode(source, settings_of(method="classcond", embed=True, **TINY))
    # the autoencoder of mini, halved
    assert embedded["bytes"] > estimate["bytes"] + 1_500_000


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("d3m", D3MSettings),
        ("classcond", ClassCondSettings),
        ("minimax", MinimaxSettings),
        ("modes", ModesSettings),
    ],
)
def test_every_setting_is_on_the_page(name: str, kind: type[Any]) -> None:
    page = (ROOT / "spec" / "methods.md").read_text(encoding="utf-8")
    section = page.split(f"\n## {name}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| *(\S*) *\| (.*) \|$", section, re.MULTILINE)
    assert rows == [
        (entry.name, "" if entry.default is None else str(entry.default), entry.help)
        for entry in options_of(kind)
    ]


def test_command_takes_settings_of_the_method(tmp_path: Path) -> None:
    make_tree(tmp_path / "source", 4)

    def run(*words: str) -> Result:
        line = ["encode", str(tmp_path / "source"), "--dry-run", "--format", "json", *words]
        return invoke(*line)

    own = ["--model", "tiny", "--time-budget", "2m", "--licence", "mit"]
    done = run("--method", "classcond", *own)
    assert done.exit_code == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["seconds"]["train"] == 120.0
    assert found["plan"]["model"]["name"] == "tiny"
    for words, said in (
        (("--set", "licence"), "no option '--set'"),
        (("--method", "classcond", "--layers", "3"), "no option '--layers'"),
        (("--model", "tiny"), "no option '--model'"),
    ):
        done = run(*words)
        assert done.exit_code != 0
        assert said in str(done.exception or "") + done.stderr
