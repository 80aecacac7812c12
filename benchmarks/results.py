"""Results: one JSON schema for all benchmarks.

A file in `results/` holds `what` was measured, the `command` that did it, the `machine`, the
`versions` of Python and packages, the `date`, and the `figures`, whose form each benchmark decides.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
KEYS = {"what", "command", "machine", "versions", "date", "figures"}
PACKAGES = ("d3pack", "numpy", "torch", "diffusers", "transformers", "huggingface_hub")


def processor() -> str:
    """Return the name of the processor, as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def machine() -> dict[str, Any]:
    """Return what decides about speed here."""
    facts: dict[str, Any] = {"processor": processor(), "cores": os.cpu_count()}
    torch = sys.modules.get("torch")
    if torch is not None:
        facts["threads"] = torch.get_num_threads()
        if torch.cuda.is_available():
            facts["gpu"] = torch.cuda.get_device_name()
    return facts


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that matter."""
    installed = {d.metadata["Name"].lower() for d in importlib.metadata.distributions()}
    return {
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in PACKAGES if name in installed},
    }


def code() -> str:
    """Return a hash of the code of d3pack, for figures that must be of one version of it."""
    total = hashlib.sha256()
    for path in sorted((RESULTS.parents[1] / "d3pack").rglob("*.py")):
        total.update(f"{path.relative_to(RESULTS.parents[1]).as_posix()}\n".encode())
        total.update(path.read_bytes())
    return total.hexdigest()[:12]


def command(name: str, arguments: Sequence[str]) -> str:
    """Return the command line, without the folders of this machine."""
    words = [Path(word).name if os.path.isabs(word) else word for word in arguments]
    return " ".join(["python -m benchmarks", name, *words])


def load(name: str | Path) -> dict[str, Any]:
    """Return the figures of a result, by name or path; empty where there is none."""
    path = name if isinstance(name, Path) else RESULTS / f"{name}.json"
    if not path.exists():
        return {}
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["figures"]
    return figures


def record_of(name: str) -> dict[str, Any]:
    """Return a committed result with all that is kept beside its figures."""
    record: dict[str, Any] = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return record


def machine_of(name: str) -> dict[str, Any]:
    """Return where a committed result was measured."""
    machine: dict[str, Any] = record_of(name)["machine"]
    return machine


def save(path: Path, what: str, command: str, figures: dict[str, Any]) -> None:
    """Write a result."""
    record = {
        "what": what,
        "command": command,
        "machine": machine(),
        "versions": versions(),
        "date": datetime.now(timezone.utc).date().isoformat(),
        "figures": figures,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(record, indent=1, sort_keys=True, allow_nan=False) + "\n"
    path.write_text(text, encoding="utf-8")
