"""Train spiking neural networks by temporal-wise logit distillation. Importing it registers the students with timm."""

import importlib
import importlib.util
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


class _WithTimm(MetaPathFinder):
    """Registers the students when timm is imported, which takes ten seconds that a status line can do without."""

    _asking = False

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """timm's own spec, with the registration after it; None for other modules."""
        if fullname != "timm" or self._asking:
            return None
        self._asking = True
        try:
            spec = importlib.util.find_spec("timm")
        finally:
            self._asking = False
        if spec is None or spec.loader is None:
            return spec
        load = spec.loader.exec_module

        def load_and_register(module: ModuleType) -> None:
            load(module)
            importlib.import_module("tdkd_dist.students")

        spec.loader.exec_module = load_and_register  # type: ignore[method-assign]
        return spec


def __getattr__(name: str) -> ModuleType:
    if name not in ("anytime", "losses", "neurons", "students", "weights"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(f"tdkd_dist.{name}")


if "timm" in sys.modules:
    importlib.import_module("tdkd_dist.students")
else:
    sys.meta_path.insert(0, _WithTimm())
