"""Names that are imported when they are first asked for, so that ``import fastdistill`` and ``--help`` do not wait for torch."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Generic, TypeVar

PluginT = TypeVar("PluginT")


class Table(Mapping[str, PluginT], Generic[PluginT]):
    """Plug-ins of one kind by name, in a fixed order. Names are known at once; a plug-in's file is imported when it is looked up."""

    def __init__(self, package: str, places: Mapping[str, str]) -> None:
        """
        Args:
            package: the folder of the plug-ins, as ``__name__`` of its ``__init__.py``.
            places: for each name, ``file:attribute`` within ``package``.
        """
        self.package, self.places = package, dict(places)

    def __getitem__(self, name: str) -> PluginT:
        file, _, attribute = self.places[name].partition(":")
        plugin: PluginT = getattr(importlib.import_module(f"{self.package}.{file}"), attribute)
        return plugin

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)


def lazily(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """``__getattr__`` and ``__dir__`` of ``package`` (PEP 562) for ``names``, each with the module that has it or, as ``ops``, is it."""

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
