"""From a name, a directory or a `BackboneRef` to an open backbone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib import import_module
from importlib.metadata import entry_points
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from d3pack.backbones.loading import MAX_FILE, Files
from d3pack.backbones.lock import (
    LIST,
    FileProgress,
    VerifiedFile,
    check_path,
    list_files,
    list_path,
    lock_files,
    read_list,
    remember_list,
    verify_files,
    with_list,
)
from d3pack.backbones.protocol import Sampling
from d3pack.errors import BackboneChangedError, BackboneError, NoSpaceError, NotFoundError
from d3pack.format import BackboneRef, FileLock
from d3pack.system import first_line, is_disk_full, is_unwritable, size

if TYPE_CHECKING:
    from d3pack.backbones.levels import Levels
    from d3pack.backbones.lock import Layout
    from d3pack.backbones.protocol import Backbone

T = TypeVar("T")

MINI = "mini"
MINI_GUIDANCE = 2.5  # of images that nobody picks
MAX_TREE = 10_000  # files of a repository
# 256 pixels, Apache 2.0, 2.5 GB to decode, and, as it is not distilled to few steps, trained at all
# noise levels, which learning prompts and codes ask of a backbone
DEFAULT_ON_GPU = "Photoroom/prx-256-t2i"
_BUILT_IN = {
    "stable-diffusion": "d3pack.backbones.stable_diffusion:StableDiffusion",
    "dit": "d3pack.backbones.dit:DiT",
    "sdxl": "d3pack.backbones.sdxl:StableDiffusionXL",
    "prx": "d3pack.backbones.prx:PRX",
    "z-image": "d3pack.backbones.z_image:ZImage",
    "flux2": "d3pack.backbones.flux2:Flux2",
    "sana-sprint": "d3pack.backbones.sana:SanaSprint",
}
_MIRROR_HINT = "give a directory that holds the locked files"
_log = logging.getLogger(__name__)


@cache
def kinds() -> Mapping[str, str]:
    """Return the families by kind, as "module:class": ours, and plugins of "d3pack.backbones".

    See `d3pack.backbones.protocol` for how to write one.
    """
    plugins = {entry.name: entry.value for entry in entry_points(group="d3pack.backbones")}
    # ours come first and cannot be replaced: a pack must mean the same everywhere
    return {**_BUILT_IN, **{kind: at for kind, at in plugins.items() if kind not in _BUILT_IN}}


def _family(kind: str) -> tuple[Any, Any]:
    """Return the layout and the class of a kind."""
    if kind not in kinds():
        raise BackboneError(
            f"unknown kind of backbone {kind!r}",
            hint=f"known: {', '.join(sorted(kinds()))}; plugins add others",
        )
    module_name, _, class_name = kinds()[kind].partition(":")
    module = import_module(module_name)
    return module.LAYOUT, getattr(module, class_name)


def default_backbone(device: str) -> str:
    """Return the backbone to use when none is named: "mini" on a CPU, else PRX of 256 pixels."""
    return MINI if device.startswith("cpu") else DEFAULT_ON_GPU


def default_sampling(backbone: Backbone) -> Sampling:
    """Return how to sample prompts whose images nobody picks: as the backbone was made for."""
    own = getattr(backbone, "sampling", None)
    if isinstance(own, Sampling):
        return own
    if backbone.ref.repo == MINI:
        return Sampling("dpmpp-2m", 12, MINI_GUIDANCE)
    return Sampling("dpmpp-2m", 20, 4.0 if backbone.ref.kind == "dit" else 5.0)


def levels_of(backbone: Backbone, size: tuple[int, int], steps: int) -> Levels:
    """Return the levels that a recipe takes its sigmas from."""
    levels_for = getattr(backbone, "levels_for", None)
    levels: Levels = levels_for(size, steps) if levels_for else backbone.levels
    return levels


def mini_directory() -> Path:
    """Return the directory of `mini`: in a checkout its own copy, else the package d3pack-mini."""
    homes = [Path(__file__).parents[2] / "mini" / "d3pack_mini"]
    spec = find_spec("d3pack_mini")
    if spec is not None and spec.origin is not None:
        homes.append(Path(spec.origin).parent)
    for home in homes:
        if (home / "weights" / "unet" / "config.json").is_file():
            return home / "weights"
    raise BackboneError(
        "the weights of mini are not installed",
        code="E_BACKBONE_MISSING",
        hint="pip install 'd3pack[mini]' (non-commercial research), or name another backbone",
    )


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
    """Return the lock of a directory in diffusers' layout.

    Args:
        path: the directory.
        kind: the family; by default the one whose layout fits, of several the one with most parts.
        repo: where the files are published: "org/name", or "".
        revision: commit of the repository; by default a hash over all files.
        licence: of the weights.
        variant: of the weights, such as "fp16".
        progress: called with (file, bytes done, bytes in all) while files are hashed.
    """
    root = Path(path)
    paths = list_files(root)
    kind = kind or _detect_kind(paths, str(root), root.joinpath)
    files = lock_files(root, _family(kind)[0].needed(paths, variant), progress)
    ref = BackboneRef(kind, repo, revision or "", files, licence)
    remember_list(ref)
    return ref


def complete(ref: BackboneRef, root: Path, progress: FileProgress | None = None) -> BackboneRef:
    """Return a reference with the list of its files, which has the hash that the lock says.

    The list is the one in the directory or a remembered one, or it is made from the files that
    the family may have locked; those of another total size are not read.

    Raises:
        BackboneChangedError: the files in the directory have another lock.
        BackboneError: a file of the family is missing.
        NotFoundError: the directory does not exist.
    """
    if ref.files:
        return ref
    paths = list_files(root)
    for place in (root / LIST, list_path(ref)):
        if found := with_list(ref, read_list(place)):
            return found
    sizes = {path: (root / path).stat().st_size for path in paths}
    for chosen in _chosen(ref, sizes):
        if found := with_list(ref, lock_files(root, chosen, progress)):
            remember_list(found)
            return found
    raise _another(ref, str(root))


def _chosen(ref: BackboneRef, sizes: Mapping[str, int]) -> Iterator[tuple[str, ...]]:
    """Yield the files that may have been locked: of the family, and of the right total size."""
    for chosen in _family(ref.kind)[0].choices(sizes):
        if sum(sizes[path] for path in chosen) == ref.nbytes:
            yield chosen


def _another(ref: BackboneRef, place: str) -> BackboneChangedError:
    return BackboneChangedError(
        f"{place} does not hold the files of lock {ref.lock[:12]}, {ref.nbytes:,} bytes",
        hint="give a directory with the locked files, or encode anew with this backbone",
    )


def _detect_kind(paths: tuple[str, ...], name: str, find: Callable[[str], Path]) -> str:
    """Return the family whose layout fits; `find` returns a local copy of one of the files."""
    layouts = {kind: _family(kind)[0] for kind in kinds()}
    if (config := "transformer/config.json") in paths:
        name_of_class = Files({config: find(config)}).json(config).get("_class_name")
        for kind, layout in layouts.items():
            if layout.denoiser and layout.denoiser == name_of_class:
                return kind
    others = {kind: layout for kind, layout in layouts.items() if not layout.denoiser}
    fitting = [k for k, v in others.items() if v.matches(paths)]
    if not fitting:  # the error will name the config that is missing
        fitting = [k for k, v in others.items() if v.matches(paths, models=True)]
    if fitting:  # a family with more parts has those of another, and is meant
        return max(fitting, key=lambda kind: len(layouts[kind].parts))
    if not {"unet/config.json", "transformer/config.json"}.isdisjoint(paths):
        raise BackboneError(
            f"{name} lacks parts of every known family",
            code="E_BACKBONE_MISSING",
            hint="Stable Diffusion needs unet, vae, text_encoder, tokenizer, scheduler;"
            " DiT needs transformer, vae, scheduler",
        )
    raise BackboneError(
        f"{name} is not a backbone in diffusers' layout",
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
    """Return the lock of "mini", a directory or a Hub repository, and where its files are."""
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
    repository = _describe(name, revision)
    find = partial(_fetch_file, repository.name, repository.revision)
    kind = _detect_kind(repository.paths, name, find)
    layout = _family(kind)[0]
    needed = layout.needed(repository.paths, variant)
    root = _fetch(repository.name, repository.revision, needed, layout)
    ref = lock_directory(
        root,
        kind=kind,
        repo=repository.name,
        revision=repository.revision,
        licence=repository.licence,
        variant=variant,
        progress=progress,
    )
    return ref, root


def _mini_licence(root: Path) -> str:
    if (root / LIST).is_file():
        licence = Files({LIST: root / LIST}).json(LIST).get("licence")
        if isinstance(licence, str):
            return licence
    return "unknown"


def fetch_backbone(ref: BackboneRef, *, encoder: bool = True) -> Path:
    """Return the directory of a backbone, downloaded if need be, with every file of its lock
    verified; without its text encoder, those that a pack of outputs is decoded with."""
    ref, directory = locate(ref, encoder=encoder)
    verify_files(directory, _needed(ref, encoder=encoder))
    return directory


def _needed(ref: BackboneRef, *, encoder: bool) -> BackboneRef:
    """Return a reference whose list has only the files to fetch and verify."""
    if encoder:
        return ref
    kept = _family(ref.kind)[0].without_text(ref.files)
    return replace(ref, files={path: ref.files[path] for path in kept})


def locate(
    ref: BackboneRef, progress: FileProgress | None = None, *, encoder: bool = True
) -> tuple[BackboneRef, Path]:
    """Return a reference with its list, and where the files are, fetched if necessary.

    The files are not verified here. Without the text encoder its files are not fetched.
    """
    if ref.repo == MINI:
        root = mini_directory()
        return complete(ref, root, progress), root
    if not ref.repo:
        raise BackboneError(
            "the pack's backbone was a directory without a public home",
            code="E_BACKBONE_MISSING",
            hint="put it next to the pack as NAME.backbone, or give its directory",
        )
    ref = _complete_from_hub(ref, progress)
    needed = _needed(ref, encoder=encoder)
    return ref, _fetch(ref.repo, ref.revision, tuple(needed.files), _family(ref.kind)[0])


def _complete_from_hub(ref: BackboneRef, progress: FileProgress | None) -> BackboneRef:
    """Return the reference of a repository with its list: a known one, that of a copy in the
    cache, a published one, or one made of what the Hub says about its files."""
    if ref.files:
        return ref
    if found := with_list(ref, read_list(list_path(ref))):
        return found
    with suppress(BackboneError, NotFoundError):  # no copy, or not all of it
        return complete(ref, _snapshot(ref), progress)
    listed = _published_list(ref)
    remember_list(listed)
    return listed


def _snapshot(ref: BackboneRef) -> Path:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    folder = repo_folder_name(repo_id=ref.repo, repo_type="model")
    return Path(constants.HF_HUB_CACHE) / folder / "snapshots" / ref.revision


def _published_list(ref: BackboneRef) -> BackboneRef:
    """Return the reference with a list from the Hub, before any large file is downloaded."""
    from huggingface_hub import HfApi

    def list_tree() -> dict[str, Any]:
        tree = HfApi().list_repo_tree(ref.repo, recursive=True, revision=ref.revision)
        files = (
            entry for entry in islice(tree, MAX_TREE) if type(getattr(entry, "size", None)) is int
        )
        return {str(entry.path): entry for entry in files}

    files = _ask_hub(ref.repo, ref.revision, list_tree)
    if LIST in files and (
        found := with_list(ref, read_list(_fetch_file(ref.repo, ref.revision, LIST)))
    ):
        return found
    for chosen in _chosen(ref, {path: entry.size for path, entry in files.items()}):
        locks = {}
        for path in chosen:
            check_path(path)
            if lfs := files[path].lfs:
                locks[path] = FileLock(files[path].size, str(lfs.sha256))
            elif files[path].size <= MAX_FILE:
                data = _fetch_small(ref, path, files[path].blob_id)
                locks[path] = FileLock(len(data), hashlib.sha256(data).hexdigest())
        if found := with_list(ref, locks):
            return found
    raise _another(ref, f"{ref.repo} at {ref.revision[:12]}")


def _fetch_small(ref: BackboneRef, path: str, blob: str) -> bytes:
    """Return a file that Git stores itself; one that was damaged in transfer is fetched again."""
    data = _fetch_file(ref.repo, ref.revision, path).read_bytes()
    known = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
    if known != blob:
        _fetch_again(ref.repo, ref.revision, path)
        data = _fetch_file(ref.repo, ref.revision, path).read_bytes()
    return data


def _fetch_file(repo: str, revision: str, path: str) -> Path:
    from huggingface_hub import hf_hub_download

    download = lambda: hf_hub_download(repo, path, revision=revision)  # noqa: E731
    return Path(_ask_hub(repo, revision, download))


def open_backbone(
    ref: BackboneRef | str,
    *,
    path: str | Path | None = None,
    device: Any = "cpu",
    dtype: Any = None,
    encoder: bool = True,
    progress: FileProgress | None = None,
) -> Backbone:
    """Open a backbone.

    Args:
        ref: a lock, whose hashes every file must have, or a name ("mini", a directory, org/name),
            which is locked as it is now; `.ref` of the backbone is that lock.
        path: a directory that holds the locked files; by default they come from the Hub's cache.
        device: where the models run.
        dtype: of the models; by default float32.
        encoder: open the text encoder. Without it, its files are neither fetched nor read, and
            the backbone takes outputs only; needs a lock.
        progress: called with (file, bytes done, bytes in all) while files are hashed.

    Raises:
        BackboneError: files are missing, changed or refused; `code` says which.
        NotFoundError: there is no such directory or name.
    """
    import torch

    if isinstance(ref, str):
        ref, root = lock_backbone(ref, progress=progress)
    else:
        _family(ref.kind)  # an unknown one is refused before anything is fetched
        if path is None:
            ref, root = locate(ref, progress, encoder=encoder)
        else:
            root = Path(path)
            ref = complete(ref, root, progress)
    is_cached = path is None and ref.repo not in ("", MINI)
    needed = _needed(ref, encoder=encoder)
    verified = _verify_or_repair(root, needed, progress, is_cached=is_cached)
    files = Files({name: file.path for name, file in verified.items()}, verified)
    # with its index: "cuda" may mean another device in another thread
    device = torch.empty(0, device=device).device
    dtype = dtype or torch.float32
    backbone: Backbone = _family(ref.kind)[1](ref, files, device=device, dtype=dtype)
    return backbone


def _verify_or_repair(
    root: Path, ref: BackboneRef, progress: FileProgress | None, *, is_cached: bool
) -> Mapping[str, VerifiedFile]:
    """Verify every file; damaged files of the Hub's cache are downloaded again."""
    try:
        return verify_files(root, ref, progress)
    except BackboneChangedError as error:
        if not is_cached:
            raise
        for path, lock in ref.files.items():
            try:
                verify_files(root, replace(ref, files={path: lock}))
            except BackboneChangedError:
                try:
                    _fetch_again(ref.repo, ref.revision, path)
                except BackboneError as failure:
                    if failure.code != "E_BACKBONE_OFFLINE":
                        raise
                    raise error from None
        return verify_files(root, ref, progress)


