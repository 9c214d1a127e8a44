"""Writes that are whole or not there: all goes to a temporary name first and is then renamed."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from replace.errors import UserError


def atomic_write(path: Path, content: str | bytes) -> None:
    """Write `content` to `path`: a reader sees the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be written; the old file is untouched and no temporary file is left.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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
        UserError: safetensors could not write, for it does not say OSError when a disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    os.chmod(temporary, 0o777 & ~_umask())
    try:
        yield temporary
        old = None
        if path.exists():
            old = path.with_name(f".{path.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            os.replace(path, old)
        os.replace(temporary, path)
        if old is not None:
            shutil.rmtree(old, ignore_errors=True)
    except SafetensorError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise UserError(f"{path} cannot be written: {error}.") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _umask() -> int:
    """What the user wants new files to be like; temporary files are made for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
