"""Encode a folder of images into a pack, and look at what comes out.

    python examples/encode_folder.py photos/ photos.d3m

`photos/` holds one folder a class. After an interruption the same command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from d3pack import Decoder
from d3pack.encode import EncodeSettings, encode
from d3pack.system import live_view


def main(folder: str, output: str) -> None:
    settings = EncodeSettings(images_per_class=10, labels="top3")
    with live_view() as view:
        pack = encode(folder, output, settings, listeners=[view])
    ledger = pack.ledger()
    print(f"{ledger.images} images in {ledger.total} bytes; the backbone has {ledger.backbone}")
    for name in pack.classes:
        print(f"  {name}: {pack.images_per_class} images")
    images = Decoder(pack).images([(0, 0), (1, 0)])
    print(f"the first image of two classes: {tuple(images.shape)}, {images.dtype}")
    print(f"contact sheets: {Path(output).name}.work/sheets")


if __name__ == "__main__":
    main(*sys.argv[1:3])
