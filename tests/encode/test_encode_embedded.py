"""A pack that carries its backbone: one file is enough, and every byte of it is checked."""

from __future__ import annotations

import shutil
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cli import invoke
from encode_world import make_tree, settings_of
from safetensors.numpy import load, save

from d3pack.backbones import mini_directory
from d3pack.dataset import D3MDataset
from d3pack.decode import Decoder, backbone_path, unpack_backbone, verify_probes
from d3pack.encode import EncodeContext, encode, sampler_search
from d3pack.encode.methods.classcond.method import ClassCond
from d3pack.encode.methods.classcond.training import embed
from d3pack.errors import BackboneChangedError, D3MError
from d3pack.format import carried_files, read, write
from d3pack.format.codecs import coded_bytes, decode_files, encode_files
from d3pack.format.codecs.files import split_files
from d3pack.format.coded import Coded
from d3pack.format.pack import EMBEDDED, Pack
from d3pack.sources import open_source
from d3pack.system import Journal
from d3pack.testing import raises_code
from d3pack.train import DIT_MODELS, build_dit, export_dit, in_four_bits
from d3pack.train.rounding import call_rounded, rounded


def make_pack(root: Path, **changes: Any) -> Path:
    """Encode a tree with a model that the pack carries."""
    make_tree(root / "source", 8)
    values: dict[str, Any] = {
        "images_per_class": 3,
        "method": "classcond",
        "sampler_steps": 3,
        "guidance": 2.0,
        "group": 4,
        "teacher_samples": 200,
        "model": "tiny",
        "embed": True,
        "search_images": 12,
        "licence": "cc0-1.0",
    }
    settings = settings_of(**{**values, **changes})
    encode(root / "source", root / "all.d3m", settings, teachers=root / "teachers")
    return root / "all.d3m"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("embedded"))


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A person who has nothing but the file."""
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.mark.heavy
def test_pack_with_its_backbone_decodes_alone(packed: Path, tmp_path: Path, home: Path) -> None:
    assert not backbone_path(packed).exists()
    shutil.copy(packed, tmp_path / "alone.d3m")
    pack = read(tmp_path / "alone.d3m")
    report = verify_probes(pack, Decoder(pack))
    assert report.verdict == "exact"
    images = Decoder(pack).images(range(9))
    assert len(list((home / "embedded").iterdir())) == 1
    dataset = D3MDataset(tmp_path / "alone.d3m", cache_dir=tmp_path / "cache", quiet=True)
    assert torch.equal(dataset[4][0], images[4])


@pytest.mark.heavy
def test_model_of_four_bits_decodes_alone(
    tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trained rounded, with a fitted sampler; what the run has made, verify makes again."""
    monkeypatch.setattr(sampler_search, "choose", lambda trials, *_: trials[-1])
    path = make_pack(tmp_path / "made", embed_bits=4, sampler_steps=None)
    shutil.copy(path, tmp_path / "alone.d3m")
    pack = read(tmp_path / "alone.d3m")
    assert (pack.recipe.sampler, len(pack.recipe.sigmas)) == ("table", 6)
    done = invoke("verify", "--decode", str(tmp_path / "alone.d3m"))
    assert done.exit_code == 0, done.stderr
    assert "exact" in done.output
    assert len(list((home / "embedded").iterdir())) == 1
    table = {path: how for path, how, _ in pack.extensions[EMBEDDED].params["files"]}
    name = "diffusion_pytorch_model.safetensors"
    assert table[f"vae/{name}"] == "i8"
    found = Counter(map(str, table[f"transformer/{name}"]))
    # layers of two blocks and of the end; first and last layer and table of classes
    assert (found["4"], found["8"]) == (2 + 2 * 7 + 1, 3)
    data = path.read_bytes()
    start = len(data) - pack.extensions[EMBEDDED].nbytes
    plain, codes, _ = pack.extensions[EMBEDDED].params["parts"]
    for at in (start + 7, start + plain + 5, start + plain + codes + 3, len(data) - 1):
        with raises_code("E_LEAF" if at == len(data) - 1 else "E_HASH"):
            read(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def test_bytes_of_the_backbone_are_in_the_ledger(packed: Path) -> None:
    pack = read(packed)
    ledger = pack.ledger()
    assert ledger.total == packed.stat().st_size
    assert ledger.backbone == 0
    whole = pack.recipe.backbone.nbytes
    assert 0.45 * whole < ledger.sections[EMBEDDED] < 0.6 * whole
    assert pack.recipe.backbone.licence == "cc0-1.0"


def test_selection_of_a_pack_keeps_the_backbone(packed: Path, tmp_path: Path) -> None:
    pack = read(packed)
    part = pack.select(["lemon"]).first(2)
    write(part, tmp_path / "part.d3m")
    images = Decoder(read(tmp_path / "part.d3m")).images(range(2))
    row = pack.classes.index("lemon")
    assert torch.equal(images, Decoder(pack).images([(row, 0), (row, 1)]))


def test_embedded_backbone_of_another_hash_is_refused(packed: Path, home: Path) -> None:
    pack = read(packed)
    coded = pack.extensions[EMBEDDED]
    shared = coded.tensors["shared"].copy()
    shared[coded.params["parts"][0] + 5] ^= 1
    other = Coded("files", {"shared": shared}, coded.params, coded.shared)
    wrong = replace(pack, extensions={EMBEDDED: other})
    with pytest.raises(BackboneChangedError, match="not the one that the recipe names"):
        Decoder(wrong)
    assert not (home / "embedded").exists()


def test_damaged_copy_is_unpacked_again(packed: Path) -> None:
    pack = read(packed)
    folder = unpack_backbone(pack)
    assert folder is not None
    weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    assert unpack_backbone(pack) == folder
    Decoder(pack)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_slower_process_leaves_the_copy_of_a_faster_one(
    packed: Path, monkeypatch: pytest.MonkeyPatch, damaged: bool
) -> None:
    """Both see that a copy is missing or damaged; only the faster one writes it."""
    pack = read(packed)
    folder = unpack_backbone(pack)
    assert folder is not None
    if damaged:
        weights = folder / "transformer" / "diffusion_pytorch_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-1])
    else:
        shutil.rmtree(folder)
    real, both = carried_files, threading.Barrier(2, timeout=60)

    def delayed(pack: Any) -> Any:
        both.wait()
        return real(pack)

    monkeypatch.setattr("d3pack.decode.carried.carried_files", delayed)

    def copy(_: int) -> tuple[int, int]:
        made = unpack_backbone(pack)
        assert made is not None
        return made.stat().st_ino, (made / "transformer" / "config.json").stat().st_ino

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(copy, range(2))
    assert first == second
    assert [entry.name for entry in folder.parent.iterdir()] == [folder.name]


WEIGHTS = "a/w.safetensors"
BITS = pytest.mark.parametrize("bits", [8, 4])


def files() -> dict[str, bytes]:
    random = np.random.default_rng(0)
    tensors = {
        "wide": random.normal(size=(7, 5, 3)).astype(np.float16),
        "zero": np.zeros((4, 6), np.float16),
        "bias": random.normal(size=9).astype(np.float16),
        "exact": random.normal(size=(3, 3)).astype(np.float32),
        "wide again": np.zeros(0),
        "exact again": np.zeros(0),
    }
    tensors |= {name: tensors[name.split()[0]] for name in ("wide again", "exact again")}
    return {"a/config.json": b'{"x": 1}', WEIGHTS: save(tensors), "empty": b""}


def stored_files(bits: int) -> Coded:
    return encode_files(files(), lambda path, name: bits == 4)


@BITS
def test_files_round_trip_but_for_the_last_bits_of_matrices(bits: int) -> None:
    before, coded = files(), stored_files(bits)
    after = decode_files(coded)
    assert after.keys() == before.keys()
    assert after["a/config.json"] == before["a/config.json"]
    assert after["empty"] == b""
    old, new = load(before[WEIGHTS]), load(after[WEIGHTS])
    for name in ("zero", "bias", "exact", "exact again"):
        assert np.array_equal(old[name], new[name])
    assert np.array_equal(new["wide"], new["wide again"])
    off = np.abs(old["wide"].astype(np.float32) - new["wide"].astype(np.float32))
    largest = np.abs(old["wide"].astype(np.float32)).max()
    assert 0 < off.max() <= largest / (250 if bits == 8 else 7.5)  # +8 steps have no code
    assert decode_files(encode_files(after, lambda path, name: bits == 4)) == after


def test_a_tensor_like_an_earlier_one_is_not_stored() -> None:
    whole, four = stored_files(8), stored_files(4)
    header = int.from_bytes(files()[WEIGHTS][:8], "little")
    plain = len(b'{"x": 1}') + 8 + header + 2 * 9 + 4 * 9
    assert list(whole.params["parts"]) == [plain, 105 + 24, 7 + 4]
    assert list(four.params["parts"]) == [plain, 53 + 12, 2 + 1]
    assert coded_bytes((7, 5, 3), 8) == 105 + 2 * 7
    assert coded_bytes((7, 5, 3), 4) == 53 + 2 * 2
    assert coded_bytes((9,), 4) == 2 * 9


@pytest.mark.parametrize("shape", [(5, 27), (64, 64), (192, 16, 1, 1), (3, 1)])
def test_training_rounds_as_four_bits_do(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape) * torch.logspace(-9, 1, shape[0]).view(-1, *[1] * (len(shape) - 1))
    weight[0], weight[-1] = 0.0, -weight[-1].abs()
    weight = weight.to(memory_format=torch.channels_last) if len(shape) == 4 else weight
    weight.requires_grad_()
    file = save({"w": weight.detach().half().contiguous().numpy()})
    stored = load(decode_files(encode_files({WEIGHTS: file}, lambda path, name: True))[WEIGHTS])[
        "w"
    ]
    found = rounded(weight)
    assert np.array_equal(found.detach().numpy(), stored.astype(np.float32))
    found.square().sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad, 2 * found.detach())


