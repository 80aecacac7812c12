"""Packs of outputs: decoded without the text encoder, guided against vectors of no class."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_backbones import tiny_dit, tiny_pack, tiny_sd, without_text

from d3pack.backbones import lock_directory, open_backbone, write_list
from d3pack.decode import Decoder
from d3pack.errors import BackboneChangedError
from d3pack.format import Codes, Coding, encode_codes, encode_prompts, encode_unconditional
from d3pack.testing import raises_code

TEXT = "text_encoder/model.safetensors"


@pytest.fixture(scope="module")
def sd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_sd(tmp_path_factory.mktemp("outputs") / "sd")


@pytest.fixture
def bare(sd: Path, tmp_path: Path) -> Path:
    """The directory without the text encoder; `lock.json` has the list of all files."""
    copy = without_text(sd, tmp_path / "bare")
    write_list(copy, lock_directory(sd))
    return copy


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))


def packed(pack: Any, root: Path) -> Any:
    """The pack as a reader gives it: it does not know the list of the backbone's files."""
    import d3pack

    read = d3pack.read(d3pack.pack_bytes(pack))
    assert not read.recipe.backbone.files
    return read


def test_outputs_are_decoded_without_the_text_encoder(sd: Path, bare: Path) -> None:
    pack = packed(tiny_pack(sd, template=None, vectors=3), sd)
    assert not (bare / TEXT).exists()
    seen: list[str] = []
    decoder = Decoder(pack, path=bare, progress=lambda path, *_: seen.append(path))
    images = decoder.images(range(6))
    assert not [path for path in seen if path.startswith(("text_encoder", "tokenizer"))]
    assert torch.equal(Decoder(pack, path=sd).images(range(6)), images)
    assert torch.equal(Decoder(pack, backbone=open_backbone(str(sd))).images(range(6)), images)
    with raises_code("E_BACKBONE_MISSING", match="text encoder of this backbone is not open"):
        decoder.backbone.condition(torch.zeros(1, 1, 32), "a {}")
    with raises_code("E_BACKBONE_MISSING", match="text encoder of this backbone is not open"):
        decoder.backbone.name_vectors("cat")


def test_tokens_need_the_text_encoder(sd: Path, bare: Path) -> None:
    with raises_code("E_BACKBONE_MISSING", match="text_encoder/config.json is missing"):
        Decoder(packed(tiny_pack(sd), sd), path=bare)
    with raises_code("E_BACKBONE_MISSING"):
        open_backbone(str(bare))


def test_every_file_that_is_read_is_verified(sd: Path, bare: Path) -> None:
    pack = packed(tiny_pack(sd, template=None), sd)
    for path in sorted(p for p in bare.rglob("*") if p.is_file() and p.parent != bare):
        kept = path.read_bytes()
        path.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
        with pytest.raises(BackboneChangedError, match=path.name):
            Decoder(pack, path=bare)
        path.write_bytes(kept)
    # a file that is not read may be any: it is another backbone only for those that read it
    for name in ("text_encoder/config.json", TEXT):
        (bare / name).parent.mkdir(exist_ok=True)
        shutil.copy(sd / name, bare / name)
        (bare / name).write_bytes((bare / name).read_bytes()[:-1] + b"!")
    Decoder(pack, path=bare)
    with pytest.raises(BackboneChangedError, match=r"text_encoder/config\.json"):
        open_backbone(pack.recipe.backbone, path=bare)


def test_list_that_lacks_the_text_encoder_is_another_lock(sd: Path, bare: Path) -> None:
    pack = packed(tiny_pack(sd, template=None), sd)
    (bare / "lock.json").unlink()
    shutil.rmtree(Path(lock_home()), ignore_errors=True)
    with raises_code("E_BACKBONE_MISSING", match="text_encoder/config.json"):
        Decoder(pack, path=bare)
    files = dict(lock_directory(sd).files)
    del files[TEXT]
    write_list(bare, replace(pack.recipe.backbone, files=files))
    shutil.rmtree(Path(lock_home()), ignore_errors=True)
    with raises_code("E_BACKBONE_MISSING", match="text_encoder/config.json"):
        Decoder(pack, path=bare)


