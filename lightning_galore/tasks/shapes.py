# SPDX-License-Identifier: Apache-2.0
"""Drawn shapes under noise and a small convolutional network: an example of weights of order > 2, made on the spot."""

from typing import Any

import torch
from lightning import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.classification import MulticlassAccuracy
from typing_extensions import override

SHAPES = ("disc", "square", "triangle", "ring", "cross")


def draw(count: int, *, size: int = 24, noise: float = 0.6, seed: int) -> tuple[Tensor, Tensor]:
    """Pictures ``(count, 1, size, size)`` of one shape each, at any place and of any width, and their classes.

    Args:
        count: How many.
        size: Of their sides.
        noise: Standard deviation of what is added to each pixel; the shape is 1, the ground 0.
        seed: Of places, widths, classes and noise.
    """
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.randint(len(SHAPES), (count,), generator=generator)
    radius = size * (0.16 + 0.16 * torch.rand(count, 1, 1, generator=generator))
    middle = radius + (size - 1 - 2 * radius) * torch.rand(2, count, 1, 1, generator=generator)
    steps = torch.arange(size)
    y, x = (steps.view(1, -1, 1) - middle[0]) / radius, (steps.view(1, 1, -1) - middle[1]) / radius
    far, broad = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs())
    drawn = torch.stack(
        [
            far <= 1,
            broad <= 0.85,
            (y <= 0.8) & (x.abs() <= (y + 1) / 1.8),
            (far <= 1) & (far >= 0.55),
            (broad <= 1) & (torch.minimum(x.abs(), y.abs()) <= 0.3),
        ]
    )[kinds, torch.arange(count)]
    pictures = drawn.float() + noise * torch.randn(count, size, size, generator=generator)
    return pictures.unsqueeze(1), kinds


class ShapesDataModule(LightningDataModule):
    """Synthetic pictures of five shapes, drawn once from a seed: no data set of photographs is needed.

    Args:
        batch_size: Pictures a batch.
        train_size: Pictures to train on.
        validation_size: Other ones to validate on.
        noise: Standard deviation of the noise on each pixel.
        seed: Of the pictures.
    """

    def __init__(
        self,
        batch_size: int = 64,
        train_size: int = 4096,
        validation_size: int = 1024,
        noise: float = 0.6,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.seed, self.noise = batch_size, seed, noise
        self.train_size, self.validation_size = train_size, validation_size

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """The pictures, in a new order every epoch."""
        pictures = TensorDataset(*draw(self.train_size, noise=self.noise, seed=self.seed))
        return DataLoader(pictures, batch_size=self.batch_size, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """Pictures of another seed."""
        pictures = TensorDataset(*draw(self.validation_size, noise=self.noise, seed=self.seed + 1))
        return DataLoader(pictures, batch_size=4 * self.batch_size)


class ShapesNet(LightningModule):
    """Three convolutions and a linear layer that name the shape in a picture.

    Args:
        channels: Of the first convolution; the others have twice as many.
        lr: Learning rate of AdamW.

    Example:
        >>> ShapesNet(channels=4)(torch.zeros(2, 1, 24, 24)).shape
        torch.Size([2, 5])
    """

    def __init__(self, channels: int = 32, lr: float = 3e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.example_input_array = torch.zeros(64, 1, 24, 24)
        self.net = nn.Sequential(
            *_stage(1, channels),
            *_stage(channels, 2 * channels),
            *_stage(2 * channels, 2 * channels),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * channels, len(SHAPES)),
        )
        self.accuracy = MulticlassAccuracy(num_classes=len(SHAPES), average="micro")

    @override
    def forward(self, pictures: Tensor) -> Tensor:
        """Logits ``(pictures, 5)``."""
        found: Tensor = self.net(pictures)
        return found

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """One step's loss."""
        loss = F.cross_entropy(self(batch[0]), batch[1])
        self.log("train/loss", loss, prog_bar=True)
        return loss

    @override
    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Score one batch."""
        self.accuracy(self(batch[0]), batch[1])
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    @override
    def configure_optimizers(self) -> AdamW:
        """AdamW."""
        return AdamW(self.parameters(), lr=self.lr)


def _stage(inputs: int, outputs: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(4, outputs), nn.ReLU(), nn.MaxPool2d(2)]
