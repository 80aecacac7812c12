"""The method `modes`: clusters, mode guidance, and what comes out as codes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import invoke
from encode_world import CLASSES, make_tree, settings_of
from PIL import Image
from tiny_backbones import tiny_dit
from tiny_flow import tiny_flow
from torch import Tensor

from d3pack.backbones import Backbone, Condition, open_backbone
from d3pack.decode import Decoder, noise, samplers, verify_probes
from d3pack.encode import EncodeContext, EncodeSettings, ModesSettings, encode, estimate_encode
from d3pack.encode.codes import Coder
from d3pack.encode.methods.modes import clusters
from d3pack.encode.methods.modes.clusters import _relocate, cluster, first_centres, real_latents
from d3pack.encode.methods.modes.guidance import ModeGuidance
from d3pack.encode.methods.modes.method import Modes
from d3pack.encode.plan import sigmas_of
from d3pack.errors import UsageError
from d3pack.format import Pack, Recipe, decode_weights, encode_prompts, read
from d3pack.sources import open_source, random_order


def modes(backbone: Path | str, **changes: Any) -> EncodeSettings:
    values: dict[str, Any] = {
        "method": "modes", "backbone": str(backbone), "images_per_class": 3, "sampler_steps": 4,
        "group": 2, "code_steps": 3, "code_bits": 4,
    }  # fmt: skip
    return settings_of(**{**values, **changes})


def points(counts: tuple[int, ...], seed: int = 0, apart: float = 10.0) -> tuple[Tensor, Tensor]:
    """Return latents around centres that lie far apart, shuffled, and these centres."""
    rng = torch.Generator().manual_seed(seed)
    centres = apart * torch.randn(len(counts), 2, 3, 3, generator=rng)
    rows = centres.repeat_interleave(torch.tensor(counts), 0)
    rows = rows + 0.1 * torch.randn(rows.shape, generator=rng)
    return rows[torch.randperm(len(rows), generator=rng)], centres


def test_clusters_are_found_and_the_largest_come_first() -> None:
    rows, centres = points((4, 30, 11))
    found = cluster(rows, 3, seed=0)
    assert found.counts == (30, 11, 4)
    assert torch.allclose(found.centres, centres[[1, 2, 0]], atol=0.2)
    again = cluster(rows, 3, seed=0)
    assert torch.equal(found.centres, again.centres)


def test_centres_are_the_means_of_their_clusters() -> None:
    rows = torch.randn(60, 2, 3, 3, generator=torch.Generator().manual_seed(1))
    found = cluster(rows, 5, seed=3)
    nearest = torch.cdist(rows.flatten(1), found.centres.flatten(1)).argmin(1)
    assert torch.bincount(nearest).tolist() == list(found.counts)
    for k, centre in enumerate(found.centres):
        assert torch.allclose(rows[nearest == k].mean(0), centre, atol=1e-5)


def test_there_are_no_more_clusters_than_different_latents() -> None:
    rows, _ = points((2, 1))
    assert cluster(rows, 8, seed=0).counts == (1, 1, 1)
    same = rows[:1].expand(5, -1, -1, -1)
    found = cluster(same, 3, seed=0)
    assert found.counts == (5,)
    assert torch.allclose(found.centres[0], same[0], atol=1e-5)


def test_empty_cluster_takes_the_row_farthest_from_its_centre() -> None:
    rows = torch.tensor([[0.0], [1.0], [10.0], [4.0]])
    groups, centres = torch.tensor([0, 0, 1, 1]), torch.tensor([[0.5], [7.0], [99.0]])
    _relocate(rows, groups, centres)
    assert centres.tolist() == [[0.5], [7.0], [10.0]]
    full = torch.tensor([[0.5], [7.0]])
    _relocate(rows, groups, full)
    assert full.tolist() == [[0.5], [7.0]]


def test_all_clusters_have_rows_wherever_they_begin(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, _ = points((20, 20, 20))
    far = torch.full((1, rows[0].numel()), 1e3)

    def begins(rows: Tensor, count: int, rng: Any, *, trials: int) -> Tensor:
        return torch.cat([rows[:2], far])

    monkeypatch.setattr(clusters, "first_centres", begins)
    assert cluster(rows, 3, seed=0).counts == (20, 20, 20)


def test_greedy_seeding_starts_nearer_than_one_trial_a_step() -> None:
    rows = points((30, 30, 5, 5, 5, 3, 3, 2, 2, 2), seed=3, apart=0.4)[0].flatten(1)

    def starts(trials: int) -> list[Tensor]:
        drawn = (np.random.default_rng(seed) for seed in range(20))
        return [first_centres(rows, 10, rng, trials=trials) for rng in drawn]

    one, greedy = (
        [float(torch.cdist(rows, first).square().amin(1).sum()) for first in starts(trials)]
        for trials in (1, 4)
    )
    assert all(after <= before for before, after in zip(one, greedy, strict=True))
    assert all(torch.equal(*pair) for pair in zip(starts(4), starts(4), strict=True))


@pytest.fixture(scope="module")
def sd(home: Path) -> Backbone:
    return open_backbone(str(home / "sd"), device="cpu")


@pytest.fixture(scope="module")
def recipe(sd: Backbone) -> Recipe:
    sigmas = sigmas_of(sd, "ancestral", 6, sd.image_size)
    return Recipe(
        sd.ref, sd.image_size, "ancestral", sigmas, guidance=1.5, group=2, extra={"eta": 1.0}
    )


def sample(recipe: Recipe, sd: Backbone, pull: float, steps: int, centres: Tensor) -> Tensor:
    with torch.no_grad():
        condition = sd.condition(sd.name_vectors("lemon", 1)[None])
        guidance = ModeGuidance(sd, recipe, pull, steps)
        return guidance.sample(7, 0, condition, sd.unconditional(), centres)


def test_without_pull_images_are_those_of_the_decoder(recipe: Recipe, sd: Backbone) -> None:
    vectors = sd.name_vectors("lemon", 1).detach().float().numpy()[None, None]
    pack = Pack(("lemon",), 3, recipe, encode_prompts(vectors, "f16"), seed=7)
    made = sample(recipe, sd, 0.0, 6, torch.zeros(3, *sd.latent_shape))
    with torch.inference_mode():
        images = sd.decode(made)
    expected = Decoder(pack, backbone=sd).images(range(3))
    assert (images.int() - expected.int()).abs().max() <= 1  # prompts were rounded


def test_pull_is_the_term_of_the_paper(recipe: Recipe, sd: Backbone) -> None:
    """mean + pull * sigma * (centre - x0) + sigma * noise, sigma being that of the step's noise."""
    centre = torch.randn(1, *sd.latent_shape, generator=torch.Generator().manual_seed(2))
    made = sample(recipe, sd, 0.3, 3, centre)
    with torch.inference_mode():
        condition, none = sd.condition(sd.name_vectors("lemon", 1)[None]), sd.unconditional()

        def fresh(step: int) -> Tensor:
            return noise.normal_torch(7, 0, [0], sd.latent_shape, noise.draw_number(step))

        x = samplers.start(fresh(0), recipe.sigmas)
        for i, step in enumerate(samplers.plan("ancestral", recipe.sigmas, recipe.extra)):
            without = sd.denoise(x, recipe.sigmas[i], none)
            x0 = without + 1.5 * (sd.denoise(x, recipe.sigmas[i], condition) - without)
            x = step.a * x + step.b[0] * x0
            if i < 3:
                x = x + 0.3 * step.c * (centre - x0)
            x = x + step.c * fresh(i + 1)
    assert torch.allclose(made, x, atol=1e-4)


