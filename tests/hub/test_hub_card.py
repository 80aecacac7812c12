"""What a card tells people to paste works, as they paste it; its picture shows the images."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from cli import invoke
from PIL import Image
from places import ROOT

import d3pack
from d3pack.hub import PushSettings
from d3pack.hub.publish import prepare_push
from d3pack.hub.viewer import picture

# in the order of the card
LIBRARIES = ("torch.utils.data", "datasets", "transformers", "lightning")


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a pack of ten images, and the card that asks for the pack there."""
    folder = tmp_path_factory.mktemp("card")
    d3pack.write(d3pack.read(ROOT / "examples" / "cifar10.d3m").first(1), folder / "ten.d3m")
    parcel = prepare_push(folder / "ten.d3m", "org/ten", PushSettings(preview="none"))
    text = parcel.files["README.md"].decode()
    address = re.findall(r'D3MDataset\("(hf://.*?)"', text)
    assert len(address) == 3
    (viewer,) = re.findall(r"\]\(https://d3pack.github.io/d3pack/viewer/\?pack=([^)]*)\)", text)
    assert unquote(viewer) == address[0]
    assert len(set(address)) == 1
    return folder, text.replace(address[0], "ten.d3m")


def snippets(card: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", card, flags=re.DOTALL)


@pytest.mark.e2e
@pytest.mark.parametrize("library", LIBRARIES)
def test_snippet_of_a_library_runs_as_it_is_shown(library: str, card: tuple[Path, str]) -> None:
    if find_spec(library) is None:
        pytest.skip(f"needs {library}")
    folder, text = card
    if library == "datasets":
        (command,) = snippets(text, "sh")
        command, _, install = command.partition("  # ")
        assert install == "pip install 'd3pack[encode,mini]'\n"
        line = command.replace('"ten.d3m"', str(folder / "ten.d3m")).split()
        assert invoke(*line[1:3], "-o", folder / "images", "--to", "parquet").exit_code == 0
        assert line[:2] + line[3:] == ["d3pack", "decode", "-o", "images", "--to", "parquet"]
    code = snippets(text, "python")[LIBRARIES.index(library)]
    assert f"from {library} import" in code
    check = "\nimport json; print(json.dumps([len(data), int(sum(1 for _ in data))]))"
    env = os.environ | {"D3PACK_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code + check],
        cwd=folder, env=env, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[10, 10]"


def test_picture_has_a_column_for_each_class() -> None:
    images = np.zeros((6, 3, 8, 8), np.uint8)
    images[2:4] = 120
    images[4:] = 250
    with Image.open(io.BytesIO(picture(images, [0, 0, 1, 1, 2, 2]))) as shown:
        assert shown.size == (24, 16)
        means = np.asarray(shown.convert("L")).reshape(16, 3, 8).mean((0, 2))
    assert abs(means - [0, 120, 250]).max() < 4


def test_picture_of_many_classes_has_rows() -> None:
    images = np.zeros((23, 3, 8, 8), np.uint8)
    with Image.open(io.BytesIO(picture(images, list(range(23))))) as shown:
        assert shown.size == (80, 24)


@pytest.mark.parametrize(
    ("vector", "parts", "limit", "sampler"),
    [
        (
            "picks",
            "a learned prompt for every class, seeds, and an exact",
            None,
            "| ddim, 3 steps, guidance 2, float32 |",
        ),
        (
            "codes-mixed",
            "a learned prompt for every class, seeds, codes of 2 photographs of every class, and",
            "3 images of each class are likenesses of 2 photographs",
            "; codes of 3 levels, float32 |",
        ),
        (
            "codes-bare",
            "makes them - codes of 6 photographs of every class, and an exact",
            "6 images of each class are likenesses of 6 photographs",
            "| codes of 5 levels, float32 |",
        ),
    ],
)
def test_card_says_what_the_recipe_consists_of(
    vector: str, parts: str, limit: str | None, sampler: str
) -> None:
    file = ROOT / "spec" / "vectors" / "valid" / f"{vector}.d3m"
    parcel = prepare_push(file, "org/set", PushSettings(preview="none"))
    card = parcel.files["README.md"].decode()
    assert parts in card
    assert (limit or "Every image is synthetic") in card
    assert sampler in card
    front = card.split("---")[1]
    assert ("synthetic" in front) is (limit is None)
    croissant = json.loads(parcel.files["croissant.json"])
    assert ("synthetic" in croissant["keywords"]) is (limit is None)
    assert ("synthetic" in croissant["description"]) is (limit is None)
    likeness = "can be rebuilt from this file by anyone as a likeness of a photograph"
    assert (likeness in croissant["description"]) is (limit is not None)
