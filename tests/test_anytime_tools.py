"""Calibrating a rule and classifying pictures, as a user calls it."""

import json
from pathlib import Path

import calibrate_exit
import classify
import numpy as np
import pytest
import torch
from in_process import call
from PIL import Image

from tdkd_dist.anytime import AnytimeStudent, ExitRule
from tdkd_dist.calibration import read_logits
from tdkd_dist.config import StudentConfig
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.sources import open_source
from tdkd_dist.students import create_student
from tdkd_dist.weights import save_student

pytestmark = pytest.mark.usefixtures("one_thread")
T = 3
NAMES = ["cat", "dog", "owl"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student of pictures that are red, green or blue, told apart by its stem alone; and such pictures."""
    folder = tmp_path_factory.mktemp("here")
    rng = np.random.default_rng(0)
    for k in range(60):
        pixels = rng.integers(0, 60, (20, 24, 3), dtype=np.uint8)
        pixels[..., k % 3] += 150
        path = folder / "tree" / NAMES[k % 3] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
    config = StudentConfig(model="sew_resnet8", num_classes=3, num_timesteps=T, width=8)
    torch.manual_seed(0)
    model = create_student(config).train()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    source = open_source(folder / "tree")
    shown = torch.stack([torch.from_numpy(source.read(k)[2:18, 4:20].copy()) for k in range(60)]).permute(0, 3, 1, 2)
    x, labels = shown / 255 / 0.25 - 2, torch.from_numpy(source.labels)
    for _ in range(12):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(x).flatten(0, 1), labels.repeat(T)).backward()
        optimizer.step()
    shape = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 0.8}
    save_student(folder / "student.safetensors", model.state_dict(), config, label_names=NAMES, **shape)
    write(source, folder / "held.beton")
    for k, name in enumerate(("bat", "cat", "dog")):
        path = folder / "others" / name / "x.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(source.read(k)).save(path)
    return folder


@pytest.mark.parametrize("data", ["tree", "held.beton"])
@pytest.mark.parametrize("rule", ["confidence", "patience"])
def test_a_rule_is_chosen_and_used(here, data, rule, tmp_path):
    if data.endswith("beton"):
        pytest.importorskip("ffcv")
    student, out = here / "student.safetensors", tmp_path / "rule.json"
    done = call(calibrate_exit.main, student, here / data, "--rule", rule, "--mean-timesteps", 2.5, "--out", out)
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.splitlines()
    assert first.startswith(f"{out}: {rule} ")
    assert second.startswith("on 60 held-out pictures: ")
    assert third.startswith("top-1 ")
    found = ExitRule.load(out)
    assert found.num_timesteps == T
    assert len(found.calibration["signature"]) == 64
    logits, labels, _ = read_logits(AnytimeStudent.load(student), here / data)
    exits = found.decide(logits)
    assert found.calibration["mean_timesteps"] == pytest.approx(exits.double().mean().item())
    assert labels.tolist() == open_source(here / "tree").labels.tolist()
    parts = read_logits(AnytimeStudent.load(student), here / data, batch_size=4)  # more than FFCV has buffers
    assert parts[1].tolist() == labels.tolist()
    torch.testing.assert_close(parts[0], logits, rtol=1e-4, atol=1e-4)

    paths = sorted((here / "tree").rglob("*.png"))[:7]
    rows = [
        json.loads(line) for line in call(classify.main, student, *paths, "--exit", out, "--json").stdout.splitlines()
    ]
    assert [row["picture"] for row in rows] == [str(path) for path in paths]
    alone = AnytimeStudent.load(student, out)
    for row, path in zip(rows, paths, strict=True):
        want = alone(path)
        assert (row["timesteps"], row["top"][0]["class"]) == (int(want.timesteps[0]), int(want.classes[0]))
        assert row["top"][0]["name"] == NAMES[int(want.classes[0])]
        assert sum(entry["probability"] for entry in row["top"]) == pytest.approx(1, abs=1e-5)


def test_one_picture_is_a_line_and_several_are_a_table(here, tmp_path):
    student = here / "student.safetensors"
    path = here / "tree" / "dog" / "1.png"
    one = call(classify.main, student, path)
    (line,) = one.stdout.splitlines()
    assert line.startswith(f"{path}: dog ")
    assert line.endswith("(3 timesteps)")
    broken = tmp_path / "a\x1b[2Jb.png"
    broken.write_text("no picture")
    many = call(classify.main, student, path, broken, tmp_path / "none.png", here / "tree" / "owl" / "2.png")
    assert many.returncode == 2
    assert [line.split()[0] for line in many.stdout.splitlines()] == [
        "picture",
        str(path),
        str(here / "tree/owl/2.png"),
    ]
    wrong = many.stderr.splitlines()
    assert len(wrong) == 2
    assert wrong[0].startswith("error: ")
    assert "\x1b" not in many.stderr
    assert wrong[1].endswith("none.png: no such file")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["{here}/none.safetensors", "{here}/tree", "--max-drop", "1", "--out", "x.json"],
            "none.safetensors: no such file",
        ),
        (["{here}/student.safetensors", "{here}/none", "--max-drop", "1", "--out", "x.json"], "none: no such file"),
        (["{here}/student.safetensors", "{here}/tree", "--out", "x.json"], "one of the arguments --max-drop"),
        (
            ["{here}/student.safetensors", "{here}/tree", "--max-drop", "-1", "--out", "x.json"],
            "max_drop=-1.0: with 60",
        ),
        (
            ["{here}/student.safetensors", "{here}/tree", "--max-drop", "1", "--out", "/none/x.json"],
            "--out /none/x.json: no folder /none; create it",
        ),
        (["{here}/student.safetensors", "{here}/tree", "--max-drop", "1", "--out", "."], "--out .: a folder; name a"),
        (["{here}", "{here}/tree", "--max-drop", "1", "--out", "x.json"], "a folder; give the file in it"),
        (
            ["{here}/student.safetensors", "{here}/tree", "--max-drop", "1", "--out", "x.json", "--timesteps", "9999"],
            "--timesteps 9999: must be in 1 to 1,024",
        ),
        (
            ["{here}/student.safetensors", "{here}/others", "--max-drop", "1", "--out", "x.json"],
            "others: its classes (bat, cat, dog) are not the student's (cat, dog, owl)",
        ),
    ],
)
def test_a_mistake_is_one_line(here, arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = call(calibrate_exit.main, *(text.format(here=here) for text in arguments))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line
    assert not list(tmp_path.iterdir())
