"""gura_jax/files.py: files and folders are complete or absent, whatever fails or kills the process that writes them."""

import contextlib
import errno
import hashlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gura_jax.errors import InputError, StoreError
from gura_jax.files import (
    LOCK_FILE,
    AtomicFiles,
    final_name,
    is_folder,
    locked,
    matches,
    new_folder,
    open_folder,
    plain_name,
    read_json,
    recover_folder,
    remove_temporary,
    replace_folder,
    write_file,
    write_json,
)


class Death(BaseException):
    """Nothing catches it."""


def die(*_: Any, **__: Any) -> Any:
    raise Death


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write(folder: Path, **contents: bytes) -> None:
    with AtomicFiles(folder) as files:
        for name, content in contents.items():
            files.write(name, lambda file, content=content: file.write(content))
        files.commit()


# Files


def test_files_are_named_in_the_order_of_writing(tmp_path: Path, renamed: list[str]) -> None:
    write(tmp_path, b=b"1", a=b"2", c=b"3")
    assert renamed == ["b", "a", "c"]
    assert names(tmp_path) == ["a", "b", "c"]


def test_nothing_is_named_without_a_commit(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with AtomicFiles(tmp_path) as files:
        files.write("a", lambda file: file.write(b"new"))
        (temporary,) = [name for name in names(tmp_path) if name != "a"]
        assert final_name(temporary) == "a"
        assert (tmp_path / temporary).read_bytes() == b"new"
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a").read_bytes() == b"old"


def test_size_and_hash_are_those_of_the_file(tmp_path: Path) -> None:
    with AtomicFiles(tmp_path) as files:
        described = files.write("a", lambda file: [file.write(b"one"), file.write(b""), file.write(b"two")])
        files.commit()
    path = tmp_path / "a"
    assert described == {"bytes": 6, "sha256": hashlib.sha256(b"onetwo").hexdigest()}
    with open(path, "rb") as file:
        assert matches(file, described)
    for damaged in (b"onetwO", b"onetw", b"onetwo!"):
        assert not matches(io.BytesIO(damaged), described)


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_error_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, full)
    with pytest.raises(StoreError, match=f"{tmp_path.name}: .*No space left on device: make room or choose another"):
        write(tmp_path, a=b"1", b=b"2")
    assert names(tmp_path) == []


def test_json_is_sorted_and_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.json"
    write_json(tmp_path, "x.json", {"b": 1, "a": [2]})
    text = path.read_text()
    assert text == '{\n "a": [\n  2\n ],\n "b": 1\n}\n'
    assert read_json(path) == {"b": 1, "a": [2]}
    monkeypatch.setattr(os, "fsync", die)
    with pytest.raises(Death):
        write_json(tmp_path, "x.json", {"c": 3})
    assert path.read_text() == text
    assert names(tmp_path) == ["x.json"]


def test_what_killed_writers_left_goes_with_the_next_write(tmp_path: Path) -> None:
    left, other = (f".{name}.0123456789abcdef.tmp" for name in ("a", "b"))
    foreign = ".a.tmp"
    for name in (left, other, foreign):
        (tmp_path / name).touch()
    assert [final_name(name) for name in (left, other, foreign, "a")] == ["a", "b", None, None]
    write_file(tmp_path, "a", b"")
    assert names(tmp_path) == sorted([other, foreign, "a"])
    remove_temporary(tmp_path, {"a", "b"})
    assert names(tmp_path) == sorted([foreign, "a"])


# Folders


def fill(target: Path, content: str) -> None:
    with new_folder(target) as temporary:
        (temporary / "file").write_text(content)


def test_a_folder_is_there_when_it_is_full(tmp_path: Path) -> None:
    target = tmp_path / "in" / "mine"
    with new_folder(target) as temporary:
        (temporary / "file").write_text("new")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert names(target.parent) == ["mine"]
    assert (target / "file").read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o755


