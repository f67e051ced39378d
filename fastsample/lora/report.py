"""What attach did with a file: which of its parts were used, what the others are, and where the scales came from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from fastsample.lora.files.names import Resolution
from fastsample.lora.files.refused import first_few


@dataclass(frozen=True)
class Report:
    """Which parts of a file attach used.

    Attributes:
        matched: names of the submodules that got an adapter.
        unmatched: keys of the file that could not be attached.
        elsewhere: keys of the file that the module does not need: those for other components, such as a text encoder's
            where the module is a UNet, and those that only repeat others.
        reasons: why, for each key of unmatched and elsewhere.
        scales: by what states alpha, the submodules whose factor alpha / r it gave; "no alpha stated" is 1.
    """

    matched: tuple[str, ...]
    unmatched: tuple[str, ...]
    elsewhere: tuple[str, ...]
    reasons: Mapping[str, str] = field(default_factory=dict, compare=False)
    scales: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)


def report_of(resolution: Resolution) -> Report:
    """The report of a file whose fitting entries are attached."""
    scales: dict[str, tuple[str, ...]] = {}
    for path, entry in resolution.entries.items():
        scales[entry.origin] = (*scales.get(entry.origin, ()), path)
    return Report(
        tuple(resolution.entries),
        tuple(resolution.unmatched),
        tuple(resolution.elsewhere),
        {**resolution.unmatched, **resolution.elsewhere},
        scales,
    )


def refuse(resolution: Resolution, name: str, kind: str) -> None:
    """Raises ValueError where a part of a file cannot be attached.

    Args:
        resolution: of the file.
        name: what the message calls the file.
        kind: what it calls the module.
    """
    if not resolution.unmatched:
        return
    keys_of: dict[str, list[str]] = {}
    for key, reason in resolution.unmatched.items():
        keys_of.setdefault(reason, []).append(key)
    groups = [f"{first_few(keys)}: {reason}" for reason, keys in keys_of.items()]
    more = f"; and {len(groups) - 3} more reasons" if len(groups) > 3 else ""
    many = len(resolution.unmatched)
    doubt = "; is the file for another model?" if many > len(resolution.entries) else ""
    raise ValueError(
        f"{name}: {many} of its parts cannot be attached to this {kind}, strict=False leaves them out{doubt}: "
        f"{'; '.join(groups[:3])}{more}"
    )
