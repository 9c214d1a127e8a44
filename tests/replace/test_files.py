"""A write is whole or not there."""

import os
import stat

import pytest
from safetensors import SafetensorError

from replace.errors import UserError
from replace.files import atomic_folder, atomic_write


def test_files_and_folders_can_be_read_by_whom_the_user_lets(tmp_path):
    mask = os.umask(0o022)
    try:
        atomic_write(tmp_path / "a.txt", "text")
        with atomic_folder(tmp_path / "b") as folder:
            atomic_write(folder / "c.txt", b"bytes")
    finally:
        os.umask(mask)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o644
    assert stat.S_IMODE((tmp_path / "b").stat().st_mode) == 0o755


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, SafetensorError])
def test_a_failed_folder_leaves_what_was_there(tmp_path, error):
    with atomic_folder(tmp_path / "b") as folder:
        (folder / "old").touch()

    def failing():
        with atomic_folder(tmp_path / "b") as folder:
            (folder / "new").touch()
            raise error("no space left on device")

    with pytest.raises(UserError if error is SafetensorError else error):
        failing()
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["old"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    atomic_write(tmp_path / "a.txt", "old")

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        atomic_write(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
