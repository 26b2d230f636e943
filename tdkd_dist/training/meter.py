"""The training loop's numbers: loss terms, accuracy after every timestep, speed, memory and waiting for data.

Shapes: T timesteps, B images, K classes.
"""

import resource
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from tdkd_dist import distributed
from tdkd_dist.config import Config
from tdkd_dist.curves import flatten_curves
from tdkd_dist.data.batch import Batch
from tdkd_dist.losses import LossTerms
from tdkd_dist.metrics import ensemble_losses
from tdkd_dist.run.log import PROGRESS_PREFIX, Log, format_seconds
from tdkd_dist.run.record import Record

PROGRESS_INTERVAL_S = 5.0


class TrainMeter:
    """The training loop's numbers within an epoch: a row of the record every `train.log_every` steps, and meanwhile a
    progress line every few seconds.
    """

    def __init__(self, log: Log, record: Record, config: Config, steps_per_epoch: int) -> None:
        self._log, self._record = log, record
        self._every, self._batch_size = config.train.log_every, config.train.batch_size
        self._epochs, self._steps_per_epoch = config.train.epochs, steps_per_epoch
        self._last_line = self._first_time = time.monotonic()
        self._first_step: int | None = None
        self._num_timesteps = config.student.num_timesteps
        self._sums: Tensor | None = None
        self._reset()

    def wait_for(self, batches: Iterator[Batch]) -> Batch:
        """The next batch; the time it takes counts as waiting for data."""
        started = time.monotonic()
        batch = next(batches)
        self._waited_s += time.monotonic() - started
        return batch

    def measure(self, terms: LossTerms, logits_TBK: Tensor, labels: Tensor) -> Tensor:
        """A micro-batch's loss terms and the ensembles' losses, to be added once its step is taken; on the device."""
        values = torch.stack([term.detach() for term in terms]).double()
        # Fewer timesteps than the student's when their number is drawn at random.
        missing = self._num_timesteps - len(logits_TBK)
        ensembles_3T = torch.nn.functional.pad(ensemble_losses(logits_TBK, labels), (0, missing))
        return torch.cat([values, ensembles_3T.flatten()])

    def add(self, values: Tensor) -> None:
        """Add what `measure` found; it stays on the device until a row is due."""
        self._sums = values if self._sums is None else self._sums + values
        self._micro_batches += 1

    def step(self, epoch: int, step_in_epoch: int, global_step: int, learning_rate: float) -> None:
        """Count an optimiser step; every rank must call it."""
        self._steps += 1
        now = time.monotonic()
        if self._first_step is None:
            # The first step pays for compilation and caches: leave it out of the rate.
            self._first_step, self._first_time = step_in_epoch, now
        elif now - self._last_line >= PROGRESS_INTERVAL_S:
            rate = (step_in_epoch - self._first_step) / (now - self._first_time)
            left = format_seconds((self._steps_per_epoch - step_in_epoch) / rate)
            self._log.say(
                f"{PROGRESS_PREFIX}{step_in_epoch}/{self._steps_per_epoch} of epoch {epoch + 1}/{self._epochs} ·"
                f" {rate * self._batch_size:.0f} images/s · {left} left in it"
            )
            self._last_line = now
        if global_step % self._every == 0:
            self.flush(epoch, global_step, learning_rate)

    def flush(self, epoch: int, global_step: int, learning_rate: float) -> None:
        """Write the row of the steps since the last; every rank must call it."""
        if self._sums is None:
            return
        seconds, world, n = time.monotonic() - self._row_started, distributed.world_size(), len(LossTerms._fields)
        sums = distributed.sum_over_ranks(torch.cat([self._sums, self._sums.new_tensor([self._waited_s])])).cpu()
        terms = dict(zip(LossTerms._fields, (sums[:n] / self._micro_batches / world).tolist(), strict=True))
        row: dict[str, Any] = {"epoch": epoch, "global_step": global_step, "train/loss": terms.pop("total")}
        row |= {f"train/{name}": value for name, value in terms.items() if value or name in ("ce", "kl", "sd")}
        # Where T is drawn at random, the later timesteps may have been run by no batch.
        seen = [column for column in sums[n:-1].view(3, -1).T.tolist() if column[2]]
        curves = {"loss": [c[0] / c[2] for c in seen], "top1": [100 * c[1] / c[2] for c in seen]}
        row |= flatten_curves(curves, "train/")
        self._record.write(
            row
            | {
                "train/lr": learning_rate,
                "train/images_per_s": self._steps * self._batch_size / seconds,
                "train/step_ms": 1000 * seconds / self._steps,
                "train/peak_memory_mib": peak_memory_mib(),
                "train/data_wait_share": sums[-1].item() / world / seconds,
            }
        )
        self._reset()

    def _reset(self) -> None:
        self._sums = None
        self._micro_batches = self._steps = 0
        self._waited_s = 0.0
        self._row_started = time.monotonic()


def peak_memory_mib() -> float:
    """The most that this process has held so far: of the GPU's memory if it uses one, else of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
