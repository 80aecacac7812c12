"""The pages of docs/: links lead somewhere, commands and imports exist, words stand once."""

from __future__ import annotations

import ast
import re
import shlex
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from places import ROOT, load

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
CLI = (ROOT / "spec" / "cli.md").read_text(encoding="utf-8")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(DOCS)))


def text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text(page), flags=re.DOTALL | re.MULTILINE)


def verbs() -> dict[str, set[str]]:
    """Return the options of each verb, as the generated reference lists them."""
    sections = re.split(r"^## d3pack (.+)$", CLI, flags=re.MULTILINE)[1:]
    options = re.compile(r"`(--?[\w-]+)`")
    return {
        name: set(options.findall(body))
        for name, body in zip(sections[::2], sections[1::2], strict=True)
    }


def commands() -> Iterator[tuple[Path, str]]:
    for page in [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"]:
        for block in blocks(page, "sh"):
            for line in block.splitlines():
                line = line.split("  #")[0].strip()
                if line.startswith("d3pack "):
                    yield page, line


@pages
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text(page)):
        assert (page.parent / target).exists(), target


@pages
def test_included_files_exist(page: Path) -> None:
    included = re.findall(r'^ *--8<-- "([^"]+)"$', text(page), flags=re.MULTILINE)
    assert len(included) == text(page).count("--8"), "an include that mkdocs does not know"
    included += re.findall(r"^source: (.+)$", text(page), flags=re.MULTILINE)
    for path in included:
        assert (ROOT / path).is_file(), path


def test_pages_include_all_examples_but_the_packs() -> None:
    everything = "".join(text(page) for page in DOCS.rglob("*.md"))
    for example in (ROOT / "examples").glob("*.py"):
        assert f'--8<-- "examples/{example.name}"' in everything, example.name


def test_commands_have_the_options_that_pages_use() -> None:
    known = verbs()
    seen = set()
    for page, line in commands():
        words = shlex.split(line)[1:]
        verb = " ".join(words[:2]) if words[0] == "cache" else words[0]
        if verb == "demo" and verb not in known:
            continue
        seen.add(verb)
        used = {word.split("=")[0] for word in words if re.match(r"--?[a-z]", word)}
        assert used <= known[verb] | {"--help"}, f"{page.name}: {line}"
    assert len(seen) > 8


def test_guide_to_methods_names_options_that_exist() -> None:
    page = text(DOCS / "guides" / "choosing-a-method.md")
    options = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page))
    assert len(options) > 12
    assert options <= verbs()["encode"] | verbs()["code"] | {"--help"}


@pages
def test_python_of_pages_compiles_and_imports_what_exists(page: Path) -> None:
    for block in blocks(page, "python"):
        if "--8<--" in block:
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("d3pack"):
                for alias in node.names:
                    assert hasattr(import_module(str(node.module)), alias.name), alias.name


def test_api_page_names_what_exists() -> None:
    names = re.findall(r"^::: (\S+)$", text(DOCS / "api.md"), flags=re.MULTILINE)
    assert len(names) > 8
    for name in names:
        module, _, attribute = name.rpartition(".")
        found = getattr(import_module(module), attribute)
        assert found.__doc__, name


def test_glossary_explains_each_word_once() -> None:
    rows = re.findall(r"^\| (\*\*.+?) \| .+ \| .* \|$", text(DOCS / "glossary.md"), re.MULTILINE)
    words = [word for row in rows for word in re.findall(r"\*\*(.+?)\*\*", row)]
    assert len(words) > 60
    assert len(set(words)) == len(words)


def test_the_threat_model_names_code_and_tests_that_exist() -> None:
    """A defence that was renamed or removed must not stay in the list."""
    text = (ROOT / "docs/security.md").read_text(encoding="utf-8")
    rows = [line.split(" | ")[1:] for line in text.splitlines() if line.startswith("| ")]
    code = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "d3pack").rglob("*.py"))
    tests = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("*.py"))
    names = [(name, code) for answer, _ in rows for name in re.findall(r"`([\w.]+)`", answer)]
    names += [(name, tests) for _, held in rows for name in re.findall(r"`(test_\w+)`", held)]
    assert len(names) > 40
    for name, where in names:
        last = name.rpartition(".")[2]
        assert re.search(rf"(def|class) {last}\b|^ *{last}\b.*=|: {last}\b", where, re.M) or (
            last in {"view", "pull", "verify", "decode"}
        ), name
    for path in re.findall(r"`((?:tests|spec)/[\w./]+)`", text):
        assert (ROOT / path).exists(), path


def test_the_site_links_to_its_own_viewer_where_it_has_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hooks = load(DOCS / "hooks.py")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (site,) = re.findall(r"^site_url: (.+)$", settings, flags=re.MULTILINE)
    published = f"{site}viewer/"
    assert published in settings
    assert f"]({published}" in text(DOCS / "guides" / "viewer.md")

    (tmp_path / "dist").mkdir()
    (tmp_path / "dist" / "index.html").write_text("<p>page</p>", encoding="utf-8")
    config = {"site_url": site, "site_dir": str(tmp_path / "site")}
    own = {
        "": "viewer/",
        "guides/viewer/": "../../viewer/",
        "guides/viewer.html": "../viewer/",
    }
    for name, places in (("none", dict.fromkeys(own, published)), ("dist", own)):
        monkeypatch.setattr(hooks, "VIEWER", tmp_path / name)
        for url, place in places.items():
            link = f'<a href="{published}?pack=a.d3m" data-md-component="source">b</a>'
            made = hooks.on_post_page(link, page=SimpleNamespace(url=url), config=config)
            assert made == f'<a href="{place}?pack=a.d3m">b</a>'  # which asks no other server
        hooks.on_post_build(config=config)
        assert (tmp_path / "site" / "viewer" / "index.html").exists() == (name == "dist")


def test_nox_sessions_that_are_named_exist() -> None:
    tree = ast.parse((ROOT / "noxfile.py").read_text(encoding="utf-8"))
    sessions = {
        node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list
    }
    named = set()
    patterns = (
        "*.md",
        "noxfile.py",
        ".github/workflows/*.yml",
        "docs/hooks.py",
        "viewer/README.md",
    )
    places = [*PAGES, *(path for pattern in patterns for path in ROOT.glob(pattern))]
    for page in places:
        for names in re.findall(r"nox -s ((?:[a-z_]+ ?)+)", text(page)):
            named.update(names.split())
    assert {"docs", "viewer", "viewer_tests"} <= named <= sessions | {"NAME"}
