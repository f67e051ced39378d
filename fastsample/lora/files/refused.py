"""The kinds of adapters that are not plain LoRA, by name: a part left out unsaid would give wrong pictures."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from reprlib import repr as short
from typing import Any, NamedTuple

# Kinds by their keys: the first pattern that a key matches names its kind, and whether A and B beside it mean another
# thing than B A because of it.
_KEYS = tuple(
    (re.compile(pattern), what, changes)
    for pattern, what, changes in (
        (r"\.dora_scale$|\.lora_magnitude_vector\b", "DoRA", True),
        (r"\.hada_[wt]\d", "LoHa", True),
        (r"\.lokr_[wt]\d", "LoKr", True),
        (r"\.lora_mid\.", "Tucker-decomposed LoRA (LyCORIS use_cp / use_tucker)", True),
        (r"\.lora_E\b|\.ranknum\b", "AdaLoRA", True),
        (r"\.lora_embedding_[AB]\b", "LoRA of an embedding", False),
        (r"\.(lora_[AB](\.[^.]+)?|lora_(down|up)|lora\.(down|up))\.bias$", "LoRA with its own bias (lora_bias)", False),
        (r"\.oft_|\.boft_|\.oft(_blocks|_R|_r)?\b", "OFT", True),
        (r"\.ia3_l\b|\.on_input$", "IA3", False),
        (r"\.(diff|diff_b|set_weight|reshape_weight)$", "whole-weight differences (.diff)", False),
        (r"\.[wb]_norm$", "norm weights (LyCORIS train_norm)", False),
        (r"\.[ab][12]\.weight$|\.glora_", "GLoRA", True),
        (r"\.p?vera_lambda_", "VeRA", True),
        (r"^lora_controlnet$", "Control-LoRA", False),
        (r"\.modules_to_save\.", "a whole module (modules_to_save)", False),
        (r"^bundle_emb\.", "a textual inversion (bundle_emb)", False),
    )
)
# Kinds by PEFT's configuration: its fields that change what A and B mean. use_rslora, the patterns, r and lora_alpha,
# which do so too, are read.
_FIELDS = {
    "use_dora": "DoRA",
    "fan_in_fan_out": "LoRA of transposed weights (fan_in_fan_out)",
    "layer_replication": "layer replication",
    "alora_invocation_tokens": "activated LoRA",
    "target_parameters": "LoRA of bare parameters (target_parameters)",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "arrow_config": "Arrow",
    "kasa_config": "KaSA",
    "monteclora_config": "MonteCLoRA",
}
# What its fields ask for beside A and B.
BESIDE = {"lora_bias": "LoRA with its own bias (lora_bias)", "trainable_token_indices": "trainable tokens"}
# These initialisations take a part out of the base weights, which the file does not hold.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")


class UnfitError(ValueError):
    """What is wrong with one part of a file, of which the rest can be used."""


class Kind(NamedTuple):
    """What a key says that is no plain LoRA's.

    Attributes:
        what: the kind's name.
        changes: whether A and B of the same module have another meaning because of it.
        stem: the module's name.
    """

    what: str
    changes: bool
    stem: str


def kind_of(key: str) -> Kind | None:
    """The kind of adapter that a key belongs to, None where it may be a plain LoRA's.

    Example:
        >>> kind_of("x.lokr_w1")
        Kind(what='LoKr', changes=True, stem='x')
        >>> kind_of("x.lora_A.weight")
    """
    for pattern, what, changes in _KEYS:
        if match := pattern.search(key):
            return Kind(what, changes, key[: match.start()])
    return None


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
