"""What all ranks agree on before each optimiser step: to stop, to skip a loss that is not finite, to save."""

import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from tdkd_dist import distributed
from tdkd_dist.config import TrainConfig
from tdkd_dist.data.crops import Ints
from tdkd_dist.files import append_text
from tdkd_dist.mistakes import Mistake


class StepGuard:
    """One agreement a step, over the control group, so that all ranks save, skip and stop together."""

    def __init__(self, config: TrainConfig, skipped_file: Path, should_stop: Callable[[], bool]) -> None:
        self._config, self._skipped_file, self._should_stop = config, skipped_file, should_stop
        self._saved = time.monotonic()
        self.skipped = self._in_a_row = 0
        self.stop = self.save = False
        self._watched: list[Callable[[], bool]] = []

    def watch(self, loss: Tensor) -> None:
        """Look at a micro-batch's loss, before its backward pass, so that `agree` need not wait for that."""
        self._watched.append(_finite_later(loss.detach()))

    def agree(self, global_step: int, samples: Callable[[], Ints]) -> bool:
        """Whether to skip the optimiser step in hand, the one after `global_step`; sets `stop` and `save`.

        It hangs on the losses watched since the last time; `samples` gives the indices they were computed from. The
        samples of the ranks whose losses are not finite are recorded. Every rank must call it. Raises `Mistake` with
        advice when too many steps in a row would be skipped.
        """
        finite = all([is_finite() for is_finite in self._watched])
        self._watched.clear()
        due = time.monotonic() - self._saved > 60 * self._config.save_every_min
        every = self._config.save_every_steps
        self.stop, skip, due = distributed.any_rank(self._should_stop(), not finite, due)
        self.save = due or (every is not None and (global_step + 1) % every == 0)
        if not skip:
            self._in_a_row = 0
            return False
        self.skipped += 1
        self._in_a_row += 1
        found = distributed.from_every_rank(None if finite else samples().tolist())
        if distributed.rank() == 0:
            row = {"global_step": global_step, "samples": {k: s for k, s in enumerate(found) if s is not None}}
            append_text(self._skipped_file, json.dumps(row) + "\n")
        if self._in_a_row > self._config.max_skipped:
            raise Mistake(
                f"the loss was not finite in {self._in_a_row} steps in a row, up to step {global_step + 1}: try a lower"
                f" optim.lr, optim.warmup_epochs or optim.clip_grad; their samples are in {self._skipped_file}"
            )
        return True

    def saved(self) -> None:
        """A checkpoint was just written."""
        self._saved = time.monotonic()


def _finite_later(loss: Tensor) -> Callable[[], bool]:
    """Answers whether `loss` is finite; on a GPU it waits for the work queued so far, not for what comes after."""
    finite = torch.isfinite(loss)
    if not finite.is_cuda:
        return lambda: bool(finite)
    here = torch.empty((), dtype=torch.bool, pin_memory=True)
    here.copy_(finite, non_blocking=True)
    computed = torch.cuda.Event()  # type: ignore[no-untyped-call]
    computed.record()

    def answer() -> bool:
        computed.synchronize()
        return bool(here)

    return answer
