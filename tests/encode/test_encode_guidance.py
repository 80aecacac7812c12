"""Guidance by measurement, on the embedded backbone and a teacher that is really trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from encode_world import make_tree, quick
from safetensors.torch import load_file

from d3pack.backbones import MINI_GUIDANCE
from d3pack.decode import Decoder
from d3pack.encode import encode
from d3pack.encode.candidates import Answers, pick_order
from d3pack.encode.methods.d3m.collages import make_collages
from d3pack.encode.methods.d3m.guidance import KEPT
from d3pack.encode.sampler_search import GUIDANCES, energy_distance
from d3pack.format import pack_bytes
from d3pack.sources import Source, open_source
from d3pack.teachers import Cut, SmallResNet, TrainedTeacher, batched, teacher_config

pytestmark = pytest.mark.heavy

CANDIDATES = 2
SETTINGS = quick(
    Path("mini"), modes=1, candidates=CANDIDATES, labels="none", steps=0, cool=0, images_per_class=2
)


class StopError(Exception):
    """As a kill would."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    root = make_tree(tmp_path_factory.mktemp("guidance") / "source", 12, ("lemon", "school bus"))
    return open_source(root)


@pytest.fixture(scope="module")
def made(source: Source, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    folder = tmp_path_factory.mktemp("made")
    pack = encode(source, folder / "made.d3m", SETTINGS, teachers=folder / "cache")
    return pack, folder / "made.d3m.work"


def measured(work: Path) -> dict[float, float]:
    """The distances that the journal has, by weight."""
    facts: dict[str, Any] = json.loads((work / "journal.json").read_text())["facts"]
    names = [name for name in facts if name.startswith("guidance/")]
    return {float(name.removeprefix("guidance/")): facts[name] for name in names}


def test_guidance_with_the_nearest_images_is_chosen(made: tuple[Any, Path]) -> None:
    pack, work = made
    distances = measured(work)
    assert set(distances) == set(GUIDANCES)
    assert len(set(distances.values())) == len(GUIDANCES)
    assert distances[pack.recipe.guidance] == min(distances.values())
    assert f"guidance {pack.recipe.guidance:g}; distance to real images" in (
        work / "log.txt"
    ).read_text(encoding="utf-8")


def test_distances_are_of_the_images_that_the_teacher_would_pick(
    source: Source, made: tuple[Any, Path]
) -> None:
    """One weight again, class by class, with the teacher that is left."""
    pack, work = made
    weight, each = 2.5, KEPT * CANDIDATES
    (stored,) = (work.parent / "cache").glob("*.safetensors")
    assert SETTINGS.teacher_samples is not None
    config = teacher_config(16, SETTINGS.teacher_samples, SETTINGS.seed)
    net = SmallResNet(2, config.widths)
    net.load_state_dict(load_file(stored))
    teacher = TrainedTeacher(net, config, pack.classes, {})
    trial = replace(
        pack,
        images_per_class=each,
        picks=None,
        probes=None,
        seed=2**63,
        recipe=replace(pack.recipe, guidance=weight),
    )
    images = Decoder(trial).images(range(len(trial)))
    distances = []
    for c in range(2):
        own = images[c * each : (c + 1) * each]
        logits, features = batched(teacher, own)
        kept = pick_order(Answers(logits.numpy(), features.numpy()), c, KEPT, 1)
        collages = make_collages(source, c, teacher, Cut(pack.recipe.size, 512), 1, 256)
        real = teacher.features(collages.unchosen)
        assert len(real) == 12
        distances.append(energy_distance(teacher.features(own[kept]).double(), real.double()))
    wanted = measured(work)[weight]
    assert sum(distances) / 2 == pytest.approx(wanted, abs=1e-4)


def test_stopped_measurement_continues_to_the_same_pack(
    source: Source, made: tuple[Any, Path], tmp_path: Path
) -> None:
    pack, work = made

    def stop(event: dict[str, Any]) -> None:
        if event["event"] == "step" and event["stage"] == "choose the guidance":
            raise StopError

    output = tmp_path / "made.d3m"
    with pytest.raises(StopError):
        encode(source, output, SETTINGS, listeners=[stop], teachers=work.parent / "cache")
    assert set(measured(tmp_path / "made.d3m.work")) == {GUIDANCES[0]}
    again = encode(source, output, SETTINGS, teachers=work.parent / "cache")
    assert pack_bytes(again) == pack_bytes(pack)


def test_guidance_that_is_set_is_not_measured(
    source: Source, made: tuple[Any, Path], tmp_path: Path
) -> None:
    settings = replace(SETTINGS, guidance=3.0)
    pack = encode(source, tmp_path / "given.d3m", settings, teachers=made[1].parent / "cache")
    assert pack.recipe.guidance == 3.0
    assert not measured(tmp_path / "given.d3m.work")


def test_one_image_a_class_gives_the_default_guidance(tmp_path: Path) -> None:
    lonely = open_source(make_tree(tmp_path / "lonely", 1, ("lemon", "school bus")))
    settings = replace(SETTINGS, images_per_class=1)
    pack = encode(lonely, tmp_path / "lonely.d3m", settings, teachers=tmp_path / "cache")
    assert pack.recipe.guidance == MINI_GUIDANCE
    log = (tmp_path / "lonely.d3m.work" / "log.txt").read_text(encoding="utf-8")
    assert "too few real images" in log
