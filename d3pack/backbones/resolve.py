"""From a name, a directory or a `BackboneRef` to an open backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from importlib import import_module, resources
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any

from d3pack.backbones import hub_files
from d3pack.backbones.loading import Files
from d3pack.backbones.lock import Checked, FileProgress, listing, lock_files, verify_files
from d3pack.errors import BackboneChangedError, BackboneError, NotFoundError
from d3pack.format.recipe import BackboneRef, directory_revision

if TYPE_CHECKING:
    from d3pack.backbones.protocol import Backbone

MINI = "mini"
MINI_GUIDANCE = 2.5  # of images that nobody picks
STABLE_DIFFUSION = "stable-diffusion-v1-5/stable-diffusion-v1-5"
_BUILT_IN = {
    "stable-diffusion": "d3pack.backbones.stable_diffusion:StableDiffusion",
    "dit": "d3pack.backbones.dit:DiT",
}


@cache
def kinds() -> Mapping[str, str]:
    """Families by kind, as "module:class": ours and those of the group "d3pack.backbones".

    A family's module has KIND, LAYOUT and the class; the class is called with a `BackboneRef`,
    `Files`, and device= and dtype=.
    """
    found = {e.name: e.value for e in entry_points(group="d3pack.backbones")}
    # ours first: a directory that fits one of ours is ours, whatever is installed beside it
    return {**_BUILT_IN, **{kind: at for kind, at in found.items() if kind not in _BUILT_IN}}


def _family(kind: str) -> tuple[Any, Any]:
    """The module and the class of a kind."""
    if kind not in kinds():
        raise BackboneError(
            f"backbones of the kind {kind!r} are unknown here",
            hint=f"known: {', '.join(sorted(kinds()))}; others come with a plugin",
        )
    module_name, _, class_name = kinds()[kind].partition(":")
    module = import_module(module_name)
    return module, getattr(module, class_name)


def default_backbone(device: str) -> str:
    """The backbone when nobody names one: small without a GPU, Stable Diffusion 1.5 with one."""
    return MINI if device.startswith("cpu") else STABLE_DIFFUSION


def default_guidance(ref: BackboneRef) -> float:
    """Return the guidance for prompts whose images nobody picks."""
    if ref.repo == MINI:
        return MINI_GUIDANCE
    return 4.0 if ref.kind == "dit" else 5.0


def mini_directory() -> Path:
    """Where the embedded backbone lies."""
    path = Path(str(resources.files("d3pack.backbones"))) / MINI
    if not (path / "unet" / "config.json").is_file():
        raise BackboneError(
            "the embedded backbone is not in this installation",
            code="E_BACKBONE_MISSING",
            hint="install d3pack from a wheel, or name another backbone",
        )
    return path


def lock_directory(
    path: str | Path,
    *,
    kind: str | None = None,
    repo: str = "",
    revision: str | None = None,
    licence: str = "unknown",
    variant: str | None = None,
    progress: FileProgress | None = None,
) -> BackboneRef:
    """Lock a directory in diffusers' layout: find its kind, hash what that kind needs."""
    root = Path(path)
    paths = listing(root)
    found = kind or _detect(paths, str(root))
    layout = _family(found)[0].LAYOUT
    files = lock_files(root, layout.needed(paths, variant), progress)
    return BackboneRef(found, repo, revision or directory_revision(files), files, licence)


def _detect(paths: tuple[str, ...], where: str) -> str:
    for kind in kinds():
        if _family(kind)[0].LAYOUT.matches(paths):
            return kind
    there = set(paths)
    if "unet/config.json" in there or "transformer/config.json" in there:
        raise BackboneError(
            f"{where} lacks parts of every known family",
            code="E_BACKBONE_MISSING",
            hint="Stable Diffusion needs unet, vae, text_encoder, tokenizer, scheduler;"
            " DiT needs transformer, vae, scheduler",
        )
    raise BackboneError(
        f"{where} is no backbone in diffusers' layout",
        code="E_BACKBONE_CONFIG",
        hint="expected unet/ or transformer/",
    )


