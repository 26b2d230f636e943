"""What a run records, as JSONL and on W&B. Only rank 0 writes."""

import json
import os
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tdkd_dist.config import Config, flatten
from tdkd_dist.files import append_text, cut
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.log import Log
from tdkd_dist.run.reading import is_there, iter_mappings, lines_from_end, opened, parse_mapping

NUMBERS = {int, float}


class Record:
    """`metrics.jsonl` and W&B, if this rank speaks. Trouble with W&B is told once and never stops the run."""

    def __init__(
        self,
        folder: RunFolder,
        config: Config,
        log: Log,
        *,
        wandb_id: str | None,
        global_step: int,
        validates_again: bool = False,
    ) -> None:
        self._log = log
        self._folder = folder
        self._active = log.speaks
        self._wandb: Any = None
        self._unwritten = ""
        """Rows that a full disk would not take yet."""
        self.wandb_id = wandb_id
        if self._active:
            _drop_rows_after(folder.metrics_file, global_step, validates_again=validates_again)
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
        """End the W&B run and say how to upload what was recorded offline, now or before the run was resumed."""
        if self._wandb is None:
            return
        directory = Path(self._wandb.dir).parent
        try:
            self._wandb.finish()
        except Exception:  # the upload is late, or W&B broke down: what was recorded is on the disk
            upload = shlex.join(["wandb", "sync", "--include-online", str(directory)])
            self._log.say(f"W&B did not take all of this run; to upload it: {upload}")
        offline = _find_offline(directory.parent, self._wandb.id)
        if offline:
            self._log.say(f"W&B was offline; to upload this run: {shlex.join(['wandb', 'sync', *map(str, offline)])}")
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


def _find_offline(folder: Path, wandb_id: str) -> list[Path]:
    """What was recorded of one run without W&B's server and has not been uploaded, the first part first."""
    name = re.compile(rf"offline-run-\d{{8}}_\d{{6}}-{re.escape(wandb_id)}")
    parts = sorted(path for path in folder.iterdir() if name.fullmatch(path.name) and path.is_dir())
    return [part for part in parts if not any(part.glob("*.synced"))]


def _patience_at_the_end(config: Config) -> float:
    """Seconds; on Slurm a third of the notice at most, since a preempted job must be requeued before it is over."""
    notice_s = config.launcher.signal_delay_s
    in_time = "SLURM_JOB_ID" not in os.environ or notice_s == 0
    return config.wandb.timeout_s if in_time else min(config.wandb.timeout_s, notice_s / 3)


def iter_rows(path: Path, *keys: str, backward: bool = False) -> Iterator[dict[str, Any]]:
    """The rows of a `metrics.jsonl` that have all `keys`: numbers, `epoch` and `global_step` among them.

    From its start or `backward` from its end, without holding them; what is no row or no number is left out.
    """
    for found in iter_mappings(path, "epoch", "global_step", *keys, backward=backward):
        row = found
        if not set(map(type, found.values())) <= NUMBERS:
            row = {key: value for key, value in found.items() if type(value) in NUMBERS}
        if type(row.get("epoch")) is type(row.get("global_step")) is int and all(key in row for key in keys):
            yield row


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a short `metrics.jsonl`."""
    return list(iter_rows(path))


def last_row(path: Path, *keys: str) -> dict[str, Any] | None:
    """The last row that has all `keys`; None if there is none."""
    return next(iter_rows(path, *keys, backward=True), None)


def format_table(found: dict[str, Any]) -> str:
    """Accuracy after every timestep, from what a validation found, as a text table."""
    head = f"{'timesteps':>9}  {'top-1 %':>8}  {'top-5 %':>8}  {'step t alone %':>14}  {'loss':>7}"
    lines = [head, "-" * len(head)]
    columns = zip(found["top1"], found["top5"], found["step_top1"], found["loss"], strict=True)
    for t, (top1, top5, alone, loss) in enumerate(columns, start=1):
        lines.append(f"{t:>9}  {top1:>8.2f}  {top5:>8.2f}  {alone:>14.2f}  {loss:>7.4f}")
    lines.append(f"mean over timesteps: {found['top1_mean']:.2f} % of {int(found['samples'])} images")
    return "\n".join(lines + _format_exit(found))


def _format_exit(found: dict[str, Any]) -> list[str]:
    """What stopping by the rule `eval.exit` is worth, if one was given (`exits.ExitCounts.summary`)."""
    if "exit_top1" not in found:
        return []
    shares = ", ".join(f"{share:.1f} % at {t}" for t, share in enumerate(found["exit_share"], start=1))
    lines = [
        f"stopping by the rule: {found['exit_top1']:.2f} %, {found['exit_mean_timesteps']:.2f} timesteps on average",
        f"who stops when: {shares}",
    ]
    aurocs = [f"{value:.3f} by {k.removeprefix('exit_auroc_')}" for k, value in found.items() if "exit_auroc_" in k]
    lines += [f"right answers told from wrong ones (AUROC): {', '.join(aurocs)}"] if aurocs else []
    return lines + ([f"energy: {found['exit_energy_mj']:.4g} mJ an image"] if "exit_energy_mj" in found else [])


def _drop_rows_after(path: Path, global_step: int, *, validates_again: bool) -> None:
    """Forget what a resumed run will do again, and what a crash cut short; rows are in the order of their steps.

    A checkpoint of the end of an epoch may be older than the validation there, which then comes again.
    """
    if not is_there(path):
        return
    with opened(path) as stream:
        size = keep = stream.seek(0, os.SEEK_END)
        for start, line in lines_from_end(stream):
            row = parse_mapping(line) or {}
            step = row.get("global_step")
            again = validates_again and step == global_step and any(key.startswith("val/") for key in row)
            if start + len(line) < size and isinstance(step, int) and step <= global_step and not again:
                break
            keep = start
    if keep < size:
        cut(path, keep)
