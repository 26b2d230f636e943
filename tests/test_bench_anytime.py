"""tools/bench/bench_anytime.py: what each contestant answers, and the table."""

import json
from pathlib import Path

import bench_anytime
import numpy as np
import pytest
import torch
from anytime_contestants import contestants, with_relu
from in_process import call
from networks import K, T, images, student
from PIL import Image

from tdkd_dist.anytime import AnytimeStudent, ExitRule
from tdkd_dist.calibration import read_logits
from tdkd_dist.config import StudentConfig
from tdkd_dist.data.beton.writing import write
from tdkd_dist.data.sources import open_source
from tdkd_dist.neurons import SpikingNeuron
from tdkd_dist.weights import save_student

TITLES = ["exit", "step by step, t = 3", "folded, t = 3", "folded, t = 2", "folded, t = 1", "masked", "one by one"]


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random student, 37 random pictures, and a rule that lets about half of them go after the first step."""
    pytest.importorskip("ffcv")
    folder = tmp_path_factory.mktemp("here")
    rng = np.random.default_rng(0)
    for k in range(37):
        pixels = rng.integers(0, 256, (16, 16, 3)) * rng.random((1, 1, 3))
        path = folder / "tree" / "abc"[k % 3] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(path)
    write(open_source(folder / "tree"), folder / "data.beton")
    config = StudentConfig(model="sew_resnet8", num_classes=K, num_timesteps=T, width=8)
    shape = {"input_size": (3, 16, 16), "mean": (0.5,) * 3, "std": (0.25,) * 3, "crop_pct": 1.0}
    save_student(folder / "student.safetensors", student("sew_resnet8").float().state_dict(), config, **shape)
    logits, _, signature = read_logits(AnytimeStudent.load(folder / "student.safetensors"), folder / "data.beton")
    half = float(ExitRule().score(logits[0]).median())
    ExitRule("confidence", half, T).save(folder / "rule.json")
    ExitRule("confidence", half, T, {"signature": signature}).save(folder / "chosen_on_it.json")
    return folder


def run(here: Path, *arguments: object, rule: str = "rule.json"):
    threads = torch.get_num_threads()
    try:
        return call(bench_anytime.main, here / "student.safetensors", here / "data.beton",
                    "--exit", here / rule, "--threads", 1, "--rounds", 2, "--singles", 2, *arguments)  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def test_all_contestants_are_measured_on_the_same_pictures(here, tmp_path):
    done = run(here, "--batch", 8, "--json", tmp_path / "found.json", "--markdown", tmp_path / "found.md")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "found.md").read_text() == done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    results = found["results"]
    assert list(results) == [*TITLES, "ReLU"]
    assert found["images"] == 37
    assert [line.split(" | ")[0] for line in done.stdout.splitlines()[4:]] == [f"| {title}" for title in results]

    logits, labels, _ = read_logits(AnytimeStudent.load(here / "student.safetensors"), here / "data.beton")
    exits = ExitRule.load(here / "rule.json").decide(logits)
    assert len(set(exits.tolist())) > 1
    chosen = torch.stack([logits[:t, k].mean(0) for k, t in enumerate(exits.tolist())])
    under_rule = 100 * (chosen.argmax(-1) == labels).double().mean().item()
    for title in ("exit", "masked", "one by one"):
        assert results[title]["top1"] == pytest.approx(under_rule)
    for title in ("exit", "one by one"):
        assert results[title]["mean_timesteps"] == pytest.approx(exits.double().mean().item())
    for t in range(1, T + 1):
        top1 = 100 * (logits[:t].mean(0).argmax(-1) == labels).double().mean().item()
        assert results[f"folded, t = {t}"]["top1"] == pytest.approx(top1)
        assert results[f"folded, t = {t}"]["mean_timesteps"] == t
    assert results[f"step by step, t = {T}"]["top1"] == results[f"folded, t = {T}"]["top1"]
    assert results["masked"]["mean_timesteps"] == T
    assert results["ReLU"]["top1"] is None
    assert found["baseline"] in (f"step by step, t = {T}", f"folded, t = {T}")
    assert all(len(values) == 2 for result in results.values() for values in result.values() if type(values) is list)


def test_a_part_of_the_pictures_can_be_measured(here, tmp_path):
    done = run(here, "--images", 5, "--batch", 4, "--json", tmp_path / "found.json")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "found.json").read_text())["images"] == 5


@pytest.mark.parametrize(
    ("arguments", "rule", "words"),
    [
        ([], "none.json", "none.json: No such file"),
        ([], "chosen_on_it.json", "chosen_on_it.json: was chosen on "),
        (["--rounds", 0], "rule.json", "--rounds 0: must be at least 1"),
        (["--images", -1], "rule.json", "--images -1: must be at least 1"),
        (["--speed"], "rule.json", "unrecognized arguments: --speed"),
    ],
)
def test_a_mistake_is_one_line(here, arguments, rule, words):
    done = run(here, *arguments, rule=rule)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert words in line


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("name", ["sew_resnet8", "ms_resnet18", "preact_resnet34", "spiking_resnet19"])
def test_the_ordinary_network_has_the_students_shape(name):
    net = student(name)
    ordinary = with_relu(net)
    assert not any(isinstance(module, SpikingNeuron) for module in ordinary.modules())
    assert [p.shape for p in ordinary.parameters()] == [p.shape for p in net.parameters()]
    x = images()
    assert ordinary(x).shape == (1, *net(x).shape[1:])
    assert net.num_timesteps == T


@pytest.mark.usefixtures("one_thread")
def test_contestants_leave_the_model_alone(here):
    model = AnytimeStudent.load(here / "student.safetensors").model
    found = contestants(model, ExitRule(), T, torch.device("cpu"), compiled=False)
    shown = torch.randint(0, 256, (3, 3, 16, 16), dtype=torch.uint8)
    for way in found:
        classes, timesteps = way.answer(shown)
        assert classes.shape == timesteps.shape == (3,)
    assert model.num_timesteps == T
    assert [way.title for way in found if way.is_fixed] == [f"step by step, t = {T}", f"folded, t = {T}"]
