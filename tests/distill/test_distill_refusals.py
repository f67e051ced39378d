"""What cannot work is refused by name before anything is computed or written."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastsample import Schedule, distill, zoo
from fastsample.cli import main
from fastsample.distill.conditions import Conditions
from fastsample.train import ImageData, Settings, train
from support.distillation import DATA, LABELS, OBSERVATIONS, RANGE, SHAPE, SMALL, Policy, run, unet
from support.paths import ROOT

COMMON: dict[str, Any] = {"settings": SMALL, "progress": False}


def trajectory(out: Path, **changes: Any) -> Any:
    return distill.trajectory(
        **{"teacher": unet(), "shape": SHAPE, "out": out, "steps": 2, "substeps": 1, "paths": 4} | COMMON | changes
    )


def progressive(out: Path, **changes: Any) -> Any:
    return distill.progressive(**{"teacher": unet(), "data": DATA, "out": out, "start": 2} | COMMON | changes)


def consistency(out: Path, **changes: Any) -> Any:
    return distill.consistency(**{"teacher": unet(), "data": DATA, "out": out, "scales": 4} | COMMON | changes)


def guided(out: Path, **changes: Any) -> Any:
    return distill.guided(
        **{"teacher": unet(), "data": DATA, "out": out, "start": 2} | CLASSES | RANGE | COMMON | changes
    )


def lcm(out: Path, **changes: Any) -> Any:
    return distill.lcm(**{"teacher": unet(), "data": DATA, "out": out, "scales": 4} | COMMON | changes)


def lcm_lora(out: Path, **changes: Any) -> Any:
    return distill.lcm_lora(**{"teacher": unet(), "data": DATA, "out": out, "scales": 4} | COMMON | changes)


CLASSES: dict[str, Any] = {"cond": {"y": LABELS}}
CASES: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "no steps": (trajectory, {"steps": 0}, "steps must be at least 1, got 0"),
    "steps that do not nest": (trajectory, {"steps": (4, 3)}, "steps must be numbers that divide the largest"),
    "a range without an end": (trajectory, {"guidance": (1.0,)}, r"guidance must be a number or \(least, most\)"),
    "a range the wrong way round": (trajectory, {"guidance": (3.0, 2.0)}, "with least < most"),
    "a range for halving": (progressive, {"guidance": (1.0, 2.0)}, "guidance must be a"),
    "a student that is told nothing": (
        trajectory,
        {"teacher": Policy(), "shape": (16, 7), "cond": OBSERVATIONS, "steps": (2, 1)},
        "the student must take the keywords steps",
    ),
    "an unknown argument": (trajectory, {"guidence": 2.0}, "there is no argument guidence"),
    "settings of another kind": (
        trajectory,
        {"settings": {"lr": 1.0}},
        "settings must be a fastsample.distill.Settings",
    ),
    "no saving": (trajectory, {"save_every": 0}, "save_every must be at least 1"),
    "a clip": (progressive, {"clip": -1.0}, "clip must be positive"),
    "a clip that is no number": (consistency, {"clip": "dynamic"}, "clip must be a"),
    "infinite guidance": (
        trajectory,
        {"guidance": float("inf"), "cond": {"y": LABELS}, "uncond": {"y": torch.tensor([3])}},
        "guidance must be finite",
    ),
    "other keywords without a condition": (
        trajectory,
        {"guidance": 2.0, "cond": {"y": LABELS}, "uncond": {"z": torch.tensor([3])}},
        "cond and uncond must give the model the same keywords",
    ),
    "a student that is no module": (trajectory, {"student": lambda x, t: x}, "student must be a torch.nn.Module"),
    "a teacher in training": (
        trajectory,
        {"teacher": torch.nn.Sequential(torch.nn.Dropout(0.5))},
        "the teacher has a Dropout in training mode",
    ),
    "zero terminal SNR": (
        consistency,
        {"teacher": unet(schedule=Schedule.cosine(100).rescale_zero_terminal_snr())},
        "schedule must not reach alpha bar 0",
    ),
    "more steps than timesteps": (trajectory, {"steps": 200}, r"steps must lie in \[1, 100\]"),
    "no substeps": (trajectory, {"substeps": 0}, "substeps must be at least 1"),
    "no paths": (trajectory, {"paths": 0}, "paths must be at least 1"),
    "no shape": (trajectory, {"shape": ()}, "shape must be that of one sample"),
    "another shape": (trajectory, {"shape": (1, 9, 6)}, "x must be"),
    "guidance alone": (trajectory, {"guidance": 2.0}, "guidance needs uncond="),
    "a prediction": (trajectory, {"prediction": "flow"}, "prediction must be one of epsilon, v, x0"),
    "a function": (trajectory, {"teacher": lambda x, t: x}, "the teacher is no torch module .* give student="),
    "a frozen student": (trajectory, {"student": torch.nn.Identity()}, "no parameters that require gradients"),
    "a student of other samples": (trajectory, {"student": unet(channels=1)}, "x must be"),
    "an output": (trajectory, {"output": "flow"}, "output must be one of epsilon, v, x0, both"),
    "one half for both": (trajectory, {"output": "both"}, "output='both' needs a student that returns twice"),
    "conditions of two lengths": (
        trajectory,
        {"cond": {"y": LABELS, "z": [1, 2]}},
        "cond must hold as many entries of each keyword: y has 10, z has 2",
    ),
    "no conditions": (trajectory, {"cond": {"y": LABELS[:0]}}, "cond must not be empty"),
    "steps that are no power of two": (
        progressive,
        {"start": 6},
        "start must be a power of two times steps = 1, got 6",
    ),
    "fewer steps than the last": (
        progressive,
        {"start": 1, "steps": 2},
        "start must be a power of two times steps = 2",
    ),
    "too many steps": (progressive, {"start": 64}, r"steps must lie in \[1, 100\] from timestep 99 on, got 128"),
    "integer data": (progressive, {"data": DATA.long()}, "data must be a floating-point tensor .* got torch.int64"),
    "no data": (progressive, {"data": DATA[:0]}, "data must be samples"),
    "infinite data": (progressive, {"data": DATA / 0}, "data must be finite"),
    "labels of other data": (
        progressive,
        {"cond": {"y": LABELS[:4]}},
        "cond must have an entry for each of 10 samples",
    ),
    "a curriculum": (consistency, {"curriculum": "hard"}, "curriculum must be one of fixed, adaptive, easy"),
    "a solver": (consistency, {"solver": "euler"}, "solver must be one of heun, ddim"),
    "a distance": (consistency, {"loss": "l2"}, "loss must be one of norm, huber"),
    "one scale": (consistency, {"scales": 1}, "scales must be at least 2"),
    "an average of nothing": (consistency, {"target_decay": 1.0}, r"target_decay must lie in \[0, 1\)"),
    "distillation without a teacher": (consistency, {"teacher": None, "student": unet()}, "needs a teacher"),
    "training with a teacher": (consistency, {"curriculum": "adaptive"}, "leave the teacher out"),
    "nothing at all": (consistency, {"teacher": None, "curriculum": "easy"}, "give a teacher, or a student="),
    "one weight for all": (guided, {"guidance": 2.0}, r"guidance must be \(least, most\), the weights"),
    "no weight at all": (guided, {"guidance": 1.0}, r"guidance must be \(least, most\), the weights"),
    "weights without uncond": (guided, {"uncond": None}, "guidance needs uncond="),
    "guided steps that are no power of two": (guided, {"start": 3}, "start must be a power of two times steps = 1"),
    "a model that cannot be told": (
        guided,
        {"teacher": Policy(), "data": torch.zeros(6, 16, 7), "cond": OBSERVATIONS, "uncond": OBSERVATIONS},
        "the student must take the keywords guidance",
    ),
    "no scales": (lcm, {"scales": 0}, "scales must be at least 1"),
    "too many scales": (lcm, {"scales": 101}, "scales must be at most 100|scales must lie in"),
    "another distance": (lcm, {"loss": "l1"}, "loss must be one of huber, l2"),
    "an average of nothing for lcm": (lcm, {"target_decay": 1.0}, r"target_decay must lie in \[0, 1\)"),
    "an autoencoder of other latents": (
        lcm,
        {"autoencoder": zoo.Autoencoder(zoo.AutoencoderConfig())},
        r"autoencoder makes latents of shape \(4, 7, 7\)",
    ),
    "a LoRA of a range": (lcm_lora, RANGE | CLASSES, "guidance must be one number: a LoRA has no input"),
    "a LoRA of no module": (lcm_lora, {"teacher": lambda x, t: x}, "teacher must be a torch module"),
    "a LoRA and a student": (lcm_lora, {"student": unet()}, "leave student= out"),
    "a LoRA of another prediction": (lcm_lora, {"output": "v"}, "leave output= out"),
    "a LoRA of what is left out": (lcm_lora, {"targets": ["leave"]}, "targets: leave cannot have a LoRA"),
    "an infinite range": (lcm, {"guidance": (float("-inf"), 2.0)}, "guidance must be"),
    "no autoencoder": (lcm, {"autoencoder": "file"}, "autoencoder must be a fastsample.zoo.Autoencoder, got str"),
    "labels of no class": (lcm, {"cond": {"y": LABELS + 4}}, "must lie in 0 .. 3, the model's classes; got 6"),
    "a LoRA of no rank": (lcm_lora, {"rank": 0}, "rank must be at least 1"),
    "a LoRA for no layer": (lcm_lora, {"targets": ["to_q"]}, "none is named 'to_q'"),
    "guidance without calls": (
        consistency,
        {"curriculum": "easy", "guidance": 2.0, "uncond": {"y": torch.tensor([3])}},
        "guidance is the teacher's, which curriculum='easy' does not call",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_refused(name: str, tmp_path: Path) -> None:
    function, changes, message = CASES[name]
    with pytest.raises((ValueError, TypeError), match=message):
        function(tmp_path / "run", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"batch_size": 6, "accumulate": 4}, "accumulate must divide batch_size = 6"),
        ({"lr": 0.0}, "lr must be positive"),
        ({"ema_decay": 1.0}, "ema_decay must lie in"),
        ({"weight_decay": -1.0}, "weight_decay must not be negative"),
        ({"precision": "float16"}, "precision must be one of float32, bfloat16"),
        ({"seed": -1}, "seed must"),
        ({"warmup": -1}, "warmup must"),
    ],
    ids=str,
)
def test_bad_settings(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        distill.Settings(**fields)


def test_a_folder_of_another_method(tmp_path: Path) -> None:
    run("trajectory", unet(), tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    for name in ("progressive", "consistency"):
        with pytest.raises(ValueError, match=f"made with method = 'trajectory', now it is {name}"):
            run(name, unet(), tmp_path)
    assert {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"steps": 1}, "student_steps"),
        ({"settings": distill.Settings(iterations=6, batch_size=4, seed=1)}, "lr"),
        ({"guidance": 2.0, "uncond": {"y": torch.tensor([3])}}, "conditions"),
        ({"student": unet(widths=(8, 8))}, "student"),
    ],
    ids=["steps", "settings", "guidance", "student"],
)
def test_a_folder_of_another_run(changes: dict[str, Any], name: str, tmp_path: Path) -> None:
    run("trajectory", unet(), tmp_path)
    with pytest.raises(ValueError, match=f"was made with {name} = "):
        run("trajectory", unet(), tmp_path, **changes)


def test_a_folder_of_another_teacher(tmp_path: Path) -> None:
    run("trajectory", unet(), tmp_path)
    other = unet()
    with torch.no_grad():
        other.enter.weight.mul_(1.01)
    with pytest.raises(ValueError, match="was made with teacher = "):
        run("trajectory", other, tmp_path)


def test_a_folder_of_training(tmp_path: Path) -> None:
    images = torch.zeros(4, 3, 9, 6, dtype=torch.uint8)
    settings = Settings(steps=2, batch_size=2, timesteps=20, widths=(8, 16))
    train(ImageData(images, None), tmp_path, settings, progress=False)
    with pytest.raises(ValueError, match="was made with method = None, now it is trajectory"):
        run("trajectory", unet(), tmp_path)


@pytest.mark.parametrize("name", ["student.safetensors", "loss.csv", "loss.png"])
def test_somebody_elses_files_are_not_replaced(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match=f"holds {name} but no checkpoint.pt"):
        run("trajectory", unet(), tmp_path)
    assert (tmp_path / name).read_text() == "mine"


def test_conditions() -> None:
    conditions = Conditions(
        {"y": torch.arange(3), "words": ["a", "b", "c"], "more": {"z": torch.eye(3)}, "scale": 2.0},
        {"y": torch.tensor([9]), "words": [""], "more": {"z": torch.zeros(1, 3)}, "scale": 2.0},
    )
    cond, uncond = conditions.at(torch.tensor([2, 0, 2]), torch.device("cpu"))
    assert uncond is not None
    assert (cond["y"].tolist(), cond["words"], cond["scale"]) == ([2, 0, 2], ["c", "a", "c"], 2.0)
    assert torch.equal(cond["more"]["z"], torch.eye(3)[[2, 0, 2]])
    assert (uncond["y"].tolist(), uncond["words"], uncond["more"]["z"].shape) == ([9] * 3, [""] * 3, (3, 3))
    assert conditions.count == 3
    with pytest.raises(ValueError, match="uncond must hold one entry of y or 3"):
        Conditions({"y": torch.arange(3)}, {"y": torch.arange(2)})
    with pytest.raises(TypeError, match="cond must be a mapping"):
        Conditions(torch.arange(3), None)  # type: ignore[arg-type]


def test_sampling_asks_for_what_was_distilled(tmp_path: Path) -> None:
    student = run("trajectory", unet(), tmp_path)
    with pytest.raises(ValueError, match="steps must be one of 2, which it was distilled for; got 4"):
        student.sample((1, *SHAPE), 4)
    with pytest.raises(ValueError, match=re.escape("shape must be (B, 3, 9, 6), got (1, 3, 8, 8)")):
        student.sample((1, 3, 8, 8))


def test_files_that_hold_no_student(tmp_path: Path) -> None:
    zoo.save(unet(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="was not made by fastsample distill"):
        distill.load(tmp_path / "model.safetensors")
    with pytest.raises(FileNotFoundError):
        distill.load(tmp_path / "none.safetensors")
    student = run("trajectory", unet(), tmp_path / "run")
    with pytest.raises(ValueError, match="holds no such student"):
        distill.load(tmp_path / "run" / "student.safetensors", Policy())
    distill.save(student, tmp_path / "again.safetensors")
    assert distill.load(tmp_path / "again.safetensors").facts == student.facts


COMMANDS = {
    "no method": ("--out run", "the following arguments are required: METHOD|invalid choice"),
    "no out": ("trajectory", "the following arguments are required: --out"),
    "no teacher": ("trajectory --out run --teacher none.safetensors", "none.safetensors"),
    "threads": ("trajectory --out run --threads 0", "--threads must be from 1"),
    "two students": ("trajectory --out run --student a.safetensors --widths 8", "give --student or --widths"),
    "a power": ("progressive --out run --start 5", "start must be a power of two"),
    "data": ("progressive --out run --data nowhere", "nowhere"),
    "training data alone": ("consistency --out run --curriculum easy --guidance 2", "guidance is the teacher's"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_refuses(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words, message = COMMANDS[name]
    monkeypatch.chdir(tmp_path)
    try:
        status: Any = main(["distill", *words.split()])
    except SystemExit as stop:
        status = stop.code
    [line] = capsys.readouterr().err.splitlines()
    assert status == 2 and re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_the_command_distils(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    zoo.save(unet(), "teacher.safetensors")
    words = "trajectory --teacher teacher.safetensors --out run --steps 2 --substeps 2 --paths 4"
    words += " --iterations 2 --batch-size 4 --guidance 2 --threads 1"
    threads = torch.get_num_threads()
    try:
        assert main(["distill", *words.split()]) == 0
    finally:
        torch.set_num_threads(threads)
    assert "distilled for 2 steps" in capsys.readouterr().out
    student = distill.load("run/student.safetensors")
    assert (student.facts.guidance, student.facts.clip, student.steps()) == (2.0, 1.0, (2,))
    assert student.schedule.T == Schedule.cosine(100).T


def test_the_example_of_the_page_runs() -> None:
    page = ROOT / "docs" / "distillation.md"
    code = re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {}
    exec(compile("\n".join(code), page.name, "exec"), names)
    assert names["images"].shape == (10, 1, 28, 28)
