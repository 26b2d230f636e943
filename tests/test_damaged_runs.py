"""Run folders that somebody has damaged: read as far as they go, or refused in a line, and the others are shown."""

import json
import os
import platform
import shutil
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import compare_runs
import pytest
import submit
from test_report import make_run

from tdkd_dist.cluster import scheduler
from tdkd_dist.mistakes import Mistake
from tdkd_dist.run import reading
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.reading import iter_mappings, lines_from_end, read_json
from tdkd_dist.run.record import iter_rows, last_row, read_rows

FILES = ("job.json", "summary.json", "validation.json", "metrics.jsonl", "environment.json", "log.txt",
         "heartbeat/rank-00000.json", "heartbeat")  # fmt: skip
KEYS = ("cluster", "job_id", "host", "restarts", "epochs", "max_steps", "table", "figure", "exit_confidence",
        "exit_entropy", "rank", "pid", "phase", "step", "moved", "hung", "epoch", "global_step", "val/top1_t1",
        "val/samples", "val/top1_mean", "train/loss_t1", "train/step_ms", "train/images_per_s")  # fmt: skip
CONTENTS = {
    "list": b"[1]", "number": b"3", "string": b'"x"', "null": b"null", "nan": b"NaN", "empty": b"", "other keys": b"{}",
    "cut": b'{"cluster": "local", "jo', "not utf-8": b'{"epoch": "\xff\xfe"}', "nested": b"[" * 100_000,
    "wrong types": json.dumps({key: [] for key in KEYS}).encode(),
    "huge": b'{"epoch": 1, "global_step": 1' + b"0" * 5000 + b', "val/top1_t1": 1e999}',
}  # fmt: skip


def write(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


DAMAGES: dict[str, Callable[[Path], object]] = {name: write(content) for name, content in CONTENTS.items()} | {
    "folder": lambda path: path.mkdir(),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "loop": lambda path: path.symlink_to(path.name),
    "pipe": lambda path: os.mkfifo(path),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("valid"), "valid")


def of_another_seed(run: RunFolder) -> None:
    text = run.config_file.read_text()
    assert "\n  seed: 0\n" in text
    run.config_file.write_text(text.replace("\n  seed: 0\n", "\n  seed: 1\n"))


def damaged(root: Path, valid: Path, file: str, damage: Callable[[Path], object]) -> RunFolder:
    """A copy of a finished run of which one file is damaged."""
    run = RunFolder(Path(shutil.copytree(valid, root / "damaged")))
    of_another_seed(run)  # a run given twice is refused
    run.write_job("local", "999999999", run.path)
    run.log_file.write_text("  step 5/10 of epoch 1/3\n")
    run.heartbeat.mkdir()
    path = run.path / file
    path.parent.mkdir(exist_ok=True)
    if path.is_dir():
        path.rmdir()
    path.unlink(missing_ok=True)
    damage(path)
    return run


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_shown_around_or_told_in_a_line(tmp_path, capsys, valid, file, damage):
    run = damaged(tmp_path, valid, file, DAMAGES[damage])
    for main, arguments in (
        (submit.main, ["status", str(run.path), str(valid)]),
        (submit.main, ["cancel", str(run.path)]),
        (submit.main, ["logs", str(run.path)]),
        (compare_runs.main, [str(run.path), str(valid)]),
    ):
        status = main(arguments)
        said = capsys.readouterr()
        assert (status, len(said.err.splitlines())) in ((0, 0), (2, 1)), said.err
        assert all(line.isprintable() for line in (said.out + said.err).splitlines())
        if str(valid) in arguments:
            assert f"{valid}: " in said.out or "| valid" in said.out


def test_a_status_goes_on_with_the_others_and_says_which_is_damaged(tmp_path, capsys, valid):
    run = damaged(tmp_path, valid, "summary.json", DAMAGES["cut"])
    assert submit.main(["status", str(run.path), str(tmp_path / "none"), str(valid)]) == 2
    said = capsys.readouterr()
    assert said.out.startswith(f"{valid}: finished\n")
    assert said.err.splitlines() == [
        f"error: {run.summary_file}: not as a run writes it (no JSON mapping); delete it, or bring back what was there",
        f"error: {tmp_path / 'none'}: no run is here (no config.yaml)",
    ]


def test_a_comparison_goes_on_with_the_others_and_says_which_is_damaged(tmp_path, capsys, valid):
    run = damaged(tmp_path, valid, "validation.json", write(b'{"exit_confidence": {"top1": [[]]}, "exit_entropy": {}}'))
    page = tmp_path / "page.html"
    assert compare_runs.main([str(run.path), str(valid), "--html", str(page), "--tsne", "0"]) == 2
    said = capsys.readouterr()
    assert "| valid | 1 |" in said.out
    line = f"{run.validation_file}: not as a run writes it (a curve is none); delete it, or bring back what was there"
    assert said.err == f"compare_runs: {line}\n"
    assert f"left out: {line}" in page.read_text()


@pytest.mark.parametrize("job_id", ["-1", "0x1", "1 2", "--user=root", "1_2_3", "9" * 30, "١"])
def test_a_job_that_is_none_is_asked_of_nobody(tmp_path, monkeypatch, job_id):
    folder = RunFolder(tmp_path)
    for cluster in ("local", "slurm", "mars"):
        folder.write_job(cluster, job_id if cluster != "mars" else "1", tmp_path)
        with pytest.raises(Mistake, match="names no job"):
            folder.read_job()


def test_a_cluster_of_which_no_program_is_here_is_told_in_a_line(tmp_path, capsys, monkeypatch, valid):
    monkeypatch.setenv("PATH", str(tmp_path))
    run = damaged(tmp_path, valid, "validation.json", DAMAGES["empty"])
    run.write_job("slurm", "7", run.path)
    assert submit.main(["cancel", str(run.path)]) == 2
    assert capsys.readouterr().err.startswith("error: scancel cannot be run here (")


def test_another_users_process_is_told_in_a_line(monkeypatch):
    def refuse(pid: int, number: int) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "kill", refuse)
    with pytest.raises(Mistake, match="process 7 is another user's"):
        scheduler.ask_to_stop("local", "7")


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_what_one_may_not_read_is_a_mistake(tmp_path, capsys, valid):
    run = damaged(tmp_path, valid, "validation.json", DAMAGES["empty"])
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        assert submit.main(["status", str(run.path)]) == 2
        assert compare_runs.main([str(run.path)]) == 2
    finally:
        os.seteuid(0)
    assert capsys.readouterr().err.count("config.yaml: cannot be read (Permission denied)") == 2


