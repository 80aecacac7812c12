"""The benchmark of a trained student that is sent in place of a pack."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from encode_world import make_tree
from evaluate_world import BLINK
from tiny_backbones import tiny_pack, tiny_sd

from benchmarks import readme, sent_student, table
from benchmarks.sent_student import Sent, SentConvNet, count_bytes, pack_weights, widest
from d3pack.format import write
from d3pack.students import PROTOCOLS

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("bits", sent_student.BITS)
def test_what_is_sent_is_what_was_trained(bits: int) -> None:
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)
    protocol = replace(BLINK.settled(3, size=32), normalise=(mean, std))
    sent = Sent(protocol, 3, 32, 3000)
    width = widest(3, 32, bits, 3000)
    assert count_bytes(3, 32, width, bits) <= 3000 < count_bytes(3, 32, width + 1, bits)
    model = SentConvNet(3, 32, width, bits).eval()
    with torch.no_grad():
        for vector in model.vectors():
            vector.copy_(vector.half())
    data = pack_weights(model, bits)
    assert len(data) == count_bytes(3, 32, width, bits)
    images = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    pixels = images.float() / 255 - torch.tensor(mean)[:, None, None]
    with torch.no_grad():
        expected = model(pixels / torch.tensor(std)[:, None, None])
    torch.testing.assert_close(sent.receive(data, bits)(images), expected, rtol=1e-4, atol=1e-4)


def test_a_table_of_sent_students(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D3PACK_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(sent_student, "RESULTS", tmp_path)
    monkeypatch.setattr(sent_student, "load", lambda _: read())
    monkeypatch.setattr(table, "NAMED", 2)
    monkeypatch.setitem(PROTOCOLS, "quick", BLINK)
    for name, value in {"BITS": (2,), "UPDATES": 2, "PILOT_UPDATES": 1, "HELD_BACK": 2}.items():
        monkeypatch.setattr(sent_student, name, value)

    def read() -> dict[str, object]:
        path = tmp_path / "sent_student.json"
        return json.loads(path.read_text(encoding="utf-8"))["figures"] if path.exists() else {}

    # images of the pack and of class names have 64 pixels, those of the data set 32
    pack = tiny_pack(tiny_sd(tmp_path / "sd"), images=4)
    for part, count in (("train", 12), ("test", 5)):
        make_tree(tmp_path / "real" / part, classes=pack.classes, count=count)
    (tmp_path / "packs").mkdir()
    write(pack, tmp_path / "packs" / "toy-9000.d3m")
    words = f"toy --real {tmp_path}/real --work {tmp_path}/work --packs {tmp_path}/packs"
    words += f" --backbone {tmp_path}/sd --budgets 9000 --other vit6 --protocol quick"
    sent_student.main([*words.split(), "--seeds", "1"])
    sent_student.main([*words.split(), "--seeds", "2"])
    found = read()["toy"]["9000"]  # type: ignore[index]
    total = pack.ledger().total
    assert found["pack"] == {"bytes": total, "root": pack.root}
    assert set(found["runs"]) == {"0", "1"}
    for run in found["runs"].values():
        assert run["bytes"] <= total
        assert {"own", "pack", "sent student labels images of class names"} < set(run)
    monkeypatch.setattr(sent_student, "UPDATES", 3)
    sent_student.main([*words.split(), "--seeds", "1"])
    assert set(read()["toy"]["9000"]["runs"]) == {"0"}, "others are of another training"  # type: ignore[index]


def test_readme_says_what_the_sent_student_knows_and_passes_on() -> None:
    facts = {
        "bits": 3, "other": "vit6", "protocol": "standard", "updates": 30_000,
        "pack": {"bytes": 3757},
    }  # fmt: skip
    run = {"own": 0.5, "sent student labels images of class names": 0.25, "pack": 0.4}
    one = {"cifar10": {"6000": {**facts, "runs": {"0": run}}}}
    text = " ".join(readme.sent(one).split())
    assert "of 3 bits a weight that fits into the 3,757 B of the pack of 6 kB" in text
    assert "recognises 50.0 % of its test images (one run, as those that follow)" in text
    assert "it reaches 25.0 %; taught by the pack, 40.0 % (protocol" in text
    more = {"cifar10": {"6000": {**facts, "runs": {"0": run, "1": {**run, "own": 0.6}}}}}
    assert "recognises 55.0 ± 7.1 %" in readme.sent(more)
    assert readme.sent({}) == readme.SENT_NOT_YET
