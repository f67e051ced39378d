"""The model's keywords under guidance: which are batched for both halves, which are left alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastsample import Shared, ddim
from support.guided import COND, UNCOND, X, model


def test_keywords_are_batched_by_their_kind() -> None:
    seen: list[dict[str, Any]] = []

    def spy(x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        seen.append(keywords)
        return 0.5 * x

    shared, marker, words = torch.arange(7.0), object(), ["a", "b", "c"]
    ddim(
        spy,
        X,
        steps=2,
        guidance=2.0,
        guidance_interval=(400, 999),
        model_kwargs={
            "mask": torch.ones(3, 4),
            "scale": 2.0,
            "table": Shared(shared),
            "marker": marker,
            "text": torch.zeros(3, 5),
        },
        cond={
            "text": torch.ones(3, 5),
            "more": {"pooled": torch.full((3, 2), 7.0), "size": (64, 64), "n": {"k": None}},
            "residuals": (torch.ones(3, 1), (torch.full((3, 1), 2.0), "a")),
            "words": words,
            "level": torch.tensor(0.5),
            "array": np.arange(3),
        },
        uncond={
            "more": {"pooled": torch.zeros(3, 2), "size": (64, 64), "n": {"k": None}},
            "residuals": (torch.zeros(3, 1), (torch.zeros(3, 1), "a")),
            "words": ["", "", ""],
            "level": torch.tensor(0.5),
            "array": np.arange(3),
        },
    )
    both, conditional = seen
    assert torch.equal(both["text"], torch.cat([torch.zeros(3, 5), torch.ones(3, 5)])), "uncond keeps model_kwargs' own"
    assert torch.equal(both["mask"], torch.ones(6, 4)), "what model_kwargs give is batched for both"
    assert torch.equal(both["more"]["pooled"], torch.tensor([0.0] * 3 + [7.0] * 3)[:, None].expand(6, 2))
    assert both["scale"] == 2.0 and both["marker"] is marker and both["table"] is shared
    assert both["words"] == ["", "", "", *words] and both["level"] == 0.5
    first, (second, text) = both["residuals"]
    assert first.flatten().tolist() == [0, 0, 0, 1, 1, 1] and second.flatten().tolist() == [0, 0, 0, 2, 2, 2]
    assert text == "a" and type(both["residuals"]) is tuple and both["array"].tolist() == [0, 1, 2]
    assert both["more"]["size"] == (64, 64) and both["more"]["n"] == {"k": None}
    assert torch.equal(conditional["text"], torch.ones(3, 5)) and torch.equal(conditional["mask"], torch.ones(3, 4))
    assert torch.equal(conditional["more"]["pooled"], torch.full((3, 2), 7.0)) and conditional["marker"] is marker
    assert conditional["words"] is words and conditional["table"] is shared


def test_the_callers_keywords_are_left_alone() -> None:
    cond, uncond, common = {"c": COND["c"].clone()}, {"c": UNCOND["c"].clone()}, {"scale": 1.0}
    ddim(lambda x, t, c, scale: model(x, t, c), X, steps=2, guidance=2.0, cond=cond, uncond=uncond, model_kwargs=common)
    assert list(cond) == list(uncond) == ["c"] and common == {"scale": 1.0}
    assert torch.equal(cond["c"], COND["c"]) and torch.equal(uncond["c"], UNCOND["c"])


def test_without_a_weight_only_cond_counts(backend: str) -> None:
    got = ddim(model, X, steps=4, cond=COND, model_kwargs=UNCOND, backend=backend)
    assert torch.equal(got, ddim(model, X, steps=4, model_kwargs=COND, backend=backend)), "cond goes over model_kwargs"
