"""The one exception a person is meant to read: a sentence with the field, the value, what is allowed."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path


class UserError(Exception):
    """A mistake a person can mend. Entry points print it as `error: <sentence>` and exit with code 2."""


def bad_value(field: str, value: object, allowed: str | Iterable[object]) -> UserError:
    """The error for a value that is not allowed.

    Args:
        field: the config key as a person writes it, such as `attention.window`.
        value: what was given.
        allowed: a phrase that says what is allowed, or the allowed values.
    """
    words = allowed if isinstance(allowed, str) else "one of " + ", ".join(str(item) for item in allowed)
    return UserError(f"{field}={value!r} is not possible; allowed: {words}.")


def quoted(path: Path) -> str:
    """A path as Hydra's grammar takes it, whatever signs it holds."""
    escaped = str(path).replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


def resume_argument(folder: Path) -> str:
    """`resume=<folder>` as a person can type it into a shell."""
    plain = re.fullmatch(r"[\w./-]+", str(folder))
    return shlex.quote(f"resume={folder if plain else quoted(folder)}")
