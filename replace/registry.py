"""Names for things: variants, feature maps, updates and scores, found by the name that a config gives."""

import importlib
import pkgutil
from collections.abc import Callable
from typing import Generic, TypeVar

from replace.errors import UserError, bad_value

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of names for one config field, filled by a decorator.

    A name with a colon, `package.module:Class`, is imported: a variant may live in a user's own package.
    """

    def __init__(self, field: str, package: str | None = None) -> None:
        self.field = field
        self.package = package
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a class under `name`.

        Raises:
            UserError: another class has that name already.
        """

        def enter(entry: T) -> T:
            present = self._entries.get(name)
            if present is not None and getattr(present, "__qualname__", None) != getattr(
                entry, "__qualname__", None
            ):
                raise UserError(f"{self.field}={name!r} is registered twice, by {present!r} and {entry!r}.")
            self._entries[name] = entry
            return entry

        return enter

    def names(self) -> list[str]:
        """All registered names, sorted."""
        self._discover()
        return sorted(self._entries)

    def get(self, name: str) -> T:
        """The entry of that name.

        Raises:
            UserError: unknown; the sentence lists what there is.
        """
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            module, _, attribute = name.partition(":")
            try:
                return getattr(importlib.import_module(module), attribute)
            except (ImportError, AttributeError) as error:
                raise UserError(f"{self.field}={name!r} cannot be imported: {error}.") from error
        self._discover()
        if name not in self._entries:
            raise bad_value(self.field, name, [*sorted(self._entries), "package.module:Class"])
        return self._entries[name]

    def _discover(self) -> None:
        """Import every module of the registry's package, so that a new file there needs no other edit.

        In an export the files lie flat and the modeling file has imported and registered what it needs.
        """
        if self.package is None or __name__.partition(".")[0] != "replace":
            return
        found = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(found.__path__):
            importlib.import_module(f"{self.package}.{module.name}")