@dataclass(frozen=True, slots=True)
class _Repository:
    """What the Hub says about a repository at one revision."""

    name: str  # its name today: the Hub follows a repository that was renamed
    revision: str
    licence: str
    sizes: Mapping[str, int]  # bytes of each file; 0 where the Hub does not say

    @property
    def paths(self) -> tuple[str, ...]:
        return tuple(sorted(self.sizes))


def _announce(repository: _Repository, needed: Sequence[str], decoding: Sequence[str]) -> None:
    """Say what is about to be fetched."""
    cached = _cached(repository.name, repository.revision, needed)
    missing = [path for path, copy in zip(needed, cached, strict=True) if copy is None]
    if missing:
        _log.info(
            "%s (licence %s): %s to fetch; %s are decoded with",
            repository.name,
            repository.licence,
            size(sum(repository.sizes.get(path, 0) for path in missing)),
            size(sum(repository.sizes.get(path, 0) for path in decoding)),
        )


def _describe(repo: str, revision: str | None) -> _Repository:
    """Resolve a branch or tag to a commit, and list its files."""
    from huggingface_hub import HfApi

    ask = partial(HfApi().model_info, repo, revision=revision, files_metadata=True)
    info = _ask_hub(repo, revision, ask)
    licence = info.card_data.get("license") if info.card_data else None
    sizes = {str(file.rfilename): _nbytes(file.size) for file in info.siblings or ()}
    if not info.sha:
        raise BackboneError(f"the Hub names no commit for {repo}")
    if info.id != repo:
        _log.info("%s is now called %s on the Hub", repo, info.id)
    return _Repository(info.id, info.sha, str(licence or "unknown"), sizes)


