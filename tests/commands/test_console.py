"""What the command line says of options that there are not."""

from __future__ import annotations

import pytest

from fastsample.cli import main

# The arguments, the option that there is not, and those that are meant.
UNKNOWN = {
    "slip": (["sample", "--stepz", "5"], "--stepz", "--steps"),
    "library": (["sample", "--num-inference-steps", "5"], "--num-inference-steps", "--steps"),
    "underscores": (["sample", "--guidance_scale=3"], "--guidance_scale", "--guidance"),
    "one-dash": (["sample", "-steps", "5"], "-steps", "--steps"),
    "before-what-is-missing": (["distill", "lcm", "--guidance-scale", "3"], "--guidance-scale", "--guidance"),
    "after-a-value": (["train", "--data", "d.npz", "--uot", "run"], "--uot", None),
    "of-no-command": (["--versoin"], "--versoin", "--version"),
    "before-the-command": (["--steps", "3", "sample"], "--steps", None),
    "before-the-method": (["distill", "--steps", "3", "lcm"], "--steps", None),
    "unknown": (["generate", "--bogus"], "--bogus", None),
    "letter": (["info", "-x"], "-x", None),
}


@pytest.mark.parametrize("case", UNKNOWN)
def test_an_option_that_there_is_not(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments, option, meant = UNKNOWN[case]
    with pytest.raises(SystemExit) as exit:
        main(arguments)
    line = capsys.readouterr().err
    assert exit.value.code == 2 and line.count("\n") == 1
    suggestion = f"; did you mean {meant}? (see" if meant else " (see"
    assert f": there is no option {option}{suggestion}" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["sample", "--num", "-3"], "num must be at least 1, got -3"),
        (["sample", "--col", "-3"], "--columns are of a picture"),
        (["sample", "--", "--stepz"], "unrecognized arguments: -- --stepz"),
    ],
    ids=["negative-value", "beginning", "after-two-dashes"],
)
def test_what_is_no_unknown_option(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        status = main(arguments)
    except SystemExit as exit:
        status = exit.code  # type: ignore[assignment]
    assert status == 2 and message in capsys.readouterr().err
