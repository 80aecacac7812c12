"""Tasks: `nox -l` lists them, `nox -s gate` runs one. Each works in an environment of its own.

Arguments after `--` go to the tool: `nox -s fast -- tests/format`, `nox -s bench -- decode`.
With `nox --no-venv --no-install` a task runs in the active environment and installs nothing.
"""

from __future__ import annotations

import nox

nox.needs_version = ">=2024.4.15"
nox.options.sessions = ["lint", "fast"]
nox.options.reuse_existing_virtualenvs = True

PINS = ("-c", "constraints.txt")


def _install(session: nox.Session, extra: str) -> None:
    session.install(*PINS, "-e", f".[{extra}]")


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    _install(session, "test")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")
    session.run("mypy")


@nox.session
def fast(session: nox.Session) -> None:
    """Run the fast tier of the tests: under three minutes on two cores."""
    _install(session, "test")
    session.run("pytest", *session.posargs)


@nox.session
def gate(session: nox.Session) -> None:
    """Run all tests that a change has to pass."""
    _install(session, "test")
    session.run("pytest", "-m", "not slow", *session.posargs)


@nox.session
def slow(session: nox.Session) -> None:
    """Run the tests that take minutes each; before a release."""
    _install(session, "test")
    session.run("pytest", "-m", "slow", *session.posargs)


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site into site/; `nox -s docs -- serve` shows it while you write.

    It carries the viewer if that was built before: `nox -s viewer docs`.
    """
    # the pages are made from the source as it stands: neither torch nor d3pack is installed
    project = nox.project.load_toml("pyproject.toml")["project"]
    session.install(*PINS, *project["optional-dependencies"]["docs"])
    quiet = {"NO_MKDOCS_2_WARNING": "1"}  # an advertisement for a successor
    session.run("mkdocs", *(session.posargs or ["build", "--strict"]), env=quiet)


@nox.session
def viewer(session: nox.Session) -> None:
    """Build the viewer into viewer/dist, with the networks of mini; needs Node.js 20 or newer."""
    _install(session, "mini")
    session.install(*PINS, "onnx")
    session.run("python", "viewer/export_onnx.py")
    with session.chdir("viewer"):
        session.run("npm", "ci", external=True)
        session.run("npm", "run", "build", external=True)


@nox.session
def viewer_tests(session: nox.Session) -> None:
    """Test what `nox -s viewer` built, under Node.js and in Chromium or Chrome; none is skipped."""
    _install(session, "test")
    every = {"D3PACK_TEST_VIEWER": "1"}
    session.run("pytest", "-m", "slow", "tests/cli/test_viewer.py", *session.posargs, env=every)


@nox.session
def bench(session: nox.Session) -> None:
    """Run a benchmark: `nox -s bench -- NAME`."""
    _install(session, "test")
    session.run("python", "-m", "benchmarks", *session.posargs)
