"""A run's state on disk, from which it continues bit for bit, or is extended."""

from __future__ import annotations

from pathlib import Path
from reprlib import repr as short
from typing import Any

import torch

from fastsample.storage.pickles import load_pickle
from fastsample.storage.writing import replacing

# The second is the state before the cooldown: a run that is extended leaves its cooldown out.
CHECKPOINT, TRUNK = "checkpoint.pt", "trunk.pt"

State = dict[str, Any]


def write_checkpoint(state: State, path: Path) -> None:
    """Writes all state, replacing the file at once."""
    with replacing(path) as file:
        torch.save(state, file)


def read_checkpoint(out: Path, identity: State, steps: int, cooldown_start: int, device: torch.device) -> State | None:
    """The state in a folder from which a run of so many steps continues; None where there is none.

    Args:
        out: the folder.
        identity: the settings and data of the run, all but its steps.
        steps: of the run.
        cooldown_start: of the run; up to it runs of other numbers of steps are the same.
        device: where tensors are put.

    Raises:
        ValueError: for what is no checkpoint, one of another run, or one that has gone too far for so few steps.
    """
    # A run that is killed before its first checkpoint may have left the trunk alone.
    states = [(path, _read(path, identity, device)) for path in (out / CHECKPOINT, out / TRUNK) if path.exists()]
    if not states:
        return None
    for _, state in states:
        done = len(state["history"])
        if done <= steps and (state["steps"] == steps or done <= min(state["cooldown_start"], cooldown_start)):
            return state
    path, newest = states[0]
    raise ValueError(
        f"{path} has {len(newest['history'])} of {newest['steps']} steps behind it, too many for a run of {steps}: "
        f"ask for {newest['steps']} or more, or take another folder"
    )


def read_state(path: Path, identity: State, device: torch.device, columns: int, command: str) -> State:
    """The state in a file that such a run has written.

    Args:
        path: the file.
        identity: all that decides the outcome of the run.
        device: where tensors are put.
        columns: how many losses a step has.
        command: what makes such files, as texts name it.

    Raises:
        ValueError: the file is no checkpoint, or one of another run.
    """
    state = load_pickle(path, device)
    settings = state.get("settings") if isinstance(state, dict) else None
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is no checkpoint of {command}: delete it or use another folder")
    for name, value in identity.items():
        if settings.get(name) != value:
            raise ValueError(
                f"{path} was made with {name} = {short(settings.get(name))}, now it is {value}: "
                "use the same settings or another folder"
            )
    history = state.get("history")
    if not isinstance(history, torch.Tensor) or history.ndim != 2 or history.shape[1] != columns:
        raise ValueError(f"{path} is no whole checkpoint: delete it or use another folder (no history)")
    return state


def _read(path: Path, identity: State, device: torch.device) -> State:
    state = read_state(path, identity, device, 3, "fastsample train")
    if not all(isinstance(state.get(name), int) for name in ("steps", "cooldown_start")):
        raise ValueError(f"{path} is no whole checkpoint: delete it or use another folder (no steps)")
    return state