def lock_home() -> Path:
    from d3pack.backbones import cache_home

    return cache_home() / "locks"


def test_guidance_compares_with_the_vectors_of_no_class(sd: Path) -> None:
    pack = tiny_pack(sd, template=None, vectors=2, guidance=3.0)
    backbone: Any = open_backbone(str(sd))
    zeros = Decoder(pack, backbone=backbone).images([0])
    none = np.zeros((2, 32), np.float32)
    same = replace(pack, unconditional=encode_unconditional(none))
    assert torch.equal(Decoder(same, backbone=backbone).images([0]), zeros)
    none = backbone.outputs("", 2).numpy()
    other = replace(pack, unconditional=encode_unconditional(none, "f16"))
    assert not torch.equal(Decoder(other, backbone=backbone).images([0]), zeros)
    # with tokens, the vectors stand in the template; a class compared with itself is unguided
    tokens = tiny_pack(sd, classes=1, guidance=1.0)
    plain = Decoder(tokens, backbone=backbone).images([0])
    from d3pack.format import decode_prompts

    own = encode_unconditional(decode_prompts(tokens.prompts)[0, 0], "f16")
    guided = replace(tokens, recipe=replace(tokens.recipe, guidance=2.0), unconditional=own)
    found = Decoder(guided, backbone=backbone).images([0])
    assert (found.int() - plain.int()).abs().max() <= 1


def test_outputs_of_a_sentence_make_its_images(sd: Path) -> None:
    """All outputs of a text are what the encoder hands to the denoiser."""
    backbone: Any = open_backbone(str(sd))
    whole = backbone.outputs("a photo of a goldfish", backbone.text.positions)
    wanted = backbone.sentence("a photo of a goldfish").tensors["hidden"][0]
    assert torch.equal(whole, wanted)
    words = len(backbone.text.words.ids("a photo of a goldfish"))
    assert torch.equal(backbone.outputs("a photo of a goldfish", 2), wanted[words : words + 2])
    assert torch.equal(backbone.condition(whole[None], None).tensors["hidden"][0], wanted)


def test_outputs_of_wrong_shape_are_refused(sd: Path, tmp_path: Path) -> None:
    pack = tiny_pack(sd, template=None)
    for shape in ((3, 1, 1, 31), (3, 1, 78, 32)):
        wrong = replace(pack, prompts=encode_prompts(np.ones(shape, np.float32)))
        with raises_code("E_BACKBONE_PROMPT", match="outputs of .* takes up to 77 of 32"):
            Decoder(wrong, path=sd)
    backbone = open_backbone(str(sd))
    for outputs in (torch.zeros(1, 1, 31), torch.zeros(1, 17, 32)):
        with raises_code("E_BACKBONE_PROMPT", match="takes 1 to 16 of width 32"):
            backbone.condition(outputs, None)
    dit = open_backbone(str(tiny_dit(tmp_path / "dit")))
    for call in (lambda: dit.outputs("cat", 1), lambda: dit.condition(torch.zeros(1, 1, 32), None)):
        with raises_code("E_BACKBONE_PROMPT", match="reads no text"):
            call()


def test_codes_without_prompts_are_refused_where_the_backbone_reads_other_vectors(
    sd: Path, tmp_path: Path
) -> None:
    """A DiT takes class vectors alone: a pack of outputs is not for it, whatever its images use."""
    coding = Coding((2.0, 0.5, 0.0), (1, 1), bits=4, prompts=False)
    atoms, signs = np.tile([[[3, 5]]], (3, 1, 1)), np.ones((3, 1, 2), np.int8)
    dit = tiny_dit(tmp_path / "dit")
    for path, template, fits in ((sd, None, True), (dit, None, False), (dit, "{}", True)):
        pack = tiny_pack(path)
        bare = replace(
            pack,
            recipe=replace(pack.recipe, template=template),
            images_per_class=1,
            prompts=None,
            codes=encode_codes(Codes(coding, 1, atoms, signs)),
        )
        if fits:
            assert Decoder(bare, path=path).images(range(3)).shape[0] == 3
        else:
            with raises_code(
                "E_BACKBONE_PROMPT", match="outputs, which the backbone does not take"
            ):
                Decoder(bare, path=path)
