"""The code that a run has generated for a GPU, counted without one: a small student beside its ReLU twin, in bf16."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import fake_cuda
import pytest
import torch
from generated_code import Count, Setting, count

from tdkd_dist.students.relu_resnet import ReluResNet
from tdkd_dist.students.sew_resnet import BasicBlock, SEWResNet

DEPTHS = (1, 1)
NEURON_LAYERS = 6


def count_both() -> tuple[Count, Count]:
    """A stem, a block with an identity shortcut and one with a convolution: as compiled for training, and plain."""
    torch.set_num_threads(1)
    student = count(Setting("student", "run"), SEWResNet(BasicBlock, DEPTHS, num_classes=10))
    return student, count(Setting("plain", "default"), ReluResNet(DEPTHS, small_stem=False))


@pytest.fixture(scope="module")
def counts() -> tuple[Count, Count]:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:  # the stubs stay in there
        return process.submit(count_both).result()


@pytest.mark.slow
def test_a_neuron_layer_is_one_kernel_each_way(counts):
    """Backward it may be less: the neurons before and on a block's shortcut read the same gradient."""
    student, _ = counts
    assert student.neuron_layers == student.forward.neuron_kernels == NEURON_LAYERS
    assert student.backward.neuron_kernels <= NEURON_LAYERS


@pytest.mark.slow
def test_fused_kernels_move_less_than_the_plain_networks(counts):
    student, plain = counts
    assert 0.4 * plain.moved < student.moved <= 0.85 * plain.moved


@pytest.mark.slow
def test_nothing_is_kept_but_what_convolutions_and_norms_need(counts):
    student, plain = counts
    assert student.other == plain.other == {}
    assert student.kept["float32"] < 2**20
    assert student.kept["bfloat16"] <= plain.kept["bfloat16"]


def test_another_torch_is_named_in_one_line():
    with pytest.raises(fake_cuda.StubError, match=r"^torch \S+ has no torch.cuda.gone: .* torch 2"):
        fake_cuda._replace("torch.cuda.gone", None)
