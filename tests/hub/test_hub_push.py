"""Push: one commit that is read back, a card that tells all, and nothing private in it."""

from __future__ import annotations

import hashlib
import io
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hub_loopback import LoopbackHub
from hub_packs import make_pack
from huggingface_hub import constants
from tiny_backbones import tiny_pack, tiny_sd

from d3pack import Decoder, write
from d3pack import hub as d3hub
from d3pack.backbones import lock
from d3pack.dataset import D3MDataset
from d3pack.errors import HubError, HubOfflineError, InvalidPackError, NotFoundError, UsageError
from d3pack.format.pack import Pack
from d3pack.hub import preview
from d3pack.hub.push import ATTRIBUTES, Options, Parcel, prepare, send
from d3pack.testing import raises_code

pytestmark = [
    pytest.mark.usefixtures("login"),
    # huggingface_hub's own upload asks its HTTP library in a way that is on its way out.
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),
]
PROBES = Options(licence="cc-by-4.0", source="random numbers (CC0)", preview="probes")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    folder = tmp_path / "packs"
    folder.mkdir()
    write(make_pack(), folder / "a.d3m")
    return folder / "a.d3m"


def yaml_of(readme: str) -> dict[str, Any]:
    head = re.match(r"---\n(.*?)\n---\n", readme, re.DOTALL)
    assert head is not None
    value: dict[str, Any] = yaml.safe_load(head[1])
    return value


def files_at(hub: LoopbackHub, revision: str = "main", name: str = "org/set") -> dict[str, bytes]:
    repo = hub.repo(name)
    return {path: blob.data for path, blob in repo.commits[str(repo.resolve(revision))].items()}


def test_push_pull_decode_gives_the_same_root_and_the_same_images(
    hub: LoopbackHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    root = tiny_sd(tmp_path / "sd")
    hub.put("org/tiny", {p.relative_to(root).as_posix(): p.read_bytes()
                         for p in root.rglob("*") if p.is_file()}, kind="models")  # fmt: skip
    made = tiny_pack(root)
    ref, _ = lock("org/tiny")
    pack = replace(made, recipe=replace(made.recipe, backbone=ref))
    write(pack, tmp_path / "tiny.d3m")
    wanted = Decoder(pack).images(range(len(pack)))

    done = send(prepare(tmp_path / "tiny.d3m", "org/set", Options()))
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
    shown = preview.pairs_to_show(pack)
    assert table["label"].to_pylist() == [c for c, _ in shown]
    first = Image.open(io.BytesIO(table["image"][0]["bytes"].as_py()))
    assert first.tobytes() == wanted[0].permute(1, 2, 0).numpy().tobytes()


def test_one_commit_holds_all_and_is_read_back(hub: LoopbackHub, file: Path) -> None:
    done = send(prepare(file, "org/set", PROBES))
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
    }  # fmt: skip
    assert held["a.d3m"] == file.read_bytes()
    assert hub.repo("org/set").commits[str(done.address.revision)]["a.d3m"].lfs
    lines = held[".gitattributes"].decode().splitlines()
    assert lines.count(ATTRIBUTES) == 1
    assert any(line.startswith("*.parquet") for line in lines)  # the Hub's own lines stay
    assert hub.count("GET", "a.d3m|cdn") >= 1
    assert d3hub.load("org/set") == pack


