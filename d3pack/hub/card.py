"""The dataset card: YAML for the Hub, and a page for people."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

from d3pack import __version__
from d3pack.format import Pack
from d3pack.hub import snippets
from d3pack.hub.address import Address
from d3pack.hub.record import Record
from d3pack.system import count, flatten, markdown_code, markdown_table, markdown_text

MARK = "<!-- written by d3pack push: a later push may replace this card -->"

HOME = "https://d3pack.github.io/d3pack/"

_SIZES = (
    (10**3, "n<1K"),
    (10**4, "1K<n<10K"),
    (10**5, "10K<n<100K"),
    (10**6, "100K<n<1M"),
    (10**7, "1M<n<10M"),
    (10**8, "10M<n<100M"),
    (10**9, "100M<n<1B"),
)
_GLOB = re.compile(r"([*?\[])")
_LICENCE_ID = re.compile(r"[a-z0-9][a-z0-9.+-]*")


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that a card says; nothing of it tells about the machine that writes it."""

    pack: Pack
    address: Address  # repository and file of the pack
    licence: str | None = None  # of the pack
    source: str | None = None  # what the real images were, and their licence
    record: Record | None = None  # of `d3pack eval`
    preview: str | None = None  # path of the preview parquet in the repository
    picture: str | None = None  # path of a picture of its images in the repository
    shown: int = 0  # images in it
    signed: bool = False

    @property
    def name(self) -> str:
        """File name of the pack without its suffix."""
        return str(self.address.file).rpartition("/")[2].removesuffix(".d3m")


def render(facts: Facts) -> str:
    """Return the text of README.md."""
    from huggingface_hub import DatasetCardData

    meta = DatasetCardData(**metadata(facts)).to_yaml(line_break="\n")
    body = "\n\n".join(
        section
        for section in (
            f"# {markdown_text(facts.name)}",
            _summary(facts),
            _picture(facts),
            _viewer(facts),
            _usage(facts),
            _accuracy(facts),
            _backbone(facts.pack),
            _ledger(facts.pack),
            _identity(facts),
            _provenance(facts),
            _limits(facts),
            MARK,
        )
        if section
    )
    return f"---\n{meta}\n---\n\n{body}\n"


def metadata(facts: Facts) -> dict[str, Any]:
    """Return the YAML front matter."""
    value: dict[str, Any] = {
        **_licence(facts.licence),
        "pretty_name": facts.name,
        "tags": ["d3pack", "dataset-distillation", "image-classification", *kinds(facts.pack)],
        "task_categories": ["image-classification"],
        "size_categories": [next((n for top, n in _SIZES if len(facts.pack) < top), "1B<n<10B")],
    }
    if facts.preview:
        path = _GLOB.sub(r"[\1]", facts.preview)  # the Hub reads it as a pattern
        value["configs"] = [
            {"config_name": "preview", "data_files": [{"split": "preview", "path": path}]}
        ]
    return value


def kinds(pack: Pack) -> list[str]:
    """Return the keyword of packs that hold no likeness of a photograph."""
    return [] if pack.holds_photographs else ["synthetic"]


def _licence(licence: str | None) -> dict[str, str]:
    if licence is None:
        return {"license": "unknown"}
    if _LICENCE_ID.fullmatch(licence):
        return {"license": licence}
    return {"license": "other", "license_name": licence}


def _summary(facts: Facts) -> str:
    pack = facts.pack
    height, width = pack.recipe.size
    return (
        f"**{len(pack):,} images of {len(pack.classes):,} classes, {width} x {height} pixels, in"
        f" {pack.ledger().total:,} bytes.** This is a [`.d3m` pack]({HOME}): not the images, but"
        f" the recipe by which a public diffusion model makes them - {_parts(pack)} and an exact"
        " reference to the model. Everyone who opens it gets the same images."
    )


def _parts(pack: Pack) -> str:
    """Return what the recipe consists of, each with a comma behind it."""
    parts = ["a learned prompt for every class,"] if pack.prompts else []
    if not pack.all_coded:
        parts.append("seeds,")
    if pack.codes:
        coded = "photographs" if pack.holds_photographs else "made images"
        parts.append(f"codes of {pack.codes.params['codes']:,} {coded} of every class,")
    return " ".join(parts)


def _picture(facts: Facts) -> str:
    classes = facts.pack.classes
    names = ", ".join(markdown_text(name) for name in classes[:20])
    text = f"Classes: {names}" + (f", and {len(classes) - 20:,} more." if classes[20:] else ".")
    if facts.picture is None:
        return text
    shown = f"{count(facts.shown, 'image')} that the pack makes"
    return f"![{shown}](<{quote(facts.picture)}>)\n\n{text}"


def _viewer(facts: Facts) -> str:
    """Return a link to the page that verifies the pack and, of `mini`, makes its images."""
    address = Address(facts.address.repo, facts.address.file, None, facts.pack.root)
    verb = "Watch its images being made" if facts.pack.recipe.backbone.repo == "mini" else "See it"
    place = f"{HOME}viewer/?pack={quote(str(address), safe='')}"
    return f"[{verb} in the browser]({place}), where it is verified first."


