"""Sets on disk: whole or not there, in every format, and taken up again."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastsample.cli import main
from fastsample.generation import Folder, generate, merge, verify
from fastsample.generation.formats import FORMATS
from fastsample.generation.source import Source
from fastsample.storage import writing
from support.generated import SMALL, TEXT, arrays, chunks_alive, merged


def chunks_of(out: Path) -> list[Path]:
    return sorted(path for path in out.iterdir() if path.name.startswith("chunk-"))


def a_file_of(chunk: Path) -> Path:
    return chunk if chunk.is_file() else sorted(chunk.iterdir())[0]


@pytest.mark.parametrize("form", FORMATS)
def test_formats_hold_the_same(form: str, tmp_path: Path) -> None:
    wanted = merged(tmp_path / "a")
    found = merged(tmp_path / "b", format=form)
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert found[0].shape == (23, 8, 6, 3) and verify(tmp_path / "b").complete
    again = merged(tmp_path / "c", format=form)
    assert [path.name for path in chunks_of(tmp_path / "b")] == [path.name for path in chunks_of(tmp_path / "c")]
    assert all(np.array_equal(one, other) for one, other in zip(again, wanted, strict=True))


def flip(chunk: Path) -> None:
    file = a_file_of(chunk)
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def cut(chunk: Path) -> None:
    file = a_file_of(chunk)
    file.write_bytes(file.read_bytes()[:-1])


def remove(chunk: Path) -> None:
    shutil.rmtree(chunk) if chunk.is_dir() else chunk.unlink()


def double(chunk: Path) -> None:
    """A second one of the same number, with other bytes, as two GPUs may have made it."""
    folder = Folder.open(chunk.parent)
    stored = list(folder.stored())[1]
    found = folder.get(stored)
    folder.put(stored.number, found._replace(images=255 - found.images))


def swap(chunk: Path) -> None:
    """Under the number of another."""
    chunk.rename(chunk.with_name(chunk.name.replace("chunk-000001", "chunk-000002")))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("harm", [flip, cut, remove, double, swap])
def test_harm_is_found_and_mended(form: str, harm: Callable[[Path], None], tmp_path: Path) -> None:
    wanted = merged(tmp_path / "a", format=form)
    harm(chunks_of(tmp_path / "a")[1])
    report = verify(tmp_path / "a")
    assert not report.complete
    assert (report.damaged, report.missing, report.doubled) == {
        flip: (1, 0, 0), cut: (1, 0, 0), remove: (0, 1, 0), double: (0, 0, 1), swap: (1, 1, 0)
    }[harm]  # fmt: skip
    if harm is not double:
        with pytest.raises(ValueError, match="damaged" if harm in (flip, cut) else "lacks 1 of 6 chunks"):
            merge(tmp_path / "a", tmp_path / "never.npz")
        assert not (tmp_path / "never.npz").exists()
    found = merged(tmp_path / "a", format=form)
    if harm is not double:  # either of the two may stay
        assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert verify(tmp_path / "a").complete


def test_only_what_is_missing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(tmp_path / "a")
    remove(chunks_of(tmp_path / "a")[2])
    made = []
    chunk = Source.chunk
    monkeypatch.setattr(Source, "chunk", lambda self, places: made.append(places) or chunk(self, places))
    merged(tmp_path / "a")
    assert made == [range(8, 12)]


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = merged(tmp_path / "a")
    sync, count = os.fsync, 0

    def full(descriptor: int) -> None:
        nonlocal count
        count += 1
        if count == 7:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(writing.os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            generate(TEXT, tmp_path / "b", progress=False, **SMALL)
    left = [path.name for path in (tmp_path / "b").iterdir()]
    assert 0 < len(chunks_of(tmp_path / "b")) < 6 and not any(name.endswith(".part") for name in left)
    found = merged(tmp_path / "b")
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("form", ["npz", "png"])
def test_ctrl_c_and_what_a_killed_run_left(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = merged(tmp_path / "a", format=form)
    put, made = Folder.put, []

    def stopping(self: Folder, number: int, chunk: Any) -> None:
        put(self, number, chunk)
        made.append(number)
        if len(made) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "put", stopping)
        options = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
        command = ["generate", "--model", TEXT, "--out", str(tmp_path / "b"), "--format", form, *options]
        assert main(command) == 130
    assert len(chunks_of(tmp_path / "b")) == 2
    for name in (".chunk-000003-0123456789abcdef.npz.0011223344556677.part", ".settings.json.0011223344556677.part"):
        (tmp_path / "b" / name).write_text("half")
    folder = tmp_path / "b" / ".chunk-000004-0123456789abcdef.0011223344556677.part"
    folder.mkdir()
    (folder / "x.png").write_text("half")
    assert main(command) == 0
    found = arrays(tmp_path / "b")
    assert all(np.array_equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert not [path for path in (tmp_path / "b").iterdir() if path.name.endswith(".part")]


def test_other_settings_are_refused_with_the_difference(tmp_path: Path) -> None:
    merged(tmp_path / "a")
    before = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    for options, difference in (
        ({"steps": 3}, "steps 2 and not 3"),
        ({"num": 24}, "num 23 and not 24"),
        ({"seed": 8, "batch": 5}, "batch 4 and not 5, seed 7 and not 8"),
        ({"format": "png"}, "format 'npz' and not 'png'"),
        ({"guidance": 2.0}, "guidance None and not 2.0"),
    ):
        with pytest.raises(ValueError, match=difference):
            generate(TEXT, tmp_path / "a", progress=False, **{**SMALL, **options})
    assert {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()} == before


def test_other_weights_are_other_settings(tmp_path: Path) -> None:
    from support.generated import unet

    model = unet()
    generate(model, tmp_path / "a", progress=False, **SMALL)
    model.enter.weight.data[0, 0, 0, 0] += 1
    with pytest.raises(ValueError, match="was begun with weights"):
        generate(model, tmp_path / "a", progress=False, **SMALL)


def test_a_manifest_is_made_again_from_the_chunks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    merged(tmp_path / "a")
    manifest = tmp_path / "a" / "manifest.json"
    wanted = manifest.read_text()
    entries = json.loads(wanted)["chunks"]
    assert [entry["first"] for entry in entries] == [0, 4, 8, 12, 16, 20] and entries[-1]["count"] == 3
    for broken in (None, "{", "[]", '{"chunks": 3}'):
        manifest.unlink() if broken is None else manifest.write_text(broken)
        assert main(["verify", str(tmp_path / "a")]) == 2
        assert "--rebuild" in capsys.readouterr().err
        assert main(["verify", str(tmp_path / "a"), "--rebuild"]) == 0
        assert manifest.read_text() == wanted


@pytest.mark.parametrize("form", FORMATS)
def test_a_chunk_may_be_written_twice(form: str, tmp_path: Path) -> None:
    merged(tmp_path / "a", format=form)
    folder = Folder.open(tmp_path / "a")
    before = sorted(path.name for path in (tmp_path / "a").iterdir())
    for stored in folder.stored():
        folder.put(stored.number, folder.get(stored))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == before and verify(tmp_path / "a").complete


def test_a_disk_that_cannot_be_read_costs_no_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    merged(tmp_path / "a")
    before = chunks_of(tmp_path / "a")

    def broken(path: Path) -> bytes:
        raise OSError(errno.EIO, "Input/output error", str(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", broken)
        with pytest.raises(OSError, match="Input/output error"):
            generate(TEXT, tmp_path / "a", progress=False, **SMALL)
    assert chunks_of(tmp_path / "a") == before


def test_merging_into_the_set_itself_is_refused(tmp_path: Path) -> None:
    merged(tmp_path / "a")
    for name in (chunks_of(tmp_path / "a")[0].name, "new.npz"):
        with pytest.raises(ValueError, match="out must lie outside"):
            merge(tmp_path / "a", tmp_path / "a" / name)
    assert verify(tmp_path / "a").complete


def test_what_a_desktop_leaves_in_folders_is_no_damage(tmp_path: Path) -> None:
    merged(tmp_path / "a", format="png")
    (chunks_of(tmp_path / "a")[0] / ".DS_Store").write_text("mine")
    assert verify(tmp_path / "a").complete


def test_two_runs_do_not_share_a_folder(tmp_path: Path) -> None:
    merged(tmp_path / "a")
    with (
        Folder.open(tmp_path / "a").written(),
        pytest.raises(RuntimeError, match="in use by another run"),
    ):
        generate(TEXT, tmp_path / "a", progress=False, **SMALL)


def harmed(out: Path, name: str, text: str | None) -> None:
    path = out / name
    path.unlink() if text is None else path.write_text(text)


FOLDERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "settings are missing": (lambda out: harmed(out, "settings.json", None), "no settings.json in"),
    "settings are torn": (lambda out: harmed(out, "settings.json", '{"recipe"'), "cannot be read"),
    "settings are a list": (lambda out: harmed(out, "settings.json", "[]"), "holds no settings"),
    "settings are another program's": (lambda out: harmed(out, "settings.json", "{}"), "holds no settings"),
    "settings cannot be": (
        lambda out: harmed(out, "settings.json", '{"recipe": {"model": "a", "num": 0}}'),
        "num must",
    ),
    "a chunk is missing": (lambda out: remove(chunks_of(out)[0]), "lacks 1 of 6|1 missing"),
    "a chunk is damaged": (lambda out: flip(chunks_of(out)[5]), "damaged"),
    "a chunk is empty": (lambda out: chunks_of(out)[3].write_bytes(b""), "damaged"),
    "no folder": (shutil.rmtree, "no settings.json in"),
}


@pytest.mark.parametrize("command", ["verify", "merge"])
@pytest.mark.parametrize(("harm", "message"), FOLDERS.values(), ids=FOLDERS)
def test_broken_folders_are_one_clear_line(
    command: str, harm: Callable[[Path], object], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    merged(tmp_path / "a")
    harm(tmp_path / "a")
    file = tmp_path / "out.npz"
    file.write_text("precious")
    assert main([command, str(tmp_path / "a"), *([str(file)] if command == "merge" else [])]) == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and re.search(message, error)
    assert file.read_text() == "precious"


COMMANDS: dict[str, tuple[list[str], str]] = {
    "no folder": (["--num", "3"], "--out"),
    "a number that is none": (["--num", "many", "--out", "x"], "--num"),
    "no samples": (["--num", "0", "--out", "x"], "num must"),
    "an unknown option": (["--bach", "3", "--out", "x"], "bach"),
    "an unknown format": (["--format", "gif", "--out", "x"], "--format"),
    "an unknown sampler": (["--sampler", "plms", "--out", "x"], "--sampler"),
    "an unknown model": (["--model", "digits", "--out", "x"], "model must be zoo:digits"),
    "a model that is missing": (["--model", "zoo:nowhere.safetensors", "--out", "x"], "no model at"),
    "an option without a value": (["--option", "eta", "--out", "x"], "--option must be NAME=VALUE"),
    "an option of another sampler": (["--option", "order=2", "--out", "x"], "arguments of ddim are"),
    "a class that there is not": (["--classes", "10", "--out", "x"], "classes must be from 0 to 9"),
    "other files": (["--num", "3", "--out", "mine"], "holds other files"),
    "a file in place of the folder": (["--num", "3", "--out", "mine/a.txt"], "a.txt"),
}


@pytest.mark.parametrize(("options", "message"), COMMANDS.values(), ids=COMMANDS)
def test_bad_command_lines_are_one_clear_line(
    options: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "a.txt").write_text("precious")
    try:
        status = main(["generate", *options])
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and message in error
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine" / "a.txt").read_text() == "precious"


def test_the_plan_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [
        "generate",
        "--model",
        TEXT,
        "--num",
        "10",
        "--batch",
        "4",
        "--steps",
        "3",
        "--guidance",
        "2",
        "--dry-run",
    ]
    assert main([*command, "--out", str(tmp_path / "set")]) == 0
    printed = capsys.readouterr().out
    assert "10 samples, 3 x 8 x 6, of " in printed and "3 chunks of 4" in printed
    assert "6 model calls a sample, 64 samples a call, 5% of them wanted" in printed
    assert not (tmp_path / "set").exists()


def test_merging_needs_the_memory_of_one_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted: chunks that are alive at once while 23 samples are merged."""
    merged(tmp_path / "a", batch=1)
    alive = chunks_alive(monkeypatch)
    merge(tmp_path / "a", tmp_path / "a.npz")
    assert len(alive) > 40 and max(alive) <= 3  # the one that is written, the next, and the first, whose shape is known
