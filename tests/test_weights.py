"""Files in and out: what is written comes back, what others wrote is read, and what does not fit is named."""

import argparse
import dataclasses
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from weight_files import SHOWN, SMALL, images, trained

import tdkd_dist.weights
from tdkd_dist.config import StudentConfig
from tdkd_dist.mistakes import Mistake
from tdkd_dist.neurons import NeuronConfig
from tdkd_dist.students import create_student
from tdkd_dist.weights import evaluated, load_student, load_weights, read_metadata, save_student

pytestmark = pytest.mark.usefixtures("one_thread")


def complaint(model: nn.Module, path: Path) -> str:
    """What `load_weights` says of a file, one line that starts with key and file."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"^student\.checkpoint=[^\n]*$") as error:
        load_weights(model, path, "student.checkpoint")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    start = f"student.checkpoint={path}: "
    assert str(error.value).startswith(start)
    return str(error.value).removeprefix(start)


@pytest.fixture
def student() -> tuple[StudentConfig, nn.Module]:
    config = StudentConfig("sew_resnet8", **SMALL)
    return config, trained(config)


@pytest.mark.parametrize(
    "config",
    [
        StudentConfig("sew_resnet8", connect="IAND", neuron=NeuronConfig(decay=0.2, v_reset=0.1), **SMALL),
        StudentConfig("sew_resnet50", neuron=NeuronConfig("plif", surrogate="atan", detach_reset=True), **SMALL),
        StudentConfig("ms_resnet18", neuron=NeuronConfig(surrogate="triangle", surrogate_alpha=0.7), **SMALL),
        StudentConfig("preact_resnet34", neuron=NeuronConfig("if"), **SMALL),
        StudentConfig("spiking_resnet19", neuron=NeuronConfig(surrogate="rectangle"), **SMALL),
        StudentConfig("resnet18", num_classes=5),
    ],
    ids=lambda config: config.model,
)
def test_a_student_comes_back(config, tmp_path):
    path = tmp_path / "student.safetensors"
    net = trained(config).to(memory_format=torch.channels_last)
    save_student(path, net.state_dict(), config, **SHOWN, extra={"epoch": "7"})
    net = net.to(memory_format=torch.contiguous_format)  # as the file, so that rounding is the same
    again = load_student(path)
    assert not again.training
    assert torch.equal(again(images()), net(images()))
    for name, value in SHOWN.items():
        assert again.default_cfg[name] == value
    assert again.default_cfg["num_classes"] == 5
    metadata = read_metadata(path)
    assert metadata["epoch"] == "7"
    described = metadata["student"]
    assert described["model"] == config.model
    assert described["num_timesteps"] == config.num_timesteps
    assert described["neuron"]["surrogate"] == config.neuron.surrogate
    assert described["neuron"]["surrogate_alpha"] == config.neuron.slope
    assert "checkpoint" not in described
    if hasattr(net, "neuron"):
        assert again.neuron == NeuronConfig(**described["neuron"])


@pytest.mark.parametrize(
    ("trained_with", "says"),
    [
        ({"connect": "IAND"}, "connect=IAND and not None"),
        ({"neuron": NeuronConfig(decay=0.9, threshold=0.5, v_reset=0.0)}, "neuron.decay=0.9 and not 0.5"),
        ({"neuron": NeuronConfig("plif")}, "neuron.kind=plif and not lif"),
        ({"first_statistics": True}, "first_statistics=True and not False"),
        ({"model": "spiking_resnet18"}, "model=spiking_resnet18 and not sew_resnet8"),
        ({}, None),
        ({"neuron": NeuronConfig(surrogate="atan"), "drop_path": 0.2}, None),  # nothing of evaluation
    ],
)
def test_a_file_is_evaluated_as_it_was_trained(trained_with, says, tmp_path):
    path = str(tmp_path / "x.safetensors")
    config = StudentConfig(**{"model": "sew_resnet8", **SMALL} | trained_with)
    save_student(path, trained(config).state_dict(), config, **SHOWN)
    section = StudentConfig("sew_resnet8", checkpoint=path, **SMALL | {"num_timesteps": 5})
    found, note = evaluated(section)
    assert (found.num_timesteps, found.checkpoint) == (5, path)
    net, want = create_student(found), load_student(path)
    load_weights(net, path, "student.checkpoint")
    want.set_num_timesteps(5)
    with torch.no_grad():
        assert torch.equal(net.eval()(images()), want(images()))
    assert note is None if says is None else says in note


def test_what_says_nothing_of_its_student_is_the_recipes(student, tmp_path):
    config, net = student
    torch.save(net.state_dict(), tmp_path / "x.pth")
    for path in (None, "nowhere.safetensors", str(tmp_path / "x.pth")):
        section = dataclasses.replace(config, checkpoint=path)
        assert evaluated(section) == (section, None)


def test_a_file_to_evaluate_imports_nothing_by_itself(student, tmp_path):
    config, net = student
    path = tmp_path / "x.safetensors"
    save_student(path, net.state_dict(), dataclasses.replace(config, model="os.path:join"), **SHOWN)
    with pytest.raises(Mistake, match=r"x.safetensors: is of os.path:join; set student.model=os.path:join to import"):
        evaluated(dataclasses.replace(config, checkpoint=str(path)))


def test_a_learned_leak_may_be_a_scalar_in_the_file(tmp_path):
    """As in older files and in spikingjelly's."""
    config = StudentConfig("sew_resnet8", neuron=NeuronConfig("plif"), **SMALL)
    net, again = trained(config), create_student(config)
    tensors = {n: t.reshape(()) if n.endswith(".w") else t for n, t in net.state_dict().items()}
    torch.save(tensors, tmp_path / "old.pth")
    load_weights(again, tmp_path / "old.pth", "student.checkpoint")
    assert all(torch.equal(t, net.state_dict()[n]) for n, t in again.state_dict().items())
    create_student(config).load_state_dict(tensors)


