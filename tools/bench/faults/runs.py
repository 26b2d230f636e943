"""Run folders whose files hold something else, are cut, are links or folders, or belong to somebody else's program."""

import contextlib
import io
import json
import os
import random
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any
from unittest import mock

from tdkd_dist.cluster import follow, scheduler, status
from tdkd_dist.mistakes import Mistakes, printable
from tdkd_dist.recipe import load_config, to_yaml
from tdkd_dist.report import tables
from tdkd_dist.report.page import write_page
from tdkd_dist.report.runs import group_runs, load_runs
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.heartbeat import read_signs
from tdkd_dist.run.reading import parse_mapping
from tdkd_dist.run.record import last_row, read_rows

T = 4
VALUES: tuple[Any, ...] = (
    None, True, -1, 0, 10**17, 10**400, 1.5, -1e308, 1e308, 5e-324, float("nan"), float("inf"), "", "x", "\x1b[2J",
    "\u202e", "<script>alert(1)</script>", "$\\frac{$", "\ud800", "\0", "a\nb", "/dev/zero", "y" * 3000, [], [[]],
    [1, "x"], {}, {"a": [1]},
)  # fmt: skip
BYTES = (
    b"", b"\n", b"null", b"3", b"[1]", b'"x"', b"NaN", b"{}", b"{", b"\xff\xfe", b"\0" * 50, b"[" * 20_000, b"9" * 9000,
    b'{"a":' * 3000, "\u2028\x85\x1b]0;x\x07".encode(), b"x" * 3_000_000,
)  # fmt: skip


