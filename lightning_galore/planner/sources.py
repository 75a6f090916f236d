# SPDX-License-Identifier: Apache-2.0
"""Models from their configuration alone: never a weight, never code that came with a model."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_galore.planner.fakes import Job, training_loss

Head = Literal["auto", "causal-lm", "masked-lm", "sequence-classification"]

_LLAMA = {"vocab_size": 32_000, "max_position_embeddings": 2048, "tie_word_embeddings": False}


def _llama(hidden: int, mlp: int, layers: int, heads: int) -> dict[str, Any]:
    return {
        **_LLAMA,
        "hidden_size": hidden,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


#: Models by short names: the class of their configuration, its settings, the head.
#: LLaMA: table 5 of GaLore (arXiv 2403.03507); heads and layers of 1b as in its configs/llama_1b.json.
BUILT_IN: dict[str, tuple[str, dict[str, Any], Head]] = {
    "llama-60m": ("LlamaConfig", _llama(512, 1376, 8, 8), "causal-lm"),
    "llama-130m": ("LlamaConfig", _llama(768, 2048, 12, 12), "causal-lm"),
    "llama-350m": ("LlamaConfig", _llama(1024, 2736, 24, 16), "causal-lm"),
    "llama-1b": ("LlamaConfig", _llama(2048, 5461, 24, 32), "causal-lm"),
    "llama-7b": ("LlamaConfig", _llama(4096, 11_008, 32, 32), "causal-lm"),
    "roberta-base": (
        "RobertaConfig",
        {"vocab_size": 50_265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        "sequence-classification",
    ),
    # What the demo trains: the weights of all-MiniLM-L6-v2 in RoBERTa's classes.
    "minilm": (
        "RobertaConfig",
        {
            "vocab_size": 30_522,
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "max_position_embeddings": 513,
            "type_vocab_size": 2,
            "pad_token_id": 0,
        },
        "sequence-classification",
    ),
}
_AUTO_CLASSES: dict[str, str] = {
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "sequence-classification": "AutoModelForSequenceClassification",
}
_HEADS = {"ForCausalLM": "causal-lm", "LMHeadModel": "causal-lm", "ForMaskedLM": "masked-lm"}


def named_job(
    name: str,
    *,
    batch_size: int,
    sequence_length: int,
    precision: str = "bf16-true",
    head: Head = "auto",
    download: bool = False,
    **settings: Any,
) -> Job:
    """A Transformers model by name, and a batch of tokens for it.

    Args:
        name: A name of ``BUILT_IN``, a ``config.json`` or the folder that holds it, a model type (``"gpt2"``: its
            default shapes in Transformers), or a name on the Hugging Face hub whose ``config.json`` is cached.
        batch_size: Sequences a batch.
        sequence_length: Tokens a sequence.
        precision: A key of ``PRECISIONS``.
        head: What is trained on top; ``auto`` follows the configuration.
        download: Fetch a ``config.json`` from the hub (that file only).
        **settings: Changes to the configuration, as ``num_labels``.
    """
    config, own = hugging_face_config(name, download=download, **settings)
    chosen = own if head == "auto" else head
    config.use_cache = False
    module = bare_model(config, chosen)
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and sequence_length > most:
        raise ValueError(f"sequence_length={sequence_length} is more than {name} takes; {most} is its most.")
    batch = token_batch(config, chosen, batch_size=batch_size, sequence_length=sequence_length)
    return Job(name=name, module=module, batch=batch, step=training_loss, precision=precision)


def hugging_face_config(name: str, *, download: bool = False, **settings: Any) -> tuple[Any, Head]:
    """A configuration by name, and its head: see :func:`named_job`.

    Raises:
        ValueError: If nothing is known of the name without the network, or it asks for code of its own.
        FileNotFoundError: If it is the path of a file that is not there.
    """
    transformers = _transformers()
    if name.lower() in BUILT_IN:
        cls, shapes, head = BUILT_IN[name.lower()]
        return getattr(transformers, cls)(**{**shapes, **settings}), head
    config = _from_files(transformers, name, download=download, settings=settings)
    return config, _head_of(config)


def _from_files(transformers: Any, name: str, *, download: bool, settings: dict[str, Any]) -> Any:
    auto = transformers.AutoConfig
    types = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES
    local = Path(name).exists()
    if not local and name in types:
        return auto.for_model(name, **settings)
    if not local and is_path(name):
        raise FileNotFoundError(
            missing_file(name, "Give a config.json, the folder that holds one, or a recipe (.yaml).")
        )
    try:
        # A file alone may have any name; the rest of a folder or of the hub is never read.
        return auto.from_pretrained(name, local_files_only=local or not download, trust_remote_code=False, **settings)
    except (OSError, ValueError) as error:
        said = f"{str(error).splitlines()[0].rstrip('. ')}."
        if local:
            remedy = "Give a config.json with a model_type that Transformers knows"
            raise ValueError(
                f"model={name!r} cannot be planned: {said} {remedy}; code that comes with a model is never run."
            ) from error
        # Without a download an OSError says that the hub cannot be reached, which nobody has tried.
        if not download and isinstance(error, OSError):
            said = (
                "There is no such file or folder here, nor a config.json of that name in the cache of the Hugging Face "
                "hub, which is not asked without --download true (that file only, no weights)."
            )
        raise ValueError(
            f"model={name!r} cannot be planned.{_near(name, (*BUILT_IN, *types))} {said} Known by name: "
            f"{', '.join(BUILT_IN)}; also a config.json or its folder, or a model type (gpt2, bert, qwen3)."
        ) from error


def is_path(name: str) -> bool:
    """Whether a name can only be meant as a file or folder: ``organisation/model`` may be one on the hub.

    Example:
        >>> [is_path(name) for name in ("./config.json", "runs/a/b", "llama.json", "gpt2", "org/model")]
        [True, True, True, False, False]
    """
    separators = [part for part in (os.sep, os.altsep) if part]
    return (
        name.startswith((".", "~", *separators))
        or name.endswith(tuple(separators))
        or name.lower().endswith((".json", ".yaml", ".yml"))
        or sum(map(name.count, separators)) > 1
    )


def missing_file(name: str, remedy: str) -> str:
    """That a file is not there, and which of its folder's is near."""
    path = Path(name).expanduser()
    if not path.parent.is_dir():
        return f"source={name!r}: there is no such file, nor a folder {str(path.parent)!r}. {remedy}"
    near = difflib.get_close_matches(path.name, [one.name for one in path.parent.iterdir()], n=1)
    meant = f" Did you mean {str(path.with_name(near[0]))!r}?" if near else ""
    return f"source={name!r}: there is no such file.{meant} {remedy}"


