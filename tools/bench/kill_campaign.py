"""Kill a run on the two-node Slurm at random moments, and see whether it ends as the unhurt one does.

    eval "$(tools/slurm_sandbox.sh up)"
    python tools/bench/kill_campaign.py WORK [--count 20] [--seed 0] [--markdown FILE]

Each of `--count` runs is hurt in every way there is, one after the other: `node` is SIGKILL of a node's slurmd, which
is started again after it was missed, `rank` of one rank, `all` of every rank. A checkpoint is saved at every step, so
many kills hit one being written. Survived means: the final weights equal the reference's, bit for bit. Goes on where
it stopped: finished runs are kept in WORK/kills.jsonl.
"""

import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from arguments import check_counts, check_outputs
from PIL import Image
from safetensors.torch import load_file

from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.sources import open_source
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.log import format_seconds
from tdkd_dist.run.reading import iter_mappings
from tdkd_dist.run.record import last_row

ROOT = Path(__file__).resolve().parent.parent.parent
KINDS = ("node", "rank", "all")
STEPS_PER_EPOCH = 3
NODES = ("tdkd-n1", "tdkd-n2")
PATIENCE_S = 600


@dataclass(frozen=True)
class Length:
    """How long a run is, and within how many steps after the last it is hurt again."""

    epochs: int
    within: int


LONG, SHORT = Length(600, 200), Length(480, 50)
"""The campaign's and CI's: 1,440 steps, of which 900 may pass in the 35 s until Slurm has missed a node's daemon."""


def main(argv: list[str]) -> int:
    """Run the campaign; the exit status: 0 all survived, 1 a run failed, 2 a user's mistake."""
    return run_tool(lambda: campaign(argv))


def campaign(argv: list[str]) -> int:
    """The campaign; the exit status. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--count", type=int, default=20, help="runs, each killed in every way")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_args(argv)
    check_counts(args, "count")
    check_outputs(args, "markdown")
    work: Path = args.work.absolute()
    data = prepare(work)
    reference = run_reference(work, data)
    record = work / "kills.jsonl"
    rows = list(iter_mappings(record))
    done = {row["run"] for row in rows}
    for number in sorted(set(range(args.count)) - done):
        began = time.monotonic()
        new = hurt_run(RunFolder(work / f"run-{number:03d}"), data, reference, random.Random(f"{args.seed} {number}"))
        new = [row | {"run": number} for row in new]
        with record.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in new)
        rows += new
        done.add(number)
        left_s = (args.count - len(done)) * (time.monotonic() - began)
        print(f"run {number}: {json.dumps(new)}; about {format_seconds(left_s)} left", flush=True)
    table = summarise(rows)
    publish(table, args.markdown)
    return 0 if all(row["survived"] for row in rows) else 1


def prepare(work: Path) -> Path:
    """The beton that all runs train on."""
    beton = work / "x.beton"
    if not beton.exists():
        write(open_source(make_tree(work)), beton)
    return beton


def make_tree(work: Path) -> Path:
    """Three classes of pictures, of `STEPS_PER_EPOCH` batches of 16."""
    rng = np.random.default_rng(0)
    for i in range(16 * STEPS_PER_EPOCH):
        path = work / "tree" / f"class{i % 3}" / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(70 * (i % 3), 70 * (i % 3) + 90, (20, 20, 3), dtype=np.uint8)).save(path)
    return work / "tree"


def start(data: Path, folder: Path, length: Length, *, saves: bool = True) -> subprocess.Popen[str]:
    """Submit the run in `folder` and follow it; it saves at every step, or after each epoch alone."""
    arguments = (
        f"recipe=fashion_sew site=sandbox data.train={data} data.val={data} data.image_size=16 student.num_classes=3"
        " student.width=16 student.num_timesteps=4 loss.alpha=0 train.batch_size=16 train.log_every=1"
        f" train.epochs={length.epochs} train.save_every_steps={1 if saves else 'null'} eval.every=50"
        f" launcher.max_restarts=9 launcher.hang_timeout_min=1 wandb.mode=disabled run.dir={folder}"
    ).split()
    command = [sys.executable, "launch/submit.py", *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def run_reference(work: Path, data: Path, length: Length = LONG) -> RunFolder:
    """The unhurt run, which needs no checkpoints. Raises `SystemExit` with what it said if it fails."""
    folder = RunFolder(work / "reference")
    process = start(data, folder.path, length, saves=False)
    output, _ = process.communicate(timeout=PATIENCE_S)
    if process.returncode != 0:
        raise SystemExit(f"the reference run failed:\n{output}")
    return folder


def hurt_run(
    folder: RunFolder, data: Path, reference: RunFolder, draw: random.Random, length: Length = LONG
) -> list[dict[str, Any]]:
    """One run that is hurt in each way, one after the other; what became of it, a row each."""
    process = start(data, folder.path, length)
    try:
        # Slurm misses a daemon only after half a minute, and until then the ranks go on: the node comes first.
        kinds = ["node", *draw.sample(["rank", "all"], 2)]
        rows = [hurt(kind, k + 1, process, folder, draw, length.within) for k, kind in enumerate(kinds)]
        process.communicate(timeout=PATIENCE_S)
        survived = process.returncode == 0 and same_weights(reference, folder)
    except (TimeoutError, subprocess.TimeoutExpired):
        subprocess.run(["scancel", "--me"], check=False)
        raise
    finally:
        process.kill()
    return [row | {"survived": survived} for row in rows]


def hurt(
    kind: str, count: int, process: subprocess.Popen[str], folder: RunFolder, draw: random.Random, within: int
) -> dict[str, Any]:
    """Hurt a run for the `count`-th time, at a random moment of its next `within` steps; what that cost."""
    wait_for_step(folder, last_step(folder) + draw.randint(1, within))
    time.sleep(draw.uniform(0, 0.2))  # anywhere within a step or a save
    before, saving = last_step(folder), bool(list(folder.checkpoints.glob("*.tmp")))
    killed = time.monotonic()
    victim = hurt_node(draw) if kind == "node" else hurt_ranks(folder, draw, kind)
    lost = wait_for_resumption(folder, process, count, before)
    took = None if lost is None else round(time.monotonic() - killed, 1)
    return {
        "kind": kind, "hurt": victim, "during_save": saving, "step": before, "steps_lost": lost,
        "seconds_to_recover": took,
    }  # fmt: skip


def hurt_ranks(folder: RunFolder, draw: random.Random, kind: str) -> int:
    """SIGKILL one rank, or all of them; how many were there."""
    commands = {p: p.info["cmdline"] or [""] for p in psutil.process_iter(["cmdline"])}
    ranks = [p for p, c in commands.items() if f"_submit {folder.jobs}" in " ".join(c) and "srun" not in c[0]]
    chosen = ranks if kind == "all" else ranks and [draw.choice(sorted(ranks, key=lambda p: p.pid))]
    for rank in chosen:
        rank.send_signal(signal.SIGKILL)
    return len(chosen)


def hurt_node(draw: random.Random) -> str:
    """SIGKILL a node's daemon, and start it again when Slurm has given up on the node."""
    node = draw.choice(NODES)
    for process in psutil.process_iter(["name", "cmdline"]):
        if process.info["name"] == "slurmd" and node in process.info["cmdline"]:
            process.kill()
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        asked = subprocess.run(["sinfo", "-h", "-n", node, "-o", "%T"], capture_output=True, text=True)
        if "down" in asked.stdout:
            break
        time.sleep(0.5)
    subprocess.run(["slurmd", "-N", node], check=True, env=os.environ | {"PATH": f"{os.environ['PATH']}:/usr/sbin"})
    return node


