"""Keys and tokens: refused in a command line and a config, blotted out of what is logged and recorded."""

import os
import re
from collections.abc import Iterable

from replace.errors import UserError

NAMED = re.compile(r"(?:api|access|private|secret)_?key|(?<![a-z])token(?!s)|secret|passw|credential", re.I)
"""What names a key: `HF_TOKEN`, `WANDB_API_KEY`, and not `stage1.tokens`."""

SHAPED = re.compile(r"\bhf_\w{16,}|\bwandb_v\d_\w{16,}|\bgh[a-z]_\w{16,}|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)")
"""What looks like a key: those of the hubs, and a name with a password in an address."""

LEAST = 16
"""Characters of a key; what is shorter may be a word, and would be blotted out of ordinary text."""

BLOT = "<hidden>"


def blot(text: str) -> str:
    """`text` without the keys of the environment and without what looks like a key."""
    for name, value in os.environ.items():
        if len(value) >= LEAST and value in text and NAMED.search(name) and not os.path.exists(value):
            text = text.replace(value, BLOT)  # the path of a file with keys is none
    return SHAPED.sub(BLOT, text)


def refuse_keys(arguments: Iterable[str]) -> None:
    """Refuse a key in a command line, which a shell remembers and a run records.

    Raises:
        UserError: there is one; the sentence does not hold it.
    """
    for argument in arguments:
        name = argument.partition("=")[0].lstrip("+~")
        # Of a variant's own options it is known elsewhere which there are; `key` is a word of attention.
        where = argument if name.startswith("hydra.job.env") else name
        if blot(argument) != argument or (NAMED.search(where) and not name.startswith("attention.own.")):
            raise UserError(
                f"argument={blot(name) + '=...'!r} is not possible, since it holds a key; allowed: keys in "
                "the environment, such as WANDB_API_KEY and HF_TOKEN."
            )
