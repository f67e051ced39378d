"""Files that hold more than a LoRA are refused by the name of their kind: a part left out would give wrong pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from reprlib import repr as short
from typing import Any

# Kinds by their keys: the first pattern that a key matches names its kind.
_KEYS = tuple(
    (re.compile(pattern), what)
    for pattern, what in (
        (r"\.dora_scale$|lora_magnitude_vector", "DoRA"),
        (r"\.hada_[wt]\d", "LoHa"),
        (r"\.lokr_[wt]\d", "LoKr"),
        (r"\.lora_mid\.", "Tucker-decomposed LoRA (LyCORIS use_cp / use_tucker)"),
        (r"\.lora_E\b|\.ranknum\b", "AdaLoRA"),
        (r"\.lora_embedding_[AB]\b", "LoRA of an embedding"),
        (r"\.(lora_[AB](\.[^.]+)?|lora_(down|up)|lora\.(down|up))\.bias$", "LoRA with its own bias (lora_bias)"),
        (r"\.oft_|\.boft_|\.oft(_blocks|_R|_r)?\b", "OFT"),
        (r"\.ia3_l\b|\.on_input$", "IA3"),
        (r"\.(diff|diff_b|set_weight|reshape_weight)$", "whole-weight differences (.diff)"),
        (r"\.[wb]_norm$", "norm weights (LyCORIS train_norm)"),
        (r"\.[ab][12]\.weight$|\.glora_", "GLoRA"),
        (r"\.p?vera_lambda_", "VeRA"),
        (r"^lora_controlnet$", "Control-LoRA"),
    )
)
# Kinds by PEFT's configuration: its fields that change what A and B mean. use_rslora, the patterns, r and lora_alpha,
# which do so too, are read.
_FIELDS = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "LoRA of transposed weights (fan_in_fan_out)",
    "lora_bias": "LoRA with its own bias (lora_bias)",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "trainable_token_indices": "trainable tokens",
    "target_parameters": "LoRA of bare parameters (target_parameters)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# These initialisations take a part out of the base weights, which the file does not hold.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


def refuse_keys(keys: Iterable[str], name: str) -> None:
    """Raises ValueError with the kind and its first keys if some belong to no plain LoRA.

    Example:
        >>> refuse_keys(["x.lokr_w1", "x.lokr_w2"], "a.safetensors")
        Traceback (most recent call last):
        ValueError: a.safetensors holds LoKr, which is not supported: x.lokr_w1, x.lokr_w2
    """
    keys_of: dict[str, list[str]] = {}
    for key in keys:
        for pattern, what in _KEYS:
            if pattern.search(key):
                keys_of.setdefault(what, []).append(key)
                break
    if keys_of:
        kinds = "; ".join(f"{what}, which is not supported: {first_few(keys)}" for what, keys in keys_of.items())
        raise ValueError(f"{name} holds {kinds}")


def refuse_config(config: Mapping[str, Any], name: str) -> None:
    """Raises ValueError if PEFT's configuration asks for more than alpha / r * B A."""
    kind = config.get("peft_type") or "LORA"
    if kind != "LORA":
        what = kind if isinstance(kind, str) else "no kind of adapter"
        raise ValueError(f"{name} holds {what[:100]}, which is not supported: peft_type is {short(kind)}")
    for field, what in _FIELDS.items():
        if config.get(field):
            raise ValueError(f"{name} holds {what}, which is not supported: its configuration has {field!r}")
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGED_BASE):
        raise ValueError(
            f"{name} was trained on base weights that init_lora_weights={short(init)} had changed; save it with PEFT's "
            "path_initial_model_for_weight_conversion to get a LoRA of the original weights"
        )


def first_few(keys: Iterable[str], count: int = 3) -> str:
    """The first few, and how many more there are.

    Example:
        >>> first_few("abcde")
        'a, b, c and 2 more'
    """
    keys = list(keys)
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more
