"""What a review found: runs that are taken up otherwise than they were left, and models that are not of one piece."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastsample import Schedule, Shared, distill, lora
from fastsample.distill.conditions import Conditions
from fastsample.distill.network import network_for
from fastsample.distill.run import _Run
from fastsample.distill.teacher import Teacher
from fastsample.distill.trajectory import Trajectory
from support.distillation import DATA, LABELS, OBSERVATIONS, SHAPE, SMALL, Policy, run, unet, weights
from support.interruption import stopped_at

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def no_plot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastsample.train.report._plot", lambda *arguments: None)


def test_a_run_that_went_further_is_left_alone(tmp_path: Path) -> None:
    run("progressive", unet(), tmp_path, start=4, steps=1)
    before = (tmp_path / "student-2.safetensors").read_bytes()
    with pytest.raises(ValueError, match="has gone further than this run would"):
        run("progressive", unet(), tmp_path, start=4, steps=2)
    assert (tmp_path / "student-2.safetensors").read_bytes() == before


def test_halving_goes_on_to_fewer_steps(tmp_path: Path) -> None:
    run("progressive", unet(), tmp_path / "on", start=4, steps=2)
    run("progressive", unet(), tmp_path / "on", start=4, steps=1)
    run("progressive", unet(), tmp_path / "once", start=4, steps=1)
    for name in ("student-4", "student-2", "student-1"):
        assert (tmp_path / "on" / f"{name}.safetensors").read_bytes() == (
            tmp_path / "once" / f"{name}.safetensors"
        ).read_bytes()


@pytest.mark.parametrize("curriculum", ["easy", "adaptive"])
def test_training_without_a_teacher_is_taken_up(curriculum: str, tmp_path: Path) -> None:
    data = torch.randn(6, 16, 7, generator=torch.Generator().manual_seed(0))

    def go(out: Path) -> distill.Student:
        return distill.consistency(
            None, data, out, student=Policy(), curriculum=curriculum, scales=8, cond=OBSERVATIONS, settings=SMALL,
            save_every=2, progress=False,
        )  # fmt: skip

    with stopped_at(_Run, 3):
        go(tmp_path / "broken")
    broken, straight = weights(go(tmp_path / "broken")), weights(go(tmp_path / "straight"))
    assert all(torch.equal(value, straight[name]) for name, value in broken.items())
    go(tmp_path / "broken")


@pytest.mark.parametrize("stage", [0, 1])
def test_a_kill_between_the_checkpoint_and_the_student_of_a_stage(stage: int, tmp_path: Path) -> None:
    publish = _Run.publish

    def killed(self: _Run, out: Path, of: int) -> None:
        if of == stage and len(self.history) == SMALL.iterations * (stage + 1):
            raise KeyboardInterrupt
        publish(self, out, of)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Run, "publish", killed)
        run("progressive", unet(), tmp_path / "killed")
    run("progressive", unet(), tmp_path / "killed")
    run("progressive", unet(), tmp_path / "straight")
    for steps in (4, 2, 1):
        name = f"student-{steps}.safetensors"
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_paths_of_another_run_are_not_read(tmp_path: Path) -> None:
    (tmp_path / "paths").mkdir()
    np.save(tmp_path / "paths" / "00000000.npy", np.zeros((2, 2)))
    with pytest.raises(ValueError, match="holds paths but no checkpoint"):
        run("trajectory", unet(), tmp_path)
    assert [path.name for path in tmp_path.rglob("*")] == ["paths", "00000000.npy"]
    (other := tmp_path / "other").mkdir()
    (other / "paths").write_text("mine")
    with pytest.raises(ValueError, match="holds paths but no checkpoint"):
        run("trajectory", unet(), other)


def test_the_output_is_part_of_the_run(tmp_path: Path) -> None:
    student = unet(prediction="x0", target=None, learned_variance=False)
    run("trajectory", unet(), tmp_path, student=student, output="x0")
    with pytest.raises(ValueError, match="was made with output = 'x0'"):
        run("trajectory", unet(), tmp_path, student=student, output="v")


def test_numbers_of_numpy(tmp_path: Path) -> None:
    settings = distill.Settings(iterations=np.int64(2), batch_size=np.int64(2), lr=np.float64(1e-3))
    options: dict[str, Any] = {"settings": settings, "clip": np.float64(1), "guidance": np.float32(1)}
    for _ in range(2):
        student = run("trajectory", unet(), tmp_path, steps=np.int64(2), **options)
    assert student.steps() == (2,)


def adapted(model: nn.Module) -> nn.Module:
    """With an adapter of fastsample.lora on its linear layers."""
    state = {
        "obs.lora_A.weight": torch.randn(2, 5),
        "obs.lora_B.weight": torch.randn(32, 2),
    }
    lora.attach(model, state)
    return model


def test_adapters_that_cannot_be_trained(tmp_path: Path) -> None:
    for changes in ({"teacher": adapted(Policy())}, {"teacher": Policy(), "student": adapted(Policy())}):
        with pytest.raises(ValueError, match=r"a model with adapters of fastsample.lora is not trained as a whole"):
            distill.trajectory(
                shape=(16, 7),
                out=tmp_path / "run",
                cond=OBSERVATIONS,
                paths=2,
                settings=SMALL,
                progress=False,
                **changes,
            )
    assert not (tmp_path / "run").exists()


def test_a_student_that_is_the_teacher_leaves_it_alone(tmp_path: Path) -> None:
    teacher = unet()
    before = weights(teacher)
    run("progressive", teacher, tmp_path, student=teacher)
    assert all(torch.equal(value, before[name]) for name, value in weights(teacher).items())


@pytest.mark.parametrize("target", ["v", "epsilon"])
def test_a_unet_of_which_a_part_is_trained(target: str, tmp_path: Path) -> None:
    part = unet(target=target).requires_grad_(False)
    part.enter.requires_grad_(True)
    student = run("trajectory", unet(target=target), tmp_path, student=part)
    own = weights(part)
    changed = {
        name for name, value in weights(student.network).items()
        if value.shape == own[name].shape and not torch.equal(value, own[name])
    }  # fmt: skip
    assert changed == {"enter.weight", "enter.bias"}


def test_a_unet_with_peft_adapters(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = unet()
    inner = peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["qkv", "conv_in"]), copy.deepcopy(model))
    student = run("trajectory", model, tmp_path, student=inner)
    own = weights(inner)
    changed = {
        name for name, value in weights(student.network).items()
        if value.shape == own[name].shape and not torch.equal(value, own[name])
    }  # fmt: skip
    assert changed and all("lora_" in name for name in changed)


class Velocity(Policy):
    prediction = "v"


def test_what_a_student_states_it_returns() -> None:
    teacher = Teacher(Policy(), (16, 7), cond=OBSERVATIONS)
    assert network_for(teacher, Velocity(), None)[1] == "v"
    assert network_for(teacher, Velocity(), "epsilon")[1] == "epsilon"
    assert network_for(teacher, Policy(), None)[1] == "epsilon"
    facts = distill.Facts("", (16, 7), {})
    assert network_for(teacher, distill.Student(Policy(), "x0", Schedule.cosine(100), facts), None)[1] == "x0"


def test_a_student_in_half_precision(tmp_path: Path) -> None:
    student = run("trajectory", unet(), tmp_path, student=unet().bfloat16())
    assert {value.dtype for value in weights(student).values()} == {torch.float32}


def test_a_compiled_teacher_is_kept_as_it_was_before(tmp_path: Path) -> None:
    model = Policy()
    compiled = torch.compile(model, backend="eager")
    network, _ = network_for(Teacher(compiled, (16, 7), cond=OBSERVATIONS), None, None)
    assert weights(network).keys() == weights(model).keys()


@pytest.mark.parametrize(("scales", "steps"), [(2, (2, 1)), (3, (2, 1)), (4, (4, 2, 1))], ids=str)
def test_no_more_steps_than_levels(scales: int, steps: tuple[int, ...], tmp_path: Path) -> None:
    student = run("consistency", unet(), tmp_path, scales=scales)
    assert student.steps() == steps
    for count in steps:
        assert torch.isfinite(student.sample((2, *SHAPE), count, seed=0, y=LABELS[:2])).all()


@pytest.mark.parametrize(
    ("clip", "output", "start"), [(None, "both", 958), (1.0, "both", 988), (1.0, "epsilon", 958)], ids=str
)
def test_where_a_model_of_epsilon_starts(clip: float | None, output: str, start: int) -> None:
    """On the cosine schedule of 1000: sigma / alpha is 16 at 958 and 64 at 988."""
    model = unet(target="epsilon", schedule=Schedule.cosine(1000), learned_variance=output == "both")
    teacher = Teacher(model, SHAPE, clip=clip)
    network, found = network_for(teacher, None, None)
    assert found == output
    assert (
        teacher.start(distill.Student(network, output, model.schedule, distill.Facts("", SHAPE, {})).prediction)
        == start
    )


def test_conditions_of_every_kind_are_told_apart() -> None:
    def digest(**cond: Any) -> str:
        return Conditions(cond, None).digest()

    long = [{"z": torch.arange(5000)}, {"z": torch.arange(5000)}]
    other = [{"z": torch.arange(5000)}, {"z": torch.arange(5000).flip(0)}]
    assert digest(scale=1.0) != digest(scale=9.0)
    assert digest(s=Shared(torch.ones(2))) != digest(s=Shared(torch.zeros(2)))
    assert digest(words=long) != digest(words=other)
    assert digest(y=torch.arange(4)) != digest(y=torch.arange(4).reshape(2, 2))
    assert digest(f=object()) == digest(f=object())


def test_conditions_go_to_the_device() -> None:
    cond = {
        "list": [torch.ones(2), torch.ones(2)],
        "shared": Shared((torch.ones(3), [torch.ones(1)])),
        "number": torch.tensor(2.0),
        "deep": {"y": torch.arange(2)},
    }
    meta = torch.device("meta")
    told, _ = Conditions(cond, None).at(torch.tensor([1, 0, 1]), meta)
    moved = [*told["list"], told["shared"].value[0], told["shared"].value[1][0], told["number"], told["deep"]["y"]]
    assert len(moved) == 7 and {value.device for value in moved} == {meta}


def test_an_average_of_weights_is_what_is_kept(tmp_path: Path) -> None:
    last = run("trajectory", unet(), tmp_path / "last")
    mean = run("trajectory", unet(), tmp_path / "mean", settings=replace(SMALL, ema_decay=0.9))
    state = torch.load(tmp_path / "mean" / "checkpoint.pt", weights_only=True)
    name = "network.enter.weight"
    assert torch.equal(weights(last)[name], state["model"][name])
    assert torch.equal(weights(mean)[name], state["average"][name]) and len(DATA) == 10
    assert not torch.equal(weights(mean)[name], weights(last)[name])


def test_one_student_for_several_steps_and_weights(tmp_path: Path) -> None:
    """It is told both, and what it is told matters; its file knows them."""
    options: dict[str, Any] = {"steps": (2, 1), "guidance": (1.0, 3.0), "uncond": {"y": torch.tensor([3])}}
    settings = replace(SMALL, iterations=12)
    student = run("trajectory", unet(), tmp_path / "run", settings=settings, **options)
    assert (student.steps(), student.facts.told, student.facts.guidance) == ((2, 1), ("steps", "guidance"), (1.0, 3.0))
    again = distill.load(tmp_path / "run" / "student.safetensors")
    shape, y = (3, *SHAPE), LABELS[:3]
    drawn = {
        (steps, w): again.sample(shape, steps, seed=0, guidance=w, y=y) for steps in (2, 1) for w in (1.0, 2.5)
    }  # fmt: skip
    assert torch.equal(drawn[2, 2.5], student.sample(shape, seed=0, guidance=torch.full((3,), 2.5), y=y))
    assert not torch.equal(drawn[1, 1.0], drawn[1, 2.5])
    t, x = torch.full((3,), 99), torch.randn(shape)
    told = {"guidance": torch.ones(3), "y": y}
    assert not torch.equal(student(x, t, steps=torch.ones(3), **told), student(x, t, steps=2 * torch.ones(3), **told))
    for guidance, message in ((None, "guidance must be given, a weight from 1 to 3"), (4.0, r"must lie in \[1, 3\]")):
        with pytest.raises(ValueError, match=message):
            again.sample(shape, guidance=guidance, y=y)
    with pytest.raises(ValueError, match="guidance is folded in at 1: leave it out"):
        run("trajectory", unet(), tmp_path / "one").sample(shape, guidance=2.0, y=y)


def test_paths_are_guided_by_weights_of_their_own(tmp_path: Path) -> None:
    """Against the sampler, with the weight that the student is told of each path."""
    model, uncond = unet(), {"y": torch.tensor([3])}
    teacher = Teacher(model, SHAPE, cond={"y": LABELS}, uncond=uncond, guidance=3.0)
    method = Trajectory(teacher, "v", [2, 1], 3, 5, 0, (1.0, 3.0))
    places = torch.arange(5)
    weights = method._weights(places)
    assert weights is not None and ((weights > 1) & (weights < 3)).all() and len(set(weights.tolist())) == 5
    options: dict[str, Any] = {"cond": {"y": LABELS[:5]}, "uncond": {"y": torch.full((5,), 3)}, "guidance": weights}
    last = method.solver(teacher.model, method._noise(places), **options)
    assert torch.allclose(method._targets(places)[-1], last, atol=1e-5)
    assert torch.equal(method._told(places, 1, CPU)["guidance"], weights)


def test_diffusers_models_are_told_guidance_as_an_embedding(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
        "cross_attention_dim": 12, "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    teacher = diffusers.UNet2DConditionModel(**sizes).eval()
    student = distill.trajectory(
        teacher, (4, 8, 8), tmp_path, steps=1, substeps=2, paths=4, student=diffusers.UNet2DConditionModel(
            time_cond_proj_dim=16, **sizes
        ),
        schedule=Schedule.scaled_linear(), cond={"encoder_hidden_states": torch.randn(4, 5, 12)},
        uncond={"encoder_hidden_states": torch.zeros(1, 5, 12)}, guidance=(2.0, 8.0), settings=SMALL, progress=False,
    )  # fmt: skip
    words = torch.randn(1, 5, 12).expand(2, -1, -1)
    two = student.sample((2, 4, 8, 8), seed=[1, 1], guidance=torch.tensor([2.0, 8.0]), encoder_hidden_states=words)
    assert not torch.equal(two[0], two[1])