def test_an_older_folder_stays_until_the_new_one_is_full(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    fill(target, "old")
    with contextlib.suppress(Death), new_folder(target) as temporary:
        (temporary / "file").write_text("half")
        raise Death
    assert names(tmp_path) == ["mine"]
    assert (target / "file").read_text() == "old"
    fill(target, "new")
    assert names(tmp_path) == ["mine"]
    assert (target / "file").read_text() == "new"


def test_an_older_folder_comes_back_if_the_new_one_cannot_be_named(tmp_path: Path) -> None:
    target = tmp_path / "mine"
    fill(target, "old")
    with pytest.raises(FileNotFoundError):
        replace_folder(tmp_path / "nowhere", target)
    assert names(tmp_path) == ["mine"]
    assert (target / "file").read_text() == "old"


KILL_AT_EVERY_STEP = """
import itertools, os, signal, sys
from pathlib import Path
from gura_jax.files import new_folder, recover_folder

STEPS = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "shutil.rmtree")
target = Path(sys.argv[1])

def fill(content):
    with new_folder(target) as temporary:
        (temporary / "file").write_text(content)

def kill(at):
    steps = itertools.count(1)

    def hook(event, arguments):
        if event in STEPS and next(steps) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)

for at in itertools.count(1):
    fill("old")
    child = os.fork()
    if not child:
        kill(at)
        fill("new")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    recover_folder(target)
    print((target / "file").read_text())
    if not os.WIFSIGNALED(status):
        break
"""


def test_a_replacement_that_is_killed_at_any_step(tmp_path: Path) -> None:
    code = [sys.executable, "-c", KILL_AT_EVERY_STEP, str(tmp_path / "mine")]
    found = subprocess.run(code, capture_output=True, text=True, check=True).stdout.split()
    before = found.index("new")
    assert before > 2
    assert found == ["old"] * before + ["new"] * (len(found) - before)  # never anything else, nor none


def test_recovering_takes_no_other_folder(tmp_path: Path) -> None:
    for name in (".mine.old.x", ".m*.old.x", ".mine2.old.x"):
        (tmp_path / name / "old").mkdir(parents=True)
    recover_folder(tmp_path / "m*")
    recover_folder(tmp_path / "nobody")
    assert names(tmp_path) == sorted([".mine.old.x", "m*", ".mine2.old.x"])


@pytest.mark.parametrize("name", ["file", "file/out", "/proc/nowhere", "x" * 300])
def test_folders_that_cannot_be(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("")
    folder = tmp_path / name
    with pytest.raises(StoreError, match=f"{folder.name}: expected a folder that can be written to, found: "):
        open_folder(folder)


def test_is_folder_takes_any_text(tmp_path: Path) -> None:
    assert is_folder(tmp_path)
    (tmp_path / "file").touch()
    for path in (tmp_path / "file", tmp_path / "nowhere", tmp_path / ("x" * 300), Path("a\0b"), Path("")):
        assert not is_folder(path)


# Locks, names, JSON


def test_the_lock_keeps_others_out(tmp_path: Path) -> None:
    from filelock import FileLock, Timeout

    def free() -> bool:
        try:
            with FileLock(tmp_path / LOCK_FILE, timeout=0):
                return True
        except Timeout:
            return False

    with locked(tmp_path):
        assert not free()
    assert free()


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import filelock

    def none(*_: object, **__: object) -> None:
        raise NotImplementedError

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    with locked(tmp_path):
        write_file(tmp_path, "a", b"1")
    assert "a" in names(tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/a", "../a", "a\0b"])
def test_names_that_are_paths(name: str) -> None:
    with pytest.raises(InputError, match=r"somewhere: expected the name of a file in its folder, found "):
        plain_name(name, Path("somewhere"))
    assert plain_name("a.wav", Path("somewhere")) == "a.wav"


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda path: None, "cannot be read: No such file"),
        (lambda path: path.write_text("{"), "expected JSON, found: "),
        (lambda path: path.write_bytes(b"\xff"), "expected JSON, found: "),
        (lambda path: path.write_text("[" * 100_000), "expected JSON, found: "),
    ],
)
def test_files_that_are_not_json(tmp_path: Path, make: Callable[[Path], object], words: str) -> None:
    make(tmp_path / "x.json")
    with pytest.raises(InputError, match=rf"x\.json: {words}"):
        read_json(tmp_path / "x.json")
