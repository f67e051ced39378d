"""What README and docs/from-diffusers.md promise: their Python runs, links lead somewhere, set-up lines are single."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from torch import Tensor

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("code", blocks("python"), ids=lambda code: code.splitlines()[0][:40])
def test_python_examples_run(code: str) -> None:
    exec(compile(code, "README.md", "exec"), {})


def test_examples_from_diffusers_run() -> None:
    page = (ROOT / "docs" / "from-diffusers.md").read_text()
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL))
    found: dict[str, Tensor] = {}
    exec(compile(code, "from-diffusers.md", "exec"), found)
    assert found["latents"].shape == (2, 16, 64, 64) and found["latents"].isfinite().all()


def test_two_setup_commands_that_pin_torch() -> None:
    commands = blocks("bash")
    assert len(commands) == 2
    for command in commands:
        assert command.count("\n") == 1 and "-c constraints.txt" in command and "-m venv" in command
    assert (ROOT / "constraints.txt").read_text().split() == ["torch==2.13.0"]


@pytest.mark.parametrize("target", re.findall(r"\]\(([^)#]+)\)", README))
def test_links_lead_somewhere(target: str) -> None:
    assert (ROOT / target).is_file()
