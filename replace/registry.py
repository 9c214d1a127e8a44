"""Names for things: variants, feature maps, updates and scores, found by the name that a config gives."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from types import ModuleType
from typing import Generic, TypeVar

from replace.errors import UserError, bad_value

T = TypeVar("T")


class Registry(Generic[T]):
    """A table of names for one config field, filled by a decorator.

    A name with a colon, `package.module:Class`, is imported: a variant may live in a user's own package.
    """

    def __init__(
        self, field: str, package: str | None = None, base: Callable[[], type] | None = None
    ) -> None:
        """
        Args:
            field: the config key whose values are the names.
            package: its modules are imported before a name is unknown.
            base: gives the class that every entry is a subclass of; None where entries are functions. It is
                called late, since a base class may stand below its registry.
        """
        self.field = field
        self.package = package
        self.base = base
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

    def get(self, name: str, field: str | None = None) -> T:
        """The entry of that name.

        Args:
            field: the config key that gave the name, where it is another than the registry's.

        Raises:
            UserError: unknown, not to be imported, or not what this registry holds.
        """
        field = field or self.field
        if name in self._entries:
            return self._entries[name]
        if ":" in name:
            return self._imported(name, field)
        self._discover()
        if name not in self._entries:
            raise bad_value(field, name, [*sorted(self._entries), "package.module:Class"])
        return self._entries[name]

    def _imported(self, name: str, field: str) -> T:
        """What `package.module:Class` names."""
        module, _, attribute = name.partition(":")
        holder = import_own(module, f"{field}={name!r}")
        if not hasattr(holder, attribute):
            known = [key for key in vars(holder) if self._fits(getattr(holder, key))]
            raise bad_value(field, name, f"a name that {module} has, such as {', '.join(known) or 'none'}")
        found = getattr(holder, attribute)
        if not self._fits(found):
            wanted = f"a subclass of {self.base().__qualname__}" if self.base else "a function called as ours"
            raise bad_value(field, name, f"{wanted}, which {found!r} is not")
        return found

    def _fits(self, entry: object) -> bool:
        """Whether this registry could hold `entry`."""
        if self.base is not None:
            return isinstance(entry, type) and issubclass(entry, self.base())
        self._discover()
        return inspect.isfunction(entry) and all(
            len(inspect.signature(entry).parameters) == len(inspect.signature(ours).parameters)  # type: ignore[arg-type]
            for ours in self._entries.values()
        )

    def _discover(self) -> None:
        """Import every module of the registry's package, so that a new file there needs no other edit.

        In an export the files lie flat and the modeling file has imported and registered what it needs.
        """
        if self.package is None or __name__.partition(".")[0] != "replace":
            return
        found = importlib.import_module(self.package)
        for module in pkgutil.iter_modules(found.__path__):
            import_own(name := f"{self.package}.{module.name}", f"The module {name}")


def import_own(module: str, subject: str) -> ModuleType:
    """Import a module that a person may have written.

    Args:
        subject: what the sentence is about.

    Raises:
        UserError: the import fails, for whatever reason.
    """
    try:
        return importlib.import_module(module)
    # All there is to catch: the module's own code runs here, and it may raise anything, or call sys.exit.
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        if not isinstance(error, ImportError):
            reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        raise UserError(f"{subject} cannot be imported: {reason}.") from error
