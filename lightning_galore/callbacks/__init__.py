# SPDX-License-Identifier: Apache-2.0
"""Callbacks that schedule and watch low-rank training through the optimizer's public interface, and one to go on."""

from lightning_galore.callbacks.grad_norm import GradNormMonitor
from lightning_galore.callbacks.memory_monitor import MemoryMonitor
from lightning_galore.callbacks.random_states import RandomStates
from lightning_galore.callbacks.subspace_scheduler import SubspaceScheduler

__all__ = ["GradNormMonitor", "MemoryMonitor", "RandomStates", "SubspaceScheduler"]
