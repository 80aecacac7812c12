"""A sampler of few steps that is fitted to where many small ones lead."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from encode_world import quick
from tiny_backbones import tiny_dit
from tiny_flow import tiny_flow

from d3pack.backbones import Backbone, Sampling, open_backbone
from d3pack.decode import Decoder, samplers
from d3pack.encode import encode, estimate_encode, start_vectors
from d3pack.encode.allocation import MARGIN
from d3pack.encode.plan import sigmas_of
from d3pack.encode.sampler_fit import STEPS, fit_sampler, unfitted, with_table
from d3pack.encode.sampler_search import with_sampling
from d3pack.errors import BackboneError, UsageError
from d3pack.evaluate.baselines import named_twin
from d3pack.format import Pack, Recipe, encode_prompts, read
from d3pack.system import SettingError

NAMES = ("king penguin", "lemon", "school bus")


@pytest.fixture(scope="module")
def mini() -> Backbone:
    return open_backbone("mini")


def named(mini: Backbone, guidance: float) -> Pack:
    """A pack of `mini` that is prompted by class names."""
    recipe = Recipe(
        backbone=mini.ref,
        size=mini.image_size,
        sampler="dpmpp-2m",
        sigmas=sigmas_of(mini, "dpmpp-2m", 12, mini.image_size),
        guidance=guidance,
    )
    with torch.no_grad():
        vectors = [start_vectors(mini, name, 1, "a photo of a {}", False) for name in NAMES]
    prompts = torch.stack(vectors)[:, None].float().numpy()
    return Pack(NAMES, 4, recipe, encode_prompts(prompts, "f16"), seed=7)


def error(mini: Backbone, pack: Pack, recipe: Recipe) -> float:
    """Squared distance of latents to those of 60 steps, as a share of their variance."""

    def latents(recipe: Recipe) -> torch.Tensor:
        sigmas, extra = recipe.sigmas, recipe.extra
        return Decoder(replace(pack, recipe=recipe), backbone=mini).explore(
            range(len(pack)),
            lambda model, noise: samplers.sample(
                recipe.sampler, model, samplers.start(noise, sigmas), sigmas, None, extra
            ),
        )

    sampling = Sampling("dpmpp-2m", 60, recipe.guidance)
    exact = latents(with_sampling(pack.recipe, mini, sampling))
    return float((latents(recipe) - exact).square().mean() / exact.var())


@pytest.mark.heavy
@pytest.mark.parametrize("guidance", [1.0, pytest.param(2.5, marks=pytest.mark.slow)])
def test_a_fitted_sampler_is_nearer_than_twice_as_many_steps(
    mini: Backbone, guidance: float
) -> None:
    pack = named(mini, guidance)
    fit = fit_sampler(pack, mini, STEPS)
    fitted = error(mini, pack, with_table(pack.recipe, fit.sigmas, fit.table))
    many = error(mini, pack, with_sampling(pack.recipe, mini, Sampling("dpmpp-2m", 8, guidance)))
    few = error(mini, pack, with_sampling(pack.recipe, mini, Sampling("dpmpp-2m", STEPS, guidance)))
    assert fitted < many < few
    assert fitted < few / 5
    assert fitted < 3 * fit.error  # images of other seeds


def test_small_steps_of_an_exact_model_are_fitted_exactly(mini: Backbone) -> None:
    """Of a single point as data every step can be exact: then nothing is missed."""
    from d3pack.encode.sampler_fit import _fit, levels

    point = torch.full((4, 2, 8, 8), 0.75)
    noise = torch.randn(point.shape, generator=torch.Generator().manual_seed(0))
    fit = _fit(lambda x, sigma: point, noise, levels(14.61, 4))
    x = samplers.start(noise, fit.sigmas)
    extra = {"table": fit.table}
    made = samplers.sample("table", lambda x, sigma: point, x, fit.sigmas, None, extra)
    np.testing.assert_allclose(made, point, atol=5e-3)


@pytest.mark.parametrize("steps", [1, 2, 31, 64])
def test_any_number_of_steps_is_fitted(steps: int) -> None:
    from d3pack.encode.sampler_fit import _fit, levels

    noise = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    # values of unit variance, bent a little
    fit = _fit(lambda x, sigma: x / (1 + sigma**2) + 0.1 * x.tanh(), noise, levels(14.61, steps))
    assert len(fit.table) == steps
    assert fit.error < 0.01


def test_many_classes_are_fitted_from_all_over_the_list(
    mini: Backbone, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = named(mini, 1.0)
    assert few.prompts is not None
    vectors = np.zeros((500, 1, *few.prompts.params["shape"][1:]), np.float32)
    names = tuple(f"class {c}" for c in range(500))
    pack = replace(few, classes=names, prompts=encode_prompts(vectors, "f16"))
    asked: list[tuple[int, int]] = []

    def explore(self: Decoder, items: list[tuple[int, int]], use: object) -> None:
        asked.extend(self.pairs(items))

    monkeypatch.setattr(Decoder, "explore", explore)
    fit_sampler(pack, mini, 2)
    classes = [c for c, _ in asked]
    assert len(asked) == len({*classes})
    assert max(classes) - min(classes) > 450
    asked.clear()
    fit_sampler(few, mini, 2)
    assert {c for c, _ in asked} == {0, 1, 2}
    assert len({*asked}) == len(asked)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_diverges_is_an_error_of_its_own(bad: float) -> None:
    from d3pack.encode.sampler_fit import _fit, levels

    with pytest.raises(BackboneError, match="latents that are not finite"):
        _fit(lambda x, sigma: x * bad, torch.ones(2, 2, 4, 4), levels(14.61, 3))


def test_the_size_of_a_fitted_pack_is_known_before(home: Path, tmp_path: Path) -> None:
    settings = quick(
        home / "sd", fitted_steps=4, sampler_steps=None, guidance=1.5, candidates=1, labels="none"
    )
    said = estimate_encode(home / "source", settings)
    assert "fitted sampler of 4 steps" in " ".join(said["lines"])
    assert said["seconds"]["sampler"] > 0
    pack = encode(home / "source", tmp_path / "x.d3m", settings)
    assert abs((tmp_path / "x.d3m").stat().st_size - said["bytes"]) < MARGIN
    assert pack.recipe.sampler == "table"
    assert len(pack.recipe.sigmas) == 5
    assert pack.recipe.extra["table"] != unfitted(pack.recipe, 4).extra["table"]
    facts = json.loads((tmp_path / "x.d3m.work" / "journal.json").read_text())["facts"]
    assert facts["sampler/1.5"]["table"] == json.loads(json.dumps(pack.recipe.extra["table"]))
    assert f"fitted to within {facts['sampler/1.5']['error']:.2%}" in (
        tmp_path / "x.d3m.work" / "log.txt"
    ).read_text(encoding="utf-8")


def test_an_interrupted_fit_leads_to_the_same_bytes(home: Path, tmp_path: Path) -> None:
    settings = quick(home / "sd", fitted_steps=3, sampler_steps=None, guidance=1.5)
    encode(home / "source", tmp_path / "whole.d3m", settings)

    class StopError(Exception):
        pass

    def stop(event: dict[str, object]) -> None:
        if event.get("event") == "stage" and event.get("stage") == "fit the sampler":
            raise StopError

    with pytest.raises(StopError):
        encode(home / "source", tmp_path / "cut.d3m", settings, listeners=[stop])
    encode(home / "source", tmp_path / "cut.d3m", settings)
    assert (tmp_path / "cut.d3m").read_bytes() == (tmp_path / "whole.d3m").read_bytes()
    assert read(tmp_path / "cut.d3m").recipe.sampler == "table"


def test_a_fit_is_refused_where_it_cannot_help(home: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="fitted_steps excludes sampler and sampler_steps"):
        encode(home / "source", tmp_path / "x.d3m", quick(home / "sd", fitted_steps=3))
    flow = quick(
        tiny_flow("prx", tmp_path / "prx"), fitted_steps=3, sampler_steps=None, guidance=1.5
    )
    with pytest.raises(SettingError, match="this backbone has few steps of its own"):
        encode(home / "source", tmp_path / "x.d3m", flow)


def test_class_names_are_sampled_as_usual(mini: Backbone) -> None:
    """A table fits the guidance of the pack, which that baseline may change."""
    pack = named(mini, 1.0)
    fit = fit_sampler(pack, mini, 2)
    twin = named_twin(replace(pack, recipe=with_table(pack.recipe, fit.sigmas, fit.table)), mini)
    assert twin.recipe.sampler == "dpmpp-2m"
    assert twin.recipe.sigmas == pack.recipe.sigmas
    assert not twin.recipe.extra


def test_a_transformer_is_fitted_too(tmp_path: Path, home: Path) -> None:
    settings = quick(
        tiny_dit(tmp_path / "dit"),
        fitted_steps=3, sampler_steps=None, guidance=1.5, candidates=1, labels="none",
    )  # fmt: skip
    pack = encode(home / "source", tmp_path / "x.d3m", settings)
    assert pack.recipe.sampler == "table"


@pytest.mark.parametrize(("codes", "fitted"), [(0, True), (1, True), (3, False)])
def test_no_sampler_is_fitted_where_all_images_are_codes(
    home: Path, codes: int, fitted: bool
) -> None:
    settings = quick("mini", sampler_steps=None, images_per_class=3, codes=codes, candidates=1)
    said = estimate_encode(home / "source", settings)
    assert ("fitted sampler of 5 steps" in " ".join(said["lines"])) == fitted
    assert ("sampler" in said["seconds"]) == fitted
