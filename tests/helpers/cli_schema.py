"""What `--format json` prints, held against the committed schema."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
from places import ROOT

SCHEMA: dict[str, Any] = json.loads((ROOT / "spec" / "cli.schema.json").read_text(encoding="utf-8"))


def check_output(verb: str, printed: str) -> Any:
    """Return what a verb printed, one JSON document or one a line, once it fits the schema."""
    lines = printed.splitlines() if "a line" in verb else [printed]
    values = [json.loads(line) for line in lines]
    assert values
    for value in values:
        schema = {**SCHEMA, **SCHEMA["$defs"][verb]}
        jsonschema.Draft202012Validator(schema).validate(value)
    return values if "a line" in verb else values[0]
