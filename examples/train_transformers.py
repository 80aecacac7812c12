"""Train a transformers image classifier on a pack with `transformers.Trainer`.

    python examples/train_transformers.py cifar10.d3m --epochs 20

A pack is a dataset of (image, label); the collator gives the columns the names that models expect.
"""

import argparse

import torch
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

from d3pack import D3MDataset

parser = argparse.ArgumentParser()
parser.add_argument("pack")
parser.add_argument("--epochs", type=int, default=20)
parser.add_argument("--batch-size", type=int, default=64)
parser.add_argument("--output", default="runs/transformers")
parser.add_argument("--backbone", help="directory of the backbone, if the pack's is not public")
args = parser.parse_args()

dataset = D3MDataset(args.pack, output="float", backbone=args.backbone)


def collate(samples: list[tuple[torch.Tensor, int]]) -> dict[str, torch.Tensor]:
    """(image, label) pairs as the keyword arguments of the model."""
    images, labels = zip(*samples, strict=True)
    return {"pixel_values": torch.stack(images) * 2 - 1, "labels": torch.tensor(labels)}


config = ResNetConfig(
    embedding_size=32,
    hidden_sizes=[32, 64, 128],
    depths=[1, 1, 1],
    layer_type="basic",
    downsample_in_first_stage=False,
    id2label=dict(enumerate(dataset.classes)),
    label2id=dataset.class_to_idx,
)
trainer = Trainer(
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