def test_a_call_of_a_rounded_model_leaves_its_weights_alone() -> None:
    """Also where blocks share a module."""
    torch.manual_seed(0)
    model = build_dit(DIT_MODELS["tiny"], 4, 2, 3)
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    before = [weight.detach().clone() for weight in model.parameters()]
    x, times, labels = torch.randn(2, 4, 2, 2), torch.tensor([5, 900]), torch.tensor([0, 3])
    out = call_rounded(model, x, times, class_labels=labels, return_dict=False)[0]
    out.sum().backward()
    for (name, weight), was in zip(model.named_parameters(), before, strict=True):
        assert weight.is_leaf
        assert weight.grad is not None
        assert torch.equal(weight, was)
        if weight.ndim > 1 and in_four_bits(name):
            weight.data = rounded(weight).detach()
    assert torch.equal(model(x, times, class_labels=labels, return_dict=False)[0], out)


def test_small_model_of_ten_classes_takes_less_than_five_megabytes(tmp_path: Path) -> None:
    """With random weights, since zeros of equal shapes would be stored once."""
    torch.manual_seed(0)
    classes = tuple(f"class {c}" for c in range(10))
    vae = mini_directory() / "vae"
    model = build_dit(DIT_MODELS["small"], 16, 4, len(classes))
    for weight in model.parameters():
        torch.nn.init.normal_(weight)
    export_dit(tmp_path / "model", model, vae, classes, "cc0-1.0")
    journal = Journal(tmp_path / "journal", {})
    source = open_source(str(make_tree(tmp_path / "source", 1, classes)))
    for bits, least, most in ((4, 4_500_000, 5_000_000), (8, 7_000_000, 7_500_000)):
        coded = embed(journal, tmp_path / "model", bits)[1]
        values = {"model": "small", "embed": True, "embed_bits": bits, "images_per_class": 100}
        settings = settings_of(method="classcond", size=(32, 32), **values)
        own = settings.method_settings
        job = ClassCond().prepare(source, settings, own, EncodeContext("cpu", tmp_path))
        expected = job.expected_bytes(job.plan.allocation)
        assert least < coded.nbytes < expected < most
        assert expected - coded.nbytes < 30_000