def _near(name: str, known: Sequence[str]) -> str:
    """A question that names what is near, or nothing. Close ones only: most names begin alike."""
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.8)
    return f" Did you mean {' or '.join(map(repr, near))}?" if near else ""


def _head_of(config: Any) -> Head:
    for architecture in getattr(config, "architectures", None) or ():
        for ending, head in _HEADS.items():
            if architecture.endswith(ending):
                return head  # type: ignore[return-value]
        if architecture.endswith("ForSequenceClassification"):
            return "sequence-classification"
    causal = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    masked = import_module("transformers.models.auto.modeling_auto").MODEL_FOR_MASKED_LM_MAPPING_NAMES
    only_causal = config.model_type in causal and config.model_type not in masked
    return "causal-lm" if only_causal else "sequence-classification"


def bare_model(config: Any, head: Head) -> nn.Module:
    """A model of a configuration on the meta device: shapes without memory."""
    transformers = _transformers()
    if head == "sequence-classification" and getattr(config, "pad_token_id", None) is None:
        config.pad_token_id = 0  # else a batch of several sequences is refused
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("meta"):
            return getattr(transformers, _AUTO_CLASSES[head]).from_config(config)
    finally:
        torch.set_default_dtype(before)


def token_batch(config: Any, head: Head, *, batch_size: int, sequence_length: int) -> dict[str, Tensor]:
    """Full sequences of tokens with labels, on the meta device."""
    shape = (batch_size, sequence_length)
    batch = {"input_ids": torch.empty(shape, dtype=torch.long, device="meta")}
    if head == "sequence-classification":
        regression = getattr(config, "problem_type", None) == "regression"
        dtype = torch.float32 if regression else torch.long
        batch["labels"] = torch.empty(batch_size, dtype=dtype, device="meta")
    else:
        batch["labels"] = torch.empty(shape, dtype=torch.long, device="meta")
    if head != "causal-lm":
        batch["attention_mask"] = torch.empty(shape, dtype=torch.long, device="meta")
    return batch


def _transformers() -> Any:
    try:
        return import_module("transformers")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "Planning a model by its name or config.json needs transformers, which is not installed. Install it with: "
            'pip install "lightning-galore[recipes]", or pass an nn.Module.',
            name=error.name,
        ) from error
