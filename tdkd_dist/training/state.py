"""The parts of a run's state, as they are read from a checkpoint that somebody may have changed.

Only tensors, numbers and plain containers are stored: torch's reader for those runs no code.
"""

import pickle
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tdkd_dist.mistakes import Mistake, require


def read_state(file: Path) -> dict[str, Any]:
    """The mapping in a file that `torch.save` wrote, on the CPU: a GPU of that number need not be here.

    Raises `Mistake` if it holds anything else than tensors, numbers, texts and plain containers.
    """
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, OSError, KeyError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise Mistake(f"{file}: not of our writing, not read ({reason}); remove {file.parent}") from error
    require(isinstance(found, dict), f"{file}: holds no state of a run; remove {file.parent}")
    return found  # type: ignore[no-any-return]


@contextmanager
def understanding(checkpoint: Path) -> Iterator[None]:
    """Name the checkpoint in a `Mistake` about what is in it, and turn a missing or odd part into one."""
    try:
        yield
    except Mistake as mistake:
        raise Mistake(f"{checkpoint}: {mistake}; remove it, or give this run another run.name") from mistake
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise Mistake(
            f"{checkpoint}: no state of this run in it ({type(error).__name__}: {error}); remove it"
        ) from error


def require_same_form(found: Any, wanted: dict[str, torch.Tensor], what: str) -> None:
    """Raise `Mistake` unless `found` has tensors of the names and shapes of `wanted`."""
    require(isinstance(found, dict) and found.keys() == wanted.keys(), f"its {what} has other tensors than this run's")
    for name, tensor in wanted.items():
        fits = torch.is_tensor(found[name]) and found[name].shape == tensor.shape
        require(fits, f"its {what} has {name} in another shape than this run's")


def require_optimizer_state(found: Any, optimizer: torch.optim.Optimizer) -> None:
    """Raise `Mistake` unless `found` is the state of an optimiser such as this one: same groups, settings, sizes."""
    wanted = optimizer.state_dict()
    groups, ours = found["param_groups"], wanted["param_groups"]
    same = len(groups) == len(ours) and all(
        one.keys() == other.keys()
        and one["params"] == other["params"]
        and all(_same_type(one[k], other[k]) for k in one)
        for one, other in zip(groups, ours, strict=True)
    )
    require(same, "its optimiser has other settings than this run's")
    parameters = dict(enumerate(p for group in optimizer.param_groups for p in group["params"]))
    for number, state in found["state"].items():
        for key, value in state.items():
            fits = isinstance(value, bool | int | float) or value is None
            if torch.is_tensor(value):
                # A statistic of rows or columns (Adafactor) is smaller.
                fits = value.numel() <= max(parameters[number].numel(), 1)
            require(fits, f"its optimiser has an odd {key}")


def _same_type(one: Any, other: Any) -> bool:
    numbers = (bool, int, float)
    return type(one) is type(other) or (isinstance(one, numbers) and isinstance(other, numbers))


def generator_states() -> dict[str, Any]:
    """This process's random generators: python's, numpy's, torch's and that of its GPU."""
    name, keys, *rest = np.random.get_state()
    assert name == "MT19937"
    return {
        "python": random.getstate(),
        "numpy": [torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_generator_states(states: dict[str, Any]) -> None:
    """Put the random generators where `generator_states` found them."""
    random.setstate(states["python"])
    keys, *rest = states["numpy"]
    np.random.set_state(("MT19937", keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
