"""Recipes that break a rule of section 5."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import reader
from draft import Draft

from broken.case import Case, Edit


def cases() -> Iterator[Case]:
    source, code = "prompts-f16", "E_RECIPE"

    def put(**changes: Any) -> Edit:
        def edit(draft: Draft) -> None:
            draft.manifest["recipe"] |= changes
            draft.reroot()

        return edit

    def backbone(**changes: Any) -> Edit:
        def edit(draft: Draft) -> None:
            draft.manifest["recipe"]["backbone"] |= changes
            draft.reroot()

        return edit

    def drop(name: str) -> Edit:
        def edit(draft: Draft) -> None:
            del draft.manifest["recipe"][name]
            draft.reroot()

        return edit

    def whole(draft: Draft) -> None:
        draft.manifest["recipe"] = []
        draft.reroot()

    def unlocked(draft: Draft) -> None:
        del draft.manifest["recipe"]["backbone"]["lock"]
        draft.reroot()

    def commit(draft: Draft) -> None:
        home = draft.manifest["recipe"]["backbone"]
        home["revision"] = home["lock"][:40]
        draft.reroot()

    breaks = "the revision has its default"
    yield "default-backbone-revision", "E_CANON", breaks, source, commit
    for name, value in reader.RECIPE_DEFAULTS.items():
        breaks = f"{name} has its default"
        yield f"default-{name}".replace("_", "-"), "E_CANON", breaks, source, put(**{name: value})
    for name, value in reader.BACKBONE_DEFAULTS.items():
        breaks = f"the backbone's {name} has its default"
        yield f"default-backbone-{name}", "E_CANON", breaks, source, backbone(**{name: value})
    yield "default-boolean", code, "false for 0", source, put(guided_channels=False)
    yield "recipe-array", code, "not an object", source, whole
    yield "recipe-unknown-field", code, "an unknown field", source, put(magic=1)
    yield "recipe-missing-field", code, "no sigmas", source, drop("sigmas")
    yield "recipe-sampler", code, "an unknown sampler", source, put(sampler="magic")
    yield "recipe-dtype", code, "an unknown dtype", source, put(dtype="float8")
    yield "recipe-noise", code, "an unknown noise", source, put(noise="mt19937")
    yield (
        "recipe-sigmas-ascend",
        code,
        "sigmas in the wrong order",
        source,
        put(sigmas=[1.0, 2.0, 0.0]),
    )
    yield "recipe-sigmas-equal", code, "two equal sigmas", source, put(sigmas=[2.0, 2.0, 0.0])
    yield (
        "recipe-sigmas-close",
        code,
        "two sigmas that leave no digits between them",
        source,
        put(sigmas=[2.0, 1.0 + 1e-12, 1.0, 0.0]),
    )
    yield (
        "recipe-sigmas-tiny",
        code,
        "a sigma so small that its logarithm overflows",
        source,
        put(sigmas=[2.0, 1.0, 1e-320, 0.0]),
    )
    many = [float(i) for i in range(257, -1, -1)]
    yield (
        "recipe-lcm-many",
        code,
        "more steps than an epoch has noise",
        source,
        put(sampler="lcm", sigmas=many),
    )
    wrong_eta = {
        "none": {"rate": 1.0},
        "negative": {"eta": -0.5},
        "integer": {"eta": 1},
        "huge": {"eta": 1e4},
        "minus-zero": {"eta": -0.0},
    }
    for name, extra in wrong_eta.items():
        yield (
            f"recipe-ancestral-{name}",
            code,
            f"an eta that is {name}",
            source,
            put(sampler="ancestral", extra=extra),
        )
    yield (
        "recipe-ancestral-many",
        code,
        "noise for more steps than an epoch has",
        source,
        put(sampler="ancestral", sigmas=many, extra={"eta": 1.0}),
    )
    yield "recipe-table-none", code, "a sampler table without rows", source, put(sampler="table")
    rows = [[0.5, [0.5]], [0.25, [1.0]], [0.0, [1.0]]]
    wrong: dict[str, tuple[str, Any]] = {
        "few": ("a row less than steps", rows[:2]),
        "back": ("a first row that reaches back", [[0.5, [0.5, 0.5]], *rows[1:]]),
        "empty": ("a row without b", [*rows[:2], [0.0, []]]),
        "text": ("a number as text", [*rows[:2], ["0.0", [1.0]]]),
        "bool": ("a truth value as number", [*rows[:2], [0.0, [True]]]),
        "flat": ("a row of numbers", [*rows[:2], [0.0, 1.0]]),
    }
    for name, (breaks, table) in wrong.items():
        yield (
            f"recipe-table-{name}",
            code,
            breaks,
            source,
            put(sampler="table", extra={"table": table}),
        )
    yield "recipe-sigmas-end", code, "the last sigma is not zero", source, put(sigmas=[2.0, 1.0])
    yield (
        "recipe-sigmas-minus",
        code,
        "the last sigma is minus zero",
        source,
        put(sigmas=[2.0, -0.0]),
    )
    yield "recipe-sigmas-one", code, "no step at all", source, put(sigmas=[0.0])
    yield (
        "recipe-sigmas-many",
        code,
        "1001 steps",
        source,
        put(sigmas=[float(i) for i in range(1001, -1, -1)]),
    )
    yield (
        "recipe-sigmas-integer",
        code,
        "an integer among the sigmas",
        source,
        put(sigmas=[2.0, 1, 0.0]),
    )
    yield "recipe-sigmas-large", code, "a sigma beyond 1e6", source, put(sigmas=[1e7, 0.0])
    yield "recipe-guidance", code, "guidance is an integer", source, put(guidance=2)
    yield "recipe-guidance-large", code, "guidance beyond 1000", source, put(guidance=1001.0)
    yield "recipe-guidance-minus", code, "guidance of minus zero", source, put(guidance=-0.0)
    yield "recipe-eta", code, "eta of another sampler", source, put(extra={"eta": 1.0})
    rows = [[0.5, [0.5]]] * 3
    yield "recipe-table", code, "a table of another sampler", source, put(extra={"table": rows})
    yield "recipe-channels", code, "a negative number of channels", source, put(guided_channels=-1)
    yield "recipe-grey", code, "1 for true", source, put(grey=1)
    yield "recipe-size", code, "three sides", source, put(size=[64, 64, 3])
    yield "recipe-size-zero", code, "no pixel", source, put(size=[0, 64])
    yield "recipe-group", code, "a group of none", source, put(group=0)
    yield "recipe-template", code, "two places in the template", source, put(template="{} {}")
    yield "recipe-template-empty", code, "false for no template", source, put(template=False)
    yield "recipe-template-array", code, "an array for a template", source, put(template=[])
    yield (
        "recipe-template-control",
        code,
        "an escape in the template",
        source,
        put(template="\x1b[2J{}"),
    )
    yield (
        "recipe-template-reversed",
        code,
        "a mark in the template that reverses text",
        source,
        put(template="a photo of a {}\u202e"),
    )
    yield "recipe-extra", code, "extra is an array", source, put(extra=[])
    yield "backbone-kind", code, "a kind with capitals", source, backbone(kind="Stable Diffusion")
    yield "backbone-repo", code, "a repository with dots", source, backbone(repo="../x/y")
    yield "backbone-branch", code, "a branch for a revision", source, backbone(revision="main")
    yield "backbone-revision-case", code, "in capitals", source, backbone(revision="AB" * 20)
    yield "backbone-revision-empty", code, "no revision", source, backbone(revision="")
    yield "backbone-lock", code, "a lock of 63 digits", source, backbone(lock="5" * 63)
    yield "backbone-lock-case", code, "a lock in capitals", source, backbone(lock="5A" * 32)
    yield "backbone-lock-number", code, "a number for a lock", source, backbone(lock=5)
    yield "backbone-lock-missing", code, "no lock", source, unlocked
    yield "backbone-size", code, "a negative size", source, backbone(bytes=-1)
    yield "backbone-size-large", code, "2**48 + 1 bytes", source, backbone(bytes=2**48 + 1)
    yield "backbone-size-real", code, "a real size", source, backbone(bytes=1e6)
    yield (
        "backbone-licence",
        code,
        "a mark in the licence that is not seen",
        source,
        backbone(licence="\ufeffmit"),
    )
    files = {"unet/config.json": [5, "5a" * 32]}
    yield "backbone-files", code, "the list itself", source, backbone(files=files)
    yield "backbone-array", code, "not an object", source, put(backbone=[])
