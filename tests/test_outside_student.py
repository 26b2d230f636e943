"""A student from outside the package, docs/examples/spiking_transformer.py: built, trained, resumed, saved, refused."""

import importlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tdkd_dist.activity import ActivityMeter
from tdkd_dist.batch_norm import synchronise
from tdkd_dist.cluster.submission import snapshot
from tdkd_dist.config import Config, NeuronConfig, StudentConfig
from tdkd_dist.data.normalise import Normalise
from tdkd_dist.mistakes import Mistake
from tdkd_dist.run.folder import RunFolder
from tdkd_dist.run.record import read_rows
from tdkd_dist.students import create_student, is_spiking
from tdkd_dist.validate import validate
from tdkd_dist.weights import import_student, load_student, save_student

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(__file__).resolve().parent.parent
EXAMPLE = ROOT / "docs" / "examples" / "spiking_transformer.py"
MODEL = "spiking_transformer:spiking_transformer"
T, B, K = 3, 4, 5
SHOWN = {"input_size": (1, 16, 16), "mean": (0.5,), "std": (0.25,)}


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch) -> Path:
    """The folder in which the user has the example, and starts the run; what is imported from it is forgotten."""
    shutil.copy(EXAMPLE, tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    before = set(sys.modules)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - before:
        if (getattr(sys.modules[name], "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


def section(**changes: object) -> StudentConfig:
    return StudentConfig(**{"model": MODEL, "num_classes": K, "in_chans": 1, "num_timesteps": T, "width": 16} | changes)


def student(**changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    return create_student(section(**changes))


def test_the_transformer_is_a_student_as_any_other():
    net = student(neuron=NeuronConfig(kind="plif")).double()
    assert is_spiking(net)
    x = torch.randn(B, 1, 16, 16, dtype=torch.float64)
    logits = net(x)
    assert logits.shape == (T, B, K)
    (logits * torch.randn_like(logits)).sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert net.no_weight_decay() == {name for name, _ in net.named_parameters() if name.endswith(".w")} != set()

    net.eval()
    frames = torch.randn(T + 2, B, 1, 16, 16, dtype=torch.float64)
    net.set_num_timesteps(T + 2)
    whole = net(frames), net(x)
    for t in range(1, T + 2):
        net.set_num_timesteps(t)
        torch.testing.assert_close(net(frames[:t]), whole[0][:t])
        torch.testing.assert_close(net(x), whole[1][:t])
    with pytest.raises(ValueError, match="no stage 1: there are none"):
        net.recompute([1])
    net.reset_classifier(2)
    assert net.double()(x).shape == (T + 1, B, 2)


def test_batch_norms_are_synchronised_and_activity_is_counted_without_energy():
    net = synchronise(student()).eval()
    batches = [(torch.randint(0, 256, (B, 1, 16, 16), dtype=torch.uint8), torch.arange(B)) for _ in range(2)]
    row = validate(
        net, batches, Normalise([0.5], [0.25]), num_timesteps=T + 1, device=torch.device("cpu"), activity_images=6
    )
    assert row["activity_images"] == 6
    assert len(row["firing_rates"]) == 15
    assert len(row["firing_rate"]) == T + 1
    assert all(0 < rate < 1 for rate in row["firing_rate"])
    assert not [key for key in row if "energy" in key or "synops" in key or "macs" in key]
    assert "energy_mj" not in row["exit_confidence"]
    assert net.num_timesteps == T

    spikes = {}
    for name, module in net.named_modules():
        module.register_forward_hook(lambda _m, _i, y, name=name: spikes.update({name: y}))
    meter, x = ActivityMeter(net, B, torch.device("cpu")), torch.randn(B, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(meter.forward(x), net(x))
    rates = spikes["blocks.0.sn_q"].view(T, -1).mean(1).tolist()
    assert meter.summary()["firing_rates"]["blocks.0.sn_q"] == pytest.approx(rates)


@pytest.mark.slow
def test_it_is_one_graph_that_computes_the_same():
    net, x = student().double(), torch.randn(B, 1, 16, 16, dtype=torch.float64)
    results = []
    for compiled in (False, True):
        if compiled:
            net.compile(backend="aot_eager", fullgraph=True, dynamic=False)  # Inductor takes minutes over this one
        net.zero_grad()
        logits = net(x)
        logits.square().sum().backward()
        results.append([logits, *(p.grad for p in net.parameters())])
    torch.testing.assert_close(*results)


def test_a_file_says_which_module_it_needs_and_imports_none_by_itself(here):
    net = student(width=8).eval()
    save_student("own.safetensors", net.state_dict(), section(width=8), **SHOWN)
    again = load_student("own.safetensors")
    x = torch.randn(B, 1, 16, 16)
    assert torch.equal(again(x), net(x))
    assert again.default_cfg["mean"] == (0.5,)

    del sys.modules["spiking_transformer"]
    line = (
        r"^own\.safetensors: student\.model=\S+: needs the module spiking_transformer, [^\n]*allow_import=True[^\n]*$"
    )
    with pytest.raises(Mistake, match=line):
        load_student("own.safetensors")
    assert "spiking_transformer" not in sys.modules
    assert torch.equal(load_student("own.safetensors", allow_import=True)(x), net(x))
    del sys.modules["spiking_transformer"]
    (here / "spiking_transformer.py").unlink()
    importlib.invalidate_caches()
    with pytest.raises(Mistake, match=r"^own\.safetensors: student\.model=\S+: no module spiking_transformer in "):
        load_student("own.safetensors", allow_import=True)
    with pytest.raises(Mistake, match=r"^model=spiking_transformer:\S+: must be a student of the package"):
        import_student("own.safetensors", "other.safetensors", "timm", section())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"model": "nowhere:make"},
            r"student\.model=nowhere:make: no module nowhere in .* start the run in the folder",
        ),
        ({"model": "nowhere.at.all:make"}, r"student\.model=nowhere\.at\.all:make: no module nowhere in "),
        ({"model": "mine:other"}, r"student\.model=mine:other: \S+mine\.py has no function other"),
        ({"model": "mine:"}, r"student\.model=mine:: must be like my_package\.my_module:my_factory"),
        ({"model": "../mine:make"}, r"student\.model=\.\./mine:make: must be like "),
        (
            {"model": "broken:make"},
            r"student\.model=broken:make: importing broken failed: .*No module named 'lost'.*py:1",
        ),
        ({"model": "mine:few"}, r"student\.model=mine:few: few must take num_classes, .*, and has no neuron"),
        ({"model": "mine:more"}, r"student\.model=mine:more: .*missing a required argument: 'depth'"),
        ({"model": "mine:nothing"}, r"student\.model=mine:nothing: nothing made a NoneType"),
        ({"connect": "ADD"}, r"student\.connect=ADD: \S+ has no such choice, spiking_transformer takes no connect"),
        ({"drop_path": 0.1}, r"student\.drop_path=0\.1: \S+ has no such choice"),
    ],
)
def test_a_mistake_is_a_line_that_names_the_key(changes, message, here):
    (here / "broken.py").write_text("import lost\n")
    (here / "mine.py").write_text(
        "def few(num_classes, in_chans, num_timesteps): ...\n"
        "def more(depth, **kwargs): ...\n"
        "def nothing(**kwargs): ...\n"
    )
    with pytest.raises(Mistake, match=f"^{message}[^\n]*$"):
        create_student(section(**changes))


def test_a_queued_job_runs_the_student_as_it_was_at_submission(here):
    package = here / "mine" / "nets"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "net.py").write_text((here / "spiking_transformer.py").read_text())
    folder = RunFolder(here / "mine" / "runs")
    configs = [Config(student=section(model=m)) for m in (MODEL, "mine.nets.net:spiking_transformer", "sew_resnet8")]
    code = snapshot(folder, configs)
    assert sorted(path.name for path in code.iterdir()) == ["mine", "spiking_transformer.py", "tdkd_dist"]
    assert [path.name for path in (code / "mine").iterdir()] == ["nets"]

    for edited in (here / "spiking_transformer.py", package / "net.py"):
        edited.write_text("raise RuntimeError('edited after submission')")
    check = (
        "import sys; from tdkd_dist.config import StudentConfig; from tdkd_dist.students import create_student\n"
        f"for m in ('{MODEL}', 'mine.nets.net:spiking_transformer'): create_student(StudentConfig(m, width=8))\n"
        "print(sys.modules['spiking_transformer'].__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", check],
        env=os.environ | {"PYTHONPATH": f"{code}:", "PYTHONSAFEPATH": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout.strip() == str(code / "spiking_transformer.py"), done.stderr


@pytest.mark.slow
def test_it_trains_resumes_and_is_evaluated_by_the_real_command(here):
    rng = np.random.default_rng(0)
    for split, count in (("train", 32), ("val", 9)):
        for i in range(count):
            picture = here / split / str(i % 3) / f"{i}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)).save(picture)

    def launch(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = (
            f"{sys.executable} {ROOT}/launch/submit.py recipe=fashion_sew student.model={MODEL} student.num_classes=3"
            " student.width=8 student.num_timesteps=2 data.train=train data.val=val data.format=imagefolder"
            " data.image_size=16 loss.alpha=0 train.batch_size=8 train.log_every=1 train.sync_bn=true data.workers=1"
            " launcher.tasks_per_node=2 wandb.mode=disabled"
        )
        return subprocess.run([*command.split(), *arguments], capture_output=True, text=True, timeout=400)

    refused = launch("student.connect=ADD")
    assert refused.returncode == 2
    assert "student.connect=ADD: " in refused.stderr
    for steps in (2, 4):
        done = launch("run.dir=run", f"train.max_steps={steps}")
        assert done.returncode == 0, done.stdout + done.stderr
    assert "at step 2" in done.stdout
    rows = read_rows(here / "run" / "metrics.jsonl")
    losses = [row["train/loss"] for row in rows if "train/loss" in row]
    assert len(losses) == 4
    assert np.isfinite(losses).all()
    assert rows[-1]["global_step"] == 4
    assert {"val/top1_t1", "val/top1_t2", "val/firing_rate_t2"} <= rows[-1].keys()

    evaluated = launch("run.dir=again", "train.epochs=0", "student.checkpoint=run/student.safetensors")
    assert evaluated.returncode == 0, evaluated.stdout + evaluated.stderr
    assert read_rows(here / "again" / "metrics.jsonl")[-1]["val/top1_t2"] == rows[-1]["val/top1_t2"]
    assert load_student(here / "run" / "student.safetensors", allow_import=True).num_timesteps == 2
