"""Files that other programs wrote become students' files, and what does not fit is named."""

import argparse
import contextlib
import io
import re
import subprocess

import import_weights
import pytest
import timm
import torch
from torch import nn
from weight_files import SMALL, images, trained

import tdkd_dist.weights
from tdkd_dist.config import StudentConfig
from tdkd_dist.neurons import NeuronConfig
from tdkd_dist.recipe import load_config
from tdkd_dist.students import create_student
from tdkd_dist.weights import load_student

pytestmark = pytest.mark.usefixtures("one_thread")


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run the command line in this process: importing torch anew for each call takes longer than the test."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = import_weights.main([str(argument) for argument in arguments])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def test_imported_students_know_their_images(tmp_path):
    """The networks for small images are fed as CIFAR-10 is, or CIFAR-100; a recipe says everything."""
    source, dest = tmp_path / "net.pth", tmp_path / "x.safetensors"

    def imported(classes: int, *pairs: str, **options: int) -> dict:
        config = StudentConfig("spiking_resnet18", num_classes=classes, width=8, **options)
        torch.save(create_student(config).state_dict(), source)
        done = tool(source, dest, "--format=official", f"num_classes={classes}", "width=8", *pairs)
        assert done.returncode == 0, done.stderr
        return load_student(dest).default_cfg

    cifar10, cifar100 = (load_config(f"cifar{k}_resnet18", []).data for k in (10, 100))
    for classes, data in ((10, cifar10), (100, cifar100)):
        shown = imported(classes, "model=spiking_resnet18")
        assert shown["mean"] == pytest.approx(data.mean)
        assert shown["std"] == pytest.approx(data.std)
        assert shown["crop_pct"] == data.crop_pct == 1
    shown = imported(10, "recipe=cifar10dvs_resnet18", in_chans=2, num_timesteps=10)
    assert (shown["input_size"], shown["mean"], shown["frames"]) == ((2, 48, 48), (0, 0), 10)
    wrong = tool(source, dest, "--format=official", "recipe=cifar10dvs_resnet18", "widht=8")
    assert (wrong.returncode, len(wrong.stderr.splitlines())) == (2, 1)
    assert "student.widht" in wrong.stderr


def test_a_source_is_not_overwritten(tmp_path):
    net = trained(StudentConfig("sew_resnet8", **SMALL))
    torch.save(net.state_dict(), tmp_path / "x.pth")
    before = (tmp_path / "x.pth").read_bytes()
    done = tool(tmp_path / "x.pth", tmp_path / "." / "x.pth", "--format=official", "model=sew_resnet8")
    assert (done.returncode, done.stderr) == (
        2,
        f"import_weights: {tmp_path}/x.pth: is the source itself; name another file\n",
    )
    assert (tmp_path / "x.pth").read_bytes() == before


def test_a_tag_that_timm_does_not_know(tmp_path):
    done = tool("resnet34.nonsense", tmp_path / "x.safetensors", "--format=timm", "model=sew_resnet34")
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("import_weights: source=resnet34.nonsense: its weights cannot be had here (")


RELEASED = {
    "spiking_resnet18": {"conv1.": "conv0.0.", "bn1.": "conv0.1.", "fc.": "classifier.0."},
    "spiking_resnet19": {"conv1.": "conv0.0.", "bn1.": "conv0.1.", "fc1.": "classifier.0.", "fc.": "classifier.2."},
    "preact_resnet34": {},
    "cifar_resnet34": {},
    "cifar_resnet19": {"fc1.": "fc.0.", "fc.": "fc.2."},
}
"""The names of the released code's files, from ours."""


@pytest.mark.parametrize("name", RELEASED)
def test_import_of_the_released_codes_checkpoints(name, tmp_path):
    spiking = not name.startswith("cifar")
    config = StudentConfig(name, num_classes=5, width=8 if spiking else None, neuron=NeuronConfig(decay=0.2))
    net = trained(config)
    tensors = {}
    for own, tensor in net.state_dict().items():
        first = next((prefix for prefix in RELEASED[name] if own.startswith(prefix)), "")
        theirs = RELEASED[name].get(first, "") + own.removeprefix(first)
        tensors[theirs.replace(".downsample.", ".shortcut.") if name.startswith("spiking") else theirs] = tensor
    optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9)
    state = {"best_acc": 71.04, "best_epoch": 99, "best_net": tensors, "optimizer": optimizer.state_dict()}
    torch.save(state, tmp_path / "model_weights.pth")
    arguments = [f"model={name}", "num_classes=5", "num_timesteps=4", "neuron.decay=0.2"]
    done = tool(
        tmp_path / "model_weights.pth",
        tmp_path / "student.safetensors",
        "--format=official",
        *(["width=8"] if spiking else []),
        *arguments,
    )
    assert done.returncode == 0, done.stderr
    assert f"took all {len(tensors)} tensors" in done.stdout
    again = load_student(tmp_path / "student.safetensors").double()
    assert torch.equal(again(images().double()), net.double()(images().double()))


