"""The contestants of tools/bench_step.py compute what they are said to."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from tdkd_dist.config import StudentConfig
from tdkd_dist.neurons import NeuronConfig
from tdkd_dist.students import SpikingNet, create_student

TOOLS = Path(__file__).resolve().parent.parent / "tools"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, TOOLS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def test_the_looped_network_is_our_student():
    contestants = load("step_contestants")
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
        theirs = contestants.LoopedNet(student)(images)
        theirs.square().mean().backward()
        assert ours.abs().max() > 0
        torch.testing.assert_close(theirs, ours, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(student.conv1.weight.grad, gradient, rtol=1e-9, atol=1e-12)
