"""Write `spec/cli.schema.json`: what `--format json` prints, verb by verb.

python spec/make_cli_schema.py     # tests hold real outputs against it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TEXT = {"type": "string"}
WHOLE = {"type": "integer", "minimum": 0}
REAL = {"type": "number"}
FLAG = {"type": "boolean"}
ANY: dict[str, Any] = {"type": "object"}
ROOT = {"type": "string", "pattern": "^[0-9a-f]{64}$"}


def thing(needed: dict[str, Any], may: dict[str, Any] | None = None) -> dict[str, Any]:
    """An object with these members and no others."""
    return {
        "type": "object",
        "properties": {**needed, **(may or {})},
        "required": sorted(needed),
        "additionalProperties": False,
    }


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item}


def or_null(kind: dict[str, Any]) -> dict[str, Any]:
    return {"anyOf": [kind, {"type": "null"}]}


LEDGER = thing(
    {
        "sections": {"type": "object", "additionalProperties": WHOLE},
        "total": WHOLE,
        "per_class": REAL,
        "per_image": REAL,
        "backbone": WHOLE,
        "teacher": or_null(WHOLE),
        "everything": WHOLE,
    }
)
PROBES = thing(
    {
        "verdict": {"enum": ["exact", "within tolerance", "wrong backbone"]},
        "rms": REAL,
        "peak": WHOLE,
        "probes": WHOLE,
        "different": WHOLE,
    }
)
FAILURE = thing({"code": TEXT, "message": TEXT})
STORE = {
    "key": TEXT,
    "root": TEXT,
    "numerics": TEXT,
    "device": TEXT,
    "software": TEXT,
    "shape": several(WHOLE),
    "images": WHOLE,
    "decoded": WHOLE,
    "bytes": WHOLE,
    "age_days": REAL,
    "in_use": FLAG,
}
EVENT = {
    "type": "object",
    "properties": {
        "event": {"enum": ["plan", "note", "stage", "step", "stage-done", "sheets", "done"]}
    },
    "required": ["event"],
}
ESTIMATE = {
    "type": "object",
    "properties": {
        "classes": several(TEXT),
        "counts": several(WHOLE),
        "plan": ANY,
        "seconds": {"type": "object", "additionalProperties": REAL},
        "seconds_total": REAL,
        "bytes": WHOLE,
    },
    "required": ["bytes", "classes", "counts", "plan", "seconds", "seconds_total"],
}
SPREAD = thing({"mean": REAL, "std": REAL})
STUDENT = thing(
    {
        "protocol": TEXT,
        "student": TEXT,
        "seed": WHOLE,
        "images": WHOLE,
        "updates": WHOLE,
        "batch": WHOLE,
        "rate": REAL,
        "last": REAL,
        "best": REAL,
        "curve": several({"type": "array", "prefixItems": [WHOLE, REAL], "items": False}),
        "confusion": several(several(WHOLE)),
        "seconds": REAL,
    }
)
ENTRY = thing(
    {
        "key": TEXT,
        "title": TEXT,
        "last": SPREAD,
        "best": SPREAD,
        "bytes": or_null(REAL),
        "needs_backbone": FLAG,
        "hard_labels": FLAG,
        "notes": several(TEXT),
        "detail": ANY,
        "runs": several(STUDENT),
    }
)
FILE = thing({"path": TEXT, "bytes": WHOLE, "sha256": ROOT})
VERBS: dict[str, Any] = {
    "info": {
        "type": "object",
        "properties": {
            "d3m": several(WHOLE),
            "root": ROOT,
            "classes": several(TEXT),
            "images": WHOLE,
            "images_per_class": WHOLE,
            "seed": {"type": "string", "pattern": "^[0-9a-f]{16}$"},
            "recipe": ANY,
            "sections": ANY,
            "provenance": ANY,
            "ledger": LEDGER,
        },
        "required": ["classes", "images", "images_per_class", "ledger", "recipe", "root"],
    },
    "verify": several(
        {
            "anyOf": [
                thing(
                    {"file": TEXT, "valid": {"const": True}, "root": ROOT},
                    {"decode": {"anyOf": [PROBES, FAILURE]}},
                ),
                thing({"file": TEXT, "valid": {"const": False}, **FAILURE["properties"]}),
            ]
        }
    ),
    "diff": thing(
        {
            "same": FLAG,
            "roots": several(ROOT),
            "changes": several(thing({"what": TEXT, "a": {}, "b": {}})),
        }
    ),
    "view": thing({"address": TEXT}),
    "preview": thing({"output": TEXT, "bytes": WHOLE, "root": ROOT}),
    "decode": thing(
        {
            "images": WHOLE,
            "made": WHOLE,
            "seconds": REAL,
            "images_per_second": REAL,
            "out": TEXT,
            "root": ROOT,
            "decoder": ANY,
        }
    ),
    "encode (an event a line)": EVENT,
    "code (an event a line)": EVENT,
    "encode --dry-run": ESTIMATE,
    "merge (an event a line)": EVENT,
    "code --dry-run": ESTIMATE,
    "train (an event a line)": {
        "type": "object",
        "properties": {"stage": TEXT, "step": WHOLE, "progress": REAL, "loss": REAL, "left": REAL},
        "required": ["stage", "step"],
    },
    "eval": thing(
        {
            "d3pack": TEXT,
            "pack": thing(
                {"root": ROOT, "classes": several(TEXT), "images_per_class": WHOLE, "recipe": ANY}
            ),
            "protocol": ANY,
            "facts": ANY,
            "ledger": ANY,
            "decode_seconds": REAL,
            "scores": {"type": "object", "additionalProperties": REAL},
            "entries": several(ENTRY),
            "sweep": several(ANY),
        }
    ),
    "eval --shard": thing({"shard": TEXT, "trained": WHOLE}),
    "export-embeddings": thing({"files": several(TEXT)}),
    "import-embeddings": thing({"root": ROOT, "bytes": WHOLE, "path": TEXT, "classes": WHOLE}),
    "pull": thing(
        {
            "address": TEXT,
            "root": ROOT,
            "bytes": WHOLE,
            "path": TEXT,
            "signature": {},
            "backbone": {},
        }
    ),
    "push": thing(
        {
            "address": TEXT,
            "commit": TEXT,
            "root": ROOT,
            "url": TEXT,
            "files": several(TEXT),
            "notes": several(TEXT),
        }
    ),
    "push --dry-run": thing(
        {
            "address": TEXT,
            "root": ROOT,
            "message": TEXT,
            "files": several(FILE),
            "notes": several(TEXT),
            "texts": {"type": "object", "additionalProperties": TEXT},
        }
    ),
    "cache ls": several(thing(STORE)),
    "cache rm": several(thing({**STORE, "removed": FLAG})),
    "cache verify": several(thing({**STORE, "bad": several(WHOLE)})),
    "demo": thing(
        {
            "root": ROOT,
            "bytes": WHOLE,
            "images": WHOLE,
            "accuracy": {"type": "object", "additionalProperties": REAL},
            "seconds": REAL,
            "files": several(TEXT),
        }
    ),
    "env": thing(
        {
            "d3pack": TEXT,
            "python": TEXT,
            "system": TEXT,
            "packages": {"type": "object", "additionalProperties": TEXT},
            "device": ANY,
            "settings": {"type": "object", "additionalProperties": TEXT},
            "terminal": FLAG,
        },
        {
            "images_per_second": {
                "type": "object",
                "additionalProperties": {"type": ["number", "string"]},
            }
        },
    ),
}


def schema() -> str:
    """The document."""
    return (
        json.dumps(
            {
                "$schema": "https://json-schema.org/draft/2020-12/schema",
                "title": "What d3pack prints with --format json",
                "$defs": VERBS,
            },
            indent=1,
            sort_keys=True,
        )
        + "\n"
    )


if __name__ == "__main__":
    (Path(__file__).parent / "cli.schema.json").write_text(schema(), encoding="utf-8")
