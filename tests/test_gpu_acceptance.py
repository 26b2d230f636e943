"""The acceptance run: its reduced form in full, and what it says of checks that miss, fail, die or hang."""

import json
import math
import subprocess
import sys
from pathlib import Path

import gpu_acceptance
import pytest
from acceptance.found import Found

TOOL = Path(gpu_acceptance.__file__)
CHECKS = """
import os
import time

from acceptance.found import Found


def good(scale):
    print("a library's chatter")
    found = Found({"ms": 2.0, "idle share": 0.5})
    found.at_most("ms", 3)
    found.at_most("idle share", 0.03, enforced=False)
    return found


def misses(scale):
    found = Found({"ratio": 1.2})
    found.at_most("ratio", 1.1)
    return found


def raises(scale):
    raise RuntimeError("out of | memory\\nand more")


def dies(scale):
    os.write(2, b"Segmentation fault\\n")
    os._exit(139)


def hangs(scale):
    Found({"first": 1}).tell()
    if os.fork() == 0:  # nor does a process that a check started outlive it
        time.sleep(60)
    time.sleep(60)
"""
PROGRAM = """
import sys

import gpu_acceptance

gpu_acceptance.CHECKS = {
    name: gpu_acceptance.Check(f"my_checks:{name}", 3 if name == "hangs" else 30)
    for name in ("good", "misses", "raises", "dies", "hangs")
}
gpu_acceptance.PATIENCE = 1
gpu_acceptance.make_scale = gpu_acceptance.prepare = lambda device: None
sys.exit(gpu_acceptance.main(sys.argv[1:]))
"""


def run(program: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(program), *arguments], capture_output=True, text=True, timeout=800)


def rows_of(done: subprocess.CompletedProcess[str]) -> dict[str, dict]:
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row["check"]: row for row in rows}


@pytest.fixture
def program(tmp_path, monkeypatch) -> Path:
    (tmp_path / "my_checks.py").write_text(CHECKS)
    (tmp_path / "program.py").write_text(PROGRAM)
    monkeypatch.setenv("PYTHONPATH", str(TOOL.parent))
    return tmp_path / "program.py"


def test_a_check_that_misses_fails_dies_or_hangs_leaves_the_others_and_is_told(program):
    done = run(program, "--device", "cpu", "--markdown", str(program.parent / "gpu.md"))
    rows = rows_of(done)
    assert done.returncode == 1
    assert list(rows) == ["good", "misses", "raises", "dies", "hangs"]
    assert {name: row["status"] for name, row in rows.items()} == {
        "good": "ok",
        "misses": "missed",
        "raises": "failed",
        "dies": "failed",
        "hangs": "failed",
    }
    assert rows["raises"]["error"] == "RuntimeError: out of | memory"
    assert rows["dies"]["error"] == "ended with exit status 139: Segmentation fault"
    assert rows["hangs"]["error"] == "not done after 3 s"
    assert rows["hangs"]["seconds"] < 10
    assert rows["hangs"]["figures"] == {"first": 1}
    table = (program.parent / "gpu.md").read_text()
    assert table in done.stdout
    assert "| good | ok | 0 | ms 2; idle share 0.5 |" in table
    assert "ms at most 3: met; idle share at most 0.03: missed, not enforced here |" in table
    assert "| ratio 1.2 | ratio at most 1.1: missed |" in table
    assert "| RuntimeError: out of / memory | - |" in table
    assert "| not done after 3 s; first 1 | - |" in table


def test_all_bounds_met_is_status_0_and_figures_are_written(program):
    done = run(program, "--device", "cpu", "--only", "good", "--json", str(program.parent / "gpu.json"))
    assert done.returncode == 0
    written = json.loads((program.parent / "gpu.json").read_text())
    assert written["checks"] == [rows_of(done)["good"]]
    assert "torch" in written["facts"]


def test_what_no_time_is_left_for_is_left_out(program, monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(program)])
    first, second = gpu_acceptance.run_checks(["engine", "neuron"], "cuda", seconds=0.0)
    assert first["status"] == second["status"] == "left out"
    assert first["error"] == "the time of the whole run is over"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--only", "engine,speed"], "--only speed: choose from engine, neuron"),
        (["--seconds", "0"], "--seconds 0: must be positive"),
        (["--seconds", "nan"], "--seconds nan: must be positive"),
        (["--device", "tpu"], "argument --device: invalid choice"),
        (["--markdown", "nowhere/gpu.md"], "--markdown nowhere/gpu.md: no folder nowhere"),
        (["--json", "nowhere/gpu.json"], "--json nowhere/gpu.json: no folder nowhere"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys):
    assert gpu_acceptance.main(arguments) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_what_is_no_number_meets_no_bound():
    found = Found({"infinite": math.inf, "unknown": math.nan, "text": "does not fit", "zero": 0})
    for figure in found.figures:
        found.at_most(figure, 0)
    assert [bound.ok for bound in found.bounds] == [False, False, False, True]


def test_the_idle_share_counts_overlapping_work_once():
    from acceptance.loop import idle_share

    assert idle_share([(10, 20), (15, 30), (16, 18), (40, 50)]) == pytest.approx(0.25)
    assert idle_share([]) == 1.0


def test_a_shape_that_falls_back_to_eager_is_found(monkeypatch):
    import torch
    from acceptance import loop, scale

    monkeypatch.setattr(torch.nn.Module, "compile", torch.nn.Module.compile)  # which the check replaces
    monkeypatch.setattr(loop, "compile_training", lambda net: net.compile(dynamic=False))
    torch.compiler.reset()
    with torch._dynamo.config.patch(cache_size_limit=2):
        found = loop.shapes(scale.reduced_scale())
    torch.compiler.reset()
    assert not found.ok
    assert found.figures["passes in eager"] > 0


@pytest.mark.slow
def test_the_reduced_form_is_green(tmp_path):
    done = run(TOOL, "--device", "cpu", "--markdown", str(tmp_path / "gpu.md"))
    rows = rows_of(done)
    assert list(rows) == list(gpu_acceptance.CHECKS)
    assert {name: row["status"] for name, row in rows.items()} == dict.fromkeys(gpu_acceptance.CHECKS, "ok"), rows
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} | ok |" in table for name in gpu_acceptance.CHECKS)
