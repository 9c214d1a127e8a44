"""Writes that are whole or not there: all goes to a temporary name first and is then renamed."""

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from replace.errors import UserError

PART, OLD = ".part", ".old"
"""How the names end of what is being written, and of what is being replaced; both begin with a dot."""


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be written; the old file is untouched and no temporary file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART)
    try:
        os.chmod(name, 0o666 & ~_umask())
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; it takes the name `path` only if the block ends well.

    A folder that already has the name is replaced. On an error nothing is left but what was there before.

    Raises:
        OSError: the folder cannot be written; also where a library says so in an error of its own.
        UserError: safetensors could not write for another reason.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART))
    os.chmod(temporary, 0o777 & ~_umask())
    try:
        yield temporary
        for written in sorted(temporary.rglob("*")):
            _keep(written)  # before the rename: what has the name is on the disk
        old = None
        if path.exists():
            old = path.with_name(f".{path.name}{OLD}")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(temporary, path)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        # Libraries in Rust (safetensors, tokenizers) raise errors of their own when a disk is full.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is not None and not isinstance(error, OSError):
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
        safetensors = sys.modules.get("safetensors")  # it raised nothing where nobody imported it
        if safetensors is not None and isinstance(error, safetensors.SafetensorError):
            raise UserError(f"{path} cannot be written: {error}.") from error
        raise


def clear(folder: Path) -> None:
    """Remove what a killed process was writing below `folder`, and put back what it was replacing."""
    for path in sorted(Path(folder).rglob(f".*{OLD}")):
        name = path.with_name(path.name.removeprefix(".").removesuffix(OLD))
        if name.exists():
            shutil.rmtree(path)
        else:
            os.replace(path, name)
    for path in sorted(Path(folder).rglob(f".*{PART}")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # one inside a folder that is gone by now


def expanded(path: Path | str) -> Path:
    """A path as a person writes it, `~` for the home folder; of a user that is unknown it stays as it is."""
    return Path(os.path.expanduser(path))  # Path.expanduser raises a RuntimeError of that


def _keep(path: Path) -> None:
    """Have the system write a file to the disk."""
    if path.is_file():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _umask() -> int:
    """What the user wants new files to be like; temporary files are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
