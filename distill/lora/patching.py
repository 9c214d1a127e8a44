"""Importing Unsloth, which patches torch and transformers."""

import contextlib
import io
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from replace.wheels import cache_dir

logger = logging.getLogger(__name__)


def import_unsloth() -> Any:
    """Import it, which patches torch and transformers; what it prints goes to the log.

    To be called before transformers is imported where that can be had, since Unsloth warns otherwise.
    """
    os.environ.setdefault("UNSLOTH_COMPILE_LOCATION", str(cache_dir() / "unsloth"))
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    with quiet():
        import unsloth
    return unsloth


@contextmanager
def quiet() -> Iterator[None]:
    """Unsloth prints; a run's standard output is for results."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            yield
    finally:
        for line in said.getvalue().splitlines():
            if line.strip():
                logger.info("%s", line.strip())
