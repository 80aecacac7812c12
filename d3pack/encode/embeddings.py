"""Embedding files of textual inversion: a pack's prompts for other programs, and a pack of theirs.

One safetensors file a class, which diffusers (`load_textual_inversion`), ComfyUI and A1111 take. A
file of Stable Diffusion has one tensor (k, D), named like the file; one of Stable Diffusion XL has
`clip_l` and `clip_g`, one for each text encoder.
"""

from __future__ import annotations

import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from d3pack.backbones import TEMPLATE, default_sampling, open_backbone
from d3pack.decode import class_folder
from d3pack.encode.plan import sigmas_of
from d3pack.encode.settings import ImportSettings
from d3pack.errors import InvalidPackError, NotFoundError, UsageError
from d3pack.format import Pack, Recipe, check_name, decode_prompts, encode_prompts
from d3pack.system import (
    SettingError,
    first_line,
    markdown_code,
    markdown_table,
    markdown_text,
    replace_folder,
)

if TYPE_CHECKING:
    from d3pack.backbones import Backbone

Array = npt.NDArray[np.float32]

KINDS = ("stable-diffusion", "sdxl")  # whose tokens other programs can load
SUFFIXES = (".safetensors", ".bin", ".pt")
MAX_BYTES = 1 << 26  # of a file and of what it unpacks to: a thousand vectors of SDXL have 8 MB
_LEFT, _RIGHT = "clip_l", "clip_g"
_SDXL = (768, 2048)  # of a token: what the first encoder reads, and both
_NAME = "class"  # in the metadata of our files


def export_embeddings(
    pack: Pack,
    output: str | Path,
    *,
    backbone: str | Path | None = None,
    overwrite: bool = False,
) -> list[Path]:
    """Write the prompts of a pack as embedding files, with a README that says how to use them.

    Args:
        pack: of tokens, for Stable Diffusion or Stable Diffusion XL.
        output: folder to write; a file for each class, or for each mode of one.
        backbone: directory of the backbone; needed where SDXL's widths are not the usual ones.
        overwrite: replace a folder that exists.

    Raises:
        UsageError: the prompts are not tokens, the pack is for another kind of backbone, or the
            folder exists.
    """
    output, kind = Path(output), pack.recipe.backbone.kind
    if kind not in KINDS or pack.recipe.template is None:
        what = "outputs" if kind in KINDS else f"prompts for {kind}"
        raise UsageError(
            f"{what} cannot be loaded as embeddings", hint=f"only tokens for {' and '.join(KINDS)}"
        )
    if pack.recipe.template.count("{}") != 1:
        raise UsageError(f"the template {pack.recipe.template!r:.80} must have one {{}}")
    if output.exists() and not overwrite:
        raise UsageError(
            f"{output} exists", hint="name another folder, or use --overwrite (overwrite=True)"
        )
    if pack.prompts is None:
        raise UsageError("the pack holds codes alone, and no prompts")
    prompts = decode_prompts(pack.prompts)
    left = _left_width(prompts.shape[3], backbone) if kind == "sdxl" else 0
    names = []
    with replace_folder(output) as temporary:
        for c, name in enumerate(pack.classes):
            for mode, vectors in enumerate(prompts[c]):
                stem = class_folder(c, name, len(pack.classes))
                most = len(prompts[c]) - 1
                stem += f"_{mode:0{len(str(most))}d}" if most else ""
                names.append((f"{stem}.safetensors", name))
                (temporary / names[-1][0]).write_bytes(_file(stem, name, vectors, left))
        (temporary / "README.md").write_text(_readme(pack, names), encoding="utf-8")
    return [output / file for file, _ in names]


def _left_width(width: int, backbone: str | Path | None) -> int:
    """Return how many values of a token are for the first text encoder."""
    if backbone is None:
        if width == _SDXL[1]:
            return _SDXL[0]
        raise UsageError(f"tokens of {width} are not SDXL's usual ones", hint="name the backbone")
    config = Path(backbone) / "text_encoder" / "config.json"
    try:
        left = json.loads(config.read_text(encoding="utf-8"))["hidden_size"]
    except (OSError, ValueError, LookupError, TypeError):
        raise NotFoundError(f"{config} does not tell the width of the text encoder") from None
    if type(left) is not int or not 0 < left < width:
        raise UsageError(f"{config} has a hidden_size of {left!r:.40}, of tokens of {width}")
    return left


