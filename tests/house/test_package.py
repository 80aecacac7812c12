"""What is published: a wheel and an sdist, whole, and at work in an environment of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest
from places import ROOT

PACKAGE = {
    str(path.relative_to(ROOT))
    for path in (ROOT / "d3pack").rglob("*")
    if path.is_file() and path.suffix != ".pyc"
}
SCRIPTS = "Scripts" if sys.platform == "win32" else "bin"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist from a checkout, the wheel from the sdist; the build tools are those of [test]."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    return out


@pytest.mark.e2e
def test_the_wheel_is_the_package_and_nothing_else(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        inside = {name for name in names if ".dist-info/" not in name}
        assert inside == PACKAGE
        assert "d3pack/py.typed" in inside
        assert {"d3pack/preview/page.html", "d3pack/decode/normal16.f32"} <= inside
        about = {name.split(".dist-info/")[1] for name in names - inside}
        assert {"licenses/LICENSE", "licenses/d3pack/backbones/mini/README.md"} <= about
        lock = json.loads(archive.read("d3pack/backbones/mini/lock.json"))
        sizes = {info.filename: info.file_size for info in archive.infolist()}
    for path, (size, _) in files(lock).items():
        assert sizes[f"d3pack/backbones/mini/{path}"] == size, path


def files(lock: dict[str, object]) -> dict[str, tuple[int, str]]:
    found = lock["files"]
    assert isinstance(found, dict)
    return {path: tuple(entry) for path, entry in found.items()}


@pytest.mark.e2e
def test_the_sdist_can_build_and_test_itself(built: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout: what belongs to the project cannot be listed")
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    listed = {
        path for path in subprocess.run(
            ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
        ).stdout.split("\n") if path
    }  # fmt: skip
    assert listed - names <= {".gitignore"}
    assert not {name for name in names if "__pycache__" in name or name.endswith(".pyc")}


def test_every_pin_covers_what_the_project_asks_for() -> None:
    """constraints.txt names each direct dependency; nothing comes from elsewhere."""
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    wishes = [*project["dependencies"]]
    wishes += [wish for extra in extras for wish in extras[extra]]
    wanted = {normal(wish) for wish in wishes if not wish.startswith("d3pack[")}
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
    (wheel,) = built.glob("*.whl")
    venv.create(tmp_path / "venv", with_pip=False)
    python = tmp_path / "venv" / SCRIPTS / "python"
    install = ["install", "-q", "--no-index", "--no-deps", str(wheel)]
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
