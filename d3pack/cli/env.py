"""`d3pack env`: what a bug report needs to say."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from typing import Any

from d3pack.cli import _out
from d3pack.cli._fields import Format, format_option
from d3pack.system import option

PACKAGES = (
    "d3pack-mini",
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "huggingface_hub",
    "numpy",
    "pillow",
    "click",
    "rich",
    "torchvision",
    "datasets",
    "pyarrow",
    "matplotlib",
    "scikit-learn",
    "model-signing",
)
SETTINGS = (
    "D3PACK_HOME",
    "HF_HOME",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "OMP_NUM_THREADS",
    "CUDA_VISIBLE_DEVICES",
)


@dataclass(frozen=True, slots=True)
class Env:
    """Print versions and settings for a bug report. No path and no token is shown.

    Example: d3pack env --speed
    """

    speed: bool = option(
        False,
        "Measure images a second of the embedded backbone, exactly and with each switch of"
        " decode --fast: takes a few minutes.",
    )
    format: Format = format_option()

    def run(self) -> None:
        """Collect the facts and print them."""
        facts = collect()
        if self.speed:
            facts["images_per_second"] = self._speeds()
        if self.format == "json":
            _out.emit(facts)
        elif self.format == "human":
            for group, values in facts.items():
                if not isinstance(values, dict):
                    _out.show(f"{group:<16} {values}")
                    continue
                print(group)
                for name, value in values.items():
                    _out.show(f"  {name:<22} {value}")

    def _speeds(self) -> dict[str, float | str]:
        """What this machine makes of the pack that comes with d3pack."""
        from d3pack.decode import speeds
        from d3pack.demo import example_pack

        rates: dict[str, float | str] = {}
        for name, rate in speeds(example_pack()):
            if self.format == "human":
                _out.say(f"measured: {name}")
            rates[name] = rate if isinstance(rate, str) else round(rate, 1)
        return rates


def collect() -> dict[str, Any]:
    """Return the facts; torch is asked for its devices, so this takes a second."""
    import torch

    from d3pack import __version__
    from d3pack.system import fast_bfloat16

    return {
        "d3pack": __version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": {name: version(name) for name in PACKAGES},
        "device": {
            "cuda": torch.version.cuda or "none",
            "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
            "threads": torch.get_num_threads(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "bfloat16": fast_bfloat16("cpu"),
        },
        "settings": {name: setting(name) for name in SETTINGS},
        "terminal": sys.stdout.isatty(),
    }


def version(package: str) -> str:
    """Return the installed version, or that there is none."""
    from importlib import metadata  # a tenth of the command's start-up

    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def setting(name: str) -> str:
    """Return a variable of the environment; values that name a place stay private."""
    value = os.environ.get(name)
    if value is None:
        return "unset"
    return "set" if name.endswith(("_HOME", "_ENDPOINT")) else value
