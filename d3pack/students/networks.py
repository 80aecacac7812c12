"""Students: the networks that the literature on dataset distillation trains on small sets.

Every student takes normalised float images (N, 3, S, S) and returns logits (N, classes). To add
one, add a function of (classes, size, norm) to `STUDENTS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d3pack.errors import NotFoundError, UsageError
from d3pack.students.protocols import Norm


def _norm(kind: Norm, channels: int) -> nn.Module:
    """Instance norm is written as GroupNorm with one channel a group, as in the published code."""
    return nn.GroupNorm(channels, channels) if kind == "instance" else nn.BatchNorm2d(channels)


def _conv(inner: int, outer: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inner, outer, kernel, stride, padding=kernel // 2, bias=False)


class _FusedReluPool(torch.autograd.Function):
    """ReLU and 2x2 average pooling in channels-last order, in which processors are fast.

    The bits are those of the two operations; pooling in the ordinary order takes a third of a
    ConvNet's time on a processor.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        kept = x.contiguous(memory_format=torch.channels_last).relu()
        ctx.save_for_backward(kept)
        return F.avg_pool2d(kept, 2).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        n, c, h, w = kept.shape
        values = kept.permute(0, 2, 3, 1).view(n, h // 2, 2, w // 2, 2, c)
        quarter = (grads[0] * 0.25).contiguous(memory_format=torch.channels_last)
        spread = quarter.permute(0, 2, 3, 1).view(n, h // 2, 1, w // 2, 1, c).expand_as(values)
        passed = torch.ops.aten.threshold_backward(spread, values, 0)
        return cast(Tensor, passed.view(n, h, w, c).permute(0, 3, 1, 2).contiguous())


class ReluPool(nn.Module):
    """ReLU, then 2x2 average pooling."""

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and x.shape[2] % 2 == 0 and x.shape[3] % 2 == 0:
            return cast(Tensor, _FusedReluPool.apply(x))  # type: ignore[no-untyped-call]
        return F.avg_pool2d(F.relu(x), 2)


class ConvNet(nn.Module):
    """ConvNet-D of dataset condensation (arXiv 2006.05929): D x (conv3, norm, ReLU, avgpool2)."""

    def __init__(self, depth: int, classes: int, size: int, norm: Norm, width: int = 128) -> None:
        super().__init__()
        side = size >> depth
        if side < 1:
            raise UsageError(
                f"convnet{depth} halves images {depth} times: {size} px are too small",
                hint=f"use images of at least {1 << depth} px, or a shallower student",
            )
        layers: list[nn.Module] = []
        for level in range(depth):
            layers += [
                nn.Conv2d(3 if level == 0 else width, width, 3, padding=1),
                _norm(norm, width),
                ReluPool(),
            ]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Linear(width * side * side, classes)

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.classifier(self.features(x).flatten(1)))


class _Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut; `pooled` halves by average pooling, not by stride."""

    def __init__(self, inner: int, outer: int, stride: int, norm: Norm, pooled: bool) -> None:
        super().__init__()
        self.pool = stride if pooled else 1
        self.conv1 = _conv(inner, outer, 3, 1 if pooled else stride)
        self.norm1 = _norm(norm, outer)
        self.conv2 = _conv(outer, outer)
        self.norm2 = _norm(norm, outer)
        self.shortcut = nn.Sequential()
        if stride != 1 or inner != outer:
            self.shortcut.append(_conv(inner, outer, 1, 1 if pooled else stride))
            if pooled:
                self.shortcut.append(nn.AvgPool2d(stride))
            self.shortcut.append(_norm(norm, outer))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        if self.pool > 1:
            y = F.avg_pool2d(y, self.pool)
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    """Residual network of basic blocks; variants differ in stem and downsampling."""

    def __init__(
        self,
        blocks: tuple[int, int, int, int],
        classes: int,
        norm: Norm,
        stem: nn.Module,
        pooled: bool,
    ) -> None:
        super().__init__()
        self.stem = stem
        layers: list[nn.Module] = []
        inner = 64
        for stage, count in enumerate(blocks):
            outer = 64 << stage
            for position in range(count):
                stride = 2 if stage > 0 and position == 0 else 1
                layers.append(_Block(inner, outer, stride, norm, pooled))
                inner = outer
        self.stages = nn.Sequential(*layers)
        self.classifier = nn.Linear(inner, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                fan_out = module.kernel_size[0] * module.kernel_size[1] * module.out_channels
                nn.init.normal_(module.weight, 0.0, math.sqrt(2.0 / fan_out))

    def forward(self, x: Tensor) -> Tensor:
        features = self.stages(self.stem(x)).mean((2, 3))
        return cast(Tensor, self.classifier(features))


def _resnet_ap10(classes: int, size: int, norm: Norm) -> nn.Module:
    """ResNetAP-10 (arXiv 2205.14959, used by arXiv 2311.15529): the stem depends on the size."""
    kernel, pool = (7, 4) if size > 128 else (3, 2) if size > 64 else (3, 1)
    stem: list[nn.Module] = [_conv(3, 64, kernel), _norm(norm, 64), nn.ReLU(inplace=True)]
    if pool > 1:
        stem.append(nn.AvgPool2d(pool))
    return ResNet((1, 1, 1, 1), classes, norm, nn.Sequential(*stem), pooled=True)


def _resnet18_cifar(classes: int, size: int, norm: Norm) -> nn.Module:
    """ResNet-18 with a 3x3 stem and no max-pool: CIFAR and Tiny-ImageNet."""
    stem = nn.Sequential(_conv(3, 64), _norm(norm, 64), nn.ReLU(inplace=True))
    return ResNet((2, 2, 2, 2), classes, norm, stem, pooled=False)


def _resnet18_imagenet(classes: int, size: int, norm: Norm) -> nn.Module:
    """ResNet-18 as on ImageNet: 7x7 stem of stride 2, then a max-pool."""
    stem = nn.Sequential(
        _conv(3, 64, 7, 2), _norm(norm, 64), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, padding=1)
    )
    return ResNet((2, 2, 2, 2), classes, norm, stem, pooled=False)


class _Transformers(nn.Module):
    """An image classifier of `transformers` that takes images and returns logits."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return cast(Tensor, self.model(pixel_values=x).logits)


def _transformers(name: str, classes: int, size: int) -> nn.Module:
    from transformers import AutoConfig, AutoModelForImageClassification
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    try:
        if name in CONFIG_MAPPING:
            config = AutoConfig.for_model(name)
        else:
            config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise NotFoundError(
            f"there is no transformers config {name!r}",
            hint="give a model type such as vit, a directory with config.json, or a repository",
        ) from error
    config.num_labels = classes
    if hasattr(config, "image_size"):
        config.image_size = size
    try:
        return _Transformers(AutoModelForImageClassification.from_config(config))
    except (ValueError, ZeroDivisionError, RuntimeError) as error:
        raise UsageError(
            f"transformers config {name!r} makes no image classifier for {size} px: {error}",
            hint="choose an image-classification config whose patches fit the images",
        ) from error


def _vit(depth: int) -> Callable[[int, int, Norm], nn.Module]:
    """Return what builds a small ViT: 8 x 8 patches, 192 values wide as DeiT-Tiny, layer norm."""

    def build(classes: int, size: int, norm: Norm) -> nn.Module:
        from transformers.models.vit.configuration_vit import ViTConfig
        from transformers.models.vit.modeling_vit import ViTForImageClassification

        if size % 8:
            raise UsageError(
                f"vit{depth} cuts images into 8 x 8 patches: {size} px do not divide by 8",
                hint="use images whose size is a multiple of 8, or a ConvNet",
            )
        config = ViTConfig(
            hidden_size=192,
            num_hidden_layers=depth,
            num_attention_heads=3,
            intermediate_size=768,
            image_size=size,
            patch_size=size // 8,
            num_labels=classes,
        )
        return _Transformers(ViTForImageClassification(config))

    return build


def _convnet(depth: int) -> Callable[[int, int, Norm], nn.Module]:
    return lambda classes, size, norm: ConvNet(depth, classes, size, norm)


STUDENTS: dict[str, Callable[[int, int, Norm], nn.Module]] = {
    **{f"convnet{depth}": _convnet(depth) for depth in (3, 4, 5, 6)},
    "resnetap10": _resnet_ap10,
    "resnet18": _resnet18_cifar,
    "resnet18-imagenet": _resnet18_imagenet,
    "vit6": _vit(6),
}
TRANSFORMERS = "hf:"


def build_student(
    name: str, classes: int, size: int, *, norm: Norm = "instance", seed: int = 0
) -> nn.Module:
    """Return a fresh student with weights drawn from `seed`; `hf:NAME` is a transformers config."""
    if not name.startswith(TRANSFORMERS) and name not in STUDENTS:
        names = ", ".join(STUDENTS)
        raise UsageError(f"invalid student {name!r}: expected one of {names}, or hf:CONFIG")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if name.startswith(TRANSFORMERS):
            return _transformers(name.removeprefix(TRANSFORMERS), classes, size)
        return STUDENTS[name](classes, size, norm)
