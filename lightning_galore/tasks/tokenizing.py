# SPDX-License-Identifier: Apache-2.0
"""Tokenizers of language models: by name, or trained on the text."""

import os
import shutil
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lightning_galore.tasks.causal_models import PUBLISHED
from lightning_galore.tasks.extras import require

#: What the GaLore paper's scripts tokenize C4 with; its published sizes take it where no other is named.
PUBLISHED_TOKENIZER = "google-t5/t5-base"
END, UNKNOWN = "</s>", "<unk>"


def load_tokenizer(name: str) -> Any:
    """A tokenizer by its name on the hub, or the folder that holds it.

    Args:
        name: Also a published size, as ``"60m"``, for the tokenizer that the paper used.

    Raises:
        FileNotFoundError: If it cannot be had.
        ValueError: If it has no end-of-text token, which stands between documents.
    """
    name = PUBLISHED_TOKENIZER if name in PUBLISHED else name
    try:
        tokenizer = require("transformers").AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"The tokenizer {name!r} cannot be loaded: {str(error).splitlines()[0]} Name a folder that holds one with "
            "data.tokenizer_name=..., or have one trained on your text with data.vocab_size=8192."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {name!r} has no end-of-text token (eos_token), which stands between documents. Set it and "
            "save the tokenizer into a folder, or name another one with data.tokenizer_name=..."
        )
    # Documents are cut into blocks later; a length that is checked here only warns.
    tokenizer.model_max_length = int(1e30)
    return tokenizer


def bpe_folder(texts: Sequence[str], vocab_size: int, folder: Path) -> Path:
    """Where the tokenizer that is trained on ``texts`` is kept: texts and size name it."""
    digest = blake2b(str(vocab_size).encode(), digest_size=8)
    for text in texts:
        digest.update(text.encode("utf-8", "surrogatepass") + b"\x00")
    return folder / f"bpe-{vocab_size}-{digest.hexdigest()}"


def train_bpe(texts: Sequence[str], vocab_size: int, folder: Path) -> Path:
    """Train a byte-level BPE, or find it where it was kept the last time.

    Any text can be written in it: its alphabet is the 256 bytes. Token 0 is the end of text.

    Args:
        texts: Documents.
        vocab_size: Tokens, the alphabet and ``</s>`` among them.
        folder: Trained tokenizers are kept below it.

    Returns:
        The folder of the tokenizer, for ``AutoTokenizer``.

    Raises:
        ValueError: If the texts are too short for that many tokens.
    """
    kept = bpe_folder(texts, vocab_size, folder)
    if (kept / "tokenizer.json").is_file():
        return kept
    tokenizers, transformers = require("tokenizers"), require("transformers")
    bpe = tokenizers.ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size=vocab_size, special_tokens=[END, UNKNOWN], show_progress=False)
    if (made := bpe.get_vocab_size()) < vocab_size:
        raise ValueError(
            f"vocab_size={vocab_size} is more than the text gives: {len(texts)} documents make {made} tokens. Lower it "
            "to at most that, or give more text."
        )
    folder.mkdir(parents=True, exist_ok=True)
    # Beside its place and then moved there whole: another run must not find half of it.
    made_in = Path(tempfile.mkdtemp(prefix=".bpe-", dir=folder))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token=END, unk_token=UNKNOWN)
    fast.save_pretrained(made_in)
    try:
        os.replace(made_in, kept)
    except OSError:  # another run was faster
        shutil.rmtree(made_in)
    return kept


class Encoder:
    """Token ids of texts, each followed by the end-of-text token. An object, as it is pickled for workers.

    Args:
        tokenizer: Of Transformers.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, texts: list[str]) -> list[list[int]]:
        """The ids of each text."""
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        end = self.tokenizer.eos_token_id
        return [[*ids, end] for ids in encoded["input_ids"]]


def largest_id(tokenizer: Any) -> int:
    """The largest id that ordinary text and the end-of-text token can give: T5's extra ids never come up."""
    added = set(tokenizer.added_tokens_decoder)
    return max(*(i for i in tokenizer.get_vocab().values() if i not in added), tokenizer.eos_token_id)
