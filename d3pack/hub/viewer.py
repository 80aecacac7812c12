"""A small parquet of images of a pack, which the dataset viewer of the Hub shows."""

from __future__ import annotations

import io
import json
import logging
from pathlib import Path

import numpy as np
import numpy.typing as npt

from d3pack.errors import BackboneError, UsageError
from d3pack.format import EMBEDDED, Pack
from d3pack.system import Counter, count, duration, resolve_device

MAX_IMAGES = 40
MAX_LARGE_IMAGES = 12  # of more than _PNG_SIDE pixels: a minute each where there is no GPU
MAX_SIDE = 256  # pixels; larger images are scaled down and stored as JPEG
_PNG_SIDE = 128
_COLUMNS = 10  # of the picture
_PICTURE = 1280  # pixels of its larger side

_SHORTER = "show the probes instead (--preview probes), or nothing (--preview none)"

_log = logging.getLogger(__name__)

Images = npt.NDArray[np.uint8]  # (N, 3, h, w)


def preview_pairs(pack: Pack, most: int | None = None) -> list[tuple[int, int]]:
    """Return (class, index) pairs: classes spread evenly, with the best images of each."""
    if most is None:
        most = MAX_IMAGES if max(pack.recipe.size) <= _PNG_SIDE else MAX_LARGE_IMAGES
    classes = len(pack.classes)
    chosen = np.unique(np.linspace(0, classes - 1, min(classes, most)).round().astype(int))
    each = max(1, min(pack.images_per_class, most // len(chosen)))
    return [(int(c), i) for c in chosen for i in range(each)]


def decode_preview(
    pack: Pack,
    *,
    path: str | Path | None = None,
    device: str | None = None,
    most: int | None = None,
    progress: Counter | None = None,
) -> tuple[Images, list[int]]:
    """Return images decoded by the pack's backbone, which its probes fit, and their classes."""
    from d3pack.decode import Decoder, check_memory, check_time, expected_seconds, require_probes

    pairs = preview_pairs(pack, most)
    probes = [] if pack.probes is None else pack.probes.pairs()
    what = "the images of the preview"
    check_memory(what, pack, _SHORTER)
    with Decoder(pack, device=resolve_device(device), path=path) as decoder:
        check_memory(what, pack, _SHORTER, decoder)
        seconds = expected_seconds(decoder, [*probes, *pairs])
        check_time(what, seconds, _SHORTER)
        _log.info("%s for the preview, about %s", count(len(pairs), "image"), duration(seconds))
        require_probes(pack, decoder)
        with decoder.counted(progress, len(pairs)):
            groups = [images.cpu().numpy() for _, images in decoder.stream(pairs)]
    return np.concatenate(groups), [c for c, _ in pairs]


def check_probes(pack: Pack, *, path: str | Path | None = None, device: str | None = None) -> str:
    """Return why the probes could not be checked; nothing where they are right, or not there.

    No backbone is fetched for it, and no work begun for which `verify --decode` asks.

    Raises:
        BackboneError: the probes are those of another backbone.
    """
    if pack.probes is None:
        return ""
    is_mini = pack.recipe.backbone.repo == "mini"
    if path is None and EMBEDDED not in pack.extensions and not is_mini:
        return "the backbone is not here"
    from d3pack.decode import Decoder, check_probe_memory, check_probe_time, require_probes

    _log.info("rebuilding %s", count(len(pack.probes.images), "probe"))
    try:
        check_probe_memory(pack)
        with Decoder(pack, device=resolve_device(device), path=path) as decoder:
            check_probe_time(pack, decoder)
            require_probes(pack, decoder)
    except UsageError as error:
        if error.code == "E_LONG":
            return str(error.args[0])
        raise
    except BackboneError as error:
        if is_mini and error.code in ("E_BACKBONE_MISSING", "E_BACKBONE_CHANGED"):
            return "the backbone is not here"  # not installed, or of another version
        raise
    return ""


def probe_preview(pack: Pack, most: int | None = None) -> tuple[Images, list[int]]:
    """Return the probes of the pack, images that were decoded when it was made."""
    if pack.probes is None:
        raise UsageError("the pack has no probes to show", hint="use preview='decode' or 'none'")
    most = MAX_IMAGES if most is None else most
    return pack.probes.images[:most], pack.probes.labels[:most].tolist()


def picture(images: Images, labels: list[int]) -> bytes:
    """Return images as tiles of one WebP picture, a column for each class if there are few."""
    from PIL import Image

    rows = labels.count(labels[0])
    by_class = rows * len(set(labels)) == len(labels) and len(labels) <= rows * _COLUMNS
    if by_class:
        images = images.reshape(-1, rows, *images.shape[1:]).swapaxes(0, 1)
        images = images.reshape(-1, *images.shape[2:])
    columns = len(labels) // rows if by_class else min(_COLUMNS, len(labels))
    height, width = images.shape[2:]
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height))
    for number, image in enumerate(images):
        place = (number % columns * width, number // columns * height)
        sheet.paste(Image.fromarray(np.ascontiguousarray(image.transpose(1, 2, 0))), place)
    sheet.thumbnail((_PICTURE, _PICTURE))
    buffer = io.BytesIO()
    sheet.save(buffer, "WEBP", quality=90)
    return buffer.getvalue()


def parquet(images: Images, labels: list[int], classes: tuple[str, ...]) -> bytes:
    """Return columns `image` and `label`, with the types that `datasets` and the viewer expect."""
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
    if max(picture.size) <= _PNG_SIDE:
        picture.save(out, "PNG", optimize=True)
        return out.getvalue(), "png"
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    picture.save(out, "JPEG", quality=90)
    return out.getvalue(), "jpg"
