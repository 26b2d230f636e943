"""What a rank does around the training: whose fault an error is, and signals as flags."""

import os
import signal
import tempfile

import pytest

from tdkd_dist.cluster import job
from tdkd_dist.cluster.follow import LogTail, _bar
from tdkd_dist.cluster.job import CACHES, Job, _SignalFlags, keep_caches_local
from tdkd_dist.config import Config
from tdkd_dist.mistakes import Mistake
from tdkd_dist.run.log import PROGRESS_PREFIX, Log
from tdkd_dist.training.checkpoint import warn_of_short_notice


def test_mistakes_are_the_users_and_all_else_is_a_crash(monkeypatch):
    """What numpy raises inside our own function is none of the user's."""

    def run_and_raise(error: Exception):
        def broken(*_: object) -> bool:
            raise error

        monkeypatch.setattr(Job, "_run", broken)
        monkeypatch.setattr(job, "_export_environment", lambda config: None)
        return Job(Config())()

    outcome = run_and_raise(Mistake("data.val=x: y"))
    assert (outcome.state, outcome.message) == ("refused", "data.val=x: y")
    with pytest.raises(ValueError, match="cannot reshape"):
        run_and_raise(ValueError("cannot reshape array of size 3 into shape (2,2)"))


def test_signals_ask_for_a_stop_and_only_usr2_for_a_requeue():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT)}
    try:
        for number, preempted in ((signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGUSR2, True)):
            flags = _SignalFlags()
            assert not flags.stop
            os.kill(os.getpid(), number)
            assert flags.stop
            assert flags.preempted == preempted
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_requeued_job_is_the_same_job():
    again = Job(Config(), "weights.safetensors")
    assert again.checkpoint().function is again


def test_compiled_code_is_kept_on_the_nodes_own_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for variable in CACHES:
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    keep_caches_local()
    (own,) = tmp_path.iterdir()
    assert own.stat().st_mode & 0o777 == 0o700
    assert os.environ.pop("TORCHINDUCTOR_CACHE_DIR") == str(own / "inductor")
    assert os.environ.pop("TORCH_EXTENSIONS_DIR") == str(own / "torch_extensions")
    assert os.environ["TRITON_CACHE_DIR"] == "mine"


def test_compiled_code_is_not_taken_from_a_folder_of_somebody_elses(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    for variable in CACHES:
        monkeypatch.delenv(variable, raising=False)
    stranger = os.getuid() + 1
    monkeypatch.setattr(os, "getuid", lambda: stranger)
    (tmp_path / f"tdkd-dist-{stranger}").mkdir()
    keep_caches_local()
    assert not set(CACHES) & set(os.environ)


def test_a_followed_log_shows_whole_new_lines_once(tmp_path, capsys):
    log = tmp_path / "log.txt"
    log.write_text("from before\n")
    tail = LogTail(log)
    with log.open("a") as stream:
        stream.write("first · line\nhalf")
    tail.show()
    assert capsys.readouterr().out == "first · line\n"
    with log.open("a") as stream:
        stream.write(" and whole\n")
    tail.show()
    tail.show()
    assert capsys.readouterr().out == "half and whole\n"


def test_on_a_terminal_progress_is_one_line_with_a_bar(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    log = tmp_path / "log.txt"
    tail = LogTail(log)
    log.write_text(f"{PROGRESS_PREFIX}5/10 of epoch 1/2\n{PROGRESS_PREFIX}10/10 of epoch 1/2\nepoch 1/2 done\n")
    tail.show()
    shown = capsys.readouterr().out
    assert shown.count("\n") == 1
    assert "[##########..........]" in shown
    assert shown.endswith("\r\x1b[Kepoch 1/2 done\n")
    assert _bar(f"{PROGRESS_PREFIX}0/7 x", 4) == "[....]"


def test_a_notice_too_short_for_a_save_is_told_in_slurm_jobs_alone(monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    assert warn_of_short_notice(100, 120) is None
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert warn_of_short_notice(60, 120) is None
    said = warn_of_short_notice(100, 120)
    assert said is not None
    assert said.startswith("warning: saving took 100 s; launcher.signal_delay_s=120 should be 300 or more")


def test_a_character_that_a_read_cuts_in_half_is_shown_whole(tmp_path, capsys):
    log = tmp_path / "log.txt"
    tail = LogTail(log)
    whole = "a · b\n".encode()
    for end in (3, len(whole)):
        log.write_bytes(whole[:end])
        tail.show()
    assert capsys.readouterr().out == "a · b\n"


@pytest.mark.parametrize("line", ["", "x/y", "5", "5/0 of", "5/ of", "7/5 of epoch 1/2", "9" * 5000 + "/1 of"])
def test_a_progress_line_of_another_form_is_a_line(tmp_path, capsys, monkeypatch, line):
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    log = tmp_path / "log.txt"
    tail = LogTail(log)
    log.write_text(f"{PROGRESS_PREFIX}{line}\nnext\n")
    tail.show()
    assert capsys.readouterr().out.endswith("next\n")


def test_a_log_commands_no_terminal(tmp_path, capsys):
    said = Log(tmp_path / "log.txt")
    said.say("\x1b[2Jrun\r\n\ud800 two")
    assert (tmp_path / "log.txt").read_text() == "\\x1b[2Jrun\\r\n\\ud800 two\n"
    (tmp_path / "log.txt").write_bytes(b"\x1b[2Jrun\xff\x9b\n")
    LogTail(tmp_path / "log.txt", from_start=True).show()
    assert capsys.readouterr().out == "\\x1b[2Jrun\ufffd\ufffd\n"