def test_the_card_tells_all(hub: LoopbackHub, file: Path) -> None:
    send(prepare(file, "org/set", PROBES))
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
    (usage,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(usage.strip().splitlines()) == 3


def test_the_viewer_and_croissant_agree_with_the_pack(hub: LoopbackHub, file: Path) -> None:
    send(prepare(file, "org/set", PROBES))
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


def test_the_accuracy_record_goes_along_when_it_is_of_this_pack(
    hub: LoopbackHub, file: Path
) -> None:
    arm = {"title": "pack | 10", "bytes": 45064.0, "last": {"mean": 0.4321, "std": 0.01},
           "runs": [{}, {}, {}]}  # fmt: skip
    record = {
        "pack": {"root": make_pack().root},
        "facts": {"student": "convnet3", "updates": 600, "seeds": 3, "test_images": 10000},
        "preset": {"name": "quick"},
        "arms": [arm, {**arm, "title": "real", "bytes": None, "runs": [{}]}],
    }
    place = file.with_suffix(".eval") / "evaluation.json"
    place.parent.mkdir()
    place.write_text(json.dumps(record))
    readme = prepare(file, "org/set", PROBES).files["README.md"].decode()
    assert r"| pack \| 10 | 45,064 | 43.2 ± 1.0 |" in readme
    assert "| real | - | 43.2 |" in readme
    assert "preset `quick`: 600 updates, 3 seeds, tested on 10,000 real images" in readme
    record["pack"] = {"root": "0" * 64}
    place.write_text(json.dumps(record))
    parcel = prepare(file, "org/set", PROBES)
    assert "left out" in parcel.notes[0]
    with pytest.raises(UsageError, match="is about the pack 0000"):
        prepare(file, "org/set", replace(PROBES, record=place))
    place.write_text("{}")
    with pytest.raises(UsageError, match="no record of"):
        prepare(file, "org/set", PROBES)
    with pytest.raises(NotFoundError):
        prepare(file, "org/set", replace(PROBES, record=file.with_suffix(".nothing")))


def test_names_from_a_file_do_nothing_in_the_card(tmp_path: Path) -> None:
    evil = ("<script>x</script>", "[a](http://x)", "a|b", "```", "é 日本", "$x$")
    pack = replace(
        make_pack(len(evil), full=False), classes=evil, provenance={"k": "a\n## b | <b>"}
    )
    write(pack, tmp_path / "a.d3m")
    readme = prepare(tmp_path / "a.d3m", "org/set", Options(preview="none")).files["README.md"]
    text = readme.decode()
    for bad in ("<script>", "[a](", "\n## b", " a|b", "<b>"):
        assert bad not in text
    assert "é 日本" in text
    yaml_of(text)


def test_a_second_push_changes_only_what_changed(hub: LoopbackHub, file: Path) -> None:
    first = send(prepare(file, "org/set", PROBES))
    again = send(prepare(file, "org/set", PROBES))
    assert again.address == first.address
    write(make_pack(seed=2), file)
    second = send(prepare(file, "org/set", PROBES))
    assert second.address.root == make_pack(seed=2).root != first.address.root
    assert files_at(hub)[".gitattributes"].decode().count("*.d3m") == 1
    assert d3hub.load(str(first.address)) == make_pack()


def test_a_readme_of_the_people_is_kept(hub: LoopbackHub, file: Path) -> None:
    hub.put("org/set", {"README.md": b"# ours\n"})
    done = send(prepare(file, "org/set", PROBES))
    assert files_at(hub)["README.md"] == b"# ours\n"
    assert "was kept" in done.notes[0]
    send(prepare(file, "org/set", PROBES), replace_card=True)
    assert b"## Identity" in files_at(hub)["README.md"]


def test_private_branch_and_pull_request(hub: LoopbackHub, file: Path) -> None:
    parcel = prepare(file, "org/set", PROBES)
    send(parcel, private=True)
    assert hub.repo("org/set").private
    assert d3hub.load("org/set") == make_pack()
    done = send(replace(parcel, pack=parcel.pack), revision="v2")
    assert hub.repo("org/set").refs["v2"] == done.address.revision
    write(make_pack(seed=3), file)
    parcel = prepare(file, "org/set", PROBES)
    before = hub.repo("org/set").refs["main"]
    done = send(parcel, pr=True)
    assert hub.repo("org/set").refs["main"] == before
    assert hub.repo("org/set").refs["refs/pr/1"] == done.address.revision
    assert done.web.endswith("/discussions/1")
    with pytest.raises(UsageError, match="--pr or --revision"):
        send(parcel, pr=True, revision="v2")


def test_a_private_pack_never_goes_to_a_public_repository(hub: LoopbackHub, file: Path) -> None:
    hub.put("org/set", {"x": b"x"})
    before = hub.repo("org/set").refs["main"]
    with pytest.raises(HubError, match="is public, nothing was sent"):
        send(prepare(file, "org/set", PROBES), private=True)
    assert hub.repo("org/set").refs["main"] == before
    assert hub.count("POST", "preupload|commit|batch") == 0


def test_prepare_makes_no_request(hub: LoopbackHub, file: Path) -> None:
    parcel = prepare(file, "org/set", PROBES)
    assert isinstance(parcel, Parcel)
    assert hub.seen == []


def test_a_commit_that_holds_other_bytes_is_found_out(hub: LoopbackHub, file: Path) -> None:
    parcel = prepare(file, "org/set", PROBES)
    hub.fault("other_bytes", "cdn", times=99)
    with pytest.raises(
        (HubError, InvalidPackError),
        check=lambda e: isinstance(e, InvalidPackError) or e.code == "E_HUB_BYTES",
    ):
        send(parcel)
    hub.faults.clear()
    lost = hub.fault("then", "/commit/", method="POST",
                     action=lambda: hub.put("org/set", {"x": b"x"}))  # fmt: skip
    assert lost.times
    send(parcel)


def test_somebody_else_commits_in_between(hub: LoopbackHub, file: Path) -> None:
    parcel = prepare(file, "org/set", PROBES)
    send(parcel)
    write(make_pack(seed=2), file)
    hub.fault("then", "/preupload/", method="POST",
              action=lambda: hub.put("org/set", {"x": b"x"}))  # fmt: skip
    with pytest.raises(HubError, match="changed while the commit was made; run it again"):
        send(prepare(file, "org/set", PROBES))
    done = send(prepare(file, "org/set", PROBES))
    assert files_at(hub)["x"] == b"x"
    assert done.address.root == make_pack(seed=2).root


@pytest.mark.parametrize(
    ("status", "path"),
    [(500, "create"), (429, "preupload"), (500, "batch"), (500, "/lfs/"), (503, "/commit/")],
)
def test_a_hub_that_fails_is_one_line_or_tried_again(
    hub: LoopbackHub, file: Path, status: int, path: str
) -> None:
    method = "PUT" if path == "/lfs/" else "POST"
    parcel = prepare(file, "org/set", PROBES)
    hub.fault("status", path, method=method, status=status, times=99)
    with pytest.raises(HubError) as caught:
        send(parcel)
    assert "\n" not in str(caught.value)
    hub.faults.clear()
    send(parcel)
    assert d3hub.load("org/set") == make_pack()


def test_who_may_not(hub: LoopbackHub, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises_code("E_HUB_ACCESS", match="may not do this with other/set"):
        send(prepare(file, "other/set", PROBES))
    monkeypatch.delenv("HF_TOKEN")
    with raises_code("E_HUB_ACCESS", match="hf auth login"):
        send(prepare(file, "org/set", PROBES))


def test_offline_nothing_is_sent(
    hub: LoopbackHub, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubOfflineError, match="a push needs the Hub; unset HF_HUB_OFFLINE"):
        send(prepare(file, "org/set", PROBES))
    assert hub.seen == []


@pytest.mark.parametrize(
    ("repo", "says"),
    [("set", "names no repository"), ("org/set/a.d3m", "more than a repository"),
     ("org/set@v1", "more than a repository"), ("../x", "names no repository")],
)  # fmt: skip
def test_what_is_no_repository(file: Path, repo: str, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        prepare(file, repo, PROBES)


def test_what_is_no_pack_is_not_sent(file: Path) -> None:
    with pytest.raises(NotFoundError):
        prepare(file.with_name("b.d3m"), "org/set", PROBES)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(InvalidPackError):
        prepare(file, "org/set", PROBES)


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
        prepare(file, "org/set", PROBES)


def test_paths_that_are_none_of_a_machine_are_published(file: Path) -> None:
    provenance = {
        "source": "hf://datasets/org/cats/train", "url": "https://example.com/a/b",
        "relation": "and/or/not", "rate": "1/2", "sha256": "0" * 64,
    }  # fmt: skip
    pack: Pack = replace(make_pack(), provenance=provenance)
    write(pack, file)
    prepare(file, "org/set", PROBES)


def test_secrets_are_not_published(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"README\.md holds the Hub token"):
        prepare(file, "org/set", replace(PROBES, source="with hf_loopback"))
    monkeypatch.setenv("HOME", "/somewhere/kim")
    with pytest.raises(UsageError, match=r"README\.md holds the home directory"):
        prepare(file, "org/set", replace(PROBES, source="from /somewhere/kim/cats"))


def test_nothing_of_this_machine_is_in_what_is_sent(hub: LoopbackHub, file: Path) -> None:
    import getpass
    import platform

    parcel = prepare(file, "org/set", PROBES)
    texts = b"".join(data for path, data in parcel.files.items() if path != "a.d3m")
    for private in (str(file.parent), str(Path.home()) + "/", platform.node(), hub.url):
        assert private.encode() not in texts, private
    assert not re.search(rf"\b{re.escape(getpass.getuser())}/".encode(), texts)
