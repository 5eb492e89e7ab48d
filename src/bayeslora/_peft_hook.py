"""Register the methods once PEFT is imported, so that `import bayeslora` imports neither PEFT nor torch.

After `import bayeslora`, `PeftModel.from_pretrained` must know the methods. PEFT does not offer entry points, and
importing PEFT takes seconds that `bayeslora --help` must not spend. A finder on `sys.meta_path` therefore waits until
PEFT is imported, imports `bayeslora._peft`, which ends with `register_methods`, and removes itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_PEFT = "peft"


def teach_peft() -> None:
    """Register the methods now if PEFT is imported, otherwise right after its import; repeated calls do nothing."""
    if sys.modules.get(_PEFT) is not None:
        __import__("bayeslora._peft")
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def register_methods() -> None:
    """Register the methods and let PEFT read packed adapters; called at the end of `bayeslora._peft`.

    All names of `bayeslora._peft` exist by then, no matter who imported PEFT first. A package that `bayeslora.methods`
    imports must define its other names before it imports PEFT (see tests/test_import.py).
    """
    __import__("bayeslora.methods")
    sys.modules["bayeslora._peft"].read_adapters_with(_read_packed)


def _read_packed(path: str, device: str) -> Any:
    from bayeslora.export.packed.reader import read_adapter

    return read_adapter(path, device)


class _AfterPeft(MetaPathFinder):
    """Find PEFT with the other finders, and register the methods after its import; wait on if that fails."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _PEFT:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            # Keep the loader, because others ask it for sources and resources.
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ != _PEFT:
                return
            loader.exec_module = execute
            # Unlike `import_module`, this accepts a module that another thread is still importing.
            __import__("bayeslora._peft")
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = exec_module