def wait_for_step(folder: RunFolder, step: int) -> None:
    """Until the run has recorded so many steps."""
    deadline = time.monotonic() + PATIENCE_S
    while last_step(folder) < step:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder.path} did not reach step {step} within {PATIENCE_S} s")
        time.sleep(0.1)


def wait_for_resumption(folder: RunFolder, process: subprocess.Popen[str], count: int, step: int) -> int | None:
    """Until the run resumes for the `count`-th time; how many steps it must do again, None if it ends without.

    `step` is the last one seen so far.
    """
    deadline = time.monotonic() + PATIENCE_S
    while process.poll() is None:
        if time.monotonic() > deadline:
            raise TimeoutError(f"{folder.path} did not resume within {PATIENCE_S} s")
        lines = [line for line in folder.log_file.read_text().splitlines() if line.startswith("resumed after epoch")]
        if len(lines) >= count:
            return step - int(lines[-1].rsplit(" ", 1)[1])
        step = max(step, last_step(folder))  # it may go on for a while
        time.sleep(0.2)
    return None


def last_step(folder: RunFolder) -> int:
    """The last optimiser step in the record."""
    row = last_row(folder.metrics_file)
    return row["global_step"] if row is not None else 0


def same_weights(one: RunFolder, other: RunFolder) -> bool:
    """Whether two finished runs have the same student, bit for bit."""
    ours, theirs = load_file(one.student_file), load_file(other.student_file)
    return ours.keys() == theirs.keys() and all(ours[key].equal(theirs[key]) for key in ours)


def summarise(rows: list[dict[str, Any]]) -> str:
    """The table, in Markdown."""
    lines = [
        "| fault | tried | survived | during a save | steps lost, median (most) | recovered after, median (longest) |",
        "|---|---|---|---|---|---|",
    ]
    for kind in KINDS:
        own = [row for row in rows if row["kind"] == kind]
        if not own:
            continue
        lost = [row["steps_lost"] for row in own if row["steps_lost"] is not None]
        took = [row["seconds_to_recover"] for row in own if row["seconds_to_recover"] is not None]
        cells = [
            kind,
            str(len(own)),
            str(sum(row["survived"] for row in own)),
            str(sum(row["during_save"] for row in own)),
        ]
        cells.append(f"{statistics.median(lost):.0f} ({max(lost)})" if lost else "-")
        cells.append(f"{format_seconds(statistics.median(took))} ({format_seconds(max(took))})" if took else "-")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
