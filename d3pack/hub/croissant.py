"""Croissant 1.0: the pack and its preview as JSON-LD for dataset search engines."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from d3pack.hub.card import Facts

_CONTEXT = {
    "@language": "en",
    "@vocab": "https://schema.org/",
    "citeAs": "cr:citeAs",
    "column": "cr:column",
    "conformsTo": "dct:conformsTo",
    "cr": "http://mlcommons.org/croissant/",
    "data": {"@id": "cr:data", "@type": "@json"},
    "dataType": {"@id": "cr:dataType", "@type": "@vocab"},
    "dct": "http://purl.org/dc/terms/",
    "equivalentProperty": "cr:equivalentProperty",
    "examples": {"@id": "cr:examples", "@type": "@json"},
    "extract": "cr:extract",
    "field": "cr:field",
    "fileObject": "cr:fileObject",
    "fileProperty": "cr:fileProperty",
    "fileSet": "cr:fileSet",
    "format": "cr:format",
    "includes": "cr:includes",
    "isLiveDataset": "cr:isLiveDataset",
    "jsonPath": "cr:jsonPath",
    "key": "cr:key",
    "md5": "cr:md5",
    "parentField": "cr:parentField",
    "path": "cr:path",
    "rai": "http://mlcommons.org/croissant/RAI/",
    "recordSet": "cr:recordSet",
    "references": "cr:references",
    "regex": "cr:regex",
    "repeated": "cr:repeated",
    "replace": "cr:replace",
    "samplingRate": "cr:samplingRate",
    "sc": "https://schema.org/",
    "separator": "cr:separator",
    "source": "cr:source",
    "subField": "cr:subField",
    "transform": "cr:transform",
}


def render(facts: Facts, data: bytes, preview: bytes | None) -> bytes:
    """Return the JSON-LD of a pack of these bytes; paths are relative to the repository."""
    pack = facts.pack
    value: dict[str, Any] = {
        "@context": _CONTEXT,
        "@type": "sc:Dataset",
        "conformsTo": "http://mlcommons.org/croissant/1.0",
        "name": facts.name,
        "description": (
            f"{len(pack):,} synthetic images of {len(pack.classes):,} classes as a recipe for the"
            f" diffusion model {pack.recipe.backbone.repo or pack.recipe.backbone.kind}: a .d3m"
            " pack of d3pack."
        ),
        "license": facts.licence or "unknown",
        "url": f"https://huggingface.co/datasets/{facts.address.repo}",
        "identifier": f"sha256:{pack.root}",
        "version": "1.0.0",  # a pack never changes: another one has another identifier
        "keywords": ["d3pack", "dataset distillation", "image classification", "synthetic"],
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
        "field": [
            _field("classes/label", "sc:Integer"),
            _field("classes/name", "sc:Text"),
        ],
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
