"""Build what a release uploads: `python .ci/release.py dist`.

Writes wheel and sdist of d3pack, and of d3pack-mini in `dist/mini`. They are built from a copy of
the files that git knows, in which d3pack asks for a published d3pack-mini, not for the checkout's.
The built viewer, if viewer/dist has one, comes along: the page in d3pack, the networks of mini and
what runs them in d3pack-mini. Needs the extra `test`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NETWORKS = ("model/", "ort")  # names in the viewer: made of the weights, or ONNX Runtime
NOISE = "model/normal16.f32"  # the format's
CHECKOUT, PUBLISHED = "d3pack-mini @ {root:uri}/mini", "d3pack-mini>=1,<2"


def build(source: Path, out: Path, **variables: str) -> None:
    """Build the sdist of a project, and the wheel from that, by the tools of this environment."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(out), str(source)]
    subprocess.run(command, check=True, env={**os.environ, **variables})


def copied(folder: Path) -> Path:
    """Return a copy of the project with the requirement that releases have."""
    listed = subprocess.check_output(["git", "ls-files", "-z"], cwd=ROOT, text=True)
    for name in filter(None, listed.split("\0")):
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    project = folder / "pyproject.toml"
    text = project.read_text(encoding="utf-8")
    if CHECKOUT not in text:
        raise SystemExit(f"pyproject.toml does not have {CHECKOUT!r}")
    project.write_text(text.replace(CHECKOUT, PUBLISHED), encoding="utf-8")
    return folder


def add_viewer(built: Path, project: Path) -> None:
    """Put the built page into the package, and its networks into that of the weights."""
    page, networks = project / "d3pack/preview/viewer", project / "mini/d3pack_mini/viewer"
    for path in filter(Path.is_file, built.rglob("*")):
        name = path.relative_to(built).as_posix()
        target = (networks if name.startswith(NETWORKS) and name != NOISE else page) / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def main(out: Path) -> None:
    """Build everything into `out`."""
    version = subprocess.check_output(
        [sys.executable, "-m", "hatchling", "version"], cwd=ROOT, text=True
    ).strip()
    with tempfile.TemporaryDirectory() as folder:
        project = copied(Path(folder).resolve())
        viewer = ROOT / "viewer" / "dist"
        if (viewer / "index.html").is_file():
            add_viewer(viewer, project)
        else:
            print("viewer/dist is not built: the wheel has no viewer", file=sys.stderr)
        build(project / "mini", out / "mini")
        build(project, out, SETUPTOOLS_SCM_PRETEND_VERSION=version)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
