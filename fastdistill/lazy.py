"""Names that are imported when they are first asked for, so that `import fastdistill` and `--help`
do not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

PluginT = TypeVar("PluginT")


class Table(Mapping[str, PluginT], Generic[PluginT]):
    """Plug-ins of one kind by name, in a fixed order.

    Names and meanings are known at once; the file of a plug-in is imported when it is looked up.
    """

    def __init__(self, package: str, entries: Mapping[str, str | tuple[str, str]]) -> None:
        """
        Args:
            package: folder of the plug-ins, as `__name__` of its `__init__.py`.
            entries: for each name, `file:attribute` within `package`, or that and what it means in
                words.
        """
        self.package = package
        pairs = {name: (entry, "") if isinstance(entry, str) else entry for name, entry in entries.items()}
        self.places = {name: place for name, (place, _) in pairs.items()}
        self.meanings = {name: meaning for name, (_, meaning) in pairs.items()}

    def __getitem__(self, name: str) -> PluginT:
        file, _, attribute = self.places[name].partition(":")
        plugin: PluginT = getattr(importlib.import_module(f"{self.package}.{file}"), attribute)
        return plugin

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def explained(self) -> str:
        """Names with their meanings, for a help text."""
        return "; ".join(f"{name}: {meaning}" if meaning else name for name, meaning in self.meanings.items())


def lazily(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of `package` (PEP 562).

    Args:
        names: each with the module that has it or, as for `ops`, is it.
    """

    def getattribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        module = importlib.import_module(names[name])
        value = getattr(module, name, module)
        setattr(sys.modules[package], name, value)
        return value

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names})

    return getattribute, directory