def test_images_come_nearer_to_what_pulls_them(recipe: Recipe, sd: Backbone) -> None:
    centres = 2 * torch.randn(3, *sd.latent_shape, generator=torch.Generator().manual_seed(3))
    apart = [
        float((sample(recipe, sd, pull, 6, centres) - centres).square().mean())
        for pull in (0.0, 0.2, 1.0)
    ]
    assert apart == sorted(apart, reverse=True)
    assert apart[2] < 0.9 * apart[0]


def test_image_does_not_depend_on_how_many_there_are(recipe: Recipe, sd: Backbone) -> None:
    centres = torch.randn(3, *sd.latent_shape, generator=torch.Generator().manual_seed(4))
    assert torch.equal(
        sample(recipe, sd, 0.3, 3, centres)[:1], sample(recipe, sd, 0.3, 3, centres[:1])
    )


@pytest.mark.heavy
def test_pack_holds_the_images_as_codes(home: Path, tmp_path: Path) -> None:
    pack = encode(home / "source", tmp_path / "a.d3m", modes(home / "sd"))
    assert (pack.coded_images, pack.images_per_class) == (3, 3)
    assert pack.prompts is None
    assert pack.provenance["method"] == "modes"
    assert not pack.holds_photographs
    found = read(tmp_path / "a.d3m")
    assert verify_probes(found, Decoder(found, path=home / "sd")).verdict == "exact"
    described = invoke("info", str(tmp_path / "a.d3m")).stdout
    assert "3 made images a class" in described
    assert "likeness" not in described