@lru_cache
def valid() -> dict[str, bytes]:
    """A finished run's files."""
    config = load_config("fashion_sew", ["run.name=run", "data.val=/nowhere/val.beton"])
    config.train.epochs = 2
    at = [{"epoch": k // 2, "global_step": k} for k in range(4)]
    trained = {f"train/{key}": 1.5 for key in ("loss", "step_ms", "images_per_s", "data_wait_share")}
    trained |= {f"train/loss_t{t}": 2.0 / t for t in range(1, T + 1)}
    curves = ("top1", "loss", "ece", "energy_mj", "firing_rate")
    validated = {f"val/{curve}_t{t}": 50.0 + t for curve in curves for t in range(1, T + 1)}
    validated |= {"val/samples": 400, "val/top1_mean": 52.5, "val/energy_mj_relu": 1.0}
    exits = {"threshold": [0.1, 0.5], "mean_timesteps": [1.2, 2.2], "top1": [50.0, 60.0]}
    rows = [a | trained for a in at] + [{"epoch": k, "global_step": 2 * k} | validated for k in (1, 2)]
    sign = {"rank": 0, "host": "here", "pid": 1, "phase": "training", "step": 3, "moved": 1e9, "hung": False}
    contents: dict[str, Any] = {
        "job.json": {"cluster": "local", "job_id": "7", "host": os.uname().nodename, "restarts": "restarts"},
        "summary.json": {"epochs": 2, "max_steps": None, "table": "t", "figure": "f"},
        "validation.json": {"exit_confidence": exits, "exit_entropy": exits, "firing_rates": {"a": [0.1, 0.2]}},
        "heartbeat/rank-00000.json": sign,
        "heartbeat/rank-00001.json": sign | {"rank": 1, "hung": True},
    }
    files = {name: json.dumps(content, indent=1).encode() for name, content in contents.items()}
    files["metrics.jsonl"] = "".join(json.dumps(row) + "\n" for row in rows).encode()
    files["log.txt"] = "begun · at noon\n  step 5/10 of epoch 1/2 · 5 images/s\nended\n".encode()
    files["config.yaml"] = to_yaml(config).encode()
    return files


def edited(draw: random.Random, text: bytes) -> bytes:
    """JSON, or lines of it, of which one value or key is another; other text with a piece replaced."""
    lines = text.split(b"\n") if not text.startswith(b"{\n") else [text]
    k = draw.randrange(len(lines))
    content = parse_mapping(lines[k])
    if content is None:
        at = draw.randrange(len(text) + 1)
        return text[:at] + draw.choice(BYTES) + text[at + draw.randrange(9) :]
    inner = draw.choice([content, *(v for v in content.values() if isinstance(v, dict))])
    key = draw.choice(list(inner) or ["x"])
    if draw.random() < 0.2:
        inner.pop(key, None)
    else:
        inner[key] = draw.choice(VALUES)
    lines[k] = json.dumps(content).encode()
    return b"\n".join(lines)


def damage(draw: random.Random, path: Path) -> None:
    """Do to one file what may happen to one."""
    for _ in range(draw.randint(1, 3)):
        path.write_bytes(edited(draw, path.read_bytes()))
    text = path.read_bytes()
    how = draw.choice(["", "", "", "cut", "replace", "append", "remove", "folder", "link", "pipe"])
    if how in ("cut", "replace", "append"):
        cut = text[: draw.randrange(len(text) + 1)]
        path.write_bytes({"cut": cut, "replace": draw.choice(BYTES), "append": text + draw.choice(BYTES)}[how])
    elif how:
        path.unlink()
    if how == "folder":
        path.mkdir()
    elif how == "link":
        path.symlink_to(draw.choice(["nowhere", path.name, "/dev/zero", ".", "/proc/self/mem"]))
    elif how == "pipe":
        os.mkfifo(path)


def make(draw: random.Random, folder: Path) -> RunFolder:
    """A run of which a few files are damaged."""
    for name, content in valid().items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    (folder / "checkpoints" / "step-old").mkdir(parents=True)
    for name in draw.sample([name for name in valid() if name != "config.yaml"], draw.randint(1, 3)):
        damage(draw, folder / name)
    if draw.random() < 0.05:
        shutil.rmtree(folder / "heartbeat")
        (folder / "heartbeat").write_bytes(b"")
    return RunFolder(folder)


def shown(action: Callable[[], object], state: str = "gone") -> None:
    """Do `action`, whose output must leave a terminal as it is; jobs are in `state`, and no process is signalled."""
    output = io.StringIO()
    refuse = mock.Mock(side_effect=AssertionError("a process would have been signalled"))
    with (
        mock.patch.object(scheduler, "standing", return_value=(state, "")),
        mock.patch.object(scheduler, "ask_to_stop"),
        mock.patch.object(os, "kill", refuse),
        contextlib.redirect_stdout(output),
    ):
        action()
    text = output.getvalue()
    assert printable(text) == text, repr(text[:300])


def status_of_a_run(draw: random.Random, folder: Path) -> None:
    """`submit.py status`."""
    run, state = make(draw, folder / "run"), draw.choice(["gone", "running", "pending"])
    shown(lambda: print(printable(status.describe_run(status.open_run(str(run.path))))), state)


def log_of_a_run(draw: random.Random, folder: Path) -> None:
    """`submit.py logs`, and what else reads along while a job runs."""
    run = make(draw, folder / "run")
    read_signs(run.heartbeat)
    shown(lambda: follow.show_log(run))


def cancel_a_run(draw: random.Random, folder: Path) -> None:
    """`submit.py cancel` of a job that is there."""
    run = make(draw, folder / "run")
    shown(lambda: print(printable(status.cancel(run))), draw.choice(["running", "pending"]))


def compare_damaged(draw: random.Random, folder: Path) -> None:
    """`compare_runs`: its reading and its tables, and the page of some, whose pictures take their time."""
    runs = [make(draw, folder / name) for name in ("one", "other")]
    read_rows(runs[0].metrics_file)
    last_row(runs[0].metrics_file, "val/top1_t1")

    def act() -> None:
        groups = group_runs(load_runs([run.path for run in runs], Mistakes())[0])
        rows = [tables.accuracy_table(groups), tables.full_range_table(groups), tables.cost_table(groups)]
        for table in [*rows, tables.runs_table(groups), tables.differences_table(groups)]:
            print(printable(tables.markdown(table)))
        if draw.random() < 0.02:
            write_page(folder / "page.html", groups, [], tsne_images=0, say=print)
            assert "<script" not in (folder / "page.html").read_text()

    shown(act)


AREAS = {
    "run-status": status_of_a_run,
    "run-logs": log_of_a_run,
    "run-cancel": cancel_a_run,
    "run-comparison": compare_damaged,
}