def test_a_file_appears_whole_or_not_at_all(student, tmp_path, monkeypatch):
    config, net = student
    path = tmp_path / "student.safetensors"
    save_student(path, net.state_dict(), config, **SHOWN)
    whole = path.read_bytes()

    def half(tensors, name, metadata):
        Path(name).write_bytes(whole[:1000])
        raise OSError("No space left on device")

    monkeypatch.setattr(tdkd_dist.weights, "save_file", half)
    with pytest.raises(OSError, match="No space left"):
        save_student(path, net.state_dict(), config, **SHOWN)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("wrapper", [None, "model", "state_dict", "net"])
def test_files_of_torch_save(student, prefix, wrapper, tmp_path):
    config, net = student
    tensors = {prefix + name: tensor for name, tensor in net.state_dict().items()}
    torch.save({wrapper: tensors, "epoch": 3} if wrapper else tensors, tmp_path / "student.pth")
    again = create_student(config).eval()
    load_weights(again, tmp_path / "student.pth", "student.checkpoint")
    assert torch.equal(again(images()), net(images()))
    assert read_metadata(tmp_path / "student.pth") is None


def test_the_arguments_of_an_old_training_do_no_harm(student, tmp_path):
    """As in the oldest published SEW checkpoints; nothing else that is no tensor is built."""
    config, net = student
    torch.save({"net": net.state_dict(), "args": argparse.Namespace(lr=0.1, out=["a"])}, tmp_path / "old.pth")
    load_weights(create_student(config), tmp_path / "old.pth", "student.checkpoint")
    torch.save({"net": net.state_dict(), "args": Path("x")}, tmp_path / "other.pth")
    with pytest.raises(Mistake, match=r"other\.pth: not a checkpoint of tensors alone"):
        load_weights(create_student(config), tmp_path / "other.pth", "student.checkpoint")


@pytest.mark.parametrize(
    "changes",
    [
        "[1]",
        "{",
        {"mean": "abc"},
        {"mean": [0.5]},
        {"std": [0.0, 1, 1]},
        {"std": None},
        {"input_size": [3, -1, 2]},
        {"input_size": [3, 32]},
        {"neuron": 7},
        {"neuron": {"decay": 9}},
        {"num_timesteps": 0},
        {"num_timesteps": "x"},
        {"model": 7},
        {"model": "../../x"},
        {"width": 10**9},
        {"more": 1},
    ],
)
def test_damaged_metadata_are_a_line(student, changes, tmp_path):
    config, net = student
    path = tmp_path / "x.safetensors"
    save_student(path, net.state_dict(), config, **SHOWN)
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["student"])
    text = changes if isinstance(changes, str) else json.dumps(description | changes)
    save_file(dict(net.state_dict()), path, {"student": text})
    with pytest.raises(Mistake) as caught:
        load_student(path)
    assert len(caught.value.lines) == 1
    assert str(caught.value).startswith(f"{path}: ")


def test_counts_of_batches_may_be_missing(student, tmp_path):
    """As in files from before batch norm counted, torchvision's among them."""
    config, net = student
    torch.save({n: t for n, t in net.state_dict().items() if "num_batches" not in n}, tmp_path / "old.pth")
    again = create_student(config).eval()
    load_weights(again, tmp_path / "old.pth", "student.checkpoint")
    assert torch.equal(again(images()), net(images()))


