"""Embedding files: what diffusers makes of ours, and what we make of those of others."""

from __future__ import annotations

import ast
import json
import math
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import invoke
from cli_schema import check_output
from safetensors.torch import load_file, save_file
from tiny_backbones import tiny_dit, tiny_pack, tiny_sd, tiny_sdxl

import d3pack
from d3pack.backbones import open_backbone
from d3pack.decode import samplers
from d3pack.encode import ImportSettings, export_embeddings, import_embeddings
from d3pack.errors import BackboneError, D3MError, NotFoundError, UsageError
from d3pack.format import decode_prompts

TEMPLATE = "a photo of a {}"
WIDTHS = {"sd": [32], "sdxl": [24, 40]}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("embeddings")
    sd = tiny_sd(root / "sd", vae="kl", prediction="epsilon", tokenizer="vocab")
    config = json.loads((sd / "tokenizer/tokenizer_config.json").read_text())
    more = {**config, "model_max_length": 16}
    (sd / "tokenizer/tokenizer_config.json").write_text(json.dumps(more))
    return {"sd": sd, "sdxl": tiny_sdxl(root / "sdxl")}


def pipeline_of(kind: str, folder: Path) -> Any:
    import diffusers
    from transformers import CLIPTextModel, CLIPTokenizer

    if kind == "sdxl":
        pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(folder)
    else:
        pipeline = diffusers.StableDiffusionPipeline(
            vae=diffusers.AutoencoderKL.from_pretrained(folder / "vae"),
            text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
            tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
            unet=diffusers.UNet2DConditionModel.from_pretrained(folder / "unet"),
            scheduler=diffusers.DDIMScheduler.from_pretrained(folder / "scheduler"),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.scheduler = diffusers.EulerDiscreteScheduler.from_config(
        pipeline.scheduler.config, timestep_spacing="trailing"
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def load(kind: str, pipeline: Any, file: Path) -> None:
    """As the README says."""
    token = file.stem
    if kind == "sd":
        pipeline.load_textual_inversion(str(file), token=token)
        return
    vectors = load_file(file)
    for key, end in (("clip_l", ""), ("clip_g", "_2")):
        pipeline.load_textual_inversion(
            vectors[key],
            token=token,
            text_encoder=getattr(pipeline, f"text_encoder{end}"),
            tokenizer=getattr(pipeline, f"tokenizer{end}"),
        )


@pytest.mark.heavy
@pytest.mark.parametrize("kind", ["sd", "sdxl"])
@torch.no_grad()
def test_pipeline_makes_the_images_of_the_pack(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    pack = tiny_pack(folders[kind], vectors=2, steps=3)
    files = export_embeddings(pack, tmp_path / "out", backbone=folders[kind])
    pipeline = pipeline_of(kind, folders[kind])
    for file in files:
        load(kind, pipeline, file)
    backbone: Any = open_backbone(str(folders[kind]))
    prompts = torch.from_numpy(decode_prompts(pack.prompts).copy())
    sigmas = samplers.schedule(backbone.levels.alphas_cumprod, "euler", 3)
    x = torch.randn(1, *backbone.latent_shape, generator=torch.Generator().manual_seed(3))
    for c in (0, 2):
        wanted = pipeline(
            TEMPLATE.replace("{}", files[c].stem),
            latents=x.clone(),
            height=64,
            width=64,
            num_inference_steps=3,
            guidance_scale=2.0,
            output_type="pt",
        ).images
        both = (backbone.condition(prompts[c]), backbone.unconditional())

        def model(x: torch.Tensor, sigma: float, both: Any = both) -> torch.Tensor:
            with_class, without = (backbone.denoise(x, sigma, one) for one in both)
            mixed: torch.Tensor = (with_class - without) * 2.0 + without
            return mixed

        start = x * float(pipeline.scheduler.init_noise_sigma)
        made = backbone.decode_float(samplers.sample("euler", model, start, sigmas))
        torch.testing.assert_close(made.clamp(-1, 1) / 2 + 0.5, wanted, rtol=1e-4, atol=1e-4)
    assert math.isclose(float(pipeline.scheduler.sigmas[0]), sigmas[0], rel_tol=1e-5)


@pytest.mark.parametrize("kind", ["sd", "sdxl"])
def test_files_come_back_as_the_same_prompts(
    kind: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    pack = tiny_pack(folders[kind], vectors=2)
    files = export_embeddings(pack, tmp_path / "out", backbone=folders[kind])
    keys = ["clip_g", "clip_l"] if kind == "sdxl" else None
    for file in files:
        tensors = load_file(file)
        assert sorted(tensors) == (keys or [file.stem])
        assert {t.shape[0] for t in tensors.values()} == {2}
    settings = ImportSettings(images_per_class=5, seed=7, guidance=3.0, sampler="euler")
    back = import_embeddings(tmp_path / "out", str(folders[kind]), TEMPLATE, settings)
    assert back.classes == pack.classes
    assert (back.images_per_class, back.seed) == (5, 7)
    assert (back.recipe.guidance, back.recipe.sampler) == (3.0, "euler")
    assert back.recipe.backbone == pack.recipe.backbone
    assert back.prompts is not None
    assert pack.prompts is not None
    np.testing.assert_array_equal(decode_prompts(back.prompts), decode_prompts(pack.prompts))
    d3pack.write(back, tmp_path / "back.d3m")
    assert d3pack.read(tmp_path / "back.d3m") == back


def test_modes_come_back_in_their_order(folders: dict[str, Path], tmp_path: Path) -> None:
    pack = tiny_pack(folders["sd"], modes=11)
    export_embeddings(pack, tmp_path / "out")
    back = import_embeddings(tmp_path / "out", str(folders["sd"]), TEMPLATE)
    assert back.classes == pack.classes
    assert back.prompts is not None
    np.testing.assert_array_equal(decode_prompts(back.prompts), decode_prompts(pack.prompts))


def test_template_cannot_leave_its_place_in_the_readme(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    harmful = 'a "{}"); exit() #`` \\ x\n```\n# Heading'
    pack = tiny_pack(folders["sd"], template=harmful)
    files = export_embeddings(pack, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("#")] == [text.splitlines()[0]]
    code = text.split("```python\n")[1].split("\n```\n")[0]
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    prompts = [ast.literal_eval(call.args[0]) for call in calls]
    assert harmful.replace("{}", files[0].stem) in prompts
    assert len(calls) == 2
    assert "The template is ```` " in text
    with pytest.raises(UsageError, match=r"must have one \{\}") as caught:
        export_embeddings(tiny_pack(folders["sd"], template="a dog"), tmp_path / "none")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "none").exists()


def test_readme_tells_template_and_files(folders: dict[str, Path], tmp_path: Path) -> None:
    pack = tiny_pack(folders["sd"], template="a blurry picture of {}", modes=2)
    files = export_embeddings(pack, tmp_path / "out")
    assert len(files) == 6
    text = (tmp_path / "out" / "README.md").read_text()
    assert "`a blurry picture of {}`" in text
    for file in files:
        assert f"`{file.name}`" in text
    assert f"a blurry picture of embedding:{files[0].stem}" in text


def write_a1111(path: Path) -> None:
    value = {"string_to_param": {"*": torch.ones(2, 32)}, "name": "x", "step": 5}
    torch.save(value, path)


KINDS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "diffusers": ("a.safetensors", lambda p: save_file({"<cat>": torch.ones(2, 32)}, p)),
    "a1111": ("a.pt", write_a1111),
    "learned_embeds": ("a.bin", lambda p: torch.save({"<cat>": torch.ones(2, 32).half()}, p)),
    "emb_params": ("a.safetensors", lambda p: save_file({"emb_params": torch.ones(2, 32)}, p)),
    "tensor": ("a.pt", lambda p: torch.save(torch.ones(2, 32), p)),
}


@pytest.mark.parametrize("case", KINDS)
def test_files_of_others_are_read(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    name, write = KINDS[case]
    write(tmp_path / name)
    names = {"a": "cat"}
    pack = import_embeddings(tmp_path, str(folders["sd"]), TEMPLATE, names=names)
    assert pack.classes == ("cat",)
    assert pack.prompts is not None
    assert (decode_prompts(pack.prompts) == np.ones((1, 1, 2, 32))).all()
    assert import_embeddings(tmp_path, str(folders["sd"]), TEMPLATE).classes == ("a",)


class Harmful:
    def __reduce__(self) -> Any:
        return print, ("code ran",)


def one(path: Path, width: int = 32, count: int = 1, **tensors: torch.Tensor) -> Path:
    save_file(tensors or {"x": torch.ones(count, width)}, path)
    return path


def compressed(path: Path) -> None:
    torch.save(torch.zeros(2, 32), path.with_suffix(".stored"))
    with (
        zipfile.ZipFile(path.with_suffix(".stored")) as stored,
        zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in stored.infolist():
            packed.writestr(entry.filename, stored.read(entry))


def overlapping(path: Path) -> None:
    """A small zip whose list names one entry many times."""
    torch.save(torch.zeros(1 << 18), path)
    with zipfile.ZipFile(path, "a") as archive:
        archive.filelist += [max(archive.filelist, key=lambda e: e.file_size)] * 64
        archive.writestr("more", "")


def of_class(path: Path, *names: str) -> None:
    for n, name in enumerate(names):
        save_file({"x": torch.ones(1, 32)}, path / f"{n}.safetensors", metadata={"class": name})


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "width": (lambda p: one(p / "a.safetensors", 33), "vectors of 33, this backbone takes 32"),
    "bases": (
        lambda p: [one(p / f"{name}.safetensors", 16 * n) for n, name in enumerate("ab", 2)],
        "a.safetensors has vectors of 32, b.safetensors of 48: they are for different base models",
    ),
    "sdxl": (
        lambda p: one(p / "a.safetensors", clip_l=torch.ones(1, 24), clip_g=torch.ones(1, 40)),
        r"vectors of 24 \+ 40, this backbone takes 32",
    ),
    "counts": (
        lambda p: [one(p / f"{name}.safetensors", 32, n) for n, name in enumerate("ab", 1)],
        "as many for each class",
    ),
    "halves": (
        lambda p: one(p / "a.safetensors", clip_l=torch.ones(1, 24), clip_g=torch.ones(2, 40)),
        "other numbers of vectors",
    ),
    "keys": (
        lambda p: one(p / "a.safetensors", clip_l=torch.ones(1, 24), other=torch.ones(1, 40)),
        "expected one tensor, or clip_l and clip_g",
    ),
    "code": (lambda p: torch.save({"x": Harmful()}, p / "a.bin"), "which can run code"),
    "no pickle": (lambda p: (p / "a.pt").write_bytes(b"junk"), "a.pt"),
    "cut": (lambda p: (p / "a.safetensors").write_bytes(b"\x10"), "cannot be read"),
    "text": (lambda p: torch.save({"x": "y"}, p / "a.bin"), "holds str where vectors"),
    "nan": (lambda p: one(p / "a.safetensors", x=torch.full((1, 32), math.nan)), "no finite"),
    "dims": (lambda p: one(p / "a.safetensors", x=torch.ones(1, 1, 32)), "no finite vectors"),
    "compressed": (lambda p: compressed(p / "a.pt"), "a.pt is compressed"),
    "unpacked": (lambda p: overlapping(p / "a.pt"), "unpacks to more than"),
    "expanded": (
        lambda p: torch.save(torch.zeros(1).expand(10**7, 10**6), p / "a.pt"),
        "has more than",
    ),
    "sparse": (lambda p: torch.save(torch.ones(2, 32).to_sparse(), p / "a.pt"), "not dense"),
    "meta": (lambda p: torch.save(torch.ones(2, 32, device="meta"), p / "a.pt"), "not dense"),
    "float8": (
        lambda p: one(p / "a.safetensors", x=torch.ones(2, 32).to(torch.float8_e4m3fn)),
        "values of torch.float8_e4m3fn",
    ),
    "float8 of torch": (
        lambda p: torch.save(torch.ones(2, 32).to(torch.float8_e4m3fn), p / "a.pt"),
        "values of torch.float8_e4m3fn",
    ),
    "integers": (lambda p: torch.save(torch.ones(2, 32).int(), p / "a.pt"), "torch.int32"),
    "folder": (lambda p: (p / "a.safetensors").mkdir(), "is not a regular file"),
    "two endings": (
        lambda p: (one(p / "a.safetensors"), one(p / "a.pt")),
        "a.pt and a.safetensors have the same name",
    ),
    "too many": (lambda p: one(p / "a.safetensors", 32, 20), "20 vectors, .* takes 14 at most"),
    "modes": (lambda p: of_class(p, "cat", "dog", "cat"), "'cat' has 2 files, 'dog' 1"),
    "name": (lambda p: of_class(p, "cat", "d\x07g"), "1.safetensors: a class name holds U"),
    "lines": (lambda p: of_class(p, "c\nt"), "0.safetensors: a class name holds a line feed"),
    "none": (lambda p: (p / "a.txt").write_text(""), "has no file that ends in"),
}
if hasattr(os, "mkfifo"):
    WRONG["fifo"] = (lambda p: os.mkfifo(p / "a.pt"), "a.pt is not a regular file")


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files_are_refused_in_one_line(
    case: str, folders: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    write, why = WRONG[case]
    write(tmp_path)
    with pytest.raises((UsageError, NotFoundError), match=why) as caught:
        import_embeddings(tmp_path, str(folders["sd"]), TEMPLATE)
    assert "\n" not in str(caught.value)
    assert "code ran" not in capfd.readouterr().out


def test_vectors_and_template_fit_together(folders: dict[str, Path], tmp_path: Path) -> None:
    one(tmp_path / "a.safetensors", 32, 14)
    with pytest.raises(BackboneError, match="14 vectors and the template") as caught:
        import_embeddings(tmp_path, str(folders["sd"]), TEMPLATE)
    assert "\n" not in str(caught.value)
    assert import_embeddings(tmp_path, str(folders["sd"]), "{}").classes == ("a",)


def test_what_cannot_be_exported_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    outputs = tiny_pack(folders["sd"], template=None)
    classes = tiny_pack(tiny_dit(tmp_path / "dit"))
    for pack, why in ((outputs, "outputs cannot"), (classes, "prompts for dit cannot")):
        with pytest.raises(UsageError, match=why):
            export_embeddings(pack, tmp_path / "out")
    with pytest.raises(UsageError, match="tokens of 64 are not SDXL's usual ones"):
        export_embeddings(tiny_pack(folders["sdxl"]), tmp_path / "out")
    with pytest.raises(NotFoundError, match="does not tell the width"):
        export_embeddings(tiny_pack(folders["sdxl"]), tmp_path / "out", backbone=tmp_path)
    assert not (tmp_path / "out").exists()
    export_embeddings(tiny_pack(folders["sd"]), tmp_path / "out")
    with pytest.raises(UsageError, match="exists"):
        export_embeddings(tiny_pack(folders["sd"]), tmp_path / "out")
    with pytest.raises(UsageError, match="not for dit"):
        import_embeddings(tmp_path / "out", str(tmp_path / "dit"), TEMPLATE)


def test_commands_export_and_import(folders: dict[str, Path], tmp_path: Path) -> None:
    pack = tiny_pack(folders["sd"])
    d3pack.write(pack, tmp_path / "a.d3m")
    out = tmp_path / "out"
    found = invoke("export-embeddings", tmp_path / "a.d3m", "-o", out, "--format", "json")
    assert len(check_output("export-embeddings", found.stdout)["files"]) == 3
    args = ["import-embeddings", out, "--backbone", folders["sd"], "-o", tmp_path / "b.d3m"]
    found = invoke(*args, "--template", TEMPLATE, "--ipc", 2, "--format", "json")
    told = check_output("import-embeddings", found.stdout)
    back = d3pack.read(tmp_path / "b.d3m")
    assert (told["root"], told["classes"], len(back)) == (back.root, 3, 6)
    again = invoke(*args, "--template", TEMPLATE).exception
    assert isinstance(again, D3MError)
    assert "exists" in str(again)
    bad = invoke(*args, "--template", "no place", "--overwrite").exception
    assert isinstance(bad, UsageError)
