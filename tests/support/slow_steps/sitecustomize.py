"""Module on PYTHONPATH of an engine: each of its steps takes CANTATA_TEST_STEP_S seconds longer, so
that a tiny model streams for as long as a large one and leaves the processor to others. Python
imports this at its start; the engine's module is changed when it is imported."""

import importlib.abc
import importlib.machinery
import os
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

_MODULE = "workers.executor.inline"
_STEP_S = float(os.environ.get("CANTATA_TEST_STEP_S", "0"))


class _Slowing(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """A loader that loads the module unchanged, then changes it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != _MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        assert spec is not None
        self._loader = spec.loader
        spec.loader = self
        return spec

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        assert self._loader is not None
        self._loader.exec_module(module)
        executor: Any = module
        execute = executor.InlineExecutor.execute

        def slowly(self: object, *step: object) -> object:
            time.sleep(_STEP_S)
            return execute(self, *step)

        executor.InlineExecutor.execute = slowly


if _STEP_S:
    sys.meta_path.insert(0, _Slowing())
