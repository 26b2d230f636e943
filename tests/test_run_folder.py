"""What a run leaves on disk: its folder, its record, its summary."""

import json
import logging
import shlex
import shutil
from dataclasses import asdict
from pathlib import Path

import pytest

from tdkd_dist.files import append_text, write_json
from tdkd_dist.mistakes import Mistake
from tdkd_dist.recipe import load_config
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.log import Log, format_seconds
from tdkd_dist.run.progress import Progress, newest_progress, write_progress
from tdkd_dist.run.record import Record, format_table, read_rows


@pytest.fixture
def config():
    return load_config("fashion_sew", ["wandb.mode=disabled"])


def test_the_same_run_may_come_again_longer_or_elsewhere(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    config.train.epochs, config.launcher.tasks_per_node, config.train.max_steps = 9, 1, 7
    folder.create(config)
    environment = json.loads((folder.path / "environment.json").read_text())
    assert environment["versions"]["torch"]
    assert environment["cpus"] >= 1


def test_another_run_is_refused_by_its_keys(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    folder.metrics_file.write_text("{}\n")
    before = folder.config_file.read_text()
    config.loss.alpha, config.student.neuron.decay = 0.3, 0.9
    with pytest.raises(ValueError, match=r"student\.neuron\.decay \(0\.5 there, 0\.9 now\), loss\.alpha \(0\.2 there"):
        folder.create(config)
    assert folder.config_file.read_text() == before
    folder.metrics_file.unlink()  # it stopped at a mistake in the job before it came to anything
    folder.create(config)
    assert folder.config_file.read_text() != before


def saved(folder, name="step-00000007", **where):
    """A checkpoint that says where the run stands."""
    newest = folder.checkpoints / name
    newest.mkdir(parents=True, exist_ok=True)
    write_progress(newest, Progress(**where), 2)


def test_an_evaluation_leaves_a_trainings_record_alone_and_the_other_way_round(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    config.student.checkpoint = "x.safetensors"
    folder.create(config)
    write_json(folder.summary_file, {"epochs": 5})
    before = {p: p.read_bytes() for p in folder.path.iterdir() if p.is_file()}
    config.train.epochs = 0
    with pytest.raises(Mistake, match=r"run holds a training, whose record an evaluation .*: set run\.name=run-eval$"):
        folder.create(config)
    assert before == {p: p.read_bytes() for p in folder.path.iterdir() if p.is_file()}
    other = RunFolder(tmp_path / "other")
    other.create(config)
    other.metrics_file.write_text("{}\n")
    config.train.epochs = 3
    with pytest.raises(Mistake, match=r"holds an evaluation, whose record a training .* set run\.name=other-train$"):
        other.create(config)


def test_less_than_what_was_done_is_refused(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    saved(folder, epoch=4, global_step=40)
    config.train.epochs = 4
    folder.create(config)
    config.train.epochs = 3
    with pytest.raises(Mistake, match=r"has gone 4 epochs, 40 steps, more than now .*\(train\.epochs=3"):
        folder.create(config)
    config.train.epochs, config.train.max_steps = 9, 30
    with pytest.raises(Mistake, match=r"train\.max_steps=30\): ask for as many"):
        folder.create(config)


def test_checkpoints_of_the_form_that_could_run_code_are_refused_before_submission(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    saved(folder)
    write_json(folder.checkpoints / "step-00000007" / "progress.json", asdict(Progress()))
    with pytest.raises(Mistake, match="written by an older tdkd-dist, in a form that could run code"):
        folder.check(config)


def test_a_damaged_newest_checkpoint_is_passed_over_as_in_restoring(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    saved(folder, epoch=1, global_step=7)
    saved(folder, "step-00000009", epoch=2, global_step=9)
    found = newest_progress(folder.checkpoints)
    assert found is not None
    assert found.global_step == 9
    damaged = folder.checkpoints / "step-00000009" / "progress.json"
    damaged.write_text(damaged.read_text()[:-9])
    found = newest_progress(folder.checkpoints)
    assert found is not None
    assert found.global_step == 7
    folder.check(config)
    (folder.checkpoints / "step-00000007" / "progress.json").write_text("{}")
    with pytest.raises(Mistake, match=r"step-00000009: its progress\.json is none of this version"):
        folder.check(config)


def test_other_data_is_refused_or_said_in_the_record(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    folder.create(config, {"train": "a" * 64, "val": "b" * 64})
    folder.create(config, {"train": "c" * 64, "val": "b" * 64})  # nothing was trained yet
    saved(folder, epoch=1, global_step=7)
    folder.create(config, {"train": "c" * 64, "val": "b" * 64})
    config.data.train = "other"
    with pytest.raises(Mistake):
        folder.create(config, {"train": "c" * 64, "val": "b" * 64})
    config.data.train = load_config("fashion_sew", []).data.train
    with pytest.raises(Mistake, match=r"^data\.train=\S+: \S+/run was trained on other data \(signature cccc.* dddd"):
        folder.create(config, {"train": "d" * 64, "val": "b" * 64})
    config.run.allow_other_data = True
    for _ in range(2):
        folder.create(config, {"train": "d" * 64, "val": "b" * 64})
    (note,) = folder.notes_at(7)
    assert note == f"data.train={config.data.train}: other data from here on"
    assert folder.notes_at(8) == []


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, config):
    (tmp_path / "thesis.tex").write_text("")
    with pytest.raises(Mistake, match=r"run\.dir=.*: holds thesis\.tex, which is no run's"):
        RunFolder(tmp_path).create(config)
    with pytest.raises(Mistake, match=r"thesis\.tex: a file, not a folder"):
        RunFolder(tmp_path / "thesis.tex").create(config)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]
    (tmp_path / "run" / "submitit").mkdir(parents=True)
    RunFolder(tmp_path / "run").create(config)


def test_a_folder_that_cannot_be_written_is_named(tmp_path, config):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"run\.dir=.*file/run: cannot be written"):
        RunFolder(tmp_path / "file" / "run").create(config)


def test_only_the_full_length_counts_as_finished(tmp_path, config):
    folder = RunFolder(tmp_path)
    assert folder.read_summary(config) is None
    write_json(folder.summary_file, {"epochs": config.train.epochs, "max_steps": None, "table": "", "figure": ""})
    assert folder.read_summary(config) is not None
    config.train.epochs += 1
    assert folder.read_summary(config) is None


def test_the_record_forgets_what_a_resumed_run_does_again(tmp_path, config):
    folder = RunFolder(tmp_path)
    record = Record(folder, config, Log(folder.log_file), wandb_id=None, global_step=-1)
    for step in (0, 10, 20, 30):
        record.write({"epoch": 0, "global_step": step})
    with folder.metrics_file.open("a") as stream:
        stream.write('{"epoch": 0, "glo')  # what a crash leaves
    resumed = Record(folder, config, Log(folder.log_file), wandb_id=None, global_step=20)
    resumed.write({"epoch": 1, "global_step": 25})
    assert [row["global_step"] for row in read_rows(folder.metrics_file)] == [0, 10, 20, 25]
    assert all(json.loads(line) for line in folder.metrics_file.read_text().splitlines())


def test_a_validation_that_comes_again_is_recorded_once(tmp_path, config):
    """Told to stop at an epoch's last step a run saves first: what it then validates may be lost to a kill."""
    folder = RunFolder(tmp_path)
    record = Record(folder, config, Log(folder.log_file), wandb_id=None, global_step=-1)
    rows = [{"epoch": 0, "global_step": 10, "train/loss": 1.0}, {"epoch": 1, "global_step": 10, "val/top1_t1": 50.0}]
    for row in rows:
        record.write(row)
    Record(folder, config, Log(folder.log_file), wandb_id=None, global_step=10)
    assert list(read_rows(folder.metrics_file)) == rows
    Record(folder, config, Log(folder.log_file), wandb_id=None, global_step=10, validates_again=True)
    assert list(read_rows(folder.metrics_file)) == rows[:1]


@pytest.mark.parametrize("left", ['{"epoch": 0, "glo', '{"epoch": 0, "global_step": 2}', "[1]\n\udcff\n", ""])
def test_what_a_crash_cut_short_does_not_swallow_the_next_row(tmp_path, config, left):
    folder = RunFolder(tmp_path)
    folder.metrics_file.write_text('{"epoch": 0, "global_step": 1}\n' + left, errors="surrogateescape")
    record = Record(folder, config, Log(folder.log_file), wandb_id=None, global_step=5)
    record.write({"epoch": 0, "global_step": 6})
    assert [row["global_step"] for row in read_rows(folder.metrics_file)] == [1, 6]


def test_a_record_that_is_a_link_is_not_cut(tmp_path, config):
    victim, folder = tmp_path / "victim", RunFolder(tmp_path)
    victim.write_text("precious\n")
    folder.metrics_file.symlink_to(victim)
    with pytest.raises(Mistake, match="a symbolic link"):
        Record(folder, config, Log(folder.log_file), wandb_id=None, global_step=-1)
    assert victim.read_text() == "precious\n"


def test_wandb_offline_is_kept_and_its_upload_is_told(tmp_path, config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config.wandb.mode = "auto"
    folder = RunFolder(tmp_path)
    record = Record(folder, config, Log(folder.log_file), wandb_id=None, global_step=-1)
    record.write({"epoch": 1, "global_step": 1, "val/top1_t1": 50.0})
    record.write_curve([50.0, 60.0])
    record.close()
    (synced,) = [line.split()[-1] for line in folder.log_file.read_text().splitlines() if "wandb sync" in line]
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
    assert synced == str(next(tmp_path.glob("wandb/offline-run-*")))


def test_all_that_wandb_recorded_offline_of_one_run_is_told_in_order(tmp_path, config, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    config.wandb.mode = "auto"
    folder = RunFolder(tmp_path / "a run")
    names = [
        "offline-run-20250102_000000-abc",
        "offline-run-20250101_000000-abc",
        "offline-run-20250101_000000-x-abc",
        "offline-run-20250103_000000-abc",
        "run-20250101_000000-abc",
        "offline-run-20250101_000000-abcd",
    ]
    for name in names:
        (folder.path / "wandb" / name).mkdir(parents=True)
    (folder.path / "wandb" / names[3] / "run-abc.wandb.synced").touch()
    record = Record(folder, config, Log(folder.log_file), wandb_id="abc", global_step=-1)
    record.write({"epoch": 1, "global_step": 1, "val/top1_t1": 50.0})
    record.close()
    (line,) = [line for line in folder.log_file.read_text().splitlines() if "wandb sync" in line]
    told = [Path(path) for path in shlex.split(line[line.index("wandb sync") :])[2:]]
    assert [path.name for path in told[:2]] == [names[1], names[0]]
    assert len(told) == 3
    assert list(told[2].glob("*.wandb"))


def test_the_packages_own_messages_reach_the_log(tmp_path):
    logger = logging.getLogger("tdkd_dist")
    before = logger.handlers, logger.level, logger.propagate
    try:
        Log(tmp_path / "log.txt").take_over_logging()
        logging.getLogger("tdkd_dist.data.beton.staging").info("copied %d files", 2)
        logging.getLogger("somebody.else").warning("not ours")
    finally:
        logger.handlers, level, logger.propagate = before
        logger.setLevel(level)
    assert (tmp_path / "log.txt").read_text() == "copied 2 files\n"


def test_words_for_durations():
    assert [format_seconds(s) for s in (5, 65, 3725, float("inf"))] == ["5 s", "1 min 05 s", "1 h 02 min", "?"]


def test_the_table_has_a_row_a_timestep():
    found = {name: [10.0, 20.0] for name in ("top1", "top5", "step_top1", "loss")}
    table = format_table(found | {"top1_mean": 15.0, "samples": 203})
    assert table.splitlines()[2].split()[:2] == ["1", "10.00"]
    assert table.splitlines()[-1] == "mean over timesteps: 15.00 % of 203 images"


def test_the_table_says_what_the_rule_is_worth():
    found = {name: [10.0, 20.0] for name in ("top1", "top5", "step_top1", "loss")} | {"top1_mean": 15.0, "samples": 203}
    rule = {"exit_top1": 19.5, "exit_mean_timesteps": 1.25, "exit_share": [75.0, 25.0]}
    more = {"exit_auroc_margin": 0.75, "exit_auroc": 0.75, "exit_energy_mj": 0.012344}
    plain, told, whole = (format_table(f).splitlines() for f in (found, found | rule, found | rule | more))
    assert told[: len(plain)] == whole[: len(plain)] == plain
    lines = [
        "stopping by the rule: 19.50 %, 1.25 timesteps on average",
        "who stops when: 75.0 % at 1, 25.0 % at 2",
    ]
    assert told[len(plain) :] == lines
    assert whole[len(plain) :] == [
        *lines,
        "right answers told from wrong ones (AUROC): 0.750 by margin",
        "energy: 0.01234 mJ an image",
    ]


def test_a_full_disk_takes_a_line_whole_or_not_at_all(small_disk):
    path, ballast = small_disk / "metrics.jsonl", small_disk / "ballast"
    assert append_text(path, "first\n")
    ballast.write_bytes(b"x" * (shutil.disk_usage(small_disk).free))
    assert not append_text(path, "y" * 100_000 + "\n")
    assert path.read_text() == "first\n"
    ballast.unlink()
    assert append_text(path, "second\n")
    assert path.read_text() == "first\nsecond\n"


def test_another_job_does_not_inherit_the_signs_of_the_last_one(tmp_path, config):
    folder = RunFolder(tmp_path / "run")
    folder.create(config)
    folder.heartbeat.mkdir()
    (folder.heartbeat / "rank-00007.json").write_text("{}")
    folder.create(config)
    assert not folder.heartbeat.exists()
