"""Train a transformers image classifier on a pack with `transformers.Trainer`.

    python examples/train_transformers.py cifar10.d3m --epochs 20

A pack is a dataset of (image, label, weight); the collator gives the columns the names that models
expect, and the loss counts each image by its weight.
"""

import argparse
from typing import Any

import torch
from torch.nn import functional as F
from torch.utils.data import default_collate
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from d3pack import D3MDataset

parser = argparse.ArgumentParser()
parser.add_argument("pack")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--output", default="runs/transformers")
parser.add_argument("--backbone", help="directory of the backbone, if the pack's is not public")
args = parser.parse_args()

dataset = D3MDataset(args.pack, output="float", backbone=args.backbone, weights=True)


def collate(samples: list[tuple[torch.Tensor, int, torch.Tensor]]) -> dict[str, torch.Tensor]:
    images, labels, weights = default_collate(samples)
    return {"pixel_values": images * 2 - 1, "labels": labels, "weights": weights}


class WeightedTrainer(Trainer):  # type: ignore[misc]  # mypy does not follow transformers
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False  # it divides the loss by accumulated batches

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **_: Any) -> Any:
        answers = model(pixel_values=inputs["pixel_values"])
        loss = F.cross_entropy(answers.logits, inputs["labels"], reduction="none")
        loss = (loss * inputs["weights"]).mean()
        return (loss, answers) if return_outputs else loss


config = ResNetConfig(
    embedding_size=32,
    hidden_sizes=[32, 64, 128],
    depths=[1, 1, 1],
    layer_type="basic",
    downsample_in_first_stage=False,
    id2label=dict(enumerate(dataset.classes)),
    label2id=dataset.class_to_idx,
)
trainer = WeightedTrainer(
    model=ResNetForImageClassification(config),
    args=TrainingArguments(
        args.output,
        num_train_epochs=args.epochs,
        per_device_train_batch_size=args.batch_size,
        learning_rate=3e-3,
        logging_steps=10,
        report_to=[],
        dataloader_pin_memory=False,  # the images may be on the GPU already
    ),
    train_dataset=dataset,
    data_collator=collate,
)
trainer.train()
