# SPDX-License-Identifier: Apache-2.0
"""What other packages say at every start that a user of the command line can do nothing about."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec


@contextmanager
def without_notices() -> Iterator[None]:
    """Without known notices of packages to themselves; each is named with whose it is."""
    with warnings.catch_warnings():
        # Lightning's (lightning/pytorch/utilities/_pytree.py), which asks torch's pytree in an older way.
        warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
        yield


@contextmanager
def without_weights_bar() -> Iterator[None]:
    """Without Transformers' bar of weights that it loads, where a table is all that is asked for.

    Bars of downloads, which are the hub's and may take long, stay.
    """
    if find_spec("transformers") is None:
        yield
        return
    from huggingface_hub.utils import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils import logging

    bars, downloads = logging.is_progress_bar_enabled(), not are_progress_bars_disabled()
    logging.disable_progress_bar()  # the hub's too
    if downloads:
        enable_progress_bars()
    try:
        yield
    finally:
        if bars:
            logging.enable_progress_bar()
