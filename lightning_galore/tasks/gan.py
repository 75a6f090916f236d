# SPDX-License-Identifier: Apache-2.0
"""A GAN on points of a ring of Gaussians: manual optimization with two optimizers, in any mode and strategy."""

import math
from typing import Any, cast

import torch
from lightning import LightningDataModule
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812
from torch.optim import Adam
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_galore.tasks.manual import ManualModule

CENTRES, RADIUS, SPREAD = 8, 2.0, 0.1


def ring(count: int, *, seed: int) -> Tensor:
    """``count`` points ``(count, 2)`` around eight centres on a circle."""
    generator = torch.Generator().manual_seed(seed)
    angles = 2 * math.pi / CENTRES * torch.randint(CENTRES, (count,), generator=generator)
    centres = RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)
    return centres + SPREAD * torch.randn(count, 2, generator=generator)


class RingDataModule(LightningDataModule):
    """Points of the ring, drawn once from a seed.

    Args:
        batch_size: Points a batch.
        train_size: Points an epoch.
        seed: Of the points.
    """

    def __init__(self, batch_size: int = 256, train_size: int = 25_600, seed: int = 0) -> None:
        super().__init__()
        self.batch_size, self.train_size, self.seed = batch_size, train_size, seed

    @override
    def train_dataloader(self) -> DataLoader[Any]:
        """The points, in a new order every epoch."""
        points = TensorDataset(ring(self.train_size, seed=self.seed))
        return DataLoader(points, batch_size=self.batch_size, shuffle=True)


class RingGan(ManualModule):
    """Generator and critic, each with an optimizer of its own; the generator's loss reaches the critic's weights too.

    Args:
        hidden: Width of both networks.
        latent: Numbers that the generator starts from.
        lr: Learning rate of both.

    Example:
        >>> RingGan(hidden=16)(3).shape
        torch.Size([3, 2])
    """

    def __init__(self, hidden: int = 128, latent: int = 16, lr: float = 1e-3) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.latent, self.lr = latent, lr
        self.generator = _network(latent, hidden, 2)
        self.critic = _network(2, hidden, 1)

    @override
    def forward(self, count: int) -> Tensor:
        """Draw ``count`` points ``(count, 2)``."""
        return self.generator(torch.randn(count, self.latent, device=self.device))

    @override
    def training_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """One step of the critic, then one of the generator through the critic as it is then."""
        generator_optimizer, critic_optimizer = cast("list[Any]", self.optimizers())
        real, fake = batch[0], self(len(batch[0])).detach()
        critic_loss = F.softplus(-self.critic(real)).mean() + F.softplus(self.critic(fake)).mean()
        self.minimize(critic_optimizer, critic_loss)
        generator_loss = F.softplus(-self.critic(self(len(real)))).mean()
        self.minimize(generator_optimizer, generator_loss)
        self.log_dict({"train/critic": critic_loss, "train/generator": generator_loss}, prog_bar=True)

    @override
    def on_train_epoch_end(self) -> None:
        """Log the share of points near a centre, and how many centres have a fair share of them."""
        with torch.no_grad():
            points = self(2048)
        angles = torch.arange(CENTRES, device=points.device) * (2 * math.pi / CENTRES)
        centres = RADIUS * torch.stack([angles.cos(), angles.sin()], dim=1)
        distance, nearest = torch.cdist(points, centres).min(dim=1)
        near = distance < 4 * SPREAD
        shares = torch.bincount(nearest[near], minlength=CENTRES) * CENTRES / len(points)
        self.log_dict(
            {"points/near": near.float().mean(), "points/centres": (shares > 0.25).float().sum()}, prog_bar=True
        )

    @override
    def configure_optimizers(self) -> list[Adam]:
        """Adam for each network."""
        return [Adam(net.parameters(), lr=self.lr, betas=(0.5, 0.9)) for net in (self.generator, self.critic)]


def _network(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    layers = [nn.Linear(inputs, hidden), nn.LeakyReLU(0.2)]
    for _ in range(2):
        layers += [nn.Linear(hidden, hidden), nn.LeakyReLU(0.2)]
    return nn.Sequential(*layers, nn.Linear(hidden, outputs))
