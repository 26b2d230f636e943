"""Students from outside the package: `student.model=my_package.my_module:my_factory`."""

import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from tdkd_dist.mistakes import Mistake, require


def is_outside(model: str) -> bool:
    """Whether `student.model` names a function of a module, not a registered network."""
    return ":" in model


def create(model: str, arguments: Mapping[str, Any], options: Mapping[str, Any], *, allow_import: bool) -> nn.Module:
    """What the factory makes of `arguments`, which every factory takes, and `options`, which the user chose.

    Raises `Mistake`, naming the key, if there is no such factory, or it takes no such argument. `allow_import=False`:
    also if its module is not imported yet. What the factory itself raises is raised.
    """
    factory = _find(model, allow_import=allow_import)
    function = model.partition(":")[2]
    try:
        signature = inspect.signature(factory)
    except (TypeError, ValueError) as error:
        raise Mistake(f"student.model={model}: {function} does not say what it takes") from error
    takes_any = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    for name in arguments:
        require(
            takes_any or name in signature.parameters,
            f"student.model={model}: {function} must take {', '.join(arguments)}, and has no {name}",
        )
    for name, value in options.items():
        require(
            takes_any or name in signature.parameters,
            f"student.{name.removesuffix('_rate')}={value}: {model} has no such choice, {function} takes no {name}",
        )
    try:
        signature.bind(**arguments, **options)
    except TypeError as error:
        raise Mistake(f"student.model={model}: {function} is called with its keywords alone: {error}") from error
    made = factory(**arguments, **options)
    require(
        isinstance(made, nn.Module), f"student.model={model}: {function} made a {type(made).__name__}, no nn.Module"
    )
    return made


def find_source(model: str) -> Path | None:
    """The file, or folder, of the factory's top-level module; None for what is installed, which edits don't reach."""
    _search_here()
    spec = importlib.util.find_spec(model.partition(":")[0].partition(".")[0])
    if spec is None:
        return None
    places = list(spec.submodule_search_locations or ([spec.origin] if spec.has_location and spec.origin else []))
    return next((Path(place) for place in places if "site-packages" not in Path(place).parts), None)


def _find(model: str, *, allow_import: bool) -> Callable[..., nn.Module]:
    name, _, function = model.partition(":")
    require(
        all(part.isidentifier() for part in (*name.split("."), function)),
        f"student.model={model}: must be like my_package.my_module:my_factory",
    )
    module = sys.modules.get(name)
    if module is None and not allow_import:
        raise Mistake(
            f"student.model={model}: needs the module {name}, and importing runs code: import it first, or pass"
            " allow_import=True if you trust who names it"
        )
    module = module or _import(name, model)
    factory = getattr(module, function, None)
    if not callable(factory):
        raise Mistake(f"student.model={model}: {getattr(module, '__file__', None) or name} has no function {function}")
    return factory  # type: ignore[no-any-return]


def _import(name: str, model: str) -> ModuleType:
    _search_here()
    try:
        return importlib.import_module(name)
    except (Exception, SystemExit) as error:
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing is not None and f"{name}.".startswith(f"{missing}."):
            raise Mistake(
                f"student.model={model}: no module {missing} in {Path.cwd()} nor installed; start the run in the folder"
                " that holds it"
            ) from error
        last = traceback.extract_tb(error.__traceback__)[-1]
        cause = " ".join(f"{type(error).__name__}: {error}".split())
        raise Mistake(
            f"student.model={model}: importing {name} failed: {cause} ({last.filename}:{last.lineno}); mend it there"
        ) from error


def _search_here() -> None:
    """Import from the current directory too, as `python -m` does: first, or last in a job that runs a snapshot."""
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(len(sys.path) if sys.flags.safe_path else 0, here)
