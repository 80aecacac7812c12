"""Push: one commit that is read back, a complete card, and nothing private in it."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
import yaml
from cli import invoke
from hub_loopback import LoopbackHub
from hub_packs import make_pack
from huggingface_hub import constants
from markdown_it import MarkdownIt
from PIL import Image
from places import ROOT
from tiny_backbones import tiny_pack, tiny_sd

from d3pack import Decoder, read, write
from d3pack import hub as d3hub
from d3pack.backbones import lock_backbone
from d3pack.dataset import D3MDataset
from d3pack.decode import make_probes
from d3pack.errors import HubError, HubOfflineError, InvalidPackError, NotFoundError, UsageError
from d3pack.format import Pack
from d3pack.hub import Parcel, Pushed, PushSettings, load, prepare_push, send_push
from d3pack.hub.publish import ATTRIBUTES
from d3pack.hub.viewer import preview_pairs
from d3pack.testing import raises_code

pytestmark = [
    pytest.mark.usefixtures("login"),
    # huggingface_hub's own upload uses its HTTP library in a deprecated way
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
PROBES = PushSettings(licence="cc-by-4.0", source="random numbers (CC0)", preview="probes")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "packs"
    folder.mkdir()
    write(make_pack(), folder / "a.d3m")
    return folder / "a.d3m"


def sent(file: Path, settings: PushSettings = PROBES) -> Pushed:
    return send_push(prepare_push(file, "org/set", settings), settings)


def yaml_of(readme: str) -> dict[str, Any]:
    head = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)
    assert head is not None
    value: dict[str, Any] = yaml.safe_load(head[1])
    return value


def files_at(hub: LoopbackHub, revision: str = "main", name: str = "org/set") -> dict[str, bytes]:
    repo = hub.repo(name)
    return {path: blob.data for path, blob in repo.commits[str(repo.resolve(revision))].items()}


@pytest.mark.heavy
def test_pushed_pack_has_the_same_root_and_images(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    root = tiny_sd(tmp_path / "sd")
    hub.put("org/tiny", {p.relative_to(root).as_posix(): p.read_bytes()
                         for p in root.rglob("*") if p.is_file()}, kind="models")  # fmt: skip
    made = tiny_pack(root)
    ref, _ = lock_backbone("org/tiny")
    pack = replace(made, recipe=replace(made.recipe, backbone=ref))
    write(pack, tmp_path / "tiny.d3m")
    wanted = Decoder(pack).images(range(len(pack)))

    done = sent(tmp_path / "tiny.d3m", PushSettings())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "elsewhere"))
    pulled = d3hub.pull(done.address)
    assert pulled.pack.root == pack.root
    assert torch.equal(Decoder(pulled.pack).images(range(len(pack))), wanted)
    data = D3MDataset(str(done.address), cache=None)
    assert torch.equal(data[5][0], wanted[5])
    part = D3MDataset(str(done.address), classes=[2], cache=None)
    assert torch.equal(part[0][0], wanted[16])

    import pyarrow.parquet as pq
    from PIL import Image

    table = pq.read_table(io.BytesIO(files_at(hub)["preview/tiny.parquet"]))
    shown = preview_pairs(pack)
    assert table["label"].to_pylist() == [c for c, _ in shown]
    first = Image.open(io.BytesIO(table["image"][0]["bytes"].as_py()))
    assert first.tobytes() == wanted[0].permute(1, 2, 0).numpy().tobytes()


def test_push_makes_one_commit_and_reads_it_back(hub: LoopbackHub, file: Path) -> None:
    done = sent(file)
    pack = make_pack()
    assert (done.address.root, done.address.revision) == (
        pack.root,
        hub.repo("org/set").refs["main"],
    )
    assert done.web == f"{hub.url}/datasets/org/set/commit/{done.address.revision}"
    assert len(hub.repo("org/set").commits) == 2  # the Hub's own first one, and ours
    held = files_at(hub)
    assert set(held) == {
        ".gitattributes", "README.md", "a.d3m", "croissant.json", "preview/a.parquet",
        "preview/a.webp",
    }  # fmt: skip
    assert held["a.d3m"] == file.read_bytes()
    assert hub.repo("org/set").commits[str(done.address.revision)]["a.d3m"].lfs
    lines = held[".gitattributes"].decode().splitlines()
    assert lines.count(ATTRIBUTES) == 1
    assert any(line.startswith("*.parquet") for line in lines)  # the Hub's own lines stay
    assert hub.count("GET", "a.d3m|cdn") >= 1
    assert d3hub.load("org/set") == pack


def test_card_is_complete(hub: LoopbackHub, file: Path) -> None:
    sent(file)
    pack, readme = make_pack(), files_at(hub)["README.md"].decode()
    head = yaml_of(readme)
    assert head["license"] == "cc-by-4.0"
    assert head["task_categories"] == ["image-classification"]
    assert head["size_categories"] == ["n<1K"]
    assert head["configs"][0]["data_files"] == [{"split": "preview", "path": "preview/a.parquet"}]
    assert {"d3pack", "dataset-distillation"} <= set(head["tags"])
    ledger = pack.ledger()
    for text in (
        pack.root,
        "org/tiny",
        "mit",
        f"{ledger.total:,}",
        f"{ledger.sections['prompts']:,}",
        'D3MDataset("hf://datasets/org/set/a.d3m#sha256=' + pack.root,
        "random numbers (CC0)",
        "| `method` | d3m |",
        "Not measured by the publisher",
        "## Limits",
    ):
        assert text in readme, text
    usage = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(usage) == 4  # tests/hub/test_hub_card.py runs them
    (picture,) = re.findall(r"!\[.*?\]\(<(.*?)>\)", readme)
    with Image.open(io.BytesIO(files_at(hub)[picture])) as shown:
        assert shown.format == "WEBP"


def test_preview_and_croissant_agree_with_the_pack(hub: LoopbackHub, file: Path) -> None:
    sent(file)
    held, pack = files_at(hub), make_pack()
    import pyarrow.parquet as pq

    table = pq.read_table(io.BytesIO(held["preview/a.parquet"]))
    features = json.loads(table.schema.metadata[b"huggingface"])["info"]["features"]
    assert features["label"]["names"] == list(pack.classes)
    assert features["image"] == {"_type": "Image"}
    value = json.loads(held["croissant.json"])
    assert value["conformsTo"] == "http://mlcommons.org/croissant/1.0"
    for entry in value["distribution"]:
        data = held[entry["contentUrl"]]
        assert entry["sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["contentSize"] == f"{len(data)} B"
    names = [row["classes/name"] for row in value["recordSet"][0]["data"]]
    assert names == list(pack.classes)


def test_card_has_the_evaluation_of_this_pack_only(hub: LoopbackHub, file: Path) -> None:
    entry = {"title": "pack | 10", "bytes": 45064.0, "last": {"mean": 0.4321, "std": 0.01},
           "runs": [{}, {}, {}]}  # fmt: skip
    record = {
        "pack": {"root": make_pack().root},
        "facts": {"student": "convnet3", "updates": 600, "seeds": 3, "test_images": 10000},
        "protocol": {"name": "quick"},
        "entries": [entry, {**entry, "title": "real", "bytes": None, "runs": [{}]}],
    }
    place = file.with_suffix(".eval") / "evaluation.json"
    place.parent.mkdir()
    place.write_text(json.dumps(record))
    parcel = prepare_push(file, "org/set", PROBES)
    assert parcel.notes[0] == f"the accuracies on the card are those that {place} says"
    readme = parcel.files["README.md"].decode()
    assert r"| pack \| 10 | 45,064 | 43.2 ± 1.0 |" in readme
    assert "| real | - | 43.2 |" in readme
    assert "protocol `quick`: 600 updates, 3 seeds, tested on 10,000 real images" in readme
    record["pack"] = {"root": "0" * 64}
    place.write_text(json.dumps(record))
    parcel = prepare_push(file, "org/set", PROBES)
    assert "left out" in parcel.notes[0]
    with pytest.raises(UsageError, match="is about the pack 0000"):
        prepare_push(file, "org/set", replace(PROBES, evaluation=place))
    place.write_text("{}")
    with pytest.raises(UsageError, match="is not a record of"):
        prepare_push(file, "org/set", PROBES)
    with pytest.raises(NotFoundError):
        prepare_push(file, "org/set", replace(PROBES, evaluation=file.with_suffix(".nothing")))


@pytest.mark.parametrize(
    "name", ["my pack.d3m", "a[1].d3m", "50%.d3m", "a#b.d3m", "a%20b.d3m", "日本.d3m"]
)
def test_a_pack_of_any_name_is_pushed_and_opened_by_its_address(
    hub: LoopbackHub, file: Path, name: str
) -> None:
    pushed = sent(file.rename(file.with_name(name)))
    assert name in files_at(hub)
    assert pushed.address.file == name
    assert load(str(pushed.address)).root == make_pack().root
    (config,) = yaml_of(files_at(hub)["README.md"].decode())["configs"]
    pattern = config["data_files"][0]["path"]
    assert fnmatchcase(f"preview/{name.removesuffix('.d3m')}.parquet", pattern)


@pytest.mark.parametrize("name", ["../a.d3m", "a.tar", "a\\b.d3m", "a\n.d3m", ""])
def test_names_that_no_file_of_a_repository_has_are_refused(file: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"invalid (file name|path)"):
        prepare_push(file, "org/set", replace(PROBES, name=name or "/a.d3m"))


@pytest.mark.posix
def test_a_pipe_and_a_folder_are_no_packs(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.d3m")
    (tmp_path / "folder.d3m").mkdir()
    for name in ("pipe.d3m", "folder.d3m"):
        with pytest.raises(UsageError, match="is not a regular file"):
            prepare_push(tmp_path / name, "org/set", PROBES)
        done = invoke("view", tmp_path / name, "--no-open")
        assert (done.exit_code, "is not a regular file" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    "changes",
    [
        {"facts": None},
        {"facts": {"student": "s", "updates": "<b>", "seeds": 1, "test_images": 1}},
        {"facts": {"student": "s", "updates": 10**400, "seeds": 1, "test_images": 1}},
        {"protocol": {"name": ["quick"]}},
        {"entries": {"title": "x"}},
        {"entries": [{"title": "x", "bytes": 1, "last": {"mean": "1", "std": 0}, "runs": []}]},
        {"entries": [{"title": "x", "bytes": 1, "last": {"mean": 1e999, "std": 0}, "runs": []}]},
        {"entries": [{"title": "\ud800", "bytes": 1, "last": {"mean": 1, "std": 0}, "runs": []}]},
        "[" * 100_000,
        "1" * 10_000,
    ],
)
def test_wrong_evaluation_is_refused_in_one_line(file: Path, changes: Any) -> None:
    record = {
        "pack": {"root": make_pack().root},
        "facts": {"student": "convnet3", "updates": 600, "seeds": 3, "test_images": 10000},
        "protocol": {"name": "quick"},
        "entries": [],
    }
    text = changes if isinstance(changes, str) else json.dumps({**record, **changes})
    place = file.with_suffix(".eval") / "evaluation.json"
    place.parent.mkdir()
    place.write_text(text)
    with pytest.raises(UsageError, match=r"evaluation\.json is not a record of `d3pack eval`"):
        prepare_push(file, "org/set", PushSettings(preview="none"))


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Pack]:
    """A backbone, and a pack whose probes are of it."""
    root = tiny_sd(tmp_path_factory.mktemp("tiny") / "sd")
    pack = tiny_pack(root)
    with Decoder(pack, path=root) as decoder:
        return root, replace(pack, probes=make_probes(decoder, [(0, 0), (2, 1)], (64, 64)))


def with_wrong_probes(pack: Pack) -> Pack:
    assert pack.probes is not None
    return replace(pack, probes=replace(pack.probes, images=255 - pack.probes.images))


@pytest.mark.parametrize("preview", ["decode", "probes", "none"])
@pytest.mark.parametrize("given", [True, False])
def test_probes_of_another_backbone_are_not_published(
    tiny: tuple[Path, Pack], tmp_path: Path, preview: Any, given: bool
) -> None:
    root, right = tiny
    if given:
        ref = replace(right.recipe.backbone, repo="org/none")
        right = replace(right, recipe=replace(right.recipe, backbone=ref))
    else:
        copytree(root, tmp_path / "a.backbone")
    settings = PushSettings(preview=preview, backbone=root if given else None, device="cpu")
    write(right, tmp_path / "a.d3m")
    assert prepare_push(tmp_path / "a.d3m", "org/set", settings).notes == ()
    write(with_wrong_probes(right), tmp_path / "a.d3m")
    with raises_code("E_BACKBONE", match="wrong backbone: 2 probes, rms") as caught:
        prepare_push(tmp_path / "a.d3m", "org/set", settings)
    assert caught.value.exit_code == 4


@pytest.mark.heavy
def test_probes_are_checked_with_the_embedded_backbone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    right = read(ROOT / "examples" / "cifar10.d3m")
    settings = PushSettings(preview="probes", device="cpu")
    write(right, tmp_path / "a.d3m")
    assert prepare_push(tmp_path / "a.d3m", "org/set", settings).notes == ()
    write(with_wrong_probes(right), tmp_path / "a.d3m")
    with raises_code("E_BACKBONE", match="wrong backbone"):
        prepare_push(tmp_path / "a.d3m", "org/set", settings)


def test_probes_that_take_all_memory_are_not_rebuilt_for_a_push(tmp_path: Path) -> None:
    pack = read(ROOT / "examples" / "cifar10.d3m")
    huge = replace(pack, recipe=replace(pack.recipe, group=1024, size=(2048, 2048)))
    write(huge, tmp_path / "a.d3m")
    settings = PushSettings(preview="none", device="cpu")
    (note,) = prepare_push(tmp_path / "a.d3m", "org/set", settings).notes
    assert note.startswith("the probes were not checked: probes in groups of 1024 images")


def test_a_preview_that_takes_all_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = read(ROOT / "examples" / "cifar10.d3m")
    huge = replace(pack, recipe=replace(pack.recipe, group=1024, size=(2048, 2048)))
    write(huge, tmp_path / "a.d3m")
    monkeypatch.setattr("d3pack.decode.Decoder", None)
    with raises_code("E_LONG", match="images of the preview in groups of 1024.*--preview probes"):
        prepare_push(tmp_path / "a.d3m", "org/set", PushSettings(device="cpu"))


@pytest.mark.heavy
def test_a_preview_says_how_long_it_takes_and_hours_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    write(read(ROOT / "examples" / "cifar10.d3m"), tmp_path / "a.d3m")
    settings = PushSettings(preview_images=20, device="cpu")
    shown: list[tuple[int, int]] = []

    def progress(done: int, total: int) -> None:
        shown.append((done, total))

    with caplog.at_level("INFO", "d3pack"):
        prepare_push(tmp_path / "a.d3m", "org/set", settings, progress=progress)
    assert "20 images for the preview, about" in caplog.text
    assert len(shown) > 20
    assert shown == sorted(shown)
    assert shown[-1] == (20, 20)
    monkeypatch.setattr("d3pack.decode.limits.LONG", 1e-6)
    with raises_code("E_LONG", match="images of the preview take about .* on this machine"):
        prepare_push(tmp_path / "a.d3m", "org/set", settings)


def test_probes_are_said_to_be_unchecked_where_the_backbone_is_not_here(
    hub: LoopbackHub, file: Path
) -> None:
    for preview in ("probes", "none"):
        (note,) = prepare_push(file, "org/set", replace(PROBES, preview=preview)).notes
        assert note.startswith("the probes were not checked")
    assert hub.seen == []
    write(make_pack(full=False), file)
    assert prepare_push(file, "org/set", PushSettings(preview="none")).notes == ()


def test_card_shows_hostile_names_and_values_as_text(tmp_path: Path) -> None:
    evil = ("<script>x</script>", "[a](http://x)", "a|b", "```", "é 日本", "$x$")
    pack = replace(
        make_pack(len(evil), full=False), classes=evil, provenance={"k": "a\n## b | <b>"}
    )
    write(pack, tmp_path / "a.d3m")
    settings = PushSettings(preview="none")
    readme = prepare_push(tmp_path / "a.d3m", "org/set", settings).files["README.md"]
    text = readme.decode()
    for bad in ("<script>", "[a](", "\n## b", " a|b", "<b>"):
        assert bad not in text
    assert "é 日本" in text
    yaml_of(text)


HOSTILE = {
    "heading": "x\n\n## Licence: free",
    "link": "[click](https://evil.example)",
    "image": "![x](https://evil.example/t.png)",
    "html": "<img src=x onerror=alert(1)>",
    "code": "a`b``c [l](http://x) `",
    "table": "a | b |\n| c",
    "autolink": "see www.evil.example or https://evil.example",
    "mention": "@everyone",
    "clipboard": "\x1b]52;c;ZXZpbA==\x07",
    "direction": "abc\u202egpj.exe",
}


def card_of(pack: Pack, folder: Path) -> str:
    write(pack, folder / "a.d3m")
    parcel = prepare_push(folder / "a.d3m", "org/set", PushSettings(preview="none"))
    return parcel.files["README.md"].decode()


def elements(card: str) -> list[tuple[str, str]]:
    """Headings, links, images and HTML of a card, in order, with roots left out."""
    parser = MarkdownIt("commonmark").enable("table")
    text = re.sub("sha256%3D[0-9a-f]{64}", "sha256%3DROOT", card.partition("\n---\n")[2])
    blocks = parser.parse(text)
    tokens = [token for block in blocks for token in (block, *(block.children or ()))]
    kinds = ("heading_open", "link_open", "image", "html_inline", "html_block", "fence", "hr")
    return [(t.type, str(t.attrs.get("href", ""))) for t in tokens if t.type in kinds]


@pytest.mark.parametrize("place", ["key", "nested key", "value", "template", "licence"])
@pytest.mark.parametrize("kind", HOSTILE)
def test_card_shows_hostile_text_as_text(tmp_path: Path, kind: str, place: str) -> None:
    text, pack = HOSTILE[kind], make_pack(full=False)
    if place in ("template", "licence"):  # which the format restricts to one line of visible text
        text = re.sub(r"[\x00-\x1f\u202e]", " ", text)
    recipe, expected = pack.recipe, elements(card_of(pack, tmp_path))
    if place == "template":
        pack = replace(pack, recipe=replace(recipe, template=text))
    elif place == "licence":
        backbone = replace(recipe.backbone, licence=text)
        pack = replace(pack, recipe=replace(recipe, backbone=backbone))
    else:
        values: dict[str, Any] = {
            "key": {text: 1},
            "nested key": {"a": {text: {"b": "c"}}},
            "value": {"a": text},
        }
        pack = replace(pack, provenance=values[place])
    card = card_of(pack, tmp_path)
    assert elements(card) == expected
    assert [ch for ch in card if not ch.isprintable() and ch != "\n"] == []
    if "key" not in place:  # a key is shown as code, in which nothing is linked
        for linked in ("https://evil", "www.evil", "@everyone"):
            assert linked not in card.replace("\\@everyone", "")


def test_second_push_changes_only_what_changed(hub: LoopbackHub, file: Path) -> None:
    first = sent(file)
    again = sent(file)
    assert again.address == first.address
    write(make_pack(seed=2), file)
    second = sent(file)
    assert second.address.root == make_pack(seed=2).root != first.address.root
    assert files_at(hub)[".gitattributes"].decode().count("*.d3m") == 1
    assert d3hub.load(str(first.address)) == make_pack()


def test_push_keeps_a_readme_that_it_did_not_write(hub: LoopbackHub, file: Path) -> None:
    hub.put("org/set", {"README.md": b"# ours\n"})
    done = sent(file)
    assert files_at(hub)["README.md"] == b"# ours\n"
    assert "was kept" in done.notes[-1]
    sent(file, replace(PROBES, replace_card=True))
    assert b"## Identity" in files_at(hub)["README.md"]


def test_readme_that_is_not_utf8_is_kept(hub: LoopbackHub, file: Path) -> None:
    hub.put("org/set", {"README.md": b"\xff\xfe"})
    sent(file)
    assert files_at(hub)["README.md"] == b"\xff\xfe"


def test_push_to_private_branch_and_pull_request(hub: LoopbackHub, file: Path) -> None:
    parcel = prepare_push(file, "org/set", PROBES)
    send_push(parcel, replace(PROBES, private=True))
    assert hub.repo("org/set").private
    assert d3hub.load("org/set") == make_pack()
    done = send_push(replace(parcel, pack=parcel.pack), replace(PROBES, revision="v2"))
    assert hub.repo("org/set").refs["v2"] == done.address.revision
    write(make_pack(seed=3), file)
    parcel = prepare_push(file, "org/set", PROBES)
    before = hub.repo("org/set").refs["main"]
    done = send_push(parcel, replace(PROBES, pr=True))
    assert hub.repo("org/set").refs["main"] == before
    assert hub.repo("org/set").refs["refs/pr/1"] == done.address.revision
    assert done.web.endswith("/discussions/1")
    with pytest.raises(UsageError, match="give pr or a revision, not both"):
        PushSettings(pr=True, revision="v2")


def test_private_push_refuses_a_public_repository(hub: LoopbackHub, file: Path) -> None:
    hub.put("org/set", {"x": b"x"})
    before = hub.repo("org/set").refs["main"]
    with pytest.raises(HubError, match="is public, nothing was sent"):
        sent(file, replace(PROBES, private=True))
    assert hub.repo("org/set").refs["main"] == before
    assert hub.count("POST", "preupload|commit|batch") == 0


def test_prepare_push_makes_no_request(hub: LoopbackHub, file: Path) -> None:
    parcel = prepare_push(file, "org/set", PROBES)
    assert isinstance(parcel, Parcel)
    assert hub.seen == []


def test_push_refuses_a_commit_with_other_bytes(hub: LoopbackHub, file: Path) -> None:
    parcel = prepare_push(file, "org/set", PROBES)
    hub.fault("other_bytes", "cdn", times=99)
    with pytest.raises(
        (HubError, InvalidPackError),
        check=lambda e: isinstance(e, InvalidPackError) or e.code == "E_HUB_BYTES",
    ):
        send_push(parcel, PROBES)
    hub.faults.clear()
    lost = hub.fault("then", "/commit/", method="POST",
                     action=lambda: hub.put("org/set", {"x": b"x"}))  # fmt: skip
    assert lost.times
    send_push(parcel, PROBES)


def test_push_refuses_when_somebody_commits_in_between(hub: LoopbackHub, file: Path) -> None:
    parcel = prepare_push(file, "org/set", PROBES)
    send_push(parcel, PROBES)
    write(make_pack(seed=2), file)
    hub.fault("then", "/preupload/", method="POST",
              action=lambda: hub.put("org/set", {"x": b"x"}))  # fmt: skip
    with pytest.raises(HubError, match="changed while the commit was made; run it again"):
        sent(file)
    done = sent(file)
    assert files_at(hub)["x"] == b"x"
    assert done.address.root == make_pack(seed=2).root


@pytest.mark.parametrize(
    ("status", "path"),
    [(500, "create"), (429, "preupload"), (500, "batch"), (500, "/lfs/"), (503, "/commit/")],
)
def test_failing_hub_is_one_line_of_error(
    hub: LoopbackHub, file: Path, status: int, path: str
) -> None:
    method = "PUT" if path == "/lfs/" else "POST"
    parcel = prepare_push(file, "org/set", PROBES)
    hub.fault("status", path, method=method, status=status, times=99)
    with pytest.raises(HubError) as caught:
        send_push(parcel, PROBES)
    assert "\n" not in str(caught.value)
    hub.faults.clear()
    send_push(parcel, PROBES)
    assert d3hub.load("org/set") == make_pack()


def test_push_without_access_is_refused(
    hub: LoopbackHub, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises_code("E_HUB_ACCESS", match="may not do this with other/set"):
        send_push(prepare_push(file, "other/set", PROBES), PROBES)
    monkeypatch.delenv("HF_TOKEN")
    with raises_code("E_HUB_ACCESS", match="hf auth login"):
        sent(file)


def test_push_offline_sends_nothing(
    hub: LoopbackHub, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubOfflineError, match="a push needs the Hub; unset HF_HUB_OFFLINE"):
        sent(file)
    assert hub.seen == []


@pytest.mark.parametrize(
    ("repo", "says"),
    [("set", "expected a repository"), ("org/set/a.d3m", "expected org/name"),
     ("org/set@v1", "expected org/name"), ("../x", "expected a repository")],
)  # fmt: skip
def test_push_refuses_an_invalid_repository(file: Path, repo: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        prepare_push(file, repo, PROBES)


def test_push_refuses_an_invalid_pack(file: Path) -> None:
    with pytest.raises(NotFoundError):
        prepare_push(file.with_name("b.d3m"), "org/set", PROBES)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InvalidPackError):
        prepare_push(file, "org/set", PROBES)


HOME = "".join(("/ho", "me/kim"))


@pytest.mark.parametrize(
    "provenance",
    [{"source": {"path": f"{HOME}/photos/train"}}, {"options": ["--real", f"{HOME}/x/y"]},
     {"note": f"made from {HOME}/data on Monday"}, {"p": "C:\\Users\\kim\\x"},
     {"p": "~/secret/photos"}, {"p": f"file={HOME}/photos/train"}],
)  # fmt: skip
def test_local_paths_are_not_published(file: Path, provenance: dict[str, Any]) -> None:
    write(replace(make_pack(), provenance=provenance), file)
    with pytest.raises(UsageError, match="holds a local path"):
        prepare_push(file, "org/set", PROBES)


def test_remote_paths_are_published(file: Path) -> None:
    provenance = {
        "source": "hf://datasets/org/cats/train", "url": "https://example.com/a/b",
        "relation": "and/or/not", "rate": "1/2", "sha256": "0" * 64,
    }  # fmt: skip
    pack: Pack = replace(make_pack(), provenance=provenance)
    write(pack, file)
    prepare_push(file, "org/set", PROBES)


def test_secrets_are_not_published(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"README\.md holds the Hub token"):
        prepare_push(file, "org/set", replace(PROBES, source="with hf_loopback"))
    monkeypatch.setenv("HOME", "/somewhere/kim")
    with pytest.raises(UsageError, match=r"README\.md holds the home directory"):
        prepare_push(file, "org/set", replace(PROBES, source="from /somewhere/kim/cats"))


def test_push_sends_nothing_about_this_machine(hub: LoopbackHub, file: Path) -> None:
    import getpass
    import platform

    parcel = prepare_push(file, "org/set", PROBES)
    texts = b"".join(data for path, data in parcel.files.items() if path != "a.d3m")
    for private in (str(file.parent), str(Path.home()) + "/", platform.node(), hub.url):
        assert private.encode() not in texts, private
    assert not re.search(rf"\b{re.escape(getpass.getuser())}/".encode(), texts)