def _identity(facts: Facts) -> str:
    pack, recipe = facts.pack, facts.pack.recipe
    coded = "photographs" if pack.holds_photographs else "made images"
    rows = [
        ("root (identity)", f"`{pack.root}`"),
        ("file", markdown_code(str(facts.address.file))),
        ("classes", f"{len(pack.classes):,}"),
        ("images per class", f"{pack.images_per_class:,}" + (", grey" if recipe.grey else "")),
        ("sampler", f"{pack.sampling}, {recipe.dtype}"),
        ("prompts", f"codec {pack.prompts.codec}" if pack.prompts else "none"),
        ("codes", f"{pack.codes.params['codes']:,} {coded} a class" if pack.codes else "none"),
        ("soft labels", f"codec {pack.labels.codec}" if pack.labels else "none"),
        ("signature", "OpenSSF model-signing, beside the pack" if facts.signed else "none"),
    ]  # fmt: skip
    return f"## Identity\n\n{markdown_table(('what', 'value'), rows)}"


def _usage(facts: Facts) -> str:
    pinned = Address(facts.address.repo, facts.address.file, None, facts.pack.root)
    extras = ("mini",) if facts.pack.recipe.backbone.repo == "mini" else ()
    return (
        f"## Use\n\n{snippets.blocks(str(pinned), facts.pack.recipe.size, extras)}\n\n"
        "The `#sha256=` part pins the identity: another pack under this name is refused."
        " `d3pack verify --decode` with this address checks that a machine makes the same images."
    )


def _backbone(pack: Pack) -> str:
    ref = pack.recipe.backbone
    if ref.repo == "mini":
        home = "`mini`, by `pip install 'd3pack[mini]'`"
    elif ref.repo:
        home = f"[{markdown_text(ref.repo)}](https://huggingface.co/{ref.repo}/tree/{ref.revision})"
    else:
        home = "a directory without a public home: ask the authors for it"
    rows = [
        ("model", home),
        ("kind", markdown_text(ref.kind)),
        ("revision", f"`{ref.revision}`"),
        ("files", f"{ref.nbytes:,} bytes in all, of lock `{ref.lock}`"),
        ("licence", markdown_text(ref.licence)),
    ]
    return (
        f"## Backbone\n\n{markdown_table(('what', 'value'), rows)}\n\n"
        "It is not part of this repository; its licence also governs what may be done with the"
        " images that it makes."
    )


def _ledger(pack: Pack) -> str:
    ledger = pack.ledger()
    rows = [(markdown_text(name), f"{nbytes:,}") for name, nbytes in ledger.sections.items()]
    rows += [
        ("**the pack**", f"**{ledger.total:,}**"),
        ("per class", f"{ledger.per_class:,.1f}"),
        ("per image", f"{ledger.per_image:,.1f}"),
        (
            "backbone, shared by all packs" if pack.recipe.backbone.repo else "its own backbone",
            f"{ledger.backbone:,}",
        ),
    ]
    if ledger.teacher is not None:
        rows.append(("teacher, needed only to encode", f"{ledger.teacher:,}"))
    rows.append(("everything", f"{ledger.everything:,}"))
    return f"## Where the bytes are\n\n{markdown_table(('section', 'bytes'), rows, numbers=1)}"


def _accuracy(facts: Facts) -> str:
    record = facts.record
    if record is None:
        return (
            "## Accuracy\n\nNot measured by the publisher. `d3pack eval` trains students on the"
            " pack and tests them on real images."
        )
    student, protocol = markdown_text(record.student), markdown_code(record.protocol)
    return (
        f"## Accuracy\n\nStudents ({student}) trained from scratch under"
        f" the protocol {protocol}: {record.updates:,} updates,"
        f" {count(record.seeds, 'seed')}, tested on {record.test_images:,} real"
        " images.\n\n"
        + markdown_table(("trained on", "bytes", "accuracy, %"), _accuracy_rows(record), numbers=2)
    )


def _accuracy_rows(record: Record) -> list[tuple[str, str, str]]:
    """Return what students reached."""
    rows = []
    for entry in record.entries:
        nbytes = "-" if entry.nbytes is None else f"{entry.nbytes:,.0f}"
        spread = f" ± {100 * entry.std:.1f}" if entry.runs > 1 else ""
        rows.append((markdown_text(entry.title), nbytes, f"{100 * entry.mean:.1f}{spread}"))
    return rows


def _provenance(facts: Facts) -> str:
    rows = [
        (markdown_code(key), markdown_text(value)) for key, value in flatten(facts.pack.provenance)
    ]
    text = markdown_table(("what", "value"), rows) if rows else "The pack records none."
    source = markdown_text(facts.source) if facts.source else (
        "The publisher has not named them or their licence."
    )  # fmt: skip
    return f"## Provenance\n\nReal images: {source}\n\n{text}"


def _limits(facts: Facts) -> str:
    codes = facts.pack.codes
    kinds = (
        "- Every image is synthetic: made by a diffusion model from a learned prompt. They resemble"
        " the source data but do not reproduce it, and carry the biases of that model.\n"
    )
    if codes is not None:
        what = "photographs of the source data"
        if not facts.pack.holds_photographs:
            what = "images that were made for clusters of photographs and may resemble one"
        kinds = (
            f"- {facts.pack.coded_images:,} images of each class are likenesses of"
            f" {codes.params['codes']:,} {what}: anyone can rebuild them"
            " from this file. All images carry the biases of a diffusion model.\n"
        )
    return (
        f"## Limits\n\n{kinds}"
        "- They are for training and studying classifiers, not for measuring accuracy on the real"
        " task: test on real images.\n"
        "- Exact on machines where `d3pack verify --decode` says so; elsewhere within the"
        " tolerance that it reports.\n"
        "- The source data's licence and the backbone's licence apply beside this repository's"
        f" ({markdown_text(facts.licence or 'unknown')}).\n\n"
        f"Written by d3pack {__version__}."
    )
