"""Modules that are loaded when something of them is first used: pandas, scipy and torch take a second of every command
that only asks for a status, and hold memory of every process that never computes with them."""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any


class Late(ModuleType):
    """Stands for a module: `pd = Late("pandas")`, with the real import under TYPE_CHECKING.

    Any thread may be the first to use it: Python's import takes turns.
    """

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what the import system and inspection ask of every module
            raise AttributeError(name)
        value = getattr(self.load(), name)
        setattr(self, name, value)  # the next look finds it without coming here
        return value

    def load(self) -> ModuleType:
        return importlib.import_module(self.__name__)
