"""`d3pack info`: what a pack is, and where its bytes are."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option, pack_argument
from d3pack.system import count, printable, size

if TYPE_CHECKING:
    from d3pack.format import Ledger, Pack

WIDTH = 80


@dataclass(frozen=True, slots=True)
class Info:
    """Print what a pack is: identity, classes, backbone, recipe, and where its bytes are.

    Example: d3pack info flowers.d3m
    """

    pack: str = pack_argument()
    format: Format = format_option()

    def run(self) -> None:
        """Print a table that fits 80 columns, JSON, or the identity alone."""
        pack = _outline(self.pack)
        if self.format == "json":
            _out.emit(_summary(pack))
        elif self.format == "quiet":
            print(pack.root)
        else:
            for line in (*_describe(pack, self.pack), "", *_ledger(pack.ledger())):
                print(line)


def _outline(file: str) -> Pack:
    """A pack with everything that is printed; of a remote one only the first bytes are read."""
    from d3pack.format import read

    if os.path.exists(file):  # no Path: it stumbles over a name that is too long
        return read(file)
    from d3pack.hub import is_remote, remote_info

    return remote_info(file).outline if is_remote(file) else read(file)


def _summary(pack: Pack) -> dict[str, Any]:
    from d3pack.format import DEFAULTS, to_plain

    ledger = pack.ledger()
    manifest: dict[str, Any] = to_plain(pack.manifest)
    sections = {}
    for name, codec, params, *digest in manifest.pop("sections"):
        if name == "codes" and pack.codes is not None:
            params = to_plain(pack.codes.params)  # with their defaults, as the recipe
        sections[name] = {
            "codec": codec,
            "params": params,
            **({"hash": digest[0]} if digest else {}),
        }
    return {
        **DEFAULTS,
        **manifest,
        "recipe": pack.recipe.to_json(),  # with the defaults that the file leaves out
        "classes": list(pack.classes),
        "images": len(pack),
        "sections": sections,
        "ledger": {
            "sections": dict(ledger.sections),
            "total": ledger.total,
            "per_class": ledger.per_class,
            "per_image": ledger.per_image,
            "backbone": ledger.backbone,
            "teacher": ledger.teacher,
            "everything": ledger.everything,
        },
    }


def _describe(pack: Pack, file: str) -> Iterator[str]:
    from d3pack.format import EMBEDDED

    recipe, backbone = pack.recipe, pack.recipe.backbone
    yield _clip(f"{printable(file)}  d3m 1.{pack.minor}")
    yield _row("root", pack.root)
    yield _row("classes", f"{len(pack.classes):,}: " + ", ".join(pack.classes[:20]))
    height, breadth = recipe.size
    each, grey = f"{pack.images_per_class:,} a class", ", grey" if recipe.grey else ""
    yield _row("images", f"{len(pack):,}, {each}, {height} x {breadth} pixels{grey}")
    place = "carried in this file" if EMBEDDED in pack.extensions else backbone.repo
    yield _row("backbone", f"{backbone.kind}, {place or 'a directory'}")
    if backbone.revision != backbone.lock[:40]:
        yield _row("", f"revision {backbone.revision}")
    yield _row("", f"{size(backbone.nbytes)}, licence {backbone.licence}")
    yield _row("lock", backbone.lock)
    made = f"{recipe.sampler}, {len(recipe.sigmas) - 1} steps from sigma {recipe.sigmas[0]:.4g}, "
    made += f"guidance {recipe.guidance:g}"
    if pack.all_coded:
        made = "all images are made of codes"
    yield _row("recipe", made)
    yield _row("", f"{recipe.dtype}, groups of {recipe.group}, {recipe.noise} noise")
    outputs = "no template: prompts are outputs of the text encoder"
    yield _row("", outputs if recipe.template is None else f"template {recipe.template!r}")
    yield from _sections(pack)
    if pack.optional:
        labels = {EMBEDDED: "backbone (carried in this file)"}
        names = (labels.get(name, f"{name} (unknown here, preserved)") for name in pack.optional)
        yield _row("optional", ", ".join(sorted(names)))
    if pack.provenance:
        yield _row("provenance", ", ".join(sorted(pack.provenance)))


def _sections(pack: Pack) -> Iterator[str]:
    from d3pack.format import coding_of

    if pack.prompts is not None:
        modes, vectors, width = pack.prompts.params["shape"]
        size = f"{count(modes, 'mode')} of {count(vectors, 'vector')} of {width} values"
        yield _row("prompts", f"{pack.prompts.codec}, {size}")
    if pack.unconditional is not None:
        yield _row("no class", f"{pack.unconditional.codec}, one prompt")
    if pack.codes is not None:
        params, nbytes = pack.codes.params, coding_of(pack.codes).nbytes
        what = "photographs" if pack.holds_photographs else "made images"
        yield _row("codes", f"{params['codes']:,} {what} a class, {nbytes:.1f} bytes each")
        atoms, sigmas = params["atoms"], params["sigmas"]
        yield _row(
            "",
            f"{len(atoms)} levels from sigma {sigmas[0]:.4g}, {_span(atoms)} of"
            f" {2 ** params['bits']:,} entries each, eta {params['eta']:g}",
        )
        likeness = "the likeness of these photographs can be rebuilt"
        if not pack.holds_photographs:
            likeness = "made for clusters of photographs, of which they may resemble one"
        yield _row("", likeness)
    how = "derived"
    if pack.picks is not None:
        each = "a class" if pack.picks.codec == "sets" else "an image"
        how = f"curated, {count(pack.picks.params['bits'], 'bit')} {each}"
    yield _row("seeds", f"{how}, from {pack.seed:016x}")
    if pack.labels is not None:
        params = pack.labels.params
        text = pack.labels.codec
        if pack.labels.codec == "topk":
            text += f", top {params['k']} at {params['bits']} bits"
        yield _row("labels", text)
    if pack.weights is not None:
        yield _row("weights", f"{pack.weights.codec}, one for each image, for the loss")
    if pack.adapter is not None:
        table = pack.adapter.params["table"]
        yield _row("adapter", f"{pack.adapter.codec}, {count(len(table), 'tensor')}")
    if pack.probes is not None:
        (params,) = (
            params for name, _, params, *_ in pack.manifest["sections"] if name == "probes"
        )
        images, height, breadth = params["shape"]
        yield _row("probes", f"{count(images, 'image')} of {height} x {breadth} pixels")


def _span(numbers: Sequence[int]) -> str:
    least, most = min(numbers), max(numbers)
    return f"{least}" if least == most else f"{least} to {most}"


def _ledger(ledger: Ledger) -> Iterator[str]:
    yield _clip(f"{'bytes':<12}{'':>22}{'a class':>16}{'an image':>16}")
    for name, nbytes in sorted(ledger.sections.items(), key=lambda item: (-item[1], item[0])):
        yield _bytes(printable(name), nbytes, ledger)
    yield _bytes("file", ledger.total, ledger)
    yield f"{'+ backbone':<12}{ledger.backbone:>22,}"
    if ledger.teacher is not None:
        yield f"{'+ teacher':<12}{ledger.teacher:>22,}"
    yield f"{'everything':<12}{ledger.everything:>22,}"


def _bytes(name: str, nbytes: int, ledger: Ledger) -> str:
    a_class, an_image = nbytes / ledger.classes, nbytes / ledger.images
    return _clip(f"{name:<12}{nbytes:>22,}{a_class:>16,.1f}{an_image:>16,.2f}")


def _row(name: str, text: str) -> str:
    return _clip(f"  {name:<12}{printable(text)}")


def _clip(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 3] + "..."
