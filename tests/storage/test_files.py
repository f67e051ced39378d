"""Files that survive two writers, planted links, full disks and killed writers; and what is no file to read."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from fastsample.storage import reading, writing
from fastsample.storage.reading import check_expansion, open_regular, regular_size
from fastsample.storage.writing import check_writable, remove_parts, replace_text, replacing, sole_writer


def test_a_writer_that_raises_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_killed_writer_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("old")
    code = (
        "import os, signal, sys\nfrom fastsample.storage.writing import replacing\n"
        "with replacing(sys.argv[1]) as file:\n    file.write(b'half')\n    file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"
    [part] = [one for one in tmp_path.iterdir() if one != path]
    remove_parts(tmp_path, ["a.txt"])
    assert not part.exists()


def test_two_writers_at_once_do_not_meet(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    with replacing(path) as first, replacing(path) as second:
        first.write(b"1" * 10000)
        second.write(b"2" * 10000)
    assert path.read_bytes() == b"1" * 10000  # its block ends last
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("there", [True, False], ids=["to-a-file", "dangling"])
def test_a_link_is_replaced_and_its_target_stays(tmp_path: Path, there: bool) -> None:
    target, path = tmp_path / "target", tmp_path / "a.txt"
    if there:
        target.write_text("precious")
    path.symlink_to(target)
    replace_text(path, "new")
    assert not path.is_symlink()
    assert path.read_text() == "new"
    assert (target.read_text() == "precious") if there else not target.exists()


def test_a_link_at_the_parts_name_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "target"
    target.write_text("precious")
    monkeypatch.setattr(writing.secrets, "token_hex", lambda count: "known")
    (tmp_path / ".a.txt.known.part").symlink_to(target)
    with pytest.raises(FileExistsError):
        replace_text(tmp_path / "a.txt", "new")
    assert target.read_text() == "precious"


def test_a_file_has_the_rights_that_the_user_wants(tmp_path: Path) -> None:
    replace_text(tmp_path / "a.txt", "text")
    (tmp_path / "b.txt").touch()
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_a_full_disk_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(writing.os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"):
        replace_text(tmp_path / "a.txt", "text")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["a" * 255, "\u56fe" * 85, "\u00e9" * 127, "\U0001f600" * 63, "a[b]*?"],
    ids=["ascii", "3", "2", "4", "glob"],
)
def test_a_long_name_is_written_and_its_parts_are_found(tmp_path: Path, name: str) -> None:
    """Names have at most 255 bytes, of which a character takes up to four."""
    path = tmp_path / name
    replace_text(path, "text")
    assert path.read_text() == "text"
    with replacing(path):
        [part] = [one for one in tmp_path.iterdir() if one != path]
        os.link(part, copy := part.with_name(part.name.replace(".part", "0.part")))
        remove_parts(tmp_path, ["b"])
        assert copy.exists()
        remove_parts(tmp_path, [name])
        assert not copy.exists()
        part.touch()  # which the writer is to put in place


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755, 0o444], ids=oct)
def test_a_file_keeps_the_rights_of_the_one_that_it_replaces(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "a.txt"
    path.touch()
    path.chmod(mode)
    replace_text(path, "text")
    assert path.stat().st_mode & 0o777 == mode
    assert path.read_text() == "text"


def test_a_link_gives_its_targets_rights_to_nobody(tmp_path: Path) -> None:
    (tmp_path / "target").touch(0o600)
    (tmp_path / "b.txt").touch()
    (tmp_path / "a.txt").symlink_to(tmp_path / "target")
    replace_text(tmp_path / "a.txt", "text")
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as one:
        one.bind(str(path))
    return path


def _folder(path: Path) -> Path:
    path.mkdir()
    return path


ODD: dict[str, Callable[[Path], Path]] = {
    "folder": _folder,
    "FIFO": _fifo,
    "socket": _socket,
    "device": lambda path: Path("/dev/null"),
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_neither_read_nor_replaced(tmp_path: Path, kind: str) -> None:
    path = ODD[kind](tmp_path / "a")
    for refused in (regular_size, open_regular, lambda one: replace_text(one, "text")):
        with pytest.raises(ValueError, match=f"a is a {kind}|null is a {kind}"):
            refused(path)
    assert path.exists()


def _loop(path: Path) -> Path:
    path.symlink_to(path)
    return path


@pytest.mark.parametrize(
    ("make", "error"),
    [
        pytest.param(_loop, ValueError, id="loop-of-links"),
        pytest.param(lambda path: path.with_name("a\0b"), ValueError, id="null-byte"),
        pytest.param(lambda path: path.with_name("a" * 300), ValueError, id="long-name"),
        pytest.param(lambda path: path / "b", FileNotFoundError, id="nothing"),
    ],
)
def test_paths_that_cannot_be_read(tmp_path: Path, make: Callable[[Path], Path], error: type[Exception]) -> None:
    with pytest.raises(error, match=r"cannot be read|no file at"):
        open_regular(make(tmp_path / "a"))


def test_what_was_swapped_for_a_fifo_after_the_look_does_not_wait(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = _fifo(tmp_path / "a")
    monkeypatch.setattr(reading, "regular_size", lambda *_: 1)
    with pytest.raises(ValueError, match="is a FIFO"):
        open_regular(path)


def test_a_folder_has_one_writer(tmp_path: Path) -> None:
    refused: list[str] = []

    def enter() -> None:
        try:
            with sole_writer(tmp_path):
                pass
        except RuntimeError as error:
            refused.append(str(error))

    with sole_writer(tmp_path):
        other = threading.Thread(target=enter)
        other.start()
        other.join(10)
        enter()
    enter()
    assert len(refused) == 2
    assert all(f"{tmp_path} is in use by another run" in message for message in refused)
    assert not os.listdir(tmp_path)


def test_remove_parts_leaves_other_files_and_what_links_lead_to(tmp_path: Path) -> None:
    target = tmp_path / "target"
    for name in ("target", "a.txt", ".a.txt", ".b.txt.1.part", "a.txt.part"):
        (tmp_path / name).write_text(name)
    (tmp_path / ".a.txt.1.part").symlink_to(target)
    (tmp_path / ".a.txt.2.part").mkdir()
    before = set(os.listdir(tmp_path))
    remove_parts(tmp_path, ["a.txt"])
    assert set(os.listdir(tmp_path)) == before - {".a.txt.1.part"}
    assert target.read_text() == "target"


def test_check_writable(tmp_path: Path) -> None:
    check_writable(tmp_path / "new" / "deeper")
    assert not os.listdir(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        check_writable(tmp_path / "file" / "deeper")
    with pytest.raises(OSError, match="no file can be made here"):
        check_writable("/proc/new")


@pytest.mark.parametrize(
    ("size", "stored", "fits"),
    [
        pytest.param(64 << 20, 0, True, id="small"),
        pytest.param((64 << 20) + 1, 1, False, id="bomb"),
        pytest.param(200 << 20, 1 << 20, True, id="compressed"),
        pytest.param((200 << 20) + 1, 1 << 20, False, id="more"),
    ],
)
def test_check_expansion(size: int, stored: int, fits: bool) -> None:
    if fits:
        check_expansion(size, stored, "a")
    else:
        with pytest.raises(ValueError, match="a would unpack"):
            check_expansion(size, stored, "a")
