"""The baseline of class names, for prompts that are tokens and for outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_backbones import tiny_pack, tiny_sd

from d3pack.backbones import open_backbone
from d3pack.evaluate.baselines import named_twin
from d3pack.format import decode_prompts, encode_unconditional


def test_names_stand_for_prompts_of_either_kind(tmp_path: Path) -> None:
    backbone: Any = open_backbone(str(tiny_sd(tmp_path / "sd")))
    with torch.no_grad():
        twin = named_twin(tiny_pack("", backbone=backbone), backbone)
        words = [backbone.name_vectors(name) for name in twin.classes]
        assert twin.prompts is not None
        assert decode_prompts(twin.prompts).shape == (3, 1, max(map(len, words)), 32)
        assert twin.unconditional is None
        none = encode_unconditional(np.zeros((1, 32), np.float32))
        guided = tiny_pack("", backbone=backbone, vectors=1, unconditional=none)
        again = named_twin(guided, backbone)
        assert again.ledger().total > 0  # a pack that can be written
        assert again.unconditional is None
        outputs = named_twin(tiny_pack("", backbone=backbone, template=None, vectors=3), backbone)
        wanted = [backbone.outputs(f"a photo of a {name}", 3).numpy() for name in outputs.classes]
    assert outputs.recipe.template is None
    assert outputs.prompts is not None
    np.testing.assert_allclose(decode_prompts(outputs.prompts)[:, 0], wanted, rtol=1e-3, atol=1e-3)
    assert outputs.unconditional is not None