def test_a_name_too_long_is_a_mistake(capsys):
    assert submit.main(["status", "x" * 5000]) == 2
    assert capsys.readouterr().err.endswith("cannot be read (File name too long)\n")


def test_a_mapping_has_its_keys_in_their_types(tmp_path):
    path = tmp_path / "x.json"
    assert read_json(path, a=int) is None
    path.write_text('{"a": 1, "b": null, "c": "d"}')
    assert read_json(path, a=int, b=float | None, c=str) == {"a": 1, "b": None, "c": "d"}
    with pytest.raises(Mistake, match=r"its b, d cannot be"):
        read_json(path, a=int, b=str, d=str)


@pytest.mark.parametrize("text", [b"", b"\n", b"a", b"a\n", b"\n\na\nbc\n", b"a\nbc\nd", b"abcdefghij\nk\n" * 5])
@pytest.mark.parametrize("block", [1, 2, 3, 7, 1000])
def test_lines_from_the_end_are_those_from_the_start(tmp_path, text, block):
    (tmp_path / "x").write_bytes(text)
    with (tmp_path / "x").open("rb") as stream:
        found = list(lines_from_end(stream, block))[::-1]
    assert [line for _, line in found] == text.split(b"\n")
    assert all(text[start : start + len(line)] == line for start, line in found)


def test_a_line_without_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(reading, "LONGEST_LINE", 2**16)
    row = b'{"epoch": 0, "global_step": 1}\n'
    (tmp_path / "x").write_bytes(row + b"x" * 2**24 + b"\n" + row)
    for backward in (False, True):
        tracemalloc.start()
        assert len(list(iter_mappings(tmp_path / "x", backward=backward))) == 2
        assert tracemalloc.get_traced_memory()[1] < 2**23
        tracemalloc.stop()


def test_rows_are_numbers_and_know_where_they_stand(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(
        b'{"epoch": 0, "global_step": 1, "a": 2.5, "b": "x", "c": null, "d": [1]}\n3\n{"epoch": 0.5, "global_step": 1}'
        b'\n{"epoch": true, "global_step": 1}\n{"a": 1}\n\xff\n{"epoch": 1, "global_step": 2, "a": "x"}'
        b'\n{"epoch": 1, "glo'
    )
    assert read_rows(path) == [{"epoch": 0, "global_step": 1, "a": 2.5}, {"epoch": 1, "global_step": 2}]
    assert list(iter_rows(path, backward=True)) == read_rows(path)[::-1]
    assert last_row(path, "a") == {"epoch": 0, "global_step": 1, "a": 2.5}
    assert last_row(path, "z") is None


def test_a_long_record_is_not_held(tmp_path):
    run = make_run(tmp_path, "long")
    line = json.dumps({"epoch": 1, "global_step": 1} | {f"train/loss_t{t}": 1.5 for t in range(1, 5)}) + "\n"
    with RunFolder(run).metrics_file.open("a") as stream:
        stream.write(line * 100_000)
    tracemalloc.start()
    submit.main(["status", str(run)])
    assert tracemalloc.get_traced_memory()[1] < 2**24
    compare_runs.main([str(run)])
    assert tracemalloc.get_traced_memory()[1] < 2**25
    tracemalloc.stop()


def test_the_host_of_a_job_is_this_one(tmp_path):
    folder = RunFolder(tmp_path)
    folder.write_job("local", "7", tmp_path)
    assert (folder.read_job() or {})["host"] == platform.node()
