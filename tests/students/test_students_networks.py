"""Students are the published networks: counted parameters, shapes, and the same draw per seed."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from d3pack.errors import NotFoundError, UsageError
from d3pack.students import networks
from d3pack.students.networks import build_student


def parameters(model: torch.nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def convnet_parameters(depth: int, classes: int, size: int) -> int:
    first, other = 3 * 9 * 128 + 128, 128 * 9 * 128 + 128
    norms = depth * 2 * 128
    side = size >> depth
    return first + (depth - 1) * other + norms + 128 * side * side * classes + classes


@pytest.mark.parametrize(
    ("depth", "classes", "size"), [(3, 10, 32), (3, 100, 32), (4, 200, 64), (6, 10, 224)]
)
def test_convnet_has_the_published_size(depth: int, classes: int, size: int) -> None:
    model = build_student(f"convnet{depth}", classes, size)
    assert parameters(model) == convnet_parameters(depth, classes, size)


def test_convnet3_on_cifar_is_the_320010_parameter_net_of_the_literature() -> None:
    assert parameters(build_student("convnet3", 10, 32)) == 320_010


def test_resnet18_imagenet_matches_torchvision_count() -> None:
    # torchvision's resnet18 has 11,689,512 parameters for 1000 classes.
    model = build_student("resnet18-imagenet", 1000, 224, norm="batch")
    assert parameters(model) == 11_689_512


def test_resnet18_cifar_stem() -> None:
    model = build_student("resnet18", 10, 32, norm="batch")
    stem = 3 * 64 * (49 - 9)  # 3x3 in place of 7x7
    head = 512 * 990 + 990
    assert parameters(model) == 11_689_512 - stem - head
    assert model.get_submodule("stem")(torch.zeros(1, 3, 32, 32)).shape == (1, 64, 32, 32)


@pytest.mark.parametrize(("size", "side"), [(32, 32), (64, 64), (128, 64), (224, 56)])
def test_resnetap10_stem_follows_the_size(size: int, side: int) -> None:
    model = build_student("resnetap10", 10, size)
    assert model.get_submodule("stem")(torch.zeros(1, 3, size, size)).shape[-1] == side
    assert not any(m.stride != (1, 1) for m in model.modules() if isinstance(m, torch.nn.Conv2d))


@pytest.mark.parametrize("name", ["convnet3", "convnet4", "resnetap10", "resnet18", "vit6"])
def test_logits_and_gradients(name: str) -> None:
    model = build_student(name, 7, 32)
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 7)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 8, 8), (3, 16, 6, 10), (2, 4, 7, 8), (1, 8, 2, 2)])
def test_relu_and_pool_are_fused_without_a_difference(
    shape: tuple[int, int, int, int], dtype: torch.dtype
) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0, 0] = 0.0
    fused, plain = x.clone().requires_grad_(), x.clone().requires_grad_()
    one = networks.ReluPool()(fused)
    other = torch.nn.functional.avg_pool2d(torch.nn.functional.relu(plain), 2)
    assert torch.equal(one, other)
    grad = torch.randn_like(other)
    one.backward(grad)
    other.backward(grad)
    assert fused.grad is not None
    assert plain.grad is not None
    assert torch.equal(fused.grad, plain.grad)


def test_vit_has_64_patches_of_any_size() -> None:
    model = build_student("vit6", 10, 32)
    block = 4 * (192 * 192 + 192) + 2 * 192 * 768 + 768 + 192 + 4 * 192
    patches = 3 * 4 * 4 * 192 + 192
    assert parameters(model) == 6 * block + patches + 66 * 192 + 2 * 192 + 10 * 192 + 10
    with pytest.raises(UsageError, match="28 px do not divide by 8"):
        build_student("vit6", 10, 28)


def test_instance_norm_does_not_couple_images() -> None:
    model = build_student("convnet3", 5, 32)
    x = torch.randn(4, 3, 32, 32)
    alone = torch.cat([model(one[None]) for one in x])
    torch.testing.assert_close(model(x), alone, rtol=1e-4, atol=1e-4)


def test_the_seed_decides_the_weights_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, same = (build_student("convnet3", 4, 16, seed=3) for _ in range(2))
    other = build_student("convnet3", 4, 16, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.get_parameter("classifier.weight") for model in (one, same, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_transformers_by_type_and_by_directory(tmp_path: Path) -> None:
    config = {
        "model_type": "vit",
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "patch_size": 8,
        "image_size": 224,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = build_student(f"hf:{tmp_path}", 6, 32)
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 6)
    resnet = build_student("hf:resnet", 3, 32)
    resnet.eval()
    assert resnet(torch.randn(1, 3, 32, 32)).shape == (1, 3)


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(UsageError, match="resnetap10"):
        build_student("convnet9", 10, 32)
    with pytest.raises(NotFoundError, match="no-such-net"):
        build_student("hf:./no-such-net", 10, 32)


def test_a_text_model_is_no_student() -> None:
    with pytest.raises(UsageError, match="no image classifier"):
        build_student("hf:bert", 10, 32)


def test_too_small_images_are_refused() -> None:
    with pytest.raises(UsageError, match="at least 64 px"):
        build_student("convnet6", 10, 32)
