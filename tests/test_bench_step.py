"""The contestants of tools/bench_step.py compute what they are said to, and a mistake is told before they start."""

import pytest
import torch
from step import allocated_mib, main
from step_contestants import LoopedNet

from tdkd_dist.config import StudentConfig
from tdkd_dist.neurons import NeuronConfig
from tdkd_dist.students import SpikingNet, create_student


def test_the_looped_network_is_our_student():
    for v_reset in (None, 0.0):
        neuron = NeuronConfig(v_reset=v_reset)
        torch.manual_seed(0)
        student = create_student(StudentConfig(model="sew_resnet18", num_classes=5, width=8, neuron=neuron)).double()
        images = torch.randn(3, 3, 32, 32, dtype=torch.float64)
        ours = student(images)
        ours.square().mean().backward()
        gradient = student.conv1.weight.grad.clone()
        student.zero_grad()
        assert isinstance(student, SpikingNet)
        theirs = LoopedNet(student)(images)
        theirs.square().mean().backward()
        assert ours.abs().max() > 0
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(student.conv1.weight.grad, gradient, rtol=1e-9, atol=1e-12)


def test_the_peak_is_what_lives_at_once():
    def step():
        a = torch.zeros(2**20)  # 4 MiB
        del a
        b = torch.zeros(2**20)
        c = b + 1
        assert c[0] == 1

    assert 8 <= allocated_mib(step) < 9


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--student", "nope"], "student.model=nope: no such model"),
        (["--student", "sew_resnet8", "--only", "full,resnet"], "--student sew_resnet8: nothing like it for resnet;"),
        (["--teacher", "nope"], "--teacher nope: timm has no such model"),
        (["--set", "train.recompute_stages=[9]"], "train.recompute_stages=[9]: sew_resnet34 has no stage 9"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
        (["--json", "nowhere/x.json"], "--json nowhere/x.json: no folder nowhere"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1
