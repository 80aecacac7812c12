"""Encode a folder of images into a pack, and look at what comes out.

    python examples/encode_folder.py photos/ photos.d3m

`photos/` holds one folder a class. Interrupt it whenever you like: the same command goes on.
"""

from __future__ import annotations

import sys
from pathlib import Path

from d3pack import Decoder
from d3pack.encode import EncodeOptions, encode
from d3pack.sources import open_source
from d3pack.system.live import live_view


def main(folder: str, output: str) -> None:
    source = open_source(folder)
    options = EncodeOptions(images_per_class=10, labels="top3")
    with live_view() as view:
        pack = encode(source, options, output, listeners=[view])
    ledger = pack.ledger()
    print(
        f"{ledger.images} images in {ledger.total} bytes; beside them {ledger.backbone} of backbone"
    )
    for name in pack.classes:
        print(f"  {name}: {pack.images_per_class} images")
    images = Decoder(pack).images([(0, 0), (1, 0)])
    print(f"the first image of two classes: {tuple(images.shape)}, {images.dtype}")
    print(f"contact sheets: {Path(output).name}.work/sheets")


if __name__ == "__main__":
    main(*sys.argv[1:3])
