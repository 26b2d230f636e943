"""Whether and how a network in training is compiled."""

import torch
import torch._dynamo.config
import torch._functorch.config
import torch._inductor.config
from torch import nn

from tdkd_dist.config import TrainConfig
from tdkd_dist.neurons import SpikingNeuron

VERSIONS = 64
"""Image sizes, batch sizes and numbers of timesteps, in training and in validation, that a network is compiled for.

Dynamo's limit is 8, beyond which it silently runs eager: a run whose crops grow over four sizes while T is drawn from 1
to 6 has 24. All are static: code for any size takes many times as long to compile (docs/dependencies.md).
"""
KERNELS = {"max_pointwise_cat_inputs": 0, "max_complex_pointwise_cat_inputs": 0}
"""Inductor's settings for training, chosen by what its CUDA code moves (docs/results/generated_code.md).

A neuron layer ends in a concatenation of its T timesteps, forward and backward. Up to 8 inputs, Inductor makes that a
computation with a branch an input, each of which runs through the recursion from the start; without, every timestep
writes its part of the result, and all of them are one kernel. On a CPU it never makes branches.
"""
PAYS_AFTER = 500
"""Optimiser steps below which `train.compile=auto` doesn't compile: a cold compilation takes a minute or more."""


def compiles(train: TrainConfig, steps_per_epoch: int, device: torch.device) -> bool:
    """Whether this run compiles, as `train.compile` says."""
    if train.compile != "auto":
        return bool(train.compile)
    steps = min(train.max_steps or 10**9, train.epochs * steps_per_epoch)
    return device.type == "cuda" and steps >= PAYS_AFTER


def compile_training(net: nn.Module, activation_budget: float = 1.0, device: torch.device | None = None) -> None:
    """Compile `net` in place for training on `device`; None: where it is.

    `activation_budget`: the share of the activations which its compiled backward pass would like to have kept that may
    be kept; what is cheapest to compute again is dropped first (Chen et al., 2016, automated by AOTAutograd's
    partitioner). In a spiking ResNet that is every spike: batch norm needs the convolution's output anyway, and the
    spikes follow from it. It holds for the whole process; `KERNELS`, for this network's forward and backward pass.
    """
    device = device or next((p.device for p in net.parameters()), torch.device("cpu"))
    for module in net.modules():
        if isinstance(module, SpikingNeuron):
            module.writes_shortcut_gradient = device.type == "cuda"
    torch._functorch.config.activation_memory_budget = activation_budget
    torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, VERSIONS)
    known = {key: value for key, value in KERNELS.items() if hasattr(torch._inductor.config, key)}
    net.compile(dynamic=False, options=known)