def _file(stem: str, name: str, vectors: Array, left: int) -> bytes:
    from safetensors.numpy import save

    tensors = {stem: vectors}
    if left:
        tensors = {_LEFT: vectors[:, :left], _RIGHT: vectors[:, left:]}
    copies = {key: np.ascontiguousarray(value) for key, value in tensors.items()}
    return bytes(save(copies, metadata={_NAME: name}))


def _readme(pack: Pack, names: list[tuple[str, str]]) -> str:
    recipe, two = pack.recipe, pack.recipe.backbone.kind == "sdxl"
    ref, (height, width) = recipe.backbone, recipe.size
    stem = names[0][0].removesuffix(".safetensors")
    template = recipe.template or TEMPLATE
    prompt = template.replace("{}", stem)
    load = f'pipeline.load_textual_inversion("{stem}.safetensors", token="{stem}")'
    if two:
        load = "\n".join((
            "from safetensors.torch import load_file",
            f'vectors = load_file("{stem}.safetensors")',
            *(
                f'pipeline.load_textual_inversion(vectors["{key}"], token="{stem}",'
                f" text_encoder=pipeline.text_encoder{end}, tokenizer=pipeline.tokenizer{end})"
                for key, end in ((_LEFT, ""), (_RIGHT, "_2"))
            ),
        ))  # fmt: skip
    note = (
        "\nWhere the second text encoder has the `eos_token_id` 2, as published ones do, diffusers"
        " takes the pooled vector from the last vector and not from the end of the sentence.\n"
    )
    rows = [(markdown_code(file), markdown_text(name)) for file, name in names]
    how = f"{recipe.sampler}, {len(recipe.sigmas) - 1} steps, guidance {recipe.guidance:g}"
    revision, licence = markdown_code(ref.revision or "unknown"), markdown_code(ref.licence)
    return f"""# Embeddings for {ref.repo or "a backbone without a public home"}

Learned vectors for the classes of the pack `{pack.root}`.
They are for the base model `{ref.repo or ref.kind}` alone: revision {revision},
licence {licence}.

The template is {markdown_code(template)}:
write the name of a file, without `.safetensors`, in the place of `{{}}`.
The pack makes images of {width}x{height} pixels with {how}.

- ComfyUI: put the files into `models/embeddings`, and prompt
  {markdown_code(template.replace("{}", f"embedding:{stem}"))}.
- A1111: put the files into `embeddings`, and prompt {markdown_code(prompt)}.
- diffusers:

```python
{load}
images = pipeline({json.dumps(prompt, ensure_ascii=False)}).images
```
{note if two else ""}
{markdown_table(("file", "class"), rows)}
"""


def import_embeddings(
    folder: str | Path,
    backbone: Backbone | str,
    template: str,
    settings: ImportSettings | None = None,
    *,
    names: Mapping[str, str] | None = None,
) -> Pack:
    """Return a pack of embedding files: a class for each file, in the order of their names.

    Files of one class are its modes, and each class needs as many.

    Args:
        folder: with `.safetensors`, or `.bin` and `.pt`, of which only tensors are loaded.
        backbone: the base model of all files: an open one, or its name.
        template: the sentence that they were learned in, with one {}.
        settings: how images are made; by default ten of each class, as the backbone was made for.
        names: class names by file name without its ending; by default those that our own files
            hold, else the file names.

    Raises:
        NotFoundError: there is no such folder, or no such file in it.
        UsageError: a file cannot be used, or the files do not belong together or to the backbone.

    Example:
        >>> from d3pack.encode import import_embeddings
        >>> pack = import_embeddings("toys/", "org/model", "a photo of a {}")  # doctest: +SKIP
    """
    settings = settings or ImportSettings()
    if template.count("{}") != 1:
        raise SettingError("template", template, "a sentence with one {}")
    embeddings = _read_folder(Path(folder))
    opened = open_backbone(backbone) if isinstance(backbone, str) else backbone
    if opened.ref.kind not in KINDS:
        raise UsageError(f"embeddings are for {' and '.join(KINDS)}, not for {opened.ref.kind}")
    _check_fit(embeddings, opened)
    vectors = _by_class(embeddings, names or {})
    prompts = np.stack(list(vectors.values()))
    _check_template(prompts[0, :1], template, opened)
    recipe = _recipe(opened, template, settings)
    return Pack(
        classes=tuple(vectors),
        images_per_class=settings.images_per_class,
        recipe=recipe,
        prompts=encode_prompts(prompts, settings.codec),
        seed=settings.seed,
        provenance={"method": "import", "source": {"files": len(embeddings)}},
    )


