"""What a report knows of runs: their records, grouped by the configuration that they share over seeds.

Shapes: S seeds, T timesteps.
"""

import json
import math
import os
import re
from array import array
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tdkd_dist.config import Config, flatten
from tdkd_dist.curves import key_at, read_curve
from tdkd_dist.data.beton.manifest import read_manifest
from tdkd_dist.mistakes import Mistake, Mistakes, printable, require
from tdkd_dist.recipe import read_config
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.reading import is_there, read_json
from tdkd_dist.run.record import NUMBERS, iter_rows

Floats = NDArray[np.float64]
NOT_COMPARED = (
    "run.",
    "launcher.",
    "wandb.",
    "data.workers",
    "data.stage_to",
    "train.log_every",
    "train.keep_",
    "eval.",
)
"""Keys in which runs of one group may differ."""
COSTS = ("step_ms", "images_per_s", "peak_memory_mib", "data_wait_share")
VALIDATED = ("val/samples", "val/top1_mean", "val/top1_t1")
"""What a row of a validation has at least."""
EXIT_KEYS = ("mean_timesteps", "top1")
"""What is drawn of an early-exit curve."""


@dataclass
class RunData:
    """One run, as far as it has come."""

    folder: Path
    config: Config
    last: dict[str, Any]
    """The row of the last validation, without what is not finite."""
    costs: dict[str, Floats]
    """`COSTS`, a value for each row of the training that has it."""
    losses: Floats
    """`[N, 1 + T]`: the step of a row of the training, and the loss after t = 1..T; nan where unknown."""
    validation: dict[str, Any] | None
    """The last validation in full."""
    finished: bool

    @property
    def state(self) -> str:
        """In a few words."""
        if self.finished:
            return f"finished, {self.last['epoch']} epochs"
        return f"still going, or ended early: {self.last['epoch']} of {self.config.train.epochs} epochs"

    def curve(self, metric: str) -> Floats:
        """A metric of the last validation, such as `top1`, after t = 1..T."""
        return np.array(read_curve(self.last, f"val/{metric}"))

    def mean_of(self, cost: str) -> float:
        """One of `COSTS` averaged over the rows after the first, which pays for compilation; nan if unknown."""
        values = self.costs[cost]
        return float(np.mean(values[1:] if len(values) > 1 else values)) if len(values) else math.nan


@dataclass
class Group:
    """Runs that differ in nothing but their seed."""

    name: str
    runs: list[RunData]

    @property
    def config(self) -> Config:
        """What its runs share."""
        return self.runs[0].config

    def curves(self, metric: str) -> Floats:
        """`[S, T]`: a metric after every timestep, a row a seed."""
        curves = [run.curve(metric) for run in self.runs]
        return np.array([c for c in curves if len(c) == len(curves[0])])

    def exit_curve(self, rule: str, key: str) -> Floats | None:
        """`[G]`: the early-exit curve's `key` over its thresholds, averaged over seeds; None if not recorded."""
        found = [run.validation[f"exit_{rule}"].get(key) for run in self.runs if run.validation]
        alike = all(f is not None and len(f) == len(found[0]) for f in found)
        return np.mean(found, axis=0) if found and alike else None


def load_runs(folders: list[Path], broken: Mistakes | None = None) -> tuple[list[RunData], list[str]]:
    """The runs in these folders, and a line for each that holds nothing to compare yet.

    Those that are no run or damaged are gathered in `broken` and left out. Raises `Mistake` with them if it isn't
    given, or if no run is left.
    """
    runs, left_out, found = [], [], broken if broken is not None else Mistakes()
    for path in folders:
        with found.gathered():
            run = _load(RunFolder(path))
            if run is not None:
                runs.append(run)
            else:
                left_out.append(f"{path}: left out, it has not been validated yet")
    if not runs or broken is None:
        found.tell()
    require(bool(runs), "none of these runs has been validated yet: nothing to compare")
    return runs, left_out


def check_comparable(runs: list[RunData]) -> None:
    """Raise `Mistake` naming two runs that were validated on other data."""
    first = runs[0]
    for run in runs[1:]:
        if _data(run) != _data(first):
            raise Mistake(
                f"{run.folder} was validated on {run.config.data.val} ({int(run.last['val/samples'])} images) and"
                f" {first.folder} on {first.config.data.val} ({int(first.last['val/samples'])} images):"
                " they cannot be compared"
            )


def group_runs(runs: list[RunData]) -> list[Group]:
    """Runs that share a configuration but for their seed, in the order given."""
    groups: dict[str, list[RunData]] = defaultdict(list)
    for run in runs:
        groups[json.dumps(_compared(run.config), default=str, sort_keys=True)].append(run)
    for members in groups.values():
        first: dict[int, RunData] = {}
        for run in members:
            twin = first.setdefault(run.config.run.seed, run)
            require(
                twin is run,
                f"{run.folder} and {twin.folder} are the same run, of seed {run.config.run.seed}: give one of them",
            )
    found = [Group(_name_of(members), members) for members in groups.values()]
    names = [group.name for group in found]
    for group in found:
        if names.count(group.name) > 1:
            group.name += f" ({group.runs[0].folder.name})"
    return found


