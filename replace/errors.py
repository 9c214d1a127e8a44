"""The one exception a person is meant to read: a sentence with the field, the value, what is allowed."""

from collections.abc import Iterable


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
