"""Event-camera recordings from files in their official form to a distilled student, by the commands a user types."""

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
import write_beton
from in_process import call
from recordings import as_aedat2, as_bin
from safetensors.torch import load_file

from tdkd_dist.anytime import AnytimeStudent
from tdkd_dist.data.beton.manifest import read_manifest
from tdkd_dist.data.events.recording import Events
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.record import read_rows

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
CLASSES = 3


def moving(kind: int, seed: int, side: int) -> Events:
    """A bar that stands, rises or moves to the right, by kind."""
    rng = np.random.default_rng(seed)
    t = np.sort(rng.integers(0, 100_000, 400))
    along, across = rng.integers(0, side, 400), (t * (side - 4) // 100_000 + rng.integers(0, 3, 400))
    x, y = (along, np.full(400, side // 2)) if kind == 0 else (along, across) if kind == 1 else (across, along)
    return Events(t, x.astype(np.int16), y.astype(np.int16), rng.integers(0, 2, 400).astype(np.uint8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """N-MNIST's folders, and a class folder of AEDAT 2.0 for each kind; betons of both."""
    folder = tmp_path_factory.mktemp("events")
    for part, count in (("Train", 16), ("Test", 7)):
        for k in range(count * CLASSES):
            path = folder / "nmnist" / part / str(k % CLASSES) / f"{k:05}.bin"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(as_bin(moving(k % CLASSES, k, 34)))
    for k in range(10 * CLASSES):
        path = folder / "dvs" / f"kind{k % CLASSES}" / f"kind{k % CLASSES}_{k // CLASSES}.aedat"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(as_aedat2(moving(k % CLASSES, k, 128)))
    for split in ("train", "val"):
        for name in ("nmnist", "dvs"):
            dest = str(folder / f"{name}_{split}.beton")
            assert write_beton.main([str(folder / name), dest, "--frames", "4", "--split", split]) == 0
    return folder


def arguments(folder: Path, recipe: str, name: str, *more: str) -> list[str]:
    data = [f"data.{split}={folder}/{name}_{split}.beton" for split in ("train", "val")]
    small = [f"student.num_classes={CLASSES}", "train.log_every=1", "wandb.mode=disabled", "train.batch_size=12"]
    return [f"recipe={recipe}", *data, *small, *more]


@pytest.fixture(scope="module")
def teacher(folder) -> str:
    """A teacher of the mean frames, trained for some steps."""
    done = call(
        submit.main, *arguments(folder, "nmnist_teacher", "nmnist", f"run.dir={folder}/teacher", "train.epochs=3")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return f"{folder}/teacher/student.safetensors"


def test_a_distilled_student_goes_on_after_a_stop_as_if_nothing_had_happened(folder, teacher):
    common = arguments(folder, "nmnist_sew8", "nmnist", f"teacher.checkpoint={teacher}", "teacher.min_top1=0")
    common += ["student.width=8", "train.epochs=500", "data.event_augment=true"]
    run = RunFolder(folder / "interrupted")
    process = subprocess.Popen(
        [sys.executable, "launch/submit.py", *common, f"run.dir={run.path}"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    deadline = time.monotonic() + 200
    while len(read_rows(run.metrics_file)) < 7:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stdout + stderr
    stopped_at = max(row["global_step"] for row in read_rows(run.metrics_file))
    for where in ("interrupted", "whole"):
        done = call(submit.main, *common, f"run.dir={folder}/{where}", f"train.max_steps={stopped_at + 2}")
        assert done.returncode == 0, done.stdout + done.stderr
    whole = load_file(folder / "whole" / "student.safetensors")
    for name, tensor in load_file(run.student_file).items():
        assert torch.equal(tensor, whole[name]), name
    found = read_rows(run.metrics_file)[-1]
    assert [key for key in found if key.startswith("val/top1_t")] == [f"val/top1_t{t}" for t in (1, 2, 3, 4)]
    assert {f"val/energy_mj_t{t}" for t in (1, 2, 3, 4)} <= found.keys()
    student = AnytimeStudent.load(run.student_file)
    assert student.frames is not None
    assert student.class_names == ["0", "1", "2"]
    counts = torch.randint(0, 3, (5, 4, 2, 34, 34), dtype=torch.uint8)
    assert student(counts).logits.shape == (5, CLASSES)


def test_cifar10_dvs_s_recipe_runs_on_aedat(folder):
    manifest = read_manifest(folder / "dvs_train.beton")
    assert manifest is not None
    assert manifest.frames["split"] == "train, random split, 10 % validated on, seed 42"
    options = "launcher.gpus_per_node=0 launcher.tasks_per_node=2 data.frames=2 data.frame_choice=regroup"
    options += " student.num_timesteps=2 student.width=16 loss.alpha=0 train.max_steps=2 train.sync_bn=false"
    done = call(
        submit.main,
        *arguments(folder, "cifar10dvs_resnet18", "dvs", *options.split(), f"run.dir={folder}/dvs_run"),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mean over timesteps" in done.stdout
    assert " of 3 images" in done.stdout


def test_what_does_not_fit_is_said_before_anything_starts(folder, capsys):
    wrong = arguments(folder, "nmnist_sew8", "nmnist", "loss.alpha=0", "student.in_chans=3", f"run.dir={folder}/no")
    assert submit.main(wrong) == 2
    error = capsys.readouterr().err
    assert "student.in_chans=3: the frames of data.train=" in error
    assert "have 2 polarities" in error
    assert not (folder / "no").exists()
