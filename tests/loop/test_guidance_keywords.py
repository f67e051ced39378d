"""The model's keywords under guidance: which are batched for both halves, which are left alone."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Mapping
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


class Output(OrderedDict[str, Any]):
    """As transformers' ModelOutput: its entries are attributes, and its constructor takes fields."""

    def __init__(self, hidden: Tensor, mask: Tensor | None = None) -> None:
        super().__init__()
        self["hidden"] = hidden
        if mask is not None:
            self["mask"] = mask

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(name, value)
        super().__setattr__(name, value)

    def __reduce__(self) -> Any:
        return type(self), tuple(self.values())


class Frozen(Mapping[str, Any]):
    """A mapping that nobody can write to."""

    def __init__(self, entries: dict[str, Any]) -> None:
        self._entries = entries

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def seen_by(**options: Any) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def spy(x: Tensor, t: Tensor, **keywords: Any) -> Tensor:
        seen.update(keywords)
        return 0.5 * x

    ddim(spy, X, steps=2, **options)
    return seen


def test_mappings_keep_their_type_where_they_are_cast() -> None:
    given = Output(torch.ones(3, 2), torch.ones(3, dtype=torch.bool))
    default: defaultdict[str, Any] = defaultdict(list, text=torch.ones(3))
    keywords = {"output": given, "default": default, "frozen": Frozen({"a": torch.ones(3)})}
    seen = seen_by(model_kwargs=keywords, model_dtype=torch.bfloat16)
    assert type(seen["output"]) is Output and list(seen["output"]) == ["hidden", "mask"]
    assert seen["output"].hidden.dtype == seen["output"]["hidden"].dtype == torch.bfloat16
    assert seen["output"].mask is given["mask"]
    assert seen["default"].default_factory is list and seen["default"]["text"].dtype == torch.bfloat16
    assert type(seen["frozen"]) is dict and seen["frozen"]["a"].dtype == torch.bfloat16
    assert given.hidden.dtype == default["text"].dtype == torch.float32, "the caller's own are left alone"


def test_mappings_keep_their_type_where_they_are_joined() -> None:
    ones, zeros = (Output(torch.full((3, 2), value)) for value in (1.0, 0.0))
    seen = seen_by(cond={"output": ones}, uncond={"output": zeros}, guidance=2.0)
    assert type(seen["output"]) is Output
    assert torch.equal(seen["output"].hidden, torch.cat([zeros["hidden"], ones["hidden"]]))
    assert len(ones.hidden) == len(zeros.hidden) == 3
