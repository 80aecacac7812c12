"""Train on a pack with Lightning, on one device or many.

    python examples/train_lightning.py cifar10.d3m --epochs 20 --devices 2

Lightning divides the DataLoader among its ranks; they decode each image once, together.
"""

import argparse
from typing import Any

import torch
from lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from d3pack import D3MDataset

parser = argparse.ArgumentParser()
parser.add_argument("pack")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--devices", type=int, default=1)
parser.add_argument("--backbone", help="directory of the backbone, if the pack's is not public")


class Classifier(LightningModule):  # type: ignore[misc]  # mypy does not follow lightning
    def __init__(self, classes: int) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU()]
        self.network = nn.Sequential(
            *layers, nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32 * 16, classes)
        )

    def training_step(self, batch: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        images, labels, weights = batch
        loss = (F.cross_entropy(self.network(images), labels, reduction="none") * weights).mean()
        self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.print(f"epoch {self.current_epoch}: loss {self.trainer.callback_metrics['loss']:.3f}")

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


if __name__ == "__main__":
    args = parser.parse_args()
    trainer = Trainer(
        max_epochs=args.epochs,
        devices=args.devices,
        strategy="ddp" if args.devices > 1 else "auto",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    dataset = D3MDataset(
        args.pack,
        output="float",
        device=trainer.strategy.root_device,
        backbone=args.backbone,
        quiet=not trainer.is_global_zero,
        weights=True,
    )
    loader = DataLoader(dataset, batch_size=args.batch_size, shuffle=True)
    trainer.fit(Classifier(len(dataset.classes)), loader)
