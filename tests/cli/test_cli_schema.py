"""What `--format json` prints fits the committed schema, verb by verb, on real outputs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from cli import invoke
from cli_schema import SCHEMA, check_output
from dataset_packs import tiny_pack
from encode_world import make_tree
from places import ROOT, load
from tiny_backbones import tiny_sd

import d3pack
from d3pack.cli._command import all_verbs
from d3pack.dataset import StoreIdentity
from d3pack.dataset.disk import open_disk_store
from d3pack.decode import Decoder, make_probes


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a backbone, two packs, a file that is none, and a few pictures."""
    room = tmp_path_factory.mktemp("world")
    tiny_sd(room / "sd")
    pack = tiny_pack(room / "sd", classes=2, images=2, labels=True)
    probes = make_probes(Decoder(pack, path=room / "sd"), [(0, 0), (1, 1)], (16, 16))
    d3pack.write(replace(pack, probes=probes), room / "a.d3m")
    d3pack.write(pack.first(1), room / "b.d3m")
    (room / "bad.d3m").write_bytes(b"\0" * 80)
    make_tree(room / "photos", count=6)
    return room


def test_the_committed_schema_is_what_the_generator_makes() -> None:
    made = load(ROOT / "spec" / "make_cli_schema.py").schema()
    assert (ROOT / "spec" / "cli.schema.json").read_text(encoding="utf-8") == made


def test_every_schema_is_checked_with_a_real_output() -> None:
    here = {verb for verb, _, _ in CALLS}
    assert here.isdisjoint(ELSEWHERE)
    assert here | set(ELSEWHERE) == set(SCHEMA["$defs"])
    for verb, file in ELSEWHERE.items():
        text = (ROOT / "tests" / file).read_text(encoding="utf-8")
        assert "check_output(" in text
        assert f'"{verb}"' in text


def test_every_verb_has_its_schema() -> None:
    assert {name.split(" (")[0].split(" --")[0] for name in SCHEMA["$defs"]} == set(all_verbs())


CALLS = [
    ("info", "info a.d3m", 0),
    ("verify", "verify a.d3m bad.d3m", 3),
    ("verify", "verify a.d3m --decode --backbone sd", 0),
    ("diff", "diff a.d3m b.d3m", 1),
    ("diff", "diff a.d3m a.d3m", 0),
    ("preview", "preview a.d3m -o a.png --backbone sd", 0),
    ("decode", "decode a.d3m -o images --backbone sd", 0),
    ("cache ls", "cache ls", 0),
    ("cache verify", "cache verify", 0),
    ("cache rm", "cache rm --all", 0),
    ("push --dry-run", "push a.d3m org/name --dry-run --backbone sd", 0),
    ("encode --dry-run", "encode photos -o p.d3m --backbone sd --dry-run", 0),
    ("code --dry-run", "code photos -o c.d3m --backbone sd --dry-run", 0),
    ("env", "env", 0),
]
# where the output of other verbs is checked, because a test makes it there anyway
ELSEWHERE = {
    "view": "cli/test_view.py",
    "encode (an event a line)": "cli/test_cli_schema.py",
    "code (an event a line)": "encode/test_encode_codes.py",
    "merge (an event a line)": "encode/test_encode_shards.py",
    "train (an event a line)": "cli/test_cli_train.py",
    "eval": "evaluate/test_evaluate_run.py",
    "eval --shard": "evaluate/test_evaluate_shards.py",
    "export-embeddings": "encode/test_encode_embeddings.py",
    "import-embeddings": "encode/test_encode_embeddings.py",
    "pull": "hub/test_hub_cli.py",
    "push": "hub/test_hub_cli.py",
    "demo": "cli/test_demo.py",
}


@pytest.mark.parametrize(("verb", "call", "code"), CALLS, ids=[call for _, call, _ in CALLS])
def test_output_fits_the_schema(
    world: Path, monkeypatch: pytest.MonkeyPatch, verb: str, call: str, code: int
) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("D3PACK_HOME", str(world / "home"))
    if verb.startswith("cache"):  # something to list
        identity = StoreIdentity("a", "exact", "cpu", "torch", 1, (3, 4, 4))
        store = open_disk_store(world / "home", identity, 1 << 20)
        assert store is not None
        store.close()
    done = invoke(*call.split(), "--format", "json")
    assert done.exit_code == code, done.exception
    check_output(verb, done.stdout)


@pytest.mark.heavy
def test_encode_tells_an_event_a_line(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(world)
    monkeypatch.setenv("D3PACK_HOME", str(world / "home"))
    few = "--steps 2 --cool 1 --ipc 1 --teacher-samples 60 --sampler-steps 2 --probes 1"
    words = f"encode photos -o made.d3m --backbone sd {few} --format json".split()
    done = invoke(*words)
    assert done.exit_code == 0, done.exception
    events = check_output("encode (an event a line)", done.stdout)
    assert events[-1]["event"] == "done"
    assert events[-1]["root"] == d3pack.read(world / "made.d3m").root
