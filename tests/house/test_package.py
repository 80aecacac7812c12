"""What is published: a wheel and an sdist, whole, and at work in an environment of their own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest
import yaml
from places import ROOT, load

PACKAGE = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "d3pack").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}
VIEWER = "d3pack/preview/viewer/"
HAS_VIEWER = (ROOT / "viewer" / "dist" / "index.html").is_file()
SCRIPTS = "Scripts" if sys.platform == "win32" else "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a release uploads; the build tools are those of [test]."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the project cannot be listed")
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, str(ROOT / ".ci" / "release.py"), str(out)]
    subprocess.run(command, check=True, capture_output=True)
    return out


def metadata(archive: zipfile.ZipFile) -> Message:
    (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
    return message_from_bytes(archive.read(name))


@pytest.mark.e2e
def test_the_wheel_is_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        inside = {name for name in names if ".dist-info/" not in name}
        assert {name for name in inside if not name.startswith(VIEWER)} == PACKAGE
        assert (f"{VIEWER}index.html" in inside) == HAS_VIEWER
        assert not [name for name in inside if name.endswith((".safetensors", ".onnx", ".wasm"))]
        assert "d3pack/py.typed" in inside
        assert {"d3pack/preview/page.html", "d3pack/decode/normal16.f32"} <= inside
        about = metadata(archive)
        assert f"d3pack-{about['Version']}.dist-info/licenses/LICENSE" in names
    assert about["License-Expression"] == "Apache-2.0"
    assert about.get_all("License-File") == ["LICENSE"]
    # an index refuses references to files
    wishes = about.get_all("Requires-Dist", [])
    assert "d3pack-mini<2,>=1; extra == 'mini'" in wishes
    assert not [wish for wish in wishes if "@" in wish]


@pytest.mark.e2e
def test_the_weights_have_their_own_terms(built: Path) -> None:
    (wheel,) = (built / "mini").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        about = metadata(archive)
        place = f"d3pack_mini-{about['Version']}.dist-info/licenses/LICENSE"
        assert "non-commercial" in archive.read(place).decode()
        lock = json.loads(archive.read("d3pack_mini/weights/lock.json"))
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    assert about["License-Expression"] == "LicenseRef-mini-non-commercial-research AND MIT"
    assert about.get_all("License-File") == ["LICENSE", "LICENSE.onnxruntime"]
    assert ("d3pack_mini/viewer/model/denoiser.onnx" in sizes) == HAS_VIEWER
    for path, (size, _) in files(lock).items():
        assert sizes[f"d3pack_mini/weights/{path}"] == size, path


def files(lock: dict[str, object]) -> dict[str, tuple[int, str]]:
    found = lock["files"]
    assert isinstance(found, dict)
    return {path: tuple(entry) for path, entry in found.items()}


@pytest.mark.e2e
def test_the_sdist_can_build_and_test_itself(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    listed = {
        path for path in subprocess.run(
            ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split("\n") if path
    }  # fmt: skip
    weights = {name for name in listed if re.match("mini/d3pack_mini/weights/.+/", name)}
    assert listed - names <= {".gitignore", *weights}
    assert not {name for name in names if "__pycache__" in name or name.endswith(".pyc")}
    # under other terms: d3pack-mini has them
    assert not {name for name in names if name.endswith((".safetensors", ".onnx", ".wasm"))}


def test_a_checkout_asks_for_its_own_weights() -> None:
    """The one line that a release replaces; without it, the README's set-up finds no weights."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert load(ROOT / ".ci" / "release.py").CHECKOUT in project


def test_every_pin_covers_what_the_project_asks_for() -> None:
    """constraints.txt names each direct dependency; nothing comes from elsewhere."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wishes = [*project["dependencies"]]
    wishes += [wish for extra in extras for wish in extras[extra]]
    wanted = {normal(wish) for wish in wishes if not re.match(r"d3pack(\[|-mini)", wish)}
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = {normal(line) for line in lines if "==" in line}
    assert wanted <= pinned


def normal(requirement: str) -> str:
    for mark in "=<>;[ ":
        requirement = requirement.split(mark)[0]
    return requirement.lower().replace("_", "-")


@pytest.mark.e2e
def test_the_wheel_works_in_an_environment_of_its_own(built: Path, tmp_path: Path) -> None:
    """Dependencies are lent by this environment, by a path; d3pack itself is the wheel's."""
    wheels = [str(path) for path in built.rglob("*.whl")]
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / SCRIPTS / "python"
    install = ["install", "-q", "--no-index", "--no-deps", *wheels]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(python), *install], check=True)
    site = subprocess.run(
        [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    Path(site, "lent.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")

    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def run(*command: str) -> str:
        done = subprocess.run(
            [str(tmp_path / "venv" / SCRIPTS / command[0]), *command[1:]],
            capture_output=True, text=True, check=False, cwd=tmp_path, env=clean,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = run("python", "-c", "import d3pack; print(d3pack.__file__)")
    assert Path(where.strip()).is_relative_to(tmp_path)
    assert run("d3pack", "--version").strip()
    assert "cifar10" in run("d3pack", "info", str(ROOT / "examples" / "cifar10.d3m"))
    # the embedded weights came along, whole: the same images as on the machine of the example
    checked = run("d3pack", "verify", "--decode", str(ROOT / "examples" / "cifar10.d3m"))
    assert "exact" in checked or "within tolerance" in checked


def test_citation_has_what_its_schema_requires() -> None:
    """Version 1.2.0 of the format; the version of d3pack comes from the tag."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0"
    assert "version" not in citation
    for work in (citation, *citation["references"]):
        assert {"title", "type", "authors"} <= set(work)
        for author in work["authors"]:
            assert set(author) in ({"name"}, {"family-names", "given-names"})
    assert {"message", "license"} <= set(citation)
