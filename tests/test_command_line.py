"""What the tools' command lines share."""

import subprocess
import sys

import pytest

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