def differences(groups: list[Group]) -> dict[str, list[Any]]:
    """The keys in which the groups differ, with each group's value."""
    flats = [_compared(group.config) for group in groups]
    return {key: [flat[key] for flat in flats] for key in flats[0] if len({str(flat[key]) for flat in flats}) > 1}


@dataclass
class PairedDifference:
    """A group's top-1 minus another's at one timestep, seed by seed, in percentage points."""

    mean: float
    standard_error: float
    low: float
    """Of the 95 % confidence interval (Student's t)."""
    high: float
    seeds: int

    @property
    def resolved(self) -> bool:
        """Whether it is two standard errors or more from 0, and its interval (wider for few seeds) leaves 0 out."""
        return self.seeds > 1 and abs(self.mean) >= 2 * self.standard_error and not self.low <= 0 <= self.high


def paired_differences(group: Group, reference: Group) -> list[PairedDifference]:
    """After t = 1..T, over the seeds that both have; empty if there is none."""
    ours, theirs = ({run.config.run.seed: run.curve("top1") for run in g.runs} for g in (group, reference))
    return paired(ours, theirs)


def paired(ours: Mapping[int, Floats], theirs: Mapping[int, Floats]) -> list[PairedDifference]:
    """The same of curves of top-1 by seed."""
    from scipy.stats import t as student

    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds:
        return []
    T = min(len(c) for c in [*ours.values(), *theirs.values()])
    found = []
    for gaps_S in np.array([ours[s][:T] - theirs[s][:T] for s in seeds]).T:
        n, mean = len(seeds), float(gaps_S.mean())
        error = float(gaps_S.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
        half = float(student.ppf(0.975, n - 1)) * error if n > 1 else math.nan
        found.append(PairedDifference(mean, error, mean - half, mean + half, n))
    return found


def spread(values_S: Floats) -> float:
    """Standard deviation over seeds; nan for one."""
    return float(values_S.std(ddof=1)) if len(values_S) > 1 else math.nan


def _load(folder: RunFolder) -> RunData | None:
    """One run; None if it has not been validated yet. Raises `Mistake` if it is no run, or damaged."""
    require(is_there(folder.config_file), f"{folder.path}: no run is here (no config.yaml)")
    config = read_config(folder.config_file)
    loss_keys = [key_at("train/loss", t) for t in range(1, config.student.num_timesteps + 1)]
    costs = {f"train/{name}": array("d") for name in COSTS}
    losses, last = array("d"), {}
    for row in iter_rows(folder.metrics_file):
        if VALIDATED[0] in row and all(math.isfinite(row.get(key, math.nan)) for key in VALIDATED):
            last = row
        for key, values in costs.items():
            if key in row:
                values.append(row[key])
        if loss_keys[0] in row:
            losses.append(row["global_step"])
            losses.extend([row.get(key, math.nan) for key in loss_keys])
    if not last:
        return None
    return RunData(
        folder.path,
        config,
        {key: value for key, value in last.items() if math.isfinite(value)},
        {name: np.array(costs[f"train/{name}"]) for name in COSTS},
        np.array(losses).reshape(-1, 1 + len(loss_keys)),
        _read_validation(folder.validation_file),
        folder.read_summary(config) is not None,
    )


def _read_validation(path: Path) -> dict[str, Any] | None:
    """The last validation in full, None if there was none. Raises `Mistake` if what is drawn of it is damaged."""
    found = read_json(path, exit_confidence=dict, exit_entropy=dict, firing_rates=dict | None)
    if found is None:
        return None
    curves = [found[rule].get(key, [0]) for rule in ("exit_confidence", "exit_entropy") for key in EXIT_KEYS]
    drawn = [*curves, *(found.get("firing_rates") or {}).values()]
    is_good = all(isinstance(values, list) and values and set(map(type, values)) <= NUMBERS for values in drawn)
    require(is_good, f"{path}: not as a run writes it (a curve is none); delete it, or bring back what was there")
    return found


def _compared(config: Config) -> dict[str, Any]:
    return {key: value for key, value in flatten(config).items() if not key.startswith(NOT_COMPARED)}


def _name_of(runs: list[RunData]) -> str:
    """What the runs' names have in common at their start, without a trailing seed."""
    names = [run.config.run.name for run in runs]
    same = [len(set(letters)) == 1 for letters in zip(*names, strict=False)]
    common = names[0][: [*same, False].index(False)] if len(names) > 1 else re.sub(r"[-_ .]seed\d+$", "", names[0])
    return printable(common.removesuffix("seed").rstrip("-_ .") or names[0])


def _data(run: RunData) -> tuple[Any, ...]:
    path = run.config.data.val or ""
    try:
        manifest = read_manifest(path)
    except ValueError:  # a `Mistake`, or a path that no file can have
        manifest = None
    where = manifest.tables_sha256 if manifest else os.path.realpath(path)
    return where, run.last["val/samples"], run.config.student.num_classes