@pytest.fixture
def coded(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The latents that were coded, class after class."""
    batches, seen = Coder.batches, []

    def watched(self: Coder, latents: Tensor, *before: Any) -> Any:
        seen.append(latents)
        return batches(self, latents, *before)

    monkeypatch.setattr(Coder, "batches", watched)
    return seen


@pytest.mark.heavy
def test_options_of_the_guidance_change_the_images(
    home: Path, tmp_path: Path, coded: list[Tensor]
) -> None:
    changes: list[dict[str, Any]] = [{}, {"pull": 0.0}, {"pulled": 1.0}, {"pool": 4}, {"seed": 1}]
    for at, change in enumerate(changes):
        encode(home / "source", tmp_path / f"{at}.d3m", modes(home / "sd", **change))
    firsts = [coded[len(CLASSES) * at] for at in range(len(changes))]
    for at, one in enumerate(firsts):
        assert not any(torch.equal(one, other) for other in firsts[:at])


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["prx", "flux2", "z-image"])
@torch.no_grad()
def test_names_are_read_once(kind: str, tmp_path: Path) -> None:
    make_tree(tmp_path / "source", 5)
    tiny_flow(kind, tmp_path / kind)
    settings = modes(tmp_path / kind, size=(64, 64), sampler_steps=None, guidance=3.0)
    source, context = open_source(tmp_path / "source"), EncodeContext("cpu", tmp_path)
    job = Modes().prepare(source, settings, settings.method_settings, context)
    backbone: Any = job.backbone
    condition, none = job._conditions(0)
    words = backbone.name_vectors(f"a photo of a {source.classes[0]}")
    assert 1 < len(words) < backbone.output_shape[1]
    expected = backbone.condition(words[None], None)
    assert torch.equal(condition.tensors["hidden"], expected.tensors["hidden"])
    assert none is not None
    assert none.tensors["hidden"].shape == condition.tensors["hidden"].shape
    empty = backbone.outputs("", len(words))
    assert torch.equal(
        none.tensors["hidden"], backbone.condition(empty[None], None).tensors["hidden"]
    )
    Condition.cat([condition, none])


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["dit", "flux2", "sana-sprint"])
def test_backbones_of_every_kind_make_images(kind: str, tmp_path: Path) -> None:
    make_tree(tmp_path / "source", 5)
    tiny_dit(tmp_path / kind) if kind == "dit" else tiny_flow(kind, tmp_path / kind)
    changes = {"sampler_steps": None, "size": (64, 64)} if kind != "dit" else {}
    settings = modes(tmp_path / kind, images_per_class=2, code_bits=8, **changes)
    pack = encode(tmp_path / "source", tmp_path / "a.d3m", settings)
    images = Decoder(pack, path=tmp_path / kind).images([(0, 0), (1, 0), (2, 1)])
    assert (images[0] != images[1]).any()


@pytest.mark.heavy
def test_guidance_makes_images_of_outputs(tmp_path: Path) -> None:
    make_tree(tmp_path / "source", 5)
    tiny_flow("prx", tmp_path / "prx")
    packs = [
        encode(
            tmp_path / "source",
            tmp_path / f"{guidance}.d3m",
            modes(tmp_path / "prx", images_per_class=1, size=(64, 64), guidance=guidance),
        )
        for guidance in (1.0, 4.0)
    ]
    first, second = (pack.codes for pack in packs)
    assert first is not None
    assert second is not None
    assert any((first.tensors[name] != second.tensors[name]).any() for name in first.tensors)


@pytest.mark.heavy
def test_clusters_take_turns_where_images_are_few(
    tmp_path: Path, home: Path, coded: list[Tensor]
) -> None:
    make_tree(tmp_path / "source", 2)
    pack = encode(tmp_path / "source", tmp_path / "a.d3m", modes(home / "sd", images_per_class=5))
    assert pack.coded_images == 5
    assert [len(latents) for latents in coded] == [5, 5, 5]
    rows = coded[0].flatten(1)
    assert torch.cdist(rows, rows).fill_diagonal_(1).min() > 1e-3  # each from noise of its own


@pytest.mark.heavy
def test_images_weigh_as_much_as_their_clusters_where_that_is_wanted(
    home: Path, tmp_path: Path
) -> None:
    pack = encode(home / "source", tmp_path / "a.d3m", modes(home / "sd", weigh=True))
    assert pack.weights is not None
    weights = decode_weights(pack.weights)
    assert weights.mean(1) == pytest.approx([1, 1, 1], abs=0.05)
    assert (np.diff(weights, axis=1) <= 0).all()  # the largest cluster comes first
    sd = open_backbone(str(home / "sd"))
    latents = real_latents(open_source(home / "source"), 1, random_order(20, 0, 1), (64, 64), sd)
    assert weights[1] == pytest.approx(np.array(cluster(latents, 3, 0).counts) / 20 * 3, rel=0.03)
    equal = encode(home / "source", tmp_path / "b.d3m", modes(home / "sd"))
    assert equal.weights is None
    assert equal.codes is not None
    assert pack.codes is not None
    assert (equal.codes.tensors["bits"] == pack.codes.tensors["bits"]).all()


@pytest.mark.heavy
def test_images_of_one_cluster_divide_its_weight(home: Path, tmp_path: Path) -> None:
    make_tree(tmp_path / "source", 2)
    settings = modes(home / "sd", images_per_class=5, weigh=True)
    pack = encode(tmp_path / "source", tmp_path / "a.d3m", settings)
    assert pack.weights is not None
    # clusters of an image each: three images share the first, two the second
    expected = np.array([1 / 3, 1 / 2, 1 / 3, 1 / 2, 1 / 3]) / 0.4
    assert decode_weights(pack.weights)[0] == pytest.approx(expected, rel=0.03)


@pytest.mark.heavy
def test_run_that_was_stopped_goes_on_to_the_same_bytes(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = modes(home / "sd")
    encode(home / "source", tmp_path / "whole.d3m", settings)
    batches = Coder.batches
    classes: list[int] = []

    def stops(self: Coder, latents: Tensor, *before: Any) -> Any:
        classes.append(self.c)
        if len(classes) == 2:
            raise KeyboardInterrupt
        return batches(self, latents, *before)

    monkeypatch.setattr(Coder, "batches", stops)
    with pytest.raises(KeyboardInterrupt):
        encode(home / "source", tmp_path / "cut.d3m", settings)
    encode(home / "source", tmp_path / "cut.d3m", settings)
    assert classes == [0, 1, 1, 2]
    assert (tmp_path / "cut.d3m").read_bytes() == (tmp_path / "whole.d3m").read_bytes()


@pytest.mark.heavy
def test_bad_files_are_left_out_and_counted(home: Path, tmp_path: Path) -> None:
    make_tree(tmp_path / "source", 4)
    (tmp_path / "source" / CLASSES[0] / "bad.png").write_bytes(b"no image")
    settings = modes(home / "sd", provenance="full")
    pack = encode(tmp_path / "source", tmp_path / "a.d3m", settings)
    source = pack.provenance["source"]
    assert (source["seen"], source["bad"]) == (12, 1)


@pytest.mark.heavy
def test_labels_come_from_a_teacher(home: Path, tmp_path: Path) -> None:
    settings = modes(home / "sd", labels="top2", teacher_samples=100)
    pack = encode(home / "source", tmp_path / "a.d3m", settings)
    assert pack.labels is not None
    assert pack.provenance["teacher"]["bytes"] > 0


@pytest.mark.heavy
def test_estimate_has_the_bytes_and_all_stages(home: Path, tmp_path: Path) -> None:
    settings = modes(home / "sd", weigh=True)
    estimate = estimate_encode(home / "source", settings)
    encode(home / "source", tmp_path / "a.d3m", settings)
    assert abs(estimate["bytes"] - (tmp_path / "a.d3m").stat().st_size) < 20
    assert {"clusters", "images", "codes"} <= set(estimate["seconds"])
    assert any("pull 0.1 in the first 2" in line for line in estimate["lines"])


@pytest.mark.heavy
def test_budget_buys_as_many_images_as_fit(home: Path, tmp_path: Path) -> None:
    settings = modes(home / "sd", budget=1400, images_per_class=None)
    lines = estimate_encode(home / "source", settings)["lines"]
    pack = encode(home / "source", tmp_path / "a.d3m", settings)
    count = pack.images_per_class
    assert 1 < count < 150
    assert any(f"budget 1,400 bytes: {count} images of each class: about" in line for line in lines)
    assert (tmp_path / "a.d3m").stat().st_size <= 1400
    with pytest.raises(UsageError, match=f"{count + 1} images of each class take"):
        estimate_encode(home / "source", replace(settings, images_per_class=count + 1))
    many = estimate_encode(home / "source", replace(settings, budget=100_000))
    largest = max(open_source(home / "source").counts)
    assert many["plan"]["images_per_class"] == largest, "more would show photographs again"
    few = f"{len(CLASSES)} classes have no more than {largest} photographs to cluster"
    assert any(line.startswith(few) for line in many["lines"])
    assert not any("to cluster" in line for line in lines)


@pytest.mark.parametrize(
    ("steps", "pulled", "pulls"),
    [(50, 0.58, 29), (50, 0.5, 25), (4, 0.5, 2), (4, 1.0, 3), (2, 0.5, 1), (4, 0.0, 0)],
)
def test_share_of_the_steps_is_rounded_to_the_nearest(
    home: Path, steps: int, pulled: float, pulls: int
) -> None:
    settings = modes(home / "sd", sampler_steps=steps, pulled=pulled)
    source, context = open_source(home / "source"), EncodeContext("cpu", home)
    job = Modes().prepare(source, settings, settings.method_settings, context)
    assert job.pulls == pulls


def test_pull_that_leads_past_the_centre_is_refused() -> None:
    with pytest.raises(UsageError, match=r"invalid pull 1\.5: expected a number from 0 to 1"):
        ModesSettings(pull=1.5)


@pytest.mark.heavy
def test_run_says_how_many_clusters_are_single_photographs(home: Path, tmp_path: Path) -> None:
    make_tree(tmp_path / "source", 3)
    encode(tmp_path / "source", tmp_path / "a.d3m", modes(home / "sd"))
    log = (tmp_path / "a.d3m.work" / "log.txt").read_text(encoding="utf-8")
    assert "9 of 9 clusters are single photographs, which their images may resemble" in log
    encode(tmp_path / "source", tmp_path / "b.d3m", modes(home / "sd", images_per_class=1))
    assert "single" not in (tmp_path / "b.d3m.work" / "log.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"candidates": 2}, "no candidates"),
        ({"codec": "i8"}, "stores no vectors: no codec"),
        ({"for_updates": 400}, "no pilots: leave out for_updates"),
        ({"sampler_steps": 1}, "no step pulls: pulled is 0.5 of 1 step, and the last never does"),
        ({"sampler_steps": 1, "pulled": 1.0}, "no step pulls"),
        ({"sampler_steps": 4, "pulled": 0.1}, "no step pulls: pulled is 0.1 of 4 steps"),
        ({"codes": 2}, "leave out codes"),
        ({"no_codes": True}, "leave out codes"),
        ({"sampler": "ddim"}, "invalid sampler 'ddim'"),
        ({"budget": 900}, "900 bytes are too few: 3 images of each class take"),
        ({"budget": 900, "images_per_class": None}, "too few: 1 image of each class take"),
    ],
)
def test_what_made_images_cannot_have_is_refused(
    home: Path, tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(UsageError, match=said):
        encode(home / "source", tmp_path / "a.d3m", modes(home / "sd", **changes))


def test_images_are_cropped_at_their_centre(tmp_path: Path, sd: Backbone) -> None:
    pixels = np.zeros((64, 128, 3), np.uint8)
    pixels[:, 32:96] = 200
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        Image.fromarray(pixels).save(tmp_path / name / "a.png")
    found = real_latents(open_source(tmp_path), 0, [0], (64, 64), sd)
    with torch.no_grad():
        expected = sd.encode(torch.full((1, 3, 64, 64), 200, dtype=torch.uint8)).float()
    assert torch.allclose(found, expected, atol=1e-4)