class Trap:
    """A pickle that leaves a file behind when it is executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_what_is_no_checkpoint_is_said_so(student, tmp_path):
    config, net = student
    good, cut = tmp_path / "good.safetensors", tmp_path / "cut.safetensors"
    save_student(good, net.state_dict(), config, **SHOWN)
    cut.write_bytes(good.read_bytes()[:-1000])
    assert complaint(net, cut).startswith("not a checkpoint, or cut short")
    with pytest.raises(ValueError, match=r"cut\.safetensors: not a safetensors file, or cut short"):
        load_student(cut)

    pickled = tmp_path / "student.pth"
    torch.save(net.state_dict(), pickled)
    whole = pickled.read_bytes()
    for length in (0, 10, 5000, len(whole) - 100):
        pickled.write_bytes(whole[:length])
        assert complaint(net, pickled).startswith("not a checkpoint")

    (tmp_path / "notes.txt").write_text("not weights")
    assert complaint(net, tmp_path / "notes.txt").startswith("not a checkpoint")
    assert complaint(net, tmp_path / "nowhere.pth") == "no such file"
    torch.save({"mine": net.state_dict()}, tmp_path / "wrapped.pth")
    assert complaint(net, tmp_path / "wrapped.pth").endswith("found a dict with keys mine")
    torch.save([1, 2], tmp_path / "list.pth")
    assert complaint(net, tmp_path / "list.pth").endswith("found a list")

    torch.save({"model": net.state_dict(), "hook": Trap(tmp_path / "executed")}, tmp_path / "trap.pth")
    assert complaint(net, tmp_path / "trap.pth").startswith("not a checkpoint of tensors alone")
    assert not (tmp_path / "executed").exists()
    torch.load(tmp_path / "trap.pth", weights_only=False)
    assert (tmp_path / "executed").exists(), "the trap works"


def test_what_does_not_fit_is_named(student, tmp_path):
    config, net = student
    path = tmp_path / "student.safetensors"
    save_student(path, net.state_dict(), config, **SHOWN)

    other_classes = create_student(StudentConfig("sew_resnet8", **SMALL | {"num_classes": 1000}))
    assert complaint(other_classes, path) == "has 5 classes, 1000 wanted"
    assert complaint(timm.create_model("resnet18", num_classes=7), path).startswith("has 5 classes, 7 wanted; lacks ")
    wider = complaint(create_student(StudentConfig("sew_resnet8", **SMALL | {"width": 16})), path)
    assert wider.startswith("has conv1.weight [8, 3, 3, 3] instead of [16, 3, 3, 3], bn1.weight [8] instead of [16]")

    tensors = net.state_dict()
    torch.save({n: t for n, t in tensors.items() if n != "layer2.0.bn1.bias"}, tmp_path / "missing.pth")
    assert complaint(net, tmp_path / "missing.pth") == "lacks layer2.0.bn1.bias"
    torch.save(dict(tensors) | {"layer9.weight": torch.zeros(1)}, tmp_path / "extra.pth")
    assert complaint(net, tmp_path / "extra.pth") == "has layer9.weight that the model lacks"
    learned = create_student(StudentConfig("sew_resnet8", neuron=NeuronConfig("plif"), **SMALL))
    torch.save(learned.state_dict(), tmp_path / "plif.pth")
    assert complaint(net, tmp_path / "plif.pth").endswith("learned, which wants student.neuron.kind=plif")
    assert complaint(learned, path).startswith("lacks sn1.w, layer1.0.sn1.w")


def test_a_file_without_configuration_is_said_so(student, tmp_path):
    from safetensors.torch import save_file

    save_file(student[1].state_dict(), tmp_path / "bare.safetensors")
    assert read_metadata(tmp_path / "bare.safetensors") is None
    with pytest.raises(ValueError, match=r"bare\.safetensors: holds no student's configuration"):
        load_student(tmp_path / "bare.safetensors")
    with pytest.raises(ValueError, match=r"nowhere: no such file"):
        load_student(tmp_path / "nowhere")


def test_students_and_weights_need_no_training_dependency():
    """What `pip install tdkd-dist` brings is enough to load a student."""
    code = """
import sys
for name in ("deepspeed", "ffcv", "wandb", "submitit", "omegaconf", "spikingjelly"):
    sys.modules[name] = None
import tdkd_dist, tdkd_dist.students, tdkd_dist.losses, tdkd_dist.weights
import timm
timm.create_model("sew_resnet8")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
