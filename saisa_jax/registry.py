"""Components that are chosen by name: encoders, projectors, sources, tasks, families of weights.

    PROJECTORS: Registry[type[nn.Module]] = Registry("projector.kind", __name__)     the package's __init__.py

    @PROJECTORS.register("mlp")                                                      a module of that package
    class MLP(nn.Module): ...

Every module of the package is imported when a name is looked up first, so a new entry is one new file in the folder.
A script or a notebook can register its own in the same way, and so can an installed distribution that names its
modules as entry points of the package:

    [project.entry-points."saisa_jax.models.projectors"]
    gated = "my_package.gated"
"""

from __future__ import annotations

import importlib
import importlib.metadata
import pkgutil
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Generic, TypeVar

from saisa_jax.errors import UserError, did_you_mean

T = TypeVar("T")
E = TypeVar("E")


class UnknownNameError(UserError, ValueError):
    """A name under which nothing is registered; the message lists what there is."""


class ExtensionError(UserError, ImportError):
    """What an installed distribution registers cannot be imported; the message says whose it is."""


class Registry(Mapping[str, T], Generic[T]):
    """A mapping from names to what is registered under them.

    Args:
      flag: the option that chooses one, for messages.
      package: the package whose modules register themselves.
    """

    def __init__(self, flag: str, package: str) -> None:
        self.flag, self._package = flag, package
        self._entries: dict[str, T] = {}
        self._complete = False

    def register(self, name: str) -> Callable[[E], E]:
        """A decorator (or a call: `register(name)(entry)`) that makes `entry` known as `name`.

        Raises:
          ValueError: the name is taken by something else.
        """

        def add(entry: E) -> E:
            if name in self._entries and self._entries[name] is not entry:
                raise ValueError(f"{self.flag}={name!r} is registered twice: {self._entries[name]!r} and {entry!r}")
            self._entries[name] = entry  # type: ignore[assignment]
            return entry

        return add

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            self._import_all()
        if name not in self._entries:
            known = ", ".join(sorted(self._entries))
            raise UnknownNameError(f"{self.flag}={name!r} is not one of {known}{did_you_mean(name, self._entries)}")
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        self._import_all()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._import_all()
        return iter(sorted(self._entries))

    def __len__(self) -> int:
        self._import_all()
        return len(self._entries)

    def _import_all(self) -> None:
        if self._complete:
            return
        self._complete = True  # before: what is imported may look names up itself
        try:
            for module in pkgutil.iter_modules(sys.modules[self._package].__path__):
                importlib.import_module(f"{self._package}.{module.name}")
            for extension in importlib.metadata.entry_points(group=self._package):
                _load(extension)
        except BaseException:
            self._complete = False  # the next look says it again, and does not list a part as all
            raise


def _load(extension: importlib.metadata.EntryPoint) -> None:
    try:
        extension.load()
    except Exception as error:
        distribution = extension.dist.name if extension.dist else "an installed distribution"
        raise ExtensionError(
            f"{distribution} brings {extension.name} = {extension.value} to {extension.group}, and it cannot be "
            f"imported: {type(error).__name__}: {error}; mend or uninstall {distribution}"
        ) from error
