"""The command line as a user types it: real betons, two DeepSpeed ranks, real signals."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import submit
import torch
from in_process import call
from PIL import Image
from safetensors.torch import load_file

from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.sources import open_source
from tdkd_dist.recipe import list_recipes
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.record import read_rows
from tdkd_dist.weights import load_student

ROOT = Path(__file__).resolve().parent.parent.parent
CLASSES, TRAIN, VAL = 3, 48, 21


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An ImageFolder tree of three kinds of pictures, and their betons."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split, count in (("train", TRAIN), ("val", VAL)):
        for i in range(count):
            kind = i % CLASSES
            picture = rng.integers(0, 60, (72 + i, 90, 3), dtype=np.uint8)
            picture[:, :, kind] += 150
            path = folder / split / f"n{kind:08d}" / f"{i}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path, quality=90)
        write(open_source(folder / split), folder / f"{split}.beton")
    return folder


@pytest.fixture(scope="module")
def tiny(folder) -> list[str]:
    """A run of seconds: a small student on the same pictures, without a teacher."""
    recipe = folder / "tiny.yaml"
    recipe.write_text(
        f"""base: fashion_sew
data: {{train: {folder}/train.beton, val: {folder}/val.beton, image_size: 32, crop: random_resized}}
student: {{num_classes: {CLASSES}, width: 8, num_timesteps: 3}}
loss: {{alpha: 0}}
optim: {{lr: 0.02}}
train: {{epochs: 2, batch_size: 16, log_every: 1}}
wandb: {{mode: disabled}}
"""
    )
    return [f"recipe={recipe}"]


@pytest.fixture(scope="module")
def without_ffcv(folder) -> list[str]:
    """The same pictures as files: FFCV generates code at every start."""
    return [f"data.train={folder}/train", f"data.val={folder}/val", "data.format=imagefolder"]


@pytest.fixture(scope="module")
def imagenet(folder) -> list[str]:
    """The ImageNet recipe, cut down to what two CPU ranks do in a minute."""
    return (
        f"recipe=imagenet_sew34 data.train={folder}/train.beton data.val={folder}/val.beton train.max_steps=3"
        " data.image_size=64 train.batch_size=8 launcher.gpus_per_node=0 launcher.tasks_per_node=2"
        " train.activation_budget=0.7"
        f" teacher.pretrained=false teacher.min_top1=0 run.dir={folder}/imagenet"
    ).split()


@pytest.mark.slow
def test_the_imagenet_recipe_runs_on_two_cpu_ranks_and_is_finished_once(imagenet, folder):
    first = call(submit.main, *imagenet)
    assert first.returncode == 0, first.stdout + first.stderr
    assert "warning: teacher resnet34.tv_in1k has random weights" in first.stdout
    assert "train.activation_budget: ignored, the student is not compiled" in first.stdout
    table = [line.split() for line in first.stdout.splitlines() if line.strip()[:1] in "1234" and "%" not in line]
    assert [row[0] for row in table] == ["1", "2", "3", "4"]
    assert f"of {VAL} images" in first.stdout
    run = RunFolder(folder / "imagenet")
    rows = read_rows(run.metrics_file)
    last = rows[-1]
    assert last["global_step"] == 3
    assert last["val/samples"] == VAL
    assert {f"val/top{k}_t{t}" for k in (1, 5) for t in (1, 2, 3, 4)} <= last.keys()
    trained = [row for row in rows if "train/loss" in row]
    assert trained
    for row in trained:
        assert row["train/loss"] == pytest.approx(row["train/ce"] + 0.2 * row["train/kl"] + 0.5 * row["train/sd"])
    assert [row["teacher/top5"] for row in rows if "teacher/top1" in row]
    assert list(run.path.glob("wandb/offline-run-*/*.wandb"))
    assert f"wandb sync {run.path}" in first.stdout
    assert (run.figures / "accuracy_against_timestep.png").read_bytes().startswith(b"\x89PNG")
    assert list(run.checkpoints.glob("step-00000003/manifest.json"))
    student = load_student(run.student_file)
    with torch.no_grad():
        assert student(torch.randn(2, 3, 64, 64)).shape == (4, 2, 1000)

    again = call(submit.main, *imagenet)
    assert again.returncode == 0
    assert "is finished" in again.stdout
    assert first.stdout[first.stdout.index("timesteps") : first.stdout.index("mean over")] in again.stdout

    other = call(submit.main, *imagenet, "loss.alpha=0.4")
    assert other.returncode == 2
    assert "loss.alpha (0.2 there, 0.4 now)" in other.stderr

    longer = call(submit.main, *imagenet, "train.max_steps=4", "launcher.tasks_per_node=1", "train.epochs=7")
    assert longer.returncode == 0, longer.stdout + longer.stderr
    assert "at step 3" in longer.stdout
    assert read_rows(run.metrics_file)[-1]["global_step"] == 4

    evaluation = call(
        submit.main,
        *(a for a in imagenet if not a.startswith(("train.max", "run.dir"))),
        "train.epochs=0",
        f"student.checkpoint={run.student_file}",
        "eval.num_timesteps=6",
        "student.neuron.decay=0.9",
        "student.connect=IAND",
        f"run.dir={folder}/evaluation",
    )
    assert evaluation.returncode == 0, evaluation.stdout + evaluation.stderr
    assert (
        "is evaluated as it was trained: connect=ADD and not IAND, neuron.decay=0.2 and not 0.9\n" in evaluation.stdout
    )
    before, found = read_rows(run.metrics_file)[-1], read_rows(folder / "evaluation" / "metrics.jsonl")[-1]
    for t in (1, 2, 3, 4):
        assert found[f"val/top1_t{t}"] == before[f"val/top1_t{t}"]
        assert found[f"val/loss_t{t}"] == pytest.approx(before[f"val/loss_t{t}"], rel=1e-4)
    assert "val/top1_t6" in found


@pytest.mark.slow
def test_ctrl_c_stops_with_a_checkpoint_and_the_same_command_goes_on(tiny, folder):
    arguments = [*tiny, f"run.dir={folder}/interrupted", "train.epochs=500"]
    process = subprocess.Popen(
        [sys.executable, "launch/submit.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    run = RunFolder(folder / "interrupted")
    deadline = time.monotonic() + 200
    while len(read_rows(run.metrics_file)) < 4:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stdout + stderr
    assert "the same command goes on from here" in stdout
    assert "Traceback" not in stderr
    assert not list(run.checkpoints.glob("*.tmp"))
    stopped_at = max(row["global_step"] for row in read_rows(run.metrics_file))

    resumed = call(
        submit.main, *tiny, f"run.dir={folder}/interrupted", f"train.max_steps={stopped_at + 2}", "train.epochs=500"
    )
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"at step {stopped_at}" in resumed.stdout
    steps = [row["global_step"] for row in read_rows(run.metrics_file) if "train/loss" in row]
    assert steps == list(range(1, stopped_at + 3))

    whole = call(submit.main, *tiny, f"run.dir={folder}/whole", f"train.max_steps={stopped_at + 2}", "train.epochs=500")
    assert whole.returncode == 0, whole.stdout + whole.stderr
    uninterrupted = load_file(folder / "whole" / "student.safetensors")
    for name, tensor in load_file(run.student_file).items():
        assert torch.equal(tensor, uninterrupted[name]), name


@pytest.mark.slow
def test_imagefolder_gives_the_same_run_without_ffcv(tiny, without_ffcv, folder):
    found = call(submit.main, *tiny, *without_ffcv, f"run.dir={folder}/tree", "train.max_steps=2")
    assert found.returncode == 0, found.stdout + found.stderr
    assert f"of {VAL} images" in found.stdout


@pytest.mark.slow
def test_a_mistake_that_only_the_job_can_find_is_one_line_too(tiny, without_ffcv, folder):
    found = call(
        submit.main,
        *tiny,
        *without_ffcv,
        "loss.alpha=0.2",
        "teacher.name=resnet10t",
        "teacher.checkpoint=null",
        "teacher.pretrained=false",
        "teacher.min_top1=99.9",
        f"run.dir={folder}/broken_teacher",
    )
    assert found.returncode == 2
    (line,) = found.stderr.splitlines()
    assert line.startswith("error: teacher.min_top1=99.9: teacher resnet10t reaches ")


@pytest.mark.slow
def test_a_crashed_rank_is_reported_with_where_to_look(tiny, without_ffcv, folder):
    process = subprocess.Popen(
        [sys.executable, "launch/submit.py", *tiny, *without_ffcv, f"run.dir={folder}/crashed", "train.epochs=500"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    run = RunFolder(folder / "crashed")
    deadline = time.monotonic() + 200
    while len(read_rows(run.metrics_file)) < 2:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    import psutil

    (controller,) = psutil.Process(process.pid).children()
    controller.children()[1].send_signal(signal.SIGKILL)
    stdout, stderr = process.communicate(timeout=200)
    assert process.returncode == 1, stdout + stderr
    assert "error: rank 1 crashed: killed, or ended without a result" in stderr
    assert "its output: " in stderr


def wrong_teacher(folder: Path) -> str:
    import timm

    path = folder / "seven.pt"
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), path)
    return f"teacher.checkpoint={path}"


def truncated(folder: Path) -> str:
    path = folder / "short.beton"
    path.write_bytes((folder / "train.beton").read_bytes()[:-100])
    return f"data.train={path}"


def not_a_checkpoint(folder: Path) -> str:
    path = folder / "text.pt"
    path.write_text("hello")
    return f"teacher.checkpoint={path}"


MISTAKES = {
    "a key with a typo": (lambda _: "train.btach_size=8", "train.btach_size: no such key; did you mean"),
    "a missing file": (lambda f: f"data.val={f}/none.beton", "data.val="),
    "a truncated beton": (truncated, "data.train="),
    "a teacher with other classes": (wrong_teacher, "teacher.checkpoint="),
    "a teacher that is no checkpoint": (not_a_checkpoint, "teacher.checkpoint="),
    "an unknown student": (lambda _: "student.model=sew_resnet35", "student.model=sew_resnet35: no such model"),
    "a batch larger than the set": (lambda _: "train.batch_size=64", "train.batch_size=64: data.train="),
    "fewer classes than the data": (lambda _: "student.num_classes=2", "data.train="),
    "GPUs that are not there": (lambda _: "launcher.gpus_per_node=16 launcher.tasks_per_node=16", "launcher.gpus"),
    "a second node": (lambda _: "launcher.nodes=2 launcher.cluster=local", "launcher.nodes=2"),
    "an unknown optimiser": (lambda _: "optim.name=sdg", "optim.name=sdg"),
    "timesteps for an ordinary network": (lambda _: "student.model=resnet10t student.width=null", "student.model=res"),
    "more loader threads than cores": (lambda _: "data.workers=999", "data.workers=999"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(name, tiny, folder, capsys):
    make, message = MISTAKES[name]
    teacher = ["loss.alpha=0.2", "teacher.name=resnet10t"] if "teacher" in name else []
    run = folder / "refused"
    status = submit.main([*tiny, *teacher, *make(folder).split(), f"run.dir={run}"])
    captured = capsys.readouterr()
    assert status == 2
    lines = captured.err.splitlines()
    assert lines[0].startswith(f"error: {message}")
    assert len(lines) == (2 if name == "fewer classes than the data" else 1)  # of data.val too
    assert not run.exists()


def test_more_ranks_than_the_chosen_gpus_are_a_mistake(tiny, capsys, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert submit.main([*tiny, "launcher.cluster=local", "launcher.gpus_per_node=4", "launcher.tasks_per_node=4"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: launcher.gpus_per_node=4: CUDA_VISIBLE_DEVICES=2,3 shows 2; launcher.gpus_per_node=")


def test_an_unwritable_run_folder(tiny, folder, capsys):
    assert submit.main([*tiny, f"run.dir={folder}/tiny.yaml/run"]) == 2
    assert capsys.readouterr().err.startswith("error: run.dir=")


def test_no_arguments_is_a_mistake_with_the_usage(capsys):
    assert submit.main([]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: ")
    assert len(lines) <= 6


def test_a_reader_who_has_seen_enough_is_no_error():
    command = f"{sys.executable} launch/submit.py --list | head -1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "0"


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_passes_a_dry_run(name, capsys):
    assert submit.main([f"recipe={name}", "--dry-run", "launcher.cluster=local"]) == 0, capsys.readouterr().err
    shown = capsys.readouterr().out
    assert "global batch: " in shown
    assert "job: this machine" in shown


def test_a_dry_run_counts_steps_and_lists_what_is_not_here(tiny, folder, capsys):
    assert submit.main([*tiny, "--dry-run", f"data.val={folder}/none.beton", "launcher.tasks_per_node=1"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert "steps per epoch: 3" in shown
    assert f"not here yet: data.val={folder}/none.beton: no such file" in shown
    assert submit.main([*tiny, "--dry-run", truncated(folder)]) == 2


def test_the_list_names_every_recipe(capsys):
    assert submit.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(list_recipes())


def test_help_says_how_to_start(capsys):
    assert submit.main(["--help"]) == 0
    assert "recipe=NAME" in capsys.readouterr().out
