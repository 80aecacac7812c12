"""Ways to use a pack, as a card shows them; a test runs each."""

from __future__ import annotations

PYTORCH = """\
from d3pack import D3MDataset  # pip install {install}
from torch.utils.data import DataLoader

data = D3MDataset("{address}")
for images, labels in DataLoader(data, batch_size=64, shuffle=True):
    ...  # uint8, (N, 3, {height}, {width}); the first epoch makes the images, later ones read them
"""
DECODE = """\
d3pack decode "{address}" -o images --to parquet  # pip install {encode}
"""
DATASETS = """\
from datasets import load_dataset

data = load_dataset("images", split="train")  # columns: image, label
"""
TRANSFORMERS = """\
import torch
from d3pack import D3MDataset  # pip install {encode}
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

data = D3MDataset("{address}", output="float")


def collate(samples):
    images, labels = zip(*samples)
    return {{"pixel_values": torch.stack(images) * 2 - 1, "labels": torch.tensor(labels)}}


config = ResNetConfig(
    layer_type="basic",
    embedding_size=32,
    hidden_sizes=[32, 64, 128],
    depths=[1, 1, 1],
    num_labels=len(data.classes),
)
Trainer(
    ResNetForImageClassification(config),
    TrainingArguments("trained", num_train_epochs=20, learning_rate=3e-3),
    train_dataset=data,
    data_collator=collate,
).train()
"""
LIGHTNING = """\
import torch
from d3pack import D3MDataset  # pip install {install} lightning
from lightning import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader


class Classifier(LightningModule):
    def __init__(self, classes):
        super().__init__()
        layers = [nn.Conv2d(3, 32, 3, stride=2), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten()]
        self.network = nn.Sequential(*layers, nn.Linear(512, classes))

    def training_step(self, batch):
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


data = D3MDataset("{address}", output="float")
loader = DataLoader(data, batch_size=64, shuffle=True)
Trainer(max_epochs=20).fit(Classifier(len(data.classes)), loader)
"""


def blocks(address: str, size: tuple[int, int], extras: tuple[str, ...] = ()) -> str:
    """Return Markdown: PyTorch in sight, the others to open.

    Args:
        address: of the pack.
        size: height and width of its images.
        extras: that its backbone needs.
    """
    values = {
        "address": address,
        "height": size[0],
        "width": size[1],
        "install": _requirement(*extras),
        "encode": _requirement("encode", *extras),
    }

    def code(language: str, text: str) -> str:
        return f"```{language}\n{text.format(**values)}```"

    others = (
        ("datasets", code("sh", DECODE) + "\n\n" + code("python", DATASETS)),
        ("transformers", code("python", TRANSFORMERS)),
        ("Lightning", code("python", LIGHTNING)),
    )
    hidden = (
        f"<details><summary>{name}</summary>\n\n{text}\n\n</details>" for name, text in others
    )
    return "\n\n".join((code("python", PYTORCH), *hidden))


def _requirement(*extras: str) -> str:
    """Return what pip installs, as a shell takes it."""
    return f"'d3pack[{','.join(extras)}]'" if extras else "d3pack"
