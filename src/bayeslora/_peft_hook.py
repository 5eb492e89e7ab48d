"""Teach PEFT the methods as soon as PEFT is there, so that `import bayeslora` needs neither PEFT nor torch.

`import bayeslora` promises that `PeftModel.from_pretrained` knows the methods. PEFT offers no entry points for this,
and importing PEFT takes seconds that `bayeslora --help` must not spend. So a finder waits on `sys.meta_path`: once
somebody has imported PEFT, it imports `bayeslora._peft`, which ends with `register_methods`, and removes itself.
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
    """Register the methods now if PEFT is imported, otherwise right after it is; a second call changes nothing."""
    if sys.modules.get(_PEFT) is not None:
        __import__("bayeslora._peft")
    elif not any(isinstance(finder, _AfterPeft) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterPeft())


def register_methods() -> None:
    """Import what registers the methods, and let PEFT read packed adapters; `bayeslora._peft` calls it when complete.

    Whoever imports PEFT first, that module or a user, the names of `bayeslora._peft` are all there by now. A package
    that `bayeslora.methods` is built on must have its other names before it imports PEFT (tests/test_import.py tries).
    """
    __import__("bayeslora.methods")
    sys.modules["bayeslora._peft"].read_adapters_with(_read_packed)


def _read_packed(path: str, device: str) -> Any:
    from bayeslora.export.packed.reader import read_adapter

    return read_adapter(path, device)


class _AfterPeft(MetaPathFinder):
    """Finds PEFT where the other finders do, and teaches it after its import; a failed import leaves it waiting."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _PEFT:
            return None
        others = [finder for finder in sys.meta_path if finder is not self]
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            # The loader stays what it is, because others ask it for sources and resources.
            self._follow(spec.loader)
        return spec

    def _follow(self, loader: Any) -> None:
        execute = loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            if module.__name__ != _PEFT:
                return
            loader.exec_module = execute
            # Unlike `import_module`, this is content with a module that another thread is still importing.
            __import__("bayeslora._peft")
            if self in sys.meta_path:
                sys.meta_path.remove(self)

        loader.exec_module = exec_module