def _nbytes(value: Any) -> int:
    """Return a size that the Hub says; 0 for what is none."""
    return value if type(value) is int and 0 <= value < 2**63 else 0


def _fetch(repo: str, revision: str, paths: Sequence[str], layout: Layout) -> Path:
    """Return a local snapshot that has these files; from the cache alone if it has them all.

    Licence and bytes are said before anything is fetched.
    """
    from huggingface_hub import snapshot_download

    cached = _cached(repo, revision, paths)
    if cached and cached[0] is not None and None not in cached:
        return cached[0].parents[len(Path(paths[0]).parts) - 1]
    repository = _describe(repo, revision)  # logs a new name
    # the cache uses the name in the lock
    _announce(replace(repository, name=repo), paths, layout.without_text(paths))
    patterns = list(paths)
    download = lambda: snapshot_download(repo, revision=revision, allow_patterns=patterns)  # noqa: E731
    return Path(_ask_hub(repo, revision, download))


def _cached(repo: str, revision: str, paths: Sequence[str]) -> list[Path | None]:
    """Return where each file is in the cache, None for those that are not."""
    from huggingface_hub import try_to_load_from_cache

    copies = [try_to_load_from_cache(repo, path, revision=revision) for path in paths]
    return [Path(copy) if isinstance(copy, str) else None for copy in copies]