def _recipe(backbone: Backbone, template: str, settings: ImportSettings) -> Recipe:
    sampling = default_sampling(backbone)
    sampler, steps = settings.sampler or sampling.sampler, settings.sampler_steps or sampling.steps
    size = settings.size or backbone.image_size
    backbone.latent_shape_for(size)  # refuses sizes that do not fit
    return Recipe(
        backbone=backbone.ref,
        size=size,
        sampler=sampler,
        sigmas=sigmas_of(backbone, sampler, steps, size),
        guidance=sampling.guidance if settings.guidance is None else settings.guidance,
        template=template,
        extra={"eta": 1.0} if sampler == "ancestral" else {},
    )


def _read_folder(folder: Path) -> dict[str, tuple[str, list[Array]]]:
    """Return class name and vectors by file: one tensor, or one for each of two encoders."""
    if not folder.is_dir():
        raise NotFoundError(f"there is no folder {folder}")
    files = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    if not files:
        raise NotFoundError(f"{folder} has no file that ends in {', '.join(SUFFIXES)}")
    stems: dict[str, str] = {}
    for path in files:
        if not path.is_file():
            raise UsageError(f"{path.name} is not a regular file")
        if stems.setdefault(path.stem, path.name) != path.name:
            raise UsageError(f"{stems[path.stem]} and {path.name} have the same name: keep one")
    return {path.name: _read(path) for path in files}


def _by_class(
    embeddings: Mapping[str, tuple[str, list[Array]]], names: Mapping[str, str]
) -> dict[str, Array]:
    """Return the vectors (modes, k, D) of each class, in the order of the files."""
    modes: dict[str, list[Array]] = {}
    for file, (own, parts) in embeddings.items():
        name = names.get(Path(file).stem, own)
        try:
            check_name(name)
        except InvalidPackError as error:
            raise UsageError(f"{file}: {error.args[0]}") from None
        modes.setdefault(name, []).append(np.concatenate(parts, axis=1))
    first = next(iter(modes))
    for name, each in modes.items():
        if len(each) != len(modes[first]):
            raise UsageError(
                f"{first!r:.80} has {len(modes[first])} files, {name!r:.80} {len(each)}: a pack has"
                " as many modes for each class"
            )
    return {name: np.stack(each) for name, each in modes.items()}


def _check_template(vectors: Array, template: str, backbone: Backbone) -> None:
    """Refuse vectors (1, k, D) that do not fit into the text encoder with the template."""
    import torch

    most = backbone.prompt_shape[0]
    if 0 < most < vectors.shape[1]:
        raise UsageError(
            f"the files have {vectors.shape[1]} vectors, this backbone takes {most} at most"
        )
    with torch.no_grad():
        backbone.condition(torch.from_numpy(vectors), template)


