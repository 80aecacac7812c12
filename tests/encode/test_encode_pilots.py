"""A budget that pilots split between seeds and codes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import invoke
from encode_world import CLASSES, make_tree, quick
from PIL import Image
from tiny_backbones import tiny_dit

from d3pack.backbones import open_backbone
from d3pack.decode import Decoder, verify_probes
from d3pack.encode import EncodeSettings, encode, estimate_encode, pilots
from d3pack.encode.allocation import Allocation
from d3pack.encode.codes import choose_photographs, divided
from d3pack.encode.methods.d3m import collages
from d3pack.encode.pilots import MARGIN, NEW, PICKS_SHARE, enough, finer, first_splits, small_size
from d3pack.encode.plan import EncodePlan, coding_for, repeats
from d3pack.encode.settings import parse_updates
from d3pack.errors import UsageError
from d3pack.format import pack_bytes
from d3pack.sources import Source, open_source
from d3pack.students import HELD_BACK, held_back

PICKS = 300  # bytes of the toy's picks


def plan_of(images: int, **parts: Any) -> EncodePlan:
    return EncodePlan(
        classes=("a", "b"),
        images=400,
        images_per_class=images,
        typical=32,
        size=(64, 64),
        dtype="float32",
        allocation=Allocation(candidates=8, share=8),
        group=4,
        seed=0,
        pilots=10,
        **parts,
    )


def toy_size(plan: EncodePlan) -> int:
    codes = 0.0 if plan.coding is None else 2 * plan.codes * plan.coding.nbytes
    picks = PICKS if plan.allocation.candidates > 1 and plan.seeded else 0
    return 1000 + picks + int(np.ceil(codes))


def splits_of(
    budget: int,
    images: int | None = None,
    photographs: int = 5000,
    small: tuple[int, int] | None = None,
) -> dict[str, Any]:
    settings = EncodeSettings(budget=budget, images_per_class=images)
    splits = first_splits(plan_of(settings.images), settings, photographs, toy_size, small)
    return {split.name: split.plan for split in splits}


@pytest.mark.parametrize("budget", [1_400, 2_000, 3_001, 10_000, 30_000])
def test_splits_fill_the_budget_and_do_not_exceed_it(budget: int) -> None:
    splits = splits_of(budget)
    assert list(splits) == ["codes", "both", "seeds"]
    row = 2 * coding_for(EncodeSettings()).nbytes
    for name in ("codes", "both"):
        assert budget - MARGIN - row <= toy_size(splits[name]) <= budget - MARGIN
    assert splits["codes"].seeded == 0
    assert splits["both"].seeded == splits["seeds"].images_per_class == 150
    assert splits["seeds"].codes == 0


def test_small_codes_are_alone_and_have_no_prompts() -> None:
    splits = splits_of(10_000, small=(32, 32))
    assert list(splits) == ["codes", "small codes", "both", "seeds"]
    assert {name: plan.size for name, plan in splits.items()} == {
        "codes": (64, 64),
        "small codes": (32, 32),
        "both": (64, 64),
        "seeds": (64, 64),
    }
    small = splits["small codes"]
    assert small.coding is not None
    assert not small.coding.prompts
    assert small.seeded == 0


@pytest.mark.parametrize(
    ("typical", "settings", "expected"),
    [
        (32, {}, (32, 32)),
        (8, {}, (32, 32)),
        (33, {}, None),  # what is larger would lose pixels
        (32, {"size": (64, 64)}, None),  # the user has said it
    ],
)
def test_half_of_the_size_where_photographs_are_no_larger(
    typical: int, settings: dict[str, Any], expected: tuple[int, int] | None
) -> None:
    plan = replace(plan_of(4), typical=typical)
    assert small_size(plan, EncodeSettings(**settings), open_backbone("mini")) == expected


def test_no_half_of_a_size_that_the_backbone_cannot_halve(tmp_path: Path) -> None:
    tiny_dit(tmp_path / "dit")
    dit = open_backbone(str(tmp_path / "dit"))
    plan = replace(plan_of(4), typical=4, size=dit.image_size)
    assert small_size(plan, EncodeSettings(), dit) is None


def test_codes_grow_step_by_step() -> None:
    coding, sizes = coding_for(EncodeSettings()), []
    while (larger := finer(coding)) is not None:
        assert larger.sigmas == coding.sigmas
        coding = larger
        sizes.append((coding.bits, coding.atoms[0], round(coding.nbytes)))
    assert sizes == [(12, 1, 24), (8, 2, 32), (8, 4, 60)]
    assert finer(coding_for(EncodeSettings(code_bits=14, code_atoms=8))) is None


def test_picks_stay_beside_codes_where_they_are_a_small_share() -> None:
    for budget in (PICKS * PICKS_SHARE - 1, PICKS * PICKS_SHARE):
        picked = splits_of(budget)["both"].allocation.candidates > 1
        assert picked is (budget == PICKS * PICKS_SHARE)


def test_no_codes_where_not_one_of_each_class_fits() -> None:
    assert list(splits_of(1_010)) == ["seeds"]


def test_no_more_codes_than_photographs_or_images_that_are_wanted() -> None:
    assert splits_of(30_000, photographs=20)["codes"].codes == 20
    limited = splits_of(30_000, images=40)
    assert limited["codes"].images_per_class == limited["codes"].codes == 40
    assert (limited["both"].codes, limited["both"].seeded) == (20, 20)


class _Opened:
    """A source that remembers which images were opened."""

    def __init__(self, count: int) -> None:
        self.counts, self.classes, self.opened = (count,), ("one",), set[int]()

    def get(self, c: int, i: int) -> Image.Image:
        self.opened.add(i)
        return Image.new("RGB", (8, 8))


class _Even:
    """A teacher without preferences."""

    def logits(self, images: torch.Tensor) -> torch.Tensor:
        return torch.zeros(len(images), 1)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return images.flatten(1).float()


@pytest.mark.parametrize(("count", "held"), [(2, 1), (4, 1), (10, 2), (50, 10), (2_000, HELD_BACK)])
def test_photographs_that_pilots_are_tested_on_are_never_coded(count: int, held: int) -> None:
    source: Any = _Opened(count)
    run: Any = type("Run", (), {"source": source})
    plan = replace(plan_of(4), codes=8, size=(8, 8))
    free, kept = divided(source, plan, 0)
    assert len(kept) == held
    assert sorted([*free, *kept]) == list(range(count))
    assert len(choose_photographs(run, plan, _Even(), 0)) == 8  # type: ignore[arg-type]
    assert source.opened
    assert not source.opened & set(kept)  # a class with too few repeats some
    assert divided(source, replace(plan, pilots=0), 0)[1] == []


@pytest.mark.parametrize(
    ("counts", "most"),
    [
        ([7, 7, 7], 7),
        ([5000, 5000], 5000),
        ([5000] + 9 * [20], 22),  # 202 of 220 are other photographs
        ([1], 1),
        ([0, 9], 1),
        (9 * [100] + [50], 100),  # 950 of 1,000
        (4 * [100] + [50], 100),
        (3 * [100] + [50], 83),
    ],
)
def test_few_codes_repeat_photographs(counts: list[int], most: int) -> None:
    assert enough(counts) == most
    assert sum(min(n, most) for n in counts) >= NEW * most * len(counts) or most == 1


def test_photographs_that_repeat_are_announced() -> None:
    some = ("a", "b", "c"), (9, 2, 3)
    assert repeats(*some, 2) == ()
    (one,), (two,) = repeats(*some, 3), repeats(*some, 4)
    assert one == "1 class has fewer than 3 photographs to code and repeats them, first b"
    assert two == "2 classes have fewer than 4 photographs to code and repeat them, first b"


@pytest.mark.parametrize(
    ("accuracies", "chosen"),
    [
        ({"codes": 0.5, "both": 0.5, "seeds": 0.5}, "seeds"),
        ({"codes": 0.5, "both": 0.5, "seeds": 0.4}, "both"),
        ({"codes": 0.51, "both": 0.5, "seeds": 0.5}, "codes"),
    ],
)
def test_of_splits_that_teach_as_much_the_one_with_fewest_photographs_wins(
    accuracies: dict[str, float], chosen: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def marks(self: Any, splits: Sequence[pilots.Split], seeds: Sequence[int]) -> Any:
        return {split.text: [accuracies[split.name]] * len(seeds) for split in splits}

    monkeypatch.setattr(pilots._Race, "_accuracies", marks)
    settings: Any = EncodeSettings(budget=10_000)
    splits = first_splits(plan_of(settings.images), settings, 5000, toy_size)
    race: Any = pilots._Race(*4 * [None])  # type: ignore[arg-type]
    assert race.best(splits).name == chosen


def test_prompts_learn_nothing_of_what_pilots_are_tested_on(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Any] = []

    def patches(_source: Source, c: int, _teacher: Any, _cut: Any, order: Any) -> None:
        looked.append((c, order))
        raise _StopError

    monkeypatch.setattr(collages, "best_patches", patches)
    with pytest.raises(_StopError):
        encode(source, tmp_path / "x.d3m", quick("mini", **SHORT))
    settings = quick("mini", modes=1, images_per_class=4)
    with pytest.raises(_StopError):
        encode(source, tmp_path / "y.d3m", settings)
    (c, allowed), (_, every) = looked
    free, held = divided(source, replace(plan_of(4), pilots=2), c)
    assert len(held) == held_back(source.counts[c]) > 0
    assert sorted(allowed) == sorted(free)
    assert not set(allowed) & set(held)
    assert every is None


def test_updates_by_number_or_by_name_of_a_protocol(tmp_path: Path) -> None:
    make_tree(tmp_path / "source", 4)
    for word, expected in (("quick", 75), ("standard", 375), ("800", 200)):
        out = invoke("encode", str(tmp_path / "source"), "--dry-run", "--budget", "9KB",
                     "--backbone", "mini", "--for-updates", word)  # fmt: skip
        assert f"pilots of {expected} updates choose" in out.stdout
    assert EncodeSettings().for_updates == parse_updates("standard")
    wrong = invoke("encode", str(tmp_path / "source"), "--dry-run", "--for-updates", "long")
    assert wrong.exit_code == 2
    assert "invalid --for-updates 'long': expected an integer, quick or standard" in wrong.stderr


def test_codes_and_no_codes_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="codes= and no_codes= exclude each other"):
        EncodeSettings(codes=2, no_codes=True)
    assert EncodeSettings(budget=9_000).pilots == 375
    assert EncodeSettings(budget=9_000, no_codes=True).pilots == 0
    assert EncodeSettings(budget=9_000, codes=2).pilots == EncodeSettings().pilots == 0


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return open_source(str(make_tree(tmp_path_factory.mktemp("pilots") / "source", 12)))


SHORT: dict[str, Any] = {
    "images_per_class": 4,
    "budget": 2_500,
    "for_updates": 8,
    "code_steps": 4,
    "guidance": 2.0,
    "modes": 1,
    "candidates": 1,
    "labels": None,
    "steps": 2,
    "cool": 2,
}


class _StopError(Exception):
    pass


def _stop_at(text: str) -> Callable[[dict[str, Any]], None]:
    def listener(event: dict[str, Any]) -> None:
        if event["event"] == "note" and event["text"].startswith(text):
            raise _StopError

    return listener


@pytest.mark.heavy
def test_pilots_choose_and_a_stopped_run_remembers_them(source: Source, tmp_path: Path) -> None:
    settings = quick("mini", **SHORT)
    whole = encode(source, tmp_path / "whole.d3m", settings)
    assert len(pack_bytes(whole)) <= settings.budget  # type: ignore[operator]
    log = (tmp_path / "whole.d3m.work" / "log.txt").read_text()
    assert "pilots of 2 updates choose" in log
    assert "chosen: " in log
    assert "pilots are tested on only 6 photographs, so the choice may be wrong" in log
    with pytest.raises(_StopError):
        encode(source, tmp_path / "again.d3m", settings, listeners=[_stop_at("pilot 1: both")])
    notes: list[str] = []
    resumed = encode(
        source,
        tmp_path / "again.d3m",
        settings,
        listeners=[lambda e: notes.append(e["text"]) if e["event"] == "note" else None],
    )
    assert resumed.root == whole.root
    trained = [note for note in notes if note.startswith("pilot 1: ")]
    assert not any(note.startswith(("pilot 1: codes", "pilot 1: both")) for note in trained[:1])
    assert trained[0].startswith("pilot 1: seeds (4 seeded)")


@pytest.mark.heavy
def test_small_codes_make_images_of_half_of_the_size(
    source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def best(self: pilots._Race, splits: Sequence[pilots.Split]) -> pilots.Split:
        return next((split for split in splits if split.name == "small codes"), splits[0])

    monkeypatch.setattr(pilots._Race, "best", best)
    pack = encode(source, tmp_path / "small.d3m", quick("mini", **SHORT))
    assert len(pack_bytes(pack)) <= SHORT["budget"]
    assert pack.recipe.size == (32, 32)
    assert pack.coded_images == pack.images_per_class > 0
    assert pack.prompts is None
    decoder = Decoder(pack)
    assert decoder.images([(0, 0), (2, 0)]).shape == (2, 3, 32, 32)
    assert verify_probes(pack, decoder).verdict == "exact"


@pytest.mark.heavy
def test_no_codes_spends_a_budget_on_seeds_alone(source: Source, tmp_path: Path) -> None:
    defaults = {"for_updates": 1500, "code_steps": 15, "code_tried": None}
    settings = replace(quick("mini", **{**SHORT, **defaults}), no_codes=True)
    pack = encode(source, tmp_path / "seeds.d3m", settings)
    assert pack.codes is None
    assert pack.classes == CLASSES


@pytest.mark.heavy
def test_estimate_counts_codes_and_pilots(source: Source) -> None:
    estimate = estimate_encode(source, quick("mini", **SHORT))
    assert estimate["bytes"] == SHORT["budget"]
    assert estimate["seconds"]["codes"] > 0
    assert estimate["seconds"]["pilots"] > 0