def lock_backbone(
    name: str,
    *,
    revision: str | None = None,
    variant: str | None = None,
    progress: FileProgress | None = None,
) -> tuple[BackboneRef, Path]:
    """Lock "mini", a directory or a Hub repository, and say where its files are."""
    if name == MINI:
        root = mini_directory()
        licence = _mini_licence(root)
        return lock_directory(root, repo=MINI, licence=licence, progress=progress), root
    if Path(name).is_dir():
        return lock_directory(name, variant=variant, progress=progress), Path(name)
    if name.count("/") != 1 or name.startswith((".", "/")):
        raise NotFoundError(
            f"there is no backbone {name!r}", hint='use "mini", a directory, or org/name'
        )
    info = hub_files.describe(name, revision)
    kind = _detect(info.paths, name)
    wanted = _family(kind)[0].LAYOUT.needed(info.paths, variant)
    root = hub_files.fetch(info.repo, info.revision, wanted)
    return (
        lock_directory(
            root,
            kind=kind,
            repo=info.repo,
            revision=info.revision,
            licence=info.licence,
            variant=variant,
            progress=progress,
        ),
        root,
    )


def _mini_licence(root: Path) -> str:
    files = Files({"lock.json": root / "lock.json"})
    if (root / "lock.json").is_file():
        licence = files.json("lock.json").get("licence")
        if isinstance(licence, str):
            return licence
    return "unknown"


def fetch_backbone(ref: BackboneRef) -> Path:
    """Return the directory of a backbone, downloaded if need be, with every file of its lock
    verified."""
    directory = locate_files(ref)
    verify_files(directory, ref)
    return directory


def locate_files(ref: BackboneRef) -> Path:
    """Where the files of a lock are, fetched if need be; not yet verified."""
    if ref.repo == MINI:
        return mini_directory()
    if not ref.repo:
        raise BackboneError(
            "the pack's backbone was a directory without a public home",
            code="E_BACKBONE_MISSING",
            hint="put it beside the pack as NAME.backbone, or point to it with --backbone PATH",
        )
    return hub_files.fetch(ref.repo, ref.revision, tuple(ref.files))


def _verified(
    root: Path, ref: BackboneRef, progress: FileProgress | None, *, ours: bool
) -> Mapping[str, Checked]:
    """Check every file; one that we downloaded and that is not the locked one is fetched again."""
    try:
        return verify_files(root, ref, progress)
    except BackboneChangedError as error:
        if not ours:
            raise
        for path, lock in ref.files.items():
            try:
                verify_files(root, replace(ref, files={path: lock}))
            except BackboneChangedError:
                try:
                    hub_files.fetch_again(ref.repo, ref.revision, path)
                except BackboneError as failure:
                    if failure.code != "E_BACKBONE_OFFLINE":
                        raise
                    raise error from None
        return verify_files(root, ref, progress)


def open_backbone(
    ref: BackboneRef | str,
    *,
    path: str | Path | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    progress: FileProgress | None = None,
) -> Backbone:
    """Open a backbone. A `BackboneRef` is held to its hashes, wherever the files come from.

    A name ("mini", a directory, org/name) is locked as it is now; `.ref` is that lock.
    """
    import torch

    if isinstance(ref, str):
        ref, root = lock_backbone(ref, progress=progress)
    else:
        root = Path(path) if path is not None else locate_files(ref)
    found = _verified(root, ref, progress, ours=path is None and ref.repo not in ("", MINI))
    files = Files({name: file.path for name, file in found.items()}, found)
    # by its whole name: "cuda" may mean another device in another thread
    whole = torch.empty(0, device=device).device
    backbone: Backbone = _family(ref.kind)[1](
        ref, files, device=whole, dtype=dtype or torch.float32
    )
    return backbone