def _read(path: Path) -> tuple[str, list[Array]]:
    if path.stat().st_size > MAX_BYTES:
        raise UsageError(f"{path.name} has more than {MAX_BYTES} bytes, too many for an embedding")
    tensors, metadata = _load(path)
    values = tensors.get("string_to_param", tensors)
    if isinstance(values, Mapping) and {_LEFT, _RIGHT} <= set(values):
        parts = [values[_LEFT], values[_RIGHT]]
    elif isinstance(values, Mapping) and len(values) == 1:
        parts = list(values.values())
    else:
        keys = ", ".join(map(str, values)) if isinstance(values, Mapping) else type(values).__name__
        raise UsageError(
            f"{path.name} holds {keys!r:.80}: expected one tensor, or {_LEFT} and {_RIGHT}"
        )
    vectors = [_vectors(path.name, part) for part in parts]
    if len({len(part) for part in vectors}) > 1:
        raise UsageError(f"{path.name} has other numbers of vectors in {_LEFT} and {_RIGHT}")
    return metadata.get(_NAME) or path.stem, vectors


def _load(path: Path) -> tuple[Mapping[str, Any], Mapping[str, str]]:
    """Return what a file holds; of a pickle only what needs no code."""
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                return {name: file.get_tensor(name) for name in names}, file.metadata() or {}
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path.name} cannot be read: {first_line(error)}") from None
    import torch

    try:
        _check_zip(path)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:
        raise UsageError(
            f"{path.name} is a pickle that asks for more than tensors, which can run code",
            hint="convert it to safetensors where you trust it",
        ) from None
    except UsageError:
        raise
    except Exception as error:  # torch has no type of its own for a file that is none of its
        raise UsageError(f"{path.name} cannot be read: {first_line(error)}") from None
    return value if isinstance(value, Mapping) else {"": value}, {}


def _check_zip(path: Path) -> None:
    """Refuse what unpacks to more than it should, before torch unpacks it."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\x03\x04":
            return  # older than torch 1.6: not compressed
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise UsageError(f"{path.name} is compressed, which torch never does")
    if sum(entry.file_size for entry in entries) > MAX_BYTES:
        raise UsageError(
            f"{path.name} unpacks to more than {MAX_BYTES} bytes, too many for an embedding"
        )


def _vectors(file: str, value: Any) -> Array:
    """Return float32 (k, D) of a tensor (k, D) or (D)."""
    import torch

    if not isinstance(value, torch.Tensor):
        raise UsageError(f"{file} holds {type(value).__name__} where vectors are expected")
    if value.is_nested or value.layout != torch.strided or value.device.type != "cpu":
        raise UsageError(f"{file} holds a tensor that is not dense")
    if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise UsageError(f"{file} holds values of {value.dtype}, expected float32 or float16")
    if value.numel() * value.element_size() > MAX_BYTES:
        raise UsageError(f"{file} has more than {MAX_BYTES} bytes, too many for an embedding")
    vectors = value.detach().float().resolve_neg()
    if vectors.ndim not in (1, 2) or not vectors.numel() or not vectors.isfinite().all():
        raise UsageError(f"{file} holds no finite vectors, but shape {tuple(value.shape)}")
    array: Array = vectors.reshape(-1, vectors.shape[-1]).numpy()
    return array


def _check_fit(embeddings: Mapping[str, tuple[str, list[Array]]], backbone: Backbone) -> None:
    """Refuse files of several base models, or of another one."""
    shapes = {file: [part.shape for part in parts] for file, (_, parts) in embeddings.items()}
    first = next(iter(shapes))
    for file, shape in shapes.items():
        widths, wanted = ([s[1] for s in each] for each in (shape, shapes[first]))
        if widths != wanted:
            raise UsageError(
                f"{first} has vectors of {_plus(wanted)}, {file} of {_plus(widths)}: they are for"
                " different base models"
            )
        if shape != shapes[first]:
            raise UsageError(
                f"{first} has {shapes[first][0][0]} vectors, {file} {shape[0][0]}: a pack has as"
                " many for each class"
            )
    width = backbone.prompt_shape[1]
    texts = getattr(backbone, "texts", ())
    needed = [text.width for text in texts] if texts else [width]
    widths = [shape[1] for shape in shapes[first]]
    if widths != needed:
        raise UsageError(
            f"{first} has vectors of {_plus(widths)}, this backbone takes {_plus(needed)}"
        )


def _plus(widths: list[int]) -> str:
    return " + ".join(map(str, widths))