@BITS
def test_inconsistent_sections_are_refused(bits: int) -> None:
    coded = stored_files(bits)

    def other(**changes: np.ndarray) -> Coded:
        runs = {
            **dict(zip(("plain", "codes", "scales"), split_files(coded), strict=True)),
            **changes,
        }
        shared = np.frombuffer(b"".join(run.tobytes() for run in runs.values()), np.uint8)
        params = {**coded.params, "parts": [run.size for run in runs.values()]}
        return Coded("files", {"shared": shared}, params, coded.shared)

    plain, codes, scales = split_files(coded)
    assert decode_files(other()) == decode_files(coded)
    for bad in (
        other(codes=codes[:-1]),
        other(scales=np.append(scales, np.float16(1))),
        other(plain=plain[:40]),
        other(plain=np.append(plain, np.uint8(0))),
        Coded("zip", coded.tensors, coded.params, coded.shared),
        Coded(
            "files",
            coded.tensors,
            {**coded.params, "files": [[WEIGHTS, "i8"]]},
            coded.shared,
        ),
        Coded("files", coded.tensors, {**coded.params, "parts": [1, 2]}, coded.shared),
        Coded("files", coded.tensors, {}, coded.shared),
    ):
        with raises_code("E_CODEC"):
            decode_files(bad)


def test_flipped_byte_is_found_before_a_model_is_opened(packed: Path, tmp_path: Path) -> None:
    data = bytearray(packed.read_bytes())
    pack: Pack = read(packed)
    data[len(data) - pack.extensions[EMBEDDED].nbytes // 2] ^= 16
    (tmp_path / "bad.d3m").write_bytes(data)
    with pytest.raises(D3MError):
        read(tmp_path / "bad.d3m")
