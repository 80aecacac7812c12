"""Photographs as codes: the coder, `encode --codes`, `d3pack code`."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import invoke
from cli_schema import check_output
from encode_world import CLASSES, quick
from PIL import Image

import d3pack
from d3pack.backbones import Backbone, open_backbone
from d3pack.decode import Decoder, codebook, verify_probes
from d3pack.encode import codes as codes_module
from d3pack.encode import coding_within, encode, estimate_encode
from d3pack.encode.allocation import SMALLEST
from d3pack.encode.codes import Coder, choose_photographs, coding_alone, covering, tried_of
from d3pack.encode.methods.codes.method import CodesOnly, images_of
from d3pack.encode.plan import EncodePlan, coding_for, nearness, sigmas_of
from d3pack.encode.sampler_fit import with_table
from d3pack.encode.settings import EncodeSettings
from d3pack.format import (
    Codes,
    Coding,
    Pack,
    Recipe,
    coding_of,
    decode_codes,
    encode_codes,
    encode_prompts,
    pack_bytes,
)
from d3pack.format.codecs import decode_picks
from d3pack.sources import open_source
from d3pack.testing import raises_code

pytestmark = pytest.mark.heavy


@pytest.fixture(scope="module")
def mini() -> Backbone:
    return open_backbone("mini", device="cpu")


@pytest.fixture(scope="module")
def lemon(mini: Backbone) -> Pack:
    recipe = Recipe(mini.ref, mini.image_size, "euler", (1.0, 0.0), group=4)
    prompts = mini.name_vectors("lemon", 1).detach().float().numpy()[None, None]
    return Pack(("lemon",), 1, recipe, encode_prompts(prompts), seed=5)


@pytest.fixture(scope="module")
def wanted(mini: Backbone, lemon: Pack) -> torch.Tensor:
    """Latents that the backbone finds likely: its own."""
    sigmas = sigmas_of(mini, "dpmpp-2m", 8, mini.image_size)
    recipe = replace(lemon.recipe, sampler="dpmpp-2m", sigmas=sigmas)
    pack = replace(lemon, images_per_class=6, recipe=recipe, seed=77)
    images = Decoder(pack, backbone=mini).images(range(6))
    with torch.no_grad():
        return mini.encode(images).float()


def decoded(pack: Pack, backbone: Backbone, coding: Coding, code: tuple[Any, Any]) -> torch.Tensor:
    """The latents that a decoder makes of codes of one class."""
    atoms, signs = code
    count = len(atoms)
    codes = encode_codes(Codes(coding, count, atoms[None].astype(np.int64), signs[None]))
    decoder = Decoder(replace(pack, images_per_class=count, codes=codes), backbone=backbone)
    pairs = [(0, i) for i in range(count)]
    with torch.inference_mode():
        return decoder._latents(pairs, decoder._model(pairs), 0)


def distance(made: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((made - wanted).square().mean())


@pytest.mark.heavy
def test_code_leads_to_its_photograph(mini: Backbone, lemon: Pack, wanted: torch.Tensor) -> None:
    coding = coding_for(EncodeSettings(codes=6, code_steps=8, code_bits=6))
    code = Coder(mini, coding, lemon, 0).code(wanted)
    made = decoded(lemon, mini, coding, code)
    others = decoded(lemon, mini, coding, (np.roll(code[0], 1, 0), np.roll(code[1], 1, 0)))
    opposite = decoded(lemon, mini, coding, (code[0], -code[1]))
    assert distance(made, wanted) < 0.8 * distance(others, wanted)
    assert distance(made, wanted) < 0.5 * distance(opposite, wanted)


@pytest.mark.heavy
def test_more_bits_come_nearer(mini: Backbone, lemon: Pack, wanted: torch.Tensor) -> None:
    distances = []
    for steps, bits, atoms in [(4, 6, 1), (8, 6, 1), (8, 9, 1), (8, 9, 4)]:
        settings = EncodeSettings(
            codes=1, code_steps=steps, code_bits=bits, code_atoms=atoms
        )  # fmt: skip
        coding = coding_for(settings)
        code = Coder(mini, coding, lemon, 0).code(wanted)
        distances.append(distance(decoded(lemon, mini, coding, code), wanted))
    assert distances == sorted(distances, reverse=True)


@pytest.mark.heavy
def test_more_trials_come_nearer(mini: Backbone, lemon: Pack, wanted: torch.Tensor) -> None:
    coding = coding_for(EncodeSettings(codes=6, code_steps=6, code_bits=6, code_atoms=2))
    distances = [
        distance(
            decoded(lemon, mini, coding, Coder(mini, coding, lemon, 0, n).code(wanted)), wanted
        )
        for n in (1, 4, 16)
    ]
    assert distances == sorted(distances, reverse=True)


def test_images_are_coded_as_if_alone(mini: Backbone, lemon: Pack, wanted: torch.Tensor) -> None:
    coding = coding_for(EncodeSettings(codes=6, code_steps=4, code_bits=6, code_atoms=2))
    coder = Coder(mini, coding, lemon, 0, 6)
    together = coder.code(wanted)
    alone = [coder.code(latents[None]) for latents in wanted]
    for i, array in enumerate(together):
        assert np.array_equal(array, np.concatenate([code[i] for code in alone]))


def test_what_is_tried_twice_is_kept_once() -> None:
    choices = torch.tensor([[[[1, 2], [1, 2], [2, 3]], [[1, 2], [-1, 2], [-1, 2]]]])
    expected = [[[False, True, False], [False, False, True]]]
    assert codes_module._repeated(choices).tolist() == expected
    assert not codes_module._repeated(choices[..., :1]).any(), "pursuits begin differently"


@pytest.mark.heavy
def test_levels_may_be_left_to_fresh_noise(
    mini: Backbone, lemon: Pack, wanted: torch.Tensor
) -> None:
    coding = replace(coding_for(EncodeSettings(codes=1, code_steps=4)), atoms=(1, 2, 1, 0))
    atoms, signs = Coder(mini, coding, lemon, 0).code(wanted[:2])
    assert atoms.shape == signs.shape == (2, 4)
    assert (atoms[:, 1] < atoms[:, 2]).all()


def test_no_pass_is_made_whose_outcome_no_choice_needs(
    mini: Backbone, lemon: Pack, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    coding = coding_for(EncodeSettings(codes=2, code_steps=6, code_bits=6))
    coding = replace(coding, atoms=(1, 1, 1, 1, 0, 0))
    passes: list[float] = []
    denoise = Coder._denoise

    def counted(self: Coder, x: torch.Tensor, sigma: float, condition: Any) -> torch.Tensor:
        passes.append(sigma)
        return denoise(self, x, sigma, condition)

    monkeypatch.setattr(Coder, "_denoise", counted)
    atoms, signs = Coder(mini, coding, lemon, 0).code(wanted[:2])
    assert atoms.shape == signs.shape == (2, 4)
    assert passes == list(coding.sigmas[:3])


def test_atoms_differ_where_none_comes_nearer(mini: Backbone, lemon: Pack) -> None:
    coding = coding_for(EncodeSettings(codes=1, code_steps=2, code_bits=4, code_atoms=3))
    atoms, signs = Coder(mini, coding, lemon, 0).code(torch.zeros(2, *mini.latent_shape))
    assert (np.diff(atoms[:, :3], axis=1) > 0).all()
    encode_codes(Codes(coding, 2, atoms[None].astype(np.int64), signs[None]))


@pytest.mark.parametrize("steps", [2, 3, 7])
@pytest.mark.parametrize("tried", [1, 4])
def test_estimate_times_few_levels_and_counts_all_passes(
    home: Path, steps: int, tried: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: list[int] = []
    denoise = Coder._denoise

    def counted(self: Coder, x: torch.Tensor, sigma: float, condition: Any) -> torch.Tensor:
        rows.append(math.prod(x.shape[:2]))
        return denoise(self, x, sigma, condition)

    def timed(work: Callable[[], Any], **_: Any) -> float:
        before = len(rows)
        work()
        assert len(rows) - before <= 3
        return float(sum(rows[before:]))

    monkeypatch.setattr(Coder, "_denoise", counted)
    monkeypatch.setattr(codes_module, "seconds_of", timed)
    settings = quick(
        home / "sd", codes=2, images_per_class=2, code_steps=steps, code_bits=4, code_tried=tried
    )
    said = estimate_encode(home / "source", settings)["seconds"]["codes"]
    monkeypatch.undo()
    with monkeypatch.context() as context:
        context.setattr(Coder, "_denoise", counted)
        rows.clear()
        encode(home / "source", home / f"timed-{steps}-{tried}.d3m", settings)
    assert said == pytest.approx(sum(rows))


@pytest.mark.parametrize(("atoms", "tried"), [(16, 1), (20, 3)])
def test_codebooks_in_parts_give_the_same_codes(
    atoms: int, tried: int, mini: Backbone, lemon: Pack, wanted: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    coding = replace(coding_for(EncodeSettings(codes=1, code_steps=2)), atoms=(atoms, 1), bits=6)
    coder = Coder(mini, coding, lemon, 0, tried)
    whole = coder.code(wanted)
    sizes = []

    def recorded(seed: int, level: int, numbers: Any, *more: Any) -> torch.Tensor:
        sizes.append(len(numbers))
        return codebook(seed, level, numbers, *more)

    monkeypatch.setattr(codes_module, "codebook", recorded)
    monkeypatch.setattr(codes_module, "_PART", 10 * wanted[0].numel())
    parts = coder.code(wanted)
    assert set(sizes[:7]) == {10, 4}  # of 64 entries
    assert all(np.array_equal(a, b) for a, b in zip(whole, parts, strict=True))


def test_coding_goes_on_behind_the_batches_that_are_kept(
    mini: Backbone, lemon: Pack, wanted: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(codes_module, "BATCH", 2)
    coding = coding_for(EncodeSettings(codes=1, code_steps=3))
    coder = Coder(mini, coding, lemon, 0)
    latents = wanted[:5] if len(wanted) > 4 else torch.cat([wanted, wanted])[:5]
    steps = list(coder.batches(latents))
    assert [len(atoms) for atoms, _ in steps] == [2, 4, 5]
    passes = []
    code = Coder._code

    def counted(self: Coder, part: torch.Tensor, at: int) -> Any:
        passes.append(at)
        return code(self, part, at)

    monkeypatch.setattr(Coder, "_code", counted)
    for rows, begun in ((2, [2, 4]), (3, [2, 4]), (4, [4])):
        passes.clear()
        *_, last = coder.batches(latents, (steps[-1][0][:rows], steps[-1][1][:rows]))
        assert passes == begun
        assert all(np.array_equal(a, b) for a, b in zip(last, steps[-1], strict=True))


def test_settings_of_codes_spend_their_bytes_and_more_bytes_come_nearer() -> None:
    near = 0.0
    for nbytes in (3, 17, 24.4, 32, 48, 67.5, 120, 250, 400, 700, 964, 1000, 2500, 5100):
        steps, bits, atoms = coding_within(nbytes)
        settings = EncodeSettings(codes=1, code_steps=steps, code_bits=bits, code_atoms=atoms)
        assert 0.7 * nbytes < coding_for(settings).nbytes <= nbytes
        assert near < steps * nearness(bits, atoms)
        near = steps * nearness(bits, atoms)
    # codebooks of 14 bits take long: for bytes that would be left alone
    assert coding_within(28.5) == (15, 14, 1)
    for nbytes in (2.9, 5_125):
        with raises_code("E_USAGE", match="expected a number from 3 to 5124"):
            coding_within(nbytes)


def test_more_bytes_than_a_code_takes_are_refused(home: Path) -> None:
    args = ("--backbone", str(home / "sd"), "--dry-run", "--bytes-per-image")
    refused = invoke("code", str(home / "source"), *args, "6000")
    assert refused.exit_code == 2
    assert "invalid --bytes-per-image '6000': expected a number from 3 to 5124" in refused.stderr


@pytest.fixture(scope="module")
def mixed(home: Path) -> Pack:
    settings = quick(home / "sd", codes=2, code_steps=3, code_bits=4, probes=4)
    return encode(home / "source", home / "mixed.d3m", settings)


def test_pack_holds_photographs_and_seeds(home: Path, mixed: Pack) -> None:
    assert mixed.images_per_class == 4
    assert mixed.coded_images == 2
    assert mixed.codes is not None
    assert decode_codes(mixed.codes).atoms.shape == (3, 2, 3)
    assert mixed.picks is not None
    assert decode_picks(mixed.picks).shape == (3, 2)
    decoder = Decoder(mixed, path=home / "sd")
    assert verify_probes(mixed, decoder).verdict == "exact"


def test_few_codes_alone_come_without_prompts(home: Path) -> None:
    """A teacher chooses the photographs; nothing is learned that no image uses."""
    settings = quick(home / "sd", codes=4, code_steps=3, code_bits=4, probes=4)
    pack = encode(home / "source", home / "few.d3m", settings)
    assert pack.prompts is None
    assert pack.recipe.sigmas == (1.0, 0.0), "levels that no image uses"
    log = (home / "few.d3m.work" / "log.txt").read_text()
    assert "code photographs" in log
    assert "collages" not in log
    assert "invert" not in log
    assert abs(estimate_encode(home / "source", settings)["bytes"] - len(pack_bytes(pack))) < 100
    decoder = Decoder(pack, path=home / "sd")
    assert verify_probes(pack, decoder).verdict == "exact"
    images = decoder.images([(1, 0), (1, 1), (2, 3)])
    assert torch.equal(decoder.images([(2, 3), (1, 1)]), images[[2, 1]])
    part = pack.select([1]).first(2)
    assert part.prompts is None
    assert torch.equal(Decoder(part, path=home / "sd").images(range(2)), images[:2])


def test_a_sampler_that_makes_no_image_takes_no_bytes(lemon: Pack) -> None:
    table = with_table(lemon.recipe, (8.0, 1.0, 0.0), ((0.5, (0.7,)), (0.2, (1.1, -0.3))))
    recipe = replace(table, guidance=4.0)
    plan = EncodePlan(
        classes=("one",),
        images=9,
        images_per_class=4,
        typical=64,
        size=(64, 64),
        dtype="float32",
        allocation=SMALLEST,
        group=16,
        seed=0,
    )
    assert plan.recipe_of(recipe) is recipe
    coding = coding_for(EncodeSettings())
    beside = replace(plan, codes=3, coding=coding)
    assert beside.recipe_of(recipe) is recipe
    alone = replace(plan, codes=4, coding=coding).recipe_of(recipe)
    alone.check()
    assert alone.sampler == "euler"
    assert alone.guidance == 1.0
    assert not alone.extra
    assert replace(
        alone, sampler="table", sigmas=table.sigmas, guidance=4.0, extra=table.extra
    ) == (recipe)


def test_budget_of_codes_alone_has_no_room_for_prompts(home: Path) -> None:
    """What would be spent on prompts is not missed, and not spent on more of them."""
    settings = quick(home / "sd", codes=4, code_steps=3, code_bits=4, modes=None, candidates=1)
    settings = replace(settings, labels="none", probes=0)
    least = int(estimate_encode(home / "source", settings)["bytes"])
    budget = replace(settings, budget=least + 250, candidates=None)
    plan = estimate_encode(home / "source", budget)
    assert plan["bytes"] <= least + 20
    assert any("no prompts" in line for line in plan["lines"])


@pytest.mark.parametrize(
    ("codes", "settings", "tried"),
    [
        (10, {}, 8),
        (1024, {}, 8),
        (1025, {}, 4),
        (5000, {}, 1),
        (10, {"code_bits": 2}, 4),
        (5000, {"code_tried": 3}, 3),
        (10, {"size": (256, 256)}, 1),
        (10, {"budget": 6000}, 8),
        (10, {"budget": 30_000}, 4),
    ],
)
def test_fewer_photographs_are_coded_with_more_care(
    codes: int, settings: dict[str, Any], tried: int, mini: Backbone
) -> None:
    of = EncodeSettings(**settings)
    pilots, size = of.pilots, of.size or (64, 64)
    plan = EncodePlan(
        ("a",), 9, codes, 32, size, "float32", SMALLEST, 4, 0, codes, coding_for(of), pilots
    )
    assert tried_of(of, plan, mini.latent_shape_for(plan.size)) == tried


def test_prompts_stay_where_many_codes_gain_more_than_they_cost() -> None:
    def plan(codes: int) -> EncodePlan:
        coding = coding_for(EncodeSettings())
        return EncodePlan(
            ("a", "b"), 400, codes, 32, (64, 64), "float32", SMALLEST, 4, 0, codes, coding
        )

    def size_of(plan: EncodePlan) -> int:
        return 1000 + 216 * plan.needs_prompts

    # 216 bytes of prompts against a tenth of 2 * codes * 16.9 bytes
    assert not coding_alone(plan(60), size_of).prompts
    assert coding_alone(plan(70), size_of).prompts


def test_first_images_of_a_pack_drop_prompts_that_none_uses(mini: Backbone, lemon: Pack) -> None:
    coding = Coding((2.0, 0.5, 0.0), (1, 1), bits=4, prompts=False)
    atoms, signs = np.array([[[3, 5], [0, 9]]]), np.ones((1, 2, 2), np.int8)
    mixed = replace(lemon, images_per_class=3, codes=encode_codes(Codes(coding, 2, atoms, signs)))
    coded = mixed.first(2)
    assert mixed.prompts is not None
    assert coded.prompts is None
    assert d3pack.read(pack_bytes(coded)) == coded
    with raises_code("E_SECTION", match="used by no image"):
        pack_bytes(replace(coded, prompts=lemon.prompts))
    with raises_code("E_SECTION", match="missing"):
        pack_bytes(replace(mixed, prompts=None))
    expected = Decoder(mixed, backbone=mini).images(range(2))
    assert torch.equal(Decoder(coded, backbone=mini).images(range(2)), expected)


def test_photographs_do_not_change_what_seeds_make(home: Path, mixed: Pack) -> None:
    settings = quick(home / "sd", images_per_class=2, probes=4)
    alone = encode(home / "source", home / "alone.d3m", settings)
    assert np.array_equal(decode_picks(alone.picks), decode_picks(mixed.picks))  # type: ignore[arg-type]
    seeded = Decoder(mixed, path=home / "sd").images([(c, i) for c in range(3) for i in (2, 3)])
    assert torch.equal(seeded, Decoder(alone, path=home / "sd").images(range(6)))


def test_estimate_counts_the_bytes_of_codes(home: Path, mixed: Pack) -> None:
    settings = quick(home / "sd", codes=2, code_steps=3, code_bits=4, probes=4)
    estimate = estimate_encode(home / "source", settings)
    size = (home / "mixed.d3m").stat().st_size
    assert abs(estimate["bytes"] - size) < 100
    assert any("likeness can be rebuilt" in line for line in estimate["lines"])


def test_more_codes_than_images_are_refused() -> None:
    with raises_code("E_USAGE", match="codes"):
        EncodeSettings(images_per_class=3, codes=4)


def test_images_are_as_many_as_codes_where_only_these_are_said() -> None:
    assert EncodeSettings(codes=200).images == 200
    assert EncodeSettings(codes=4).images == 10
    assert EncodeSettings(codes=200, budget=9_000).images == 200


def test_a_plan_names_flags_of_its_own_verb(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("d3pack.cli.encode._LONG", 0.0)
    words = (home / "source", "--backbone", home / "sd", "--dry-run")
    said = {
        verb: [
            line for line in invoke(verb, *words, *more).stdout.splitlines() if "depends" in line
        ]
        for verb, more in (("code", ()), ("encode", ("--method", "codes")))
    }
    assert said == {
        "code": ["codes depends on --tried and --bytes-per-image"],
        "encode": ["codes depends on --code-tried"],
    }
    refused = invoke("encode", *words, "--method", "codes", "--no-codes")
    assert refused.exit_code == 2
    assert "the method codes makes nothing but codes: leave out --no-codes" in refused.stderr


def test_command_codes_a_folder(home: Path, tmp_path: Path) -> None:
    found = invoke(
        "code", home / "source", "-o", tmp_path / "x.d3m", "--backbone", home / "sd",
        "--bytes-per-image", "6", "--format", "json",
    )  # fmt: skip
    assert found.exit_code == 0, found.output
    assert check_output("code (an event a line)", found.stdout)[-1]["event"] == "done"
    pack = d3pack.read(tmp_path / "x.d3m")
    assert pack.classes == CLASSES
    assert (pack.images_per_class, pack.coded_images) == (20, 20)
    assert pack.picks is None
    assert pack.codes is not None
    assert pack.codes.nbytes <= 3 * 20 * 6
    assert pack.prompts is None
    assert "prompts" not in pack.ledger().sections
    assert verify_probes(pack, Decoder(pack, path=home / "sd")).verdict == "exact"
    described = invoke("info", tmp_path / "x.d3m").output
    assert "20 photographs a class" in described
    how = Decoder(pack, path=home / "sd").describe()
    levels = coding_of(pack.codes).atoms
    assert (how["sampler"], how["steps"], how["guidance"]) == ("codes", len(levels), 1.0)
    assert "likeness of these photographs can be rebuilt" in described


def test_command_refuses_fewer_bytes_than_any_code_takes(home: Path, tmp_path: Path) -> None:
    place = ("code", home / "source", "-o", tmp_path / "x.d3m", "--backbone", home / "sd")
    found = invoke(*place, "--bytes-per-image", "2.9", "--dry-run")
    assert found.exit_code == 2
    assert "from 3 to 5124" in found.stderr
    assert invoke(*place, "--bytes-per-image", "3", "--dry-run").exit_code == 0


def test_classes_with_few_images_repeat_them(home: Path, tmp_path: Path) -> None:
    for c, (name, count) in enumerate([("cat", 3), ("dog", 2)]):
        (tmp_path / "real" / name).mkdir(parents=True)
        for i in range(count):
            noise = np.random.default_rng(10 * c + i).integers(0, 256, (16, 16, 3), np.uint8)
            Image.fromarray(noise).save(tmp_path / "real" / name / f"{i}.png")
    settings = EncodeSettings(method="codes", backbone=str(home / "sd"), code_steps=3, code_bits=12)
    lines = estimate_encode(tmp_path / "real", settings)["lines"]
    assert any(
        "1 class has fewer than 3 photographs to code and repeats them" in line for line in lines
    )
    first, second, third = images_of(open_source(tmp_path / "real"), 1, (16, 16), 3)
    assert torch.equal(first, third)
    assert not torch.equal(first, second)
    pack = encode(tmp_path / "real", tmp_path / "x.d3m", settings)
    assert (pack.images_per_class, pack.coded_images) == (3, 3)


def test_covering_takes_the_middle_of_every_group() -> None:
    """The largest group comes first, and nothing is taken twice."""
    random = torch.Generator().manual_seed(0)
    centres = torch.eye(3, 8)
    sizes = (30, 10, 4)
    parts = [
        centre + 0.1 * torch.randn(size, 8, generator=random)
        for centre, size in zip(centres, sizes, strict=True)
    ]
    rows = torch.nn.functional.normalize(torch.cat(parts), dim=1)
    group = torch.arange(3).repeat_interleave(torch.tensor(sizes))
    chosen = covering(rows, 3)
    assert group[chosen].tolist() == [0, 1, 2]
    near = (rows[chosen] * centres).sum(1)
    assert all(near[g] > (rows[group == g] @ centres[g]).median() for g in range(3))
    assert covering(rows, 20)[:3].tolist() == chosen.tolist()
    assert sorted(covering(rows, 100).tolist()) == list(range(44))


def test_teacher_chooses_photographs_of_the_typical_half() -> None:
    """Images 0 to 19 grow brighter, and the teacher likes dark ones; features are the pixels."""

    class Grey:
        classes, counts = ("a",), (20,)

        def get(self, c: int, i: int) -> Image.Image:
            return Image.new("RGB", (8, 8), (10 * i,) * 3)

    class Dark:
        def logits(self, images: torch.Tensor) -> torch.Tensor:
            mean = images.float().flatten(1).mean(1)
            return torch.stack([-mean, mean], 1)

        def features(self, images: torch.Tensor) -> torch.Tensor:
            return images.float().flatten(1)

    run: Any = type("Run", (), {"source": Grey()})
    teacher: Any = Dark()
    plan = EncodePlan(("a",), 20, 4, 8, (8, 8), "float32", SMALLEST, 4, 0, codes=4)
    images = choose_photographs(run, plan, teacher, 0)
    shades = images.flatten(1)[:, 0].tolist()
    assert len(set(shades)) == 4
    assert max(shades) < 100
    many = choose_photographs(run, replace(plan, codes=30, images_per_class=30), teacher, 0)
    assert sorted(set(many.flatten(1)[:, 0].tolist())) == [10 * i for i in range(20)]


def test_images_are_taken_in_the_order_of_the_source(home: Path) -> None:
    source = open_source(home / "source")
    images = images_of(source, 2, (16, 16), 3)
    with Image.open(home / "source" / "school bus" / "001.png") as image:
        assert np.array_equal(images[1].permute(1, 2, 0).numpy(), np.asarray(image))


def test_the_middle_of_images_of_another_aspect_is_coded(tmp_path: Path) -> None:
    wide = Image.new("RGB", (96, 32), (255, 0, 0))
    wide.paste((0, 0, 255), (32, 0, 64, 32))
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        wide.save(tmp_path / name / "a.png")
    (image,) = images_of(open_source(tmp_path), 0, (32, 32), 1)
    assert image[2].float().mean() > 240  # blue, but for the edges of resampling
    assert image[0].float().mean() < 15


def test_codes_alone_refuse_a_teachers_work(home: Path) -> None:
    settings = EncodeSettings(method="codes", backbone=str(home / "sd"), labels="top2")
    with raises_code("E_USAGE", match="teacher"):
        estimate_encode(home / "source", settings, method=CodesOnly())


@pytest.mark.parametrize("number", [{"images_per_class": 2}, {"images_per_class": 9, "codes": 2}])
def test_codes_alone_take_all_images(home: Path, number: dict[str, Any]) -> None:
    settings = EncodeSettings(method="codes", backbone=str(home / "sd"), **number)
    with raises_code("E_USAGE", match="takes all images"):
        estimate_encode(home / "source", settings, method=CodesOnly())


def test_codes_alone_keep_within_the_budget(home: Path) -> None:
    settings = EncodeSettings(method="codes", backbone=str(home / "sd"), code_steps=3, code_bits=4)
    nbytes = estimate_encode(home / "source", settings, method=CodesOnly())["bytes"]
    estimate_encode(home / "source", replace(settings, budget=2 * nbytes), method=CodesOnly())
    with raises_code("E_USAGE", match="too few"):
        estimate_encode(home / "source", replace(settings, budget=nbytes), method=CodesOnly())


def test_no_guidance_is_measured_and_no_sampler_fitted_for_codes_alone(
    home: Path, tmp_path: Path
) -> None:
    settings = quick(home / "sd", images_per_class=40, codes=40, code_steps=15, code_bits=8)
    output = tmp_path / "alone.d3m"
    pack = encode(home / "source", output, replace(settings, probes=0))
    assert pack.prompts is not None, "many codes gain more than prompts cost"
    log = (tmp_path / "alone.d3m.work" / "log.txt").read_text()
    assert "code photographs" in log
    assert "choose the guidance" not in log
    assert pack.recipe.guidance == 1.0
