"""What a checkpoint costs: its size, the time to write and to read it, and the share of training that saving takes.

    python tools/bench/checkpoint.py [--student sew_resnet34 ...] [--folder DIR] [--rounds 5] [--markdown FILE]

One rank, fp32, SGD with momentum and a moving average of the weights. `--folder` is the file system to measure. The
peer is a bare `torch.save` of as many tensors, measured in the same run. Neither waits for the disk itself: a
checkpoint that a power cut spoils is found by its checksums.
"""

import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from arguments import check_counts, check_outputs

from tdkd_dist import distributed
from tdkd_dist.command_line import Parser, publish, run_tool
from tdkd_dist.config import Config, StudentConfig, TrainConfig
from tdkd_dist.mistakes import require
from tdkd_dist.run.progress import Progress, list_checkpoints
from tdkd_dist.students import create_student, spiking_names
from tdkd_dist.training import checkpoint
from tdkd_dist.training.engine import Engine

STUDENTS = ["sew_resnet18", "sew_resnet34", "sew_resnet101"]


def main(argv: list[str]) -> int:
    """Measure; the exit status: 0 done, 2 a user's mistake, told in one line."""
    return run_tool(lambda: compare(argv))


def compare(argv: list[str]) -> None:
    """Measure, and print the table. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("--student", nargs="+", choices=spiking_names(), metavar="STUDENT", default=STUDENTS)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--markdown", type=Path, help="append the table to this file")
    args = parser.parse_args(argv)
    require(args.folder.is_dir(), f"--folder {args.folder}: no such folder")
    check_counts(args, "rounds")
    check_outputs(args, "markdown")
    lines = [
        f"One rank, {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__};"
        f" median of {args.rounds} rounds (least to most).",
        "",
        "| student | size | bare torch.save | our save | ratio | restore | of 30 minutes |",
        "|---|---|---|---|---|---|---|",
    ]
    distributed.start_here(0, 1, distributed.free_port(), torch.device("cpu"))
    lines += [measure(name, args.folder, args.rounds) for name in args.student]
    distributed.stop()
    publish("\n".join(lines), args.markdown)


def measure(name: str, folder: Path, rounds: int) -> str:
    """A row of the table."""
    config = Config(student=StudentConfig(model=name), train=TrainConfig(batch_size=1, ema_decay=0.999))
    student = create_student(config.student)
    engine = Engine(student, config, device=torch.device("cpu"), steps_per_epoch=10, compiled=False)
    engine.backward(engine.forward(torch.rand(1, 3, 64, 64)).square().mean())
    engine.update()  # so that there is momentum to save
    saves, restores, bares = [], [], []
    with tempfile.TemporaryDirectory(dir=folder) as path:
        here, bare = Path(path), Path(path) / "bare.pt"
        for k in range(1, rounds + 1):
            bares.append(seconds(lambda: save_bare(engine, bare)))
            progress = Progress(global_step=k)
            saves.append(seconds(lambda: checkpoint.save(here, engine, progress, keep=2, best=False, say=print)))  # noqa: B023
            restores.append(seconds(lambda: checkpoint.restore(here, engine, print)))
        newest = list_checkpoints(here)[0]
        size = sum(f.stat().st_size for f in newest.rglob("*") if f.is_file())
    ratio = statistics.median(save / bare for save, bare in zip(saves, bares, strict=True))
    share = statistics.median(saves) / (30 * 60)
    cells = [name, f"{size / 1e6:.0f} MB", show(bares), show(saves), f"{ratio:.2f}", show(restores), f"{share:.2%}"]
    return f"| {' | '.join(cells)} |"


def save_bare(engine: Engine, path: Path) -> None:
    """As many tensors as the engine's state, in the plainest way."""
    networks = [engine.student.state_dict(), engine.deployed.state_dict()]
    momenta = [torch.zeros_like(p) for p in engine.student.parameters()]
    torch.save([networks, momenta], path)


def seconds(action: Callable[[], object]) -> float:
    """How long `action` takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def show(values: list[float]) -> str:
    """Median and range of seconds."""
    return f"{statistics.median(values):.2f} s ({min(values):.2f} to {max(values):.2f})"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