def _fetch_again(repo: str, revision: str, path: str) -> None:
    """Replace one file of the cache, whose bytes were damaged in transfer or on the disk."""
    from huggingface_hub import hf_hub_download

    download = lambda: hf_hub_download(repo, path, revision=revision, force_download=True)  # noqa: E731
    _ask_hub(repo, revision, download)


def _ask_hub(repo: str, revision: str | None, call: Callable[[], T]) -> T:
    """Call the Hub; each way to fail has its own error."""
    from huggingface_hub import errors as hub

    at = f" at {revision[:12]}" if revision else ""
    offline = BackboneError(
        f"{repo}{at} is not on this machine, and the Hub cannot be reached",
        code="E_BACKBONE_OFFLINE",
        hint=f"connect once to download it, or {_MIRROR_HINT}",
    )
    try:
        return call()
    except BackboneError:
        raise
    except hub.GatedRepoError:
        raise BackboneError(
            f"{repo} is gated",
            code="E_BACKBONE_GATED",
            hint=f"accept its licence at huggingface.co/{repo} and log in with `hf auth login`",
        ) from None
    except hub.RevisionNotFoundError:
        raise _gone(f"{repo} no longer has the revision{at}") from None
    except (hub.RepositoryNotFoundError, hub.HFValidationError):
        raise _gone(f"{repo} is not on the Hub, or not visible with your token") from None
    except hub.LocalEntryNotFoundError:
        raise offline from None
    except hub.EntryNotFoundError:
        raise _gone(f"{repo}{at} no longer has a file of the lock") from None
    except hub.HfHubHTTPError as error:
        raise BackboneError(
            f"the Hub refused {repo}: {first_line(error)}", hint="try again later"
        ) from None
    except Exception as error:
        if is_disk_full(error):
            raise NoSpaceError(
                "no space left in the Hub cache", hint="free some, or set HF_HOME to another disk"
            ) from error
        if is_unwritable(error):
            raise BackboneError(
                "the Hub cache cannot be written", hint="set HF_HOME to a directory you may write"
            ) from error
        # the rest comes from the HTTP library, which huggingface_hub has changed twice
        raise offline from error


def _gone(message: str) -> BackboneError:
    return BackboneError(message, code="E_BACKBONE_GONE", hint=_MIRROR_HINT)
