"""`create_student`: a recipe's `student:` section as a network, and the ReLU networks beside the spiking ones."""

import pytest
import timm
import torch

import tdkd_dist
from tdkd_dist.config import StudentConfig
from tdkd_dist.recipe import load_config
from tdkd_dist.students import create_student, is_spiking


def test_create_student_passes_on_what_the_model_takes():
    spiking = create_student(
        StudentConfig("sew_resnet8", num_classes=3, num_timesteps=2, connect="IAND", width=4, in_chans=1)
    )
    assert is_spiking(spiking)
    assert is_spiking(torch.compile(spiking))
    assert spiking(torch.randn(2, 1, 28, 28)).shape == (2, 2, 3)
    assert spiking.layer1[0].connect == "IAND"
    dropped = create_student(StudentConfig("sew_resnet8", drop_path=0.2, zero_init_last=True))
    assert dropped.layer3[0].drop_path.rate == 0.2
    assert not dropped.layer3[0].bn2.weight.any()
    ordinary = create_student(StudentConfig("resnet18", num_classes=3, in_chans=1))
    assert not is_spiking(ordinary)
    assert ordinary.eval()(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert tdkd_dist.students.create_student is create_student


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": "sew_resnet43"}, r"student\.model=sew_resnet43: no such model; did you mean .*sew_resnet34"),
        ({"model": "sew_resnet34.nobody"}, r"student\.model=sew_resnet34\.nobody: "),
        ({"model": "preact_resnet34", "connect": "ADD"}, r"student\.connect=ADD: preact_resnet34 "),
        ({"model": "resnet18", "connect": "ADD"}, r"student\.connect=ADD: resnet18 "),
        ({"model": "resnet18", "width": 8}, r"student\.width=8: resnet18 "),
        ({"model": "resnet18", "zero_init_last": True}, r"student\.zero_init_last=True: resnet18 "),
        ({"model": "resnet18", "drop_path": 0.1}, r"student\.drop_path=0\.1: resnet18 "),
        ({"model": "sew_resnet18", "drop_path": 1.0}, r"student\.drop_path=1\.0: must be in \[0, 1\)"),
        ({"model": "sew_resnet18", "connect": "OR"}, r"student\.connect=OR: must be one of ADD, AND, IAND"),
    ],
)
def test_create_student_names_the_key(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        create_student(StudentConfig(**arguments))


@pytest.mark.parametrize("name", ["cifar_resnet18", "cifar_resnet19", "cifar_resnet34"])
def test_the_papers_relu_teachers(name):
    net = timm.create_model(name, num_classes=100).eval()
    x = torch.randn(2, 3, 32, 32)
    assert net(x).shape == (2, 100)
    assert net.forward_features(x).shape == (2, 512, *((8, 8) if name == "cifar_resnet19" else (4, 4)))
    assert not is_spiking(net)
    if name == "cifar_resnet34":  # torchvision's, but for the smaller stem
        torchvision = pytest.importorskip("torchvision")
        names = torchvision.models.resnet34(num_classes=100).state_dict()
        own = net.state_dict()
        assert names.keys() == own.keys()
        assert [n for n in names if names[n].shape != own[n].shape] == ["conv1.weight"]


@pytest.mark.parametrize(("recipe", "variant"), [("imagenette_sew18_cpu", "relu"), ("cifar10_sew8_cpu", "relu8")])
def test_the_relu_network_of_a_students_shape(recipe, variant):
    sew, relu = (create_student(load_config(recipe, settings).student) for settings in ([], [f"variant={variant}"]))
    assert {n: p.shape for n, p in relu.named_parameters()} == {n: p.shape for n, p in sew.named_parameters()}
    x = torch.randn(2, 3, 32, 32)
    sew_maps = sew.forward_features(x).shape[-2:]
    assert relu.forward_features(x).shape[-2:] == sew_maps


def test_the_relu_network_is_torchvisions():
    torchvision = pytest.importorskip("torchvision")
    peer = torchvision.models.resnet18(num_classes=10).eval()
    own = create_student(StudentConfig(model="relu_resnet18", num_classes=10)).eval()
    own.load_state_dict(peer.state_dict())
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(own(x), peer(x), rtol=1e-5, atol=1e-5)
