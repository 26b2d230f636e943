"""What a run says and records: the log, the JSONL record and W&B. Only rank 0 speaks."""

import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tdkd_dist import distributed
from tdkd_dist.config import Config, flatten
from tdkd_dist.data.batch import Batch
from tdkd_dist.losses import LossTerms
from tdkd_dist.metrics import ensemble_losses
from tdkd_dist.run_folder import RunFolder, append_text

PROGRESS_PREFIX = "  step "
"""How progress lines start; a follower on a terminal shows them as one line that changes."""
PROGRESS_INTERVAL_S = 5.0


class Log:
    """`say` appends lines to the run's log on rank 0 and is silent on the others."""

    def __init__(self, path: Path) -> None:
        self._path = path if distributed.rank() == 0 else None

    def say(self, text: str) -> None:
        """Append one or more lines."""
        if self._path is not None:
            append_text(self._path, text.rstrip("\n") + "\n")

    def take_over_logging(self) -> None:
        """Make the package's own `logging` messages, from INFO on, lines of this log; and Dynamo's one that counts."""
        logger = logging.getLogger("tdkd_dist")
        logger.handlers = [_SayHandler(self)]
        logger.setLevel(logging.INFO)
        logger.propagate = False
        dynamo = logging.getLogger("torch._dynamo.convert_frame")
        dynamo.handlers = [h for h in dynamo.handlers if not isinstance(h, _FallBackHandler)] + [_FallBackHandler(self)]


class _SayHandler(logging.Handler):
    def __init__(self, log: Log) -> None:
        super().__init__()
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        self._log.say(record.getMessage())


class _FallBackHandler(_SayHandler):
    """Says once that a network runs uncompiled: Dynamo gives up on its own, and training would just be slower."""

    def emit(self, record: logging.LogRecord) -> None:
        if "torch._dynamo hit config" in record.msg:
            self._log.say(
                "warning: compiled for as many image sizes, batch sizes and numbers of timesteps as allowed; what comes"
                " now runs uncompiled, at less than full speed (compilation.VERSIONS is the limit)"
            )
            logging.getLogger("torch._dynamo.convert_frame").removeHandler(self)


class TrainMeter:
    """The training loop's numbers within an epoch: a row of the record every `train.log_every` steps, and meanwhile a
    progress line every few seconds.
    """

    def __init__(self, log: Log, record: "Record", config: Config, steps_per_epoch: int) -> None:
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
        for t, (loss, correct, samples) in enumerate(sums[n:-1].view(3, -1).T.tolist(), start=1):
            if samples:
                row |= {f"train/loss_t{t}": loss / samples, f"train/top1_t{t}": 100 * correct / samples}
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


