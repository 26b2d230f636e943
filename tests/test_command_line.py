"""What the tools' command lines share."""

import importlib
import subprocess
import sys

import pytest
from in_process import call

from tdkd_dist.command_line import MOST_TIMESTEPS, check_output, check_timesteps, run_tool
from tdkd_dist.config import StudentConfig
from tdkd_dist.mistakes import Mistake


def test_ctrl_c_is_a_line(capsys):
    def interrupted() -> None:
        raise KeyboardInterrupt

    assert run_tool(interrupted, "tool") == 130
    assert capsys.readouterr().err == "tool: interrupted\n"


def test_an_end_with_a_reason_is_a_line(capsys):
    assert run_tool(lambda: sys.exit("it broke"), "tool") == 1
    assert capsys.readouterr().err == "tool: it broke\n"


def test_who_stops_reading_is_no_crash():
    code = """
import sys
from tdkd_dist.command_line import run_tool
sys.exit(run_tool(lambda: print("\\n".join(map(str, range(100_000))))))
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 0


@pytest.mark.parametrize(
    ("name", "message"), [(".", "a folder; name a file"), ("none/x.json", "no folder .*none; create it")]
)
def test_where_nothing_can_be_written(name, message, tmp_path):
    with pytest.raises(Mistake, match=f"^--out .*: {message}$"):
        check_output(tmp_path / name, "--out")
    check_output(tmp_path / "x.json", "--out")


def test_the_tools_take_as_many_timesteps_as_the_configuration():
    for timesteps in (1, MOST_TIMESTEPS):
        check_timesteps(timesteps)
        StudentConfig(num_timesteps=timesteps)
    for timesteps in (0, MOST_TIMESTEPS + 1):
        with pytest.raises(Mistake):
            check_timesteps(timesteps)
        with pytest.raises(Mistake):
            StudentConfig(num_timesteps=timesteps)


MANY = {
    "classify": (
        "none.safetensors cat.jpg --exit none.json --timesteps 0",
        "none.safetensors, none.json, --timesteps 0",
    ),
    "calibrate_exit": (
        "none.safetensors none.beton --max-drop 1 --out none/x.json --fall 2 --workers 0",
        "none.safetensors, none.beton, --out none/x.json, --fall 2.0, --workers 0",
    ),
    "export": (
        "none.safetensors none/x.onnx --format onnx --count 1 --dt 2 --host-stem",
        "none.safetensors, DEST none/x.onnx, --count 1, --dt 2.0, --host-stem",
    ),
    "compare_runs": ("none --wandb x --figure x.txt --tsne=-1", "--wandb x, --figure x.txt, --tsne -1"),
    "write_beton": (
        "none x.beton --workers 0 --quality 0 --jpeg-share 2 --frames 0 --by size --split-by hand",
        "--workers 0, split hand, frames 0, by size, none, --jpeg-share 2.0, --quality 0",
    ),
    "import_weights": (
        "x.pth none/x.safetensors --format official decay_input=maybe neuron.knd=if num_timesteps=0",
        "DEST none/x.safetensors, decay_input=maybe, student.neuron.knd, student.num_timesteps=0",
    ),
    "plan_run": ("nodes=0 --gpus x --cores 0", "which recipe? give recipe=NAME, nodes=0, --gpus x, --cores 0"),
    "gpu_acceptance": ("--only x --seconds 0 --json none/x", "--only x, --seconds 0, --json none/x"),
}
"""Of each tool a command, and what each line of its answer is about."""


@pytest.mark.parametrize("tool", MANY)
def test_a_tool_tells_all_mistakes_at_once(tool, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command, about = MANY[tool]
    done = call(importlib.import_module(tool).main, *command.split())
    assert done.returncode == 2
    assert ", ".join(line.split(": ")[1] for line in done.stderr.splitlines()) == about
    assert not list(tmp_path.iterdir())