@pytest.mark.parametrize("decay_input", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_import_of_spikingjellys_checkpoints(wrapped, decay_input, tmp_path):
    """Logits of the imported file against spikingjelly's own, in float64, with tau = 2: halving is exact."""
    pytest.importorskip("spikingjelly")
    from spikingjelly.activation_based import functional, neuron, surrogate
    from spikingjelly.activation_based.model import sew_resnet

    torch.manual_seed(0)
    peer = sew_resnet.sew_resnet18(
        num_classes=5, cnf="ADD", spiking_neuron=neuron.LIFNode, decay_input=decay_input,
        surrogate_function=surrogate.ATan(),
    )  # fmt: skip
    for module in peer.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 1.0, 2.0)
            nn.init.normal_(module.bias, 0.5, 0.2)
            module.running_var.fill_(0.3)
    tensors = {f"module.{n}": t for n, t in peer.state_dict().items()} if wrapped else peer.state_dict()
    torch.save({"model": tensors, "epoch": 3} if wrapped else tensors, tmp_path / "sew.pth")
    done = tool(
        tmp_path / "sew.pth", tmp_path / "student.safetensors", "--format", "spikingjelly", "model=sew_resnet18",
        "num_classes=5", "num_timesteps=3", "neuron.v_reset=0", "neuron.surrogate=atan",
        f"decay_input={str(decay_input).lower()}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    functional.set_step_mode(peer, "m")
    x = images().double()
    want = peer.double().eval()(x.expand(3, *x.shape))
    assert want.std() > 1e-3
    torch.testing.assert_close(load_student(tmp_path / "student.safetensors").double()(x), want, rtol=1e-9, atol=1e-9)
    assert load_student(tmp_path / "student.safetensors").neuron.slope == 2


def test_import_refuses_what_does_not_fit(tmp_path):
    net = create_student(StudentConfig("sew_resnet8", neuron=NeuronConfig("plif"), num_classes=5))
    source = tmp_path / "plif.pth"
    torch.save(net.state_dict(), source)
    cases = {
        ("num_classes=5",): "which wants student.neuron.kind=plif",
        ("num_classes=6", "neuron.kind=plif"): "has 5 classes, 6 wanted",
        ("num_classes=5", "neuron.knd=plif"): "student.neuron.knd: no such key; did you mean student.neuron.kind?",
        ("num_classes=five",): "num_classes: ",
        ("num_classes=5", "neuron.kind=plif", "decay_input=maybe"): "decay_input=maybe: must be true or false",
        ("num_classes=5", "neuron.kind=if", "decay_input=true"): "decay_input=true: for SEW-ResNets with a leak",
    }
    for arguments, message in cases.items():
        done = tool(source, tmp_path / "out", "--format=spikingjelly", "model=sew_resnet8", *arguments)
        assert done.returncode == 2
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert not (tmp_path / "out").exists()


def test_a_relu_network_starts_a_sew_student(tmp_path):
    torch.manual_seed(0)
    relu = timm.create_model("resnet18", num_classes=5)
    torch.save(relu.state_dict(), tmp_path / "resnet18.pth")
    destination = tmp_path / "student.safetensors"
    done = tool(tmp_path / "resnet18.pth", destination, "--format=timm", "model=sew_resnet18", "num_classes=7")
    assert done.returncode == 0, done.stderr
    assert "took 120 of 122 tensors; left as initialised: fc.weight, fc.bias" in done.stdout
    own, theirs = load_student(destination).state_dict(), relu.state_dict()
    assert all(torch.equal(own[name], theirs[name]) for name in theirs if not name.startswith("fc"))
    done = tool(tmp_path / "resnet18.pth", tmp_path / "none", "--format=timm", "model=spiking_resnet18", "width=8")
    assert done.returncode == 2
    assert "has conv1.weight [64, 3, 7, 7] instead of [8, 3, 3, 3]" in done.stderr
    assert not (tmp_path / "none").exists()
    done = tool("resnet19", tmp_path / "none", "--format=timm", "model=sew_resnet18")
    assert "source=resnet19: neither a file nor a timm model" in done.stderr


@pytest.mark.parametrize("wrapper", ["model", "net", "state_dict"])
def test_import_of_the_oldest_sew_resnets(wrapper, tmp_path):
    """The files of the SEW-ResNet paper: a convolution and its norm in a container, and the training's arguments."""
    neuron = NeuronConfig("if", surrogate="atan", v_reset=0.0, detach_reset=True)
    net = trained(StudentConfig("sew_resnet18", num_classes=5, num_timesteps=4, neuron=neuron))
    tensors = {}
    for name, tensor in net.state_dict().items():
        old = re.sub(r"^(layer.*)\.conv(\d)\.", r"\1.conv\2.module.0.", name)
        old = re.sub(r"^(layer.*)\.bn(\d)\.", r"\1.conv\2.module.1.", old)
        tensors[re.sub(r"\.downsample\.", ".downsample.0.module.", old)] = tensor
    assert "layer2.0.downsample.0.module.1.running_mean" in tensors
    state = {wrapper: tensors, "epoch": 319, "args": argparse.Namespace(T=4, connect_f="ADD")}
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    section = StudentConfig("sew_resnet18", num_classes=5, num_timesteps=4, neuron=neuron)
    tdkd_dist.weights.import_student(str(tmp_path / "old.pth"), tmp_path / "x.safetensors", "spikingjelly", section)
    with torch.no_grad():
        x = images()
        assert torch.equal(load_student(tmp_path / "x.safetensors")(x), net(x))
