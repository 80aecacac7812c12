"""A small parquet of images that a pack makes: what the Hub's dataset viewer shows."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d3pack.errors import UsageError
from d3pack.format.pack import Pack

MOST = 40  # images
MOST_LARGE = 12  # of more than _PNG_UP_TO pixels: a minute each where there is no GPU
WIDEST = 256  # pixels; larger images are scaled down and stored as JPEG
_PNG_UP_TO = 128

Progress = Callable[[int, int], None]  # images done, in all
Images = npt.NDArray[np.uint8]  # (N, 3, h, w)


def pairs_to_show(pack: Pack, most: int | None = None) -> list[tuple[int, int]]:
    """(class, index) pairs: classes spread evenly, the best images of each first."""
    if most is None:
        most = MOST if max(pack.recipe.size) <= _PNG_UP_TO else MOST_LARGE
    classes = len(pack.classes)
    shown = np.unique(np.linspace(0, classes - 1, min(classes, most)).round().astype(int))
    each = max(1, min(pack.images_per_class, most // len(shown)))
    return [(int(c), i) for c in shown for i in range(each)]


def decoded(
    pack: Pack,
    *,
    path: str | Path | None = None,
    device: str = "cpu",
    most: int | None = None,
    progress: Progress | None = None,
) -> tuple[Images, list[int]]:
    """Images made by the pack's own backbone, and their classes."""
    from d3pack.decode import Decoder

    pairs = pairs_to_show(pack, most)
    made = []
    with Decoder(pack, device=device, path=path) as decoder:
        for _, images in decoder.stream(pairs):
            made.append(images.cpu().numpy())
            if progress:
                progress(sum(map(len, made)), len(pairs))
    return np.concatenate(made), [c for c, _ in pairs]


def probes(pack: Pack, most: int | None = None) -> tuple[Images, list[int]]:
    """The reference images that the pack carries: decoded when it was made."""
    if pack.probes is None:
        raise UsageError("the pack carries no probes to show", hint="use --preview decode or none")
    most = MOST if most is None else most
    return pack.probes.images[:most], pack.probes.labels[:most].tolist()


def parquet(images: Images, labels: list[int], classes: tuple[str, ...]) -> bytes:
    """Columns `image` and `label` with the types that `datasets` and the viewer know."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    cells = [
        {"bytes": data, "path": f"{number:04d}.{suffix}"}
        for number, (data, suffix) in enumerate(map(_encoded, images))
    ]
    features = {
        "image": {"_type": "Image"},
        "label": {"names": list(classes), "_type": "ClassLabel"},
    }
    schema = pa.schema(
        [("image", pa.struct([("bytes", pa.binary()), ("path", pa.string())])),
         ("label", pa.int64())],
        metadata={"huggingface": json.dumps({"info": {"features": features}})},
    )  # fmt: skip
    table = pa.table([cells, labels], schema=schema)
    out = io.BytesIO()
    pq.write_table(table, out, compression="none")
    return out.getvalue()


def _encoded(image: Images) -> tuple[bytes, str]:
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0)))
    out = io.BytesIO()
    if max(picture.size) <= _PNG_UP_TO:
        picture.save(out, "PNG", optimize=True)
        return out.getvalue(), "png"
    picture.thumbnail((WIDEST, WIDEST))
    picture.save(out, "JPEG", quality=90)
    return out.getvalue(), "jpg"
