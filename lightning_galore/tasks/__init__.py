# SPDX-License-Identifier: Apache-2.0
"""The LightningModules and LightningDataModules of the recipes."""

from lightning_galore.tasks.gan import RingDataModule, RingGan
from lightning_galore.tasks.glue import GlueModule
from lightning_galore.tasks.glue_data import GlueDataModule

__all__ = ["GlueDataModule", "GlueModule", "RingDataModule", "RingGan"]
