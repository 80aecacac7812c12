"""Minimax diffusion: losses by slow formulas, the memories' order, what moves, what is stored."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from encode_world import CLASSES, make_tree, settings_of
from tiny_backbones import tiny_dit, tiny_sd
from torch.distributions import Normal, kl_divergence

from d3pack.backbones import apply_adapter, check_adapter, open_backbone
from d3pack.backbones.dit import DiT
from d3pack.backbones.levels import Levels
from d3pack.decode import Decoder
from d3pack.encode import D3MSettings, EncodeSettings, MinimaxSettings, encode, estimate_encode
from d3pack.encode.allocation import MARGIN
from d3pack.encode.contract import EncodeContext
from d3pack.encode.methods.minimax.criteria import Memories, criteria
from d3pack.encode.methods.minimax.difffit import NULL, ROWS, DiffFit, fitted, learned
from d3pack.encode.methods.minimax.finetune import FineTuning
from d3pack.encode.methods.minimax.method import Minimax
from d3pack.encode.methods.minimax.variational import Posterior
from d3pack.errors import UsageError
from d3pack.format import pack_bytes
from d3pack.format.codecs import decode_adapter, encode_adapter, encode_prompts
from d3pack.format.pack import Pack
from d3pack.format.recipe import BackboneRef, FileLock, Recipe
from d3pack.sources import open_source
from d3pack.system import Checkpoint, Events, Journal, from_plain
from d3pack.train.data import Latents

KNOWN = ("tabby", "cat", "unheard-of")  # two of the tiny DiT's own names, and a stranger


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("minimax")
    tiny_dit(root / "dit")
    make_tree(root / "source")
    return root


@pytest.fixture
def dit(world: Path) -> Iterator[DiT]:
    """Open, and the same afterwards: every test proves that it was put back."""
    backbone = open_backbone(str(world / "dit"))
    assert isinstance(backbone, DiT)
    before = {name: value.detach().clone() for name, value in backbone.named_tensors().items()}
    yield backbone
    after = backbone.named_tensors()
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
        assert not after[name].requires_grad


def latents(count: int = 12, classes: int = 3, seed: int = 0) -> Latents:
    """Every image and then its mirror image, as the cache has them."""
    random = np.random.default_rng(seed)
    values = random.standard_normal((count, 4, 8, 8)).astype(np.float16)
    labels = np.arange(count) % classes
    both = np.concatenate([values, values[..., ::-1]])
    return Latents(both, np.concatenate([labels, labels]), np.zeros(2 * count, bool))


def tuned(fit: DiffFit, folder: Path, steps: int = 8, **settings: float) -> FineTuning:
    tuning = FineTuning(fit, latents(), MinimaxSettings(ema=0.5, batch=4, **settings), steps, 3)  # type: ignore[arg-type]
    journal = Journal(folder, {})
    tuning.run(Checkpoint(journal, "state"), Events())
    journal.close()
    return tuning


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum() / math.sqrt((a * a).sum() * (b * b).sum()))


def test_criteria_are_the_slow_formula() -> None:
    torch.manual_seed(0)
    memories = Memories(4, 5)
    for c in (0, 2):
        memories.add(c, torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4))
    predicted, labels = torch.randn(6, 2, 4, 4), torch.tensor([2, 0, 1, 2, 1, 0])
    near, far = criteria(predicted, labels, memories, 0.002, 0.008)
    slow_near = slow_far = 0.0
    for c in (0, 2):  # class 1 has no memory yet: it counts in the mean and adds nothing
        mine = [predicted[i].numpy().ravel() for i in range(6) if labels[i] == c]
        real = [m.numpy() for m in memories.real[c]]
        made = [m.numpy() for m in memories.predicted[c]]
        slow_near += 0.002 * (1 - min(cosine(x, z) for x in mine for z in real)) / 3
        slow_far += 0.008 * max(cosine(x, z) for x in mine for z in made) / 3
    assert float(near) == pytest.approx(slow_near, rel=1e-5)
    assert float(far) == pytest.approx(slow_far, rel=1e-5)


def test_memories_drop_the_oldest_first() -> None:
    memories = Memories(2, 3)
    for first in range(0, 6, 2):
        batch = torch.arange(first, first + 2).float().reshape(2, 1, 1, 1)
        memories.add(1, batch, 10 + batch)
    assert [float(m) for m in memories.real[1]] == [3, 4, 5]
    assert [float(m) for m in memories.predicted[1]] == [13, 14, 15]
    assert not memories.real[0]
    other = Memories(2, 3)
    other.restore(memories.state(), torch.device("cpu"))
    assert [float(m) for m in other.predicted[1]] == [13, 14, 15]
    assert not other.predicted[0]


def test_a_batch_is_judged_before_it_is_remembered(dit: DiT) -> None:
    with fitted(dit, KNOWN) as fit:
        tuning = FineTuning(fit, latents(), MinimaxSettings(batch=4), 9, 3)
        first = tuning._losses(0)
        assert first.near.item() == first.far.item() == 0.0
        held = {c: [m.clone() for m in tuning.memories.predicted[c]] for c in range(3)}
        seen = [c for c in range(3) if held[c]]
        second = tuning._losses(1)
        labels = tuning.latents.labels[tuning.rows(1)]
        again = Memories(3, 64)
        for c in seen:
            again.predicted[c] = held[c]
            again.real[c] = tuning.memories.real[c][: len(held[c])]
        near, far = criteria(second.predicted, torch.from_numpy(labels), again, 0.002, 0.008)
        assert second.near.item() == near.item()
        assert second.far.item() == far.item()


def test_every_pass_sees_each_image_once(dit: DiT) -> None:
    with fitted(dit, KNOWN) as fit:
        tuning = FineTuning(fit, latents(14), MinimaxSettings(batch=4), 9, 3)
        first = np.concatenate([tuning.rows(step) for step in range(3)])
        second = np.concatenate([tuning.rows(step) for step in range(3, 6)])
    assert len(set(first.tolist())) == len(set(second.tolist())) == 12  # two do not fill a batch
    assert first.tolist() != second.tolist()


def test_the_diffusion_loss_is_the_slow_formula(dit: DiT) -> None:
    """Noise in, noise out; the variance by its bound, and the mean untouched by it."""
    torch.manual_seed(1)
    x0, noise = torch.randn(4, 4, 8, 8).clamp(-2, 2), torch.randn(4, 4, 8, 8)
    t, labels = torch.tensor([3, 1, 500, 999]), torch.tensor([0, 1, 2, 0])
    dropped = torch.tensor([False, True, False, False])
    alphas = torch.from_numpy(dit.levels.alphas_cumprod)[t].float().reshape(-1, 1, 1, 1)
    x_t = alphas.sqrt() * x0 + (1 - alphas).sqrt() * noise
    with fitted(dit, KNOWN) as fit:
        tuning = FineTuning(fit, latents(), MinimaxSettings(), 9, 3)
        losses = tuning.losses(x0, labels, t, noise, dropped)
        with torch.no_grad():
            said = fit.denoise(x_t, t, torch.tensor([0, 3, 2, 0]))
    eps, variance = said[:, :4], said[:, 4:]
    predicted = (x_t - (1 - alphas).sqrt() * eps) / alphas.sqrt()
    torch.testing.assert_close(losses.predicted, predicted, rtol=1e-4, atol=1e-3)
    bound = slow_bound(dit.levels, x0, x_t, t, predicted, variance)
    wanted = ((eps - noise) ** 2).mean((1, 2, 3)) + bound
    assert losses.diffusion.item() == pytest.approx(float(wanted.mean()), rel=1e-4)


def slow_bound(
    levels: Levels,
    x0: torch.Tensor,
    x_t: torch.Tensor,
    t: torch.Tensor,
    predicted: torch.Tensor,
    says: torch.Tensor,
) -> torch.Tensor:
    """KL of two normal distributions, step by step from the betas, in double precision."""
    alphas = levels.alphas_cumprod
    found = []
    for i, step in enumerate(t.tolist()):
        now, before = alphas[step], alphas[step - 1] if step else 1.0
        beta = 1 - now / before
        a = math.sqrt(before) * beta / (1 - now)
        b = math.sqrt(now / before) * (1 - before) / (1 - now)
        clipped = max(step, 1)
        last, last_before = alphas[clipped], alphas[clipped - 1]
        least = math.log((1 - last / last_before) * (1 - last_before) / (1 - last))
        share = (says[i].double() + 1) / 2
        log_variance = share * math.log(beta) + (1 - share) * least
        mean = a * predicted[i].double() + b * x_t[i].double()
        model = Normal(mean, (0.5 * log_variance).exp())
        if step:
            true = Normal(a * x0[i].double() + b * x_t[i].double(), math.exp(0.5 * least))
            found.append(kl_divergence(true, model).mean() / math.log(2))
            continue
        x = x0[i].double()
        upper, lower = model.cdf(x + 1 / 255), model.cdf(x - 1 / 255)
        inside = (upper - lower).clamp(min=1e-12)
        chance = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, inside))
        found.append(-chance.clamp(min=1e-12).log().mean() / math.log(2))
    return torch.stack(found).float()


def test_the_bound_agrees_within_the_normal_and_at_its_tails() -> None:
    """The published code approximates the normal distribution function; so does ours."""
    levels = Levels.from_config({})
    torch.manual_seed(2)
    x0 = torch.rand(64, 2, 4, 4) * 2.4 - 1.2
    t = torch.tensor([0] * 32 + list(range(1, 1000, 32)))
    alphas = torch.from_numpy(levels.alphas_cumprod)[t].float().reshape(-1, 1, 1, 1)
    x_t = alphas.sqrt() * x0 + (1 - alphas).sqrt() * torch.randn_like(x0)
    says = torch.rand_like(x0) * 2 - 1
    near = x0 + 0.002 * torch.randn_like(x0)
    found = Posterior.of(levels).bound(x0, x_t, t, near, says)
    torch.testing.assert_close(
        found, slow_bound(levels, x0, x_t, t, near, says), rtol=2e-2, atol=0.05
    )


def test_what_moves_and_what_does_not(dit: DiT, tmp_path: Path) -> None:
    before = {name: value.detach().clone() for name, value in dit.named_tensors().items()}
    with fitted(dit, KNOWN) as fit:
        start = {name: value.detach().clone() for name, value in fit.values.items()}
        tuned(fit, tmp_path / "work")
        for name, value in dit.named_tensors().items():
            moved = not torch.equal(value, before[name])
            assert moved == name.endswith(".bias"), name
        assert all(not torch.equal(v, start[n]) for n, v in fit.values.items())
        factors = {n for n in fit.values if n.endswith((".inner", ".outer"))}
    at = "transformer_blocks.0"  # half of three blocks is one
    assert factors == {
        *(f"{at}.attn1.to_{part}.inner" for part in "qkv"),
        f"{at}.attn1.to_out.0.inner",
        f"{at}.attn1.to_out.0.outer",
        f"{at}.ff.net.2.outer",
    }


@pytest.mark.parametrize("ema", [0.9999, 0.5])
def test_average_after_n_steps_is_plain(dit: DiT, tmp_path: Path, ema: float) -> None:
    """train_dit.py: a copy of the start, then ema * average + (1 - ema) * value in each step."""
    passed: list[torch.Tensor] = []

    class Watched(FineTuning):
        def _update_average(self) -> None:
            super()._update_average()
            passed.append(self.fit.values[ROWS].detach().double())

    with fitted(dit, KNOWN) as fit:
        start = fit.values[ROWS].detach().double()
        tuning = Watched(fit, latents(), MinimaxSettings(batch=4, ema=ema), 8, 3)
        journal = Journal(tmp_path / "work", {})
        tuning.run(Checkpoint(journal, "state"), Events())
        journal.close()
        found = tuning.average[ROWS].double()
    shares = [ema**8, *((1 - ema) * ema ** (7 - k) for k in range(8))]
    assert sum(shares) == pytest.approx(1)
    expected = sum(share * v for share, v in zip(shares, [start, *passed], strict=True))
    moved = (expected - start).norm()
    assert (found - expected).norm() < 0.05 * moved  # float32 rounds steps of 1e-8


def test_plan_says_what_the_average_keeps_of_the_backbone(world: Path) -> None:
    source = open_source(str(world / "source"))
    for ema, says in ((0.9999, "keeps 100 % of the backbone"), (0.8, "keeps 11 % of")):
        settings = settings_of(
            method="minimax", backbone=str(world / "dit"), train_steps=10, ema=ema
        )
        job = Minimax().prepare(
            source, settings, settings.method_settings, EncodeContext("cpu", world)
        )
        assert any(says in line for line in job.describe().lines())


def test_the_time_embedding_stays_one(dit: DiT, tmp_path: Path) -> None:
    with fitted(dit, KNOWN) as fit:
        tuned(fit, tmp_path / "work")
        found = fit.adapter()
    name = "norm1.emb.timestep_embedder.linear_1.bias.delta"
    rows = [found[f"transformer_blocks.{i}.{name}"] for i in range(3)]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_the_adapter_is_what_was_learned(dit: DiT, tmp_path: Path) -> None:
    """Folded into the frozen weights it says what the tuned model says, and of no class too."""
    torch.manual_seed(3)
    x, t = torch.randn(4, 4, 8, 8), torch.tensor([10, 10, 700, 700])
    labels = torch.tensor([0, 2, 3, 1])  # 3 is no class
    null = dit.denoiser.transformer_blocks[0].norm1.emb.table[-1].clone()
    with fitted(dit, KNOWN) as fit:
        tuned(fit, tmp_path / "work", lr=0.03)
        with torch.no_grad():
            wanted = fit.denoise(x, t, labels)[:, :4]
        adapter, prompts = fit.adapter(), fit.prompts()
        assert not torch.equal(fit.values[NULL], null)
    assert {n: tuple(v.shape) for n, v in adapter.items()} == learned(dit.denoiser)
    check_adapter(dit, adapter)
    with torch.no_grad():
        plain = dit.predict(x[:1], t[:1], dit.condition(prompts[:1, None]))
        with apply_adapter(dit, adapter):
            rows = [
                dit.unconditional() if c == 3 else dit.condition(prompts[c : c + 1, None])
                for c in labels.tolist()
            ]
            got = torch.cat(
                [dit.predict(x[i : i + 1], t[i : i + 1], c) for i, c in enumerate(rows)]
            )
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert (got[:1] - plain).abs().max() > 0.01


def test_a_class_starts_at_the_row_that_bears_its_name(dit: DiT) -> None:
    table = dit.denoiser.transformer_blocks[0].norm1.emb.table.clone()
    with fitted(dit, KNOWN) as fit:
        rows = fit.values[ROWS].detach().clone()
    assert torch.equal(rows[0], dit.name_vectors("tabby")[0])
    assert torch.equal(rows[2], table[:-1].mean(0))


def test_class_that_starts_at_the_mean_is_named_in_the_plan(world: Path, tmp_path: Path) -> None:
    """A folder of WordNet ids without a table of names: no class starts at its own row."""
    names = ("n01443537", "n07749582", "tabby")
    settings = settings_of(method="minimax", backbone=str(world / "dit"))
    context = EncodeContext("cpu", tmp_path)
    source = open_source(make_tree(tmp_path / "ids", 3, names))
    job = Minimax().prepare(source, settings, settings.method_settings, context)
    (line,) = [line for line in job.describe().lines() if "unknown to the backbone" in line]
    assert line.startswith("2 of 3 classes")
    assert "n01443537, n07749582;" in line
    known = open_source(make_tree(tmp_path / "known", 3, ("tabby", "cat", "3")))
    job = Minimax().prepare(known, settings, settings.method_settings, context)
    assert not [line for line in job.describe().lines() if "unknown" in line]


@pytest.mark.parametrize("codec", ["f16", "i8"])
def test_decoding_with_the_adapter_is_exact(dit: DiT, tmp_path: Path, codec: str) -> None:
    with fitted(dit, KNOWN) as fit:
        tuned(fit, tmp_path / "work", lr=0.03)
        adapter = encode_adapter({n: v.numpy() for n, v in fit.adapter().items()}, codec)
        prompts = encode_prompts(fit.prompts().numpy()[:, None, None])
    recipe = Recipe(dit.ref, dit.image_size, "ddim", (10.0, 1.0, 0.0), 2.0, 3, group=2)
    pack = Pack(("a", "b", "c"), 3, recipe, prompts, seed=5, adapter=adapter)
    decoder = Decoder(pack, backbone=dit)
    images = decoder.images(range(9))
    assert torch.equal(decoder.images([8, 4, 0]), images[[8, 4, 0]])
    assert torch.equal(Decoder(pack, backbone=dit).images([(1, 1)])[0], images[4])
    bare = Decoder(Pack(("a", "b", "c"), 3, recipe, prompts, seed=5), backbone=dit)
    assert not torch.equal(bare.images(range(9)), images)


def test_a_size_that_stays_small_on_the_published_model() -> None:
    """DiT-XL/2 without its weights, ten classes: 1.3 MB in f16, 0.7 MB in i8, all included."""
    from accelerate import init_empty_weights
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    with init_empty_weights():
        model = DiTTransformer2DModel(
            num_attention_heads=16,
            attention_head_dim=72,
            in_channels=4,
            out_channels=8,
            num_layers=28,
            sample_size=32,
            patch_size=2,
            num_embeds_ada_norm=1000,
        )
    shapes = learned(model)
    random = np.random.default_rng(0)
    values = {n: random.normal(0, 0.02, s).astype(np.float32) for n, s in shapes.items()}
    assert 600_000 < sum(v.size for v in values.values()) < 650_000
    prompts = encode_prompts(random.normal(size=(10, 1, 1, 1152)).astype(np.float32))
    files = {f"transformer/{i}": FileLock(10, "0" * 64) for i in range(6)}
    recipe = Recipe(BackboneRef("dit", "a/b", "0" * 40, files, "x"), (256, 256), "ddim", (1.0, 0.0))
    classes = tuple(map(str, range(10)))
    sizes = {}
    for codec in ("f16", "i8"):
        coded = encode_adapter(values, codec)
        with_it = Pack(classes, 10, recipe, prompts, seed=0, adapter=coded)
        without = Pack(classes, 10, recipe, prompts, seed=0)
        sizes[codec] = len(pack_bytes(with_it)) - len(pack_bytes(without))
        back = decode_adapter(coded)
        for name, value in values.items():
            assert (
                np.abs(back[name] - value).max()
                <= np.abs(value).max() / (2**11, 250)[codec == "i8"]
            )
    assert sizes["f16"] <= 1_300_000
    assert sizes["i8"] <= 700_000


def test_minimax_refuses_what_it_cannot_tune(world: Path) -> None:
    source = open_source(str(world / "source"))
    tiny_sd(world / "sd")
    dit = str(world / "dit")
    for settings, message in (
        (EncodeSettings(method="minimax"), "tunes a class-conditional DiT"),
        (
            EncodeSettings(method="minimax", backbone=str(world / "sd")),
            "this is a stable-diffusion",
        ),
        (
            EncodeSettings(method="minimax", backbone=dit, method_settings=D3MSettings(modes=2)),
            "the method minimax takes MinimaxSettings",
        ),
    ):
        with pytest.raises(UsageError, match=message):
            estimate_encode(source, settings)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"epoch": 2}, "unknown setting 'epoch'.*did you mean 'epochs'"),
        ({"memory": "few"}, "invalid memory 'few': expected an integer"),
        ({"adapter": "i4"}, "invalid adapter 'i4': expected f16 or i8"),
    ],
)
def test_settings_of_minimax_are_checked(values: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        from_plain(MinimaxSettings, values)


def test_estimate_of_minimax_has_the_bytes(world: Path) -> None:
    source = open_source(str(world / "source"))
    settings = settings_of(method="minimax", backbone=str(world / "dit"), epochs=2, batch=8)
    estimate = estimate_encode(source, settings)
    assert estimate["classes"] == sorted(CLASSES)
    assert estimate["plan"]["settings"]["epochs"] == 2
    assert 6_000 < estimate["bytes"] < 9_000
    assert estimate["seconds_total"] > 0
    coded = settings_of(
        method="minimax", backbone=str(world / "dit"), epochs=2, batch=8, codes=2, code_steps=3
    )
    assert estimate_encode(source, coded)["seconds"]["codes"] > 0
    assert not {"codes", "sampler"} & set(estimate["seconds"])
    sought = settings_of(
        method="minimax", backbone=str(world / "dit"), epochs=2, batch=8, search_images=12,
        sampler="ddim", sampler_steps=2,
    )  # fmt: skip
    assert estimate_encode(source, sought)["seconds"]["sampler"] > 0


@pytest.mark.heavy
@pytest.mark.parametrize(("select", "count"), [("teacher", 1), ("draws", 16)])
def test_no_teacher_is_trained_where_nothing_asks_it(
    world: Path, tmp_path: Path, select: Any, count: int
) -> None:
    source = open_source(str(world / "source"))
    settings = settings_of(
        method="minimax", backbone=str(world / "dit"), train_steps=2, ema=0.5,
        candidates=count, select=select,
    )  # fmt: skip
    estimate = estimate_encode(source, settings)
    assert "teacher" not in estimate["seconds"]
    output = tmp_path / "alone.d3m"
    pack = encode(source, output, settings, teachers=tmp_path / "cache")
    assert "teacher" not in pack.provenance
    assert not (tmp_path / "cache").exists()
    assert abs(output.stat().st_size - estimate["bytes"]) < MARGIN
    assert ("draws" in estimate["seconds"]) == (select == "draws")
    s3 = {"candidates": 2, "select": "s3"}
    for asks in ({"labels": "top1"}, {"candidates": 2}, s3, {"search_images": 4}):
        changed = settings_of(
            **{"method": "minimax", "backbone": str(world / "dit"), "candidates": 1, **asks}
        )
        assert "teacher" in estimate_encode(source, changed)["seconds"], asks
