# SPDX-License-Identifier: Apache-2.0
"""The LightningModules and LightningDataModules of the recipes."""

from lightning_galore.tasks.causal_lm import CausalLMModule
from lightning_galore.tasks.causal_lm_data import CausalLMDataModule
from lightning_galore.tasks.gan import RingDataModule, RingGan
from lightning_galore.tasks.glue import GlueModule
from lightning_galore.tasks.glue_data import GlueDataModule
from lightning_galore.tasks.instructions import InstructionDataModule

__all__ = [
    "CausalLMDataModule",
    "CausalLMModule",
    "GlueDataModule",
    "GlueModule",
    "InstructionDataModule",
    "RingDataModule",
    "RingGan",
]
