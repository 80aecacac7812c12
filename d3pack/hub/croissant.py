"""Croissant 1.0: the pack and its preview as JSON-LD for dataset search engines."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from d3pack.hub.card import Facts, kinds
from d3pack.system import count

# the context of the specification: names of Croissant itself, then of other vocabularies
_TERMS = (
    "citeAs", "column", "equivalentProperty", "extract", "field", "fileObject", "fileProperty",
    "fileSet", "format", "includes", "isLiveDataset", "jsonPath", "key", "md5", "parentField",
    "path", "recordSet", "references", "regex", "repeated", "replace", "samplingRate", "separator",
    "source", "subField", "transform",
)  # fmt: skip
_CONTEXT = {
    **{term: f"cr:{term}" for term in _TERMS},
    "@language": "en",
    "@vocab": "https://schema.org/",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "rai": "http://mlcommons.org/croissant/RAI/",
    "sc": "https://schema.org/",
}


def render(facts: Facts, data: bytes, preview: bytes | None) -> bytes:
    """Return the JSON-LD of a pack of these bytes; paths are relative to the repository."""
    pack = facts.pack
    what, likeness = "synthetic images", ""
    if pack.holds_photographs:
        what = "images"
        likeness = (
            f" Of each class {count(pack.coded_images, 'image')} can be rebuilt from this file by"
            " anyone as a likeness of a photograph of the source data."
        )
    value: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": facts.name,
        "description": (
            f"{len(pack):,} {what} of {len(pack.classes):,} classes as a recipe for the"
            f" diffusion model {pack.recipe.backbone.repo or pack.recipe.backbone.kind}: a .d3m"
            f" pack of d3pack.{likeness}"
        ),
        "license": facts.licence or "unknown",
        "url": f"https://huggingface.co/datasets/{facts.address.repo}",
        "identifier": f"sha256:{pack.root}",
        "version": "1.0.0",  # a pack never changes: another one has another identifier
        "keywords": ["d3pack", "dataset distillation", "image classification", *kinds(pack)],
        "distribution": [
            _file("pack", str(facts.address.file), "application/vnd.d3pack.d3m", data)
        ],
        "recordSet": [_classes(pack.classes)],
    }
    if preview is not None:
        value["distribution"].append(
            _file("preview", str(facts.preview), "application/x-parquet", preview)
        )
        value["recordSet"].append(_preview())
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _file(name: str, path: str, encoding: str, data: bytes) -> dict[str, Any]:
    return {
        "@type": "cr:FileObject",
        "@id": name,
        "name": name,
        "contentUrl": path,
        "contentSize": f"{len(data)} B",
        "encodingFormat": encoding,
        "sha256": hashlib.sha256(data).hexdigest(),
    }


def _classes(names: tuple[str, ...]) -> dict[str, Any]:
    return {
        "@type": "cr:RecordSet",
        "@id": "classes",
        "name": "classes",
        "dataType": "sc:Enumeration",
        "key": {"@id": "classes/label"},
        "field": [_field("classes/label", "sc:Integer"), _field("classes/name", "sc:Text")],
        "data": [{"classes/label": i, "classes/name": name} for i, name in enumerate(names)],
    }


def _preview() -> dict[str, Any]:
    def source(column: str) -> dict[str, Any]:
        return {"fileObject": {"@id": "preview"}, "extract": {"column": column}}

    image = {**source("image"), "transform": {"jsonPath": "bytes"}}
    label = {"source": source("label"), "references": {"field": {"@id": "classes/label"}}}
    return {
        "@type": "cr:RecordSet",
        "@id": "images",
        "name": "images",
        "field": [
            {**_field("images/image", "sc:ImageObject"), "source": image},
            {**_field("images/label", "sc:Integer"), **label},
        ],
    }


def _field(name: str, kind: str) -> dict[str, Any]:
    return {"@type": "cr:Field", "@id": name, "name": name, "dataType": kind}