class Record:
    """`metrics.jsonl` and W&B, written by rank 0. Trouble with W&B is reported once and never stops the run."""

    def __init__(self, folder: RunFolder, config: Config, log: Log, *, wandb_id: str | None, global_step: int) -> None:
        self._log = log
        self._folder = folder
        self._active = distributed.rank() == 0
        self._wandb: Any = None
        self._unwritten = ""
        """Rows that a full disk would not take yet."""
        self.wandb_id = wandb_id
        if self._active:
            _drop_rows_after(folder.metrics_file, global_step)
            self._start_wandb(config)

    def write(self, row: dict[str, Any]) -> None:
        """Append a row, which holds `epoch` and `global_step`, to the record and to W&B."""
        if not self._active:
            return
        self._unwritten += json.dumps(row) + "\n"
        if append_text(self._folder.metrics_file, self._unwritten):
            self._unwritten = ""
        self._send(lambda run: run.log(row))

    def write_curve(self, top1: list[float]) -> None:
        """Send accuracy against timestep (per cent, t = 1..T) to W&B as a table and a line plot."""

        def send(run: Any) -> None:
            import wandb

            table = wandb.Table(columns=["timestep", "top1"], data=[[t, v] for t, v in enumerate(top1, start=1)])
            run.log(
                {
                    "full_range/table": table,
                    "full_range/curve": wandb.plot.line(table, "timestep", "top1", title="Top-1 after t timesteps"),
                }
            )

        self._send(send)

    def close(self) -> None:
        """End the W&B run and, if it was offline, say how to upload it."""
        if self._wandb is None:
            return
        offline, directory = self._wandb.offline, Path(self._wandb.dir).parent
        try:
            self._wandb.finish()
        except Exception:  # the upload is late, or W&B broke down: what was recorded is on the disk
            self._log.say(f"W&B did not take all of this run; to upload it: wandb sync --include-online {directory}")
        if offline:
            self._log.say(f"W&B was offline; to upload this run: wandb sync {directory}")
        self._wandb = None

    def _start_wandb(self, config: Config) -> None:
        if config.wandb.mode == "disabled":
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            mode: str = config.wandb.mode
            if mode == "auto":
                logged_in = "online" if wandb.login(prompt=False, verify=False) else "offline"
                mode = os.environ.get("WANDB_MODE", logged_in)
            self._wandb = self._init_wandb(wandb, config, mode)
            self.wandb_id = self._wandb.id
            self._wandb.define_metric("epoch")
            self._wandb.define_metric("global_step")
            self._wandb.define_metric("train/*", step_metric="global_step")
            self._wandb.define_metric("val/*", step_metric="epoch")
        except Exception as error:
            self._log.say(f"W&B is off: {type(error).__name__}: {error}")

    def _init_wandb(self, wandb: Any, config: Config, mode: str) -> Any:
        arguments = {
            "project": config.wandb.project,
            "entity": config.wandb.entity,
            "name": config.run.name,
            "id": self.wandb_id,
            "resume": "allow" if self.wandb_id else None,
            "dir": str(self._folder.path),
            "config": flatten(config),
            "settings": wandb.Settings(
                init_timeout=config.wandb.timeout_s,
                finish_timeout=_patience_at_the_end(config),
                finish_timeout_raises=True,
            ),
        }
        try:
            return wandb.init(mode=mode, **arguments)
        except Exception as error:
            if mode != "online":
                raise
            self._log.say(f"W&B could not be reached ({type(error).__name__}); recording offline")
            return wandb.init(mode="offline", **arguments)

    def _send(self, action: Callable[[Any], None]) -> None:
        if self._wandb is None:
            return
        try:
            action(self._wandb)
        except Exception as error:
            self._log.say(f"W&B stopped: {type(error).__name__}: {error}; the JSONL record goes on")
            self._wandb = None


def _patience_at_the_end(config: Config) -> float:
    """Seconds; on Slurm a third of the notice at most, since a preempted job must be requeued before it is over."""
    notice_s = config.launcher.signal_delay_s
    in_time = "SLURM_JOB_ID" not in os.environ or notice_s == 0
    return config.wandb.timeout_s if in_time else min(config.wandb.timeout_s, notice_s / 3)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`; a last line that a crash cut short is left out."""
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def peak_memory_mib() -> float:
    """The most that this process has held so far: of the GPU's memory if it uses one, else of the machine's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


def format_seconds(seconds: float) -> str:
    """`1 h 02 min`, `3 min 05 s` or `12 s`."""
    if not math.isfinite(seconds):
        return "?"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    if hours:
        return f"{hours} h {m:02d} min"
    return f"{m} min {s:02d} s" if m else f"{s} s"


def format_table(row: dict[str, float], num_timesteps: int) -> str:
    """Accuracy after every timestep, from a validation row, as a text table."""
    head = f"{'timesteps':>9}  {'top-1 %':>8}  {'top-5 %':>8}  {'step t alone %':>14}  {'loss':>7}"
    lines = [head, "-" * len(head)]
    for t in range(1, num_timesteps + 1):
        lines.append(
            f"{t:>9}  {row[f'val/top1_t{t}']:>8.2f}  {row[f'val/top5_t{t}']:>8.2f}"
            f"  {row[f'val/step_top1_t{t}']:>14.2f}  {row[f'val/loss_t{t}']:>7.4f}"
        )
    lines.append(f"mean over timesteps: {row['val/top1_mean']:.2f} % of {int(row['val/samples'])} images")
    return "\n".join(lines)


def _drop_rows_after(path: Path, global_step: int) -> None:
    """Forget what a resumed run will do again."""
    rows = read_rows(path)
    kept = [row for row in rows if row.get("global_step", 0) <= global_step]
    if len(kept) < len(rows):
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
        temporary.replace(path)
