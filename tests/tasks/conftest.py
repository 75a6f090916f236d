# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os

import pytest

# Before transformers and datasets are imported, which read it once: no test of the tasks reaches the network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")

from tests.tasks.tiny import build_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of a tiny random RoBERTa and its tokenizer."""
    return build_tiny_model(tmp_path_factory.mktemp("tiny_roberta"))
