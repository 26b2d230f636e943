"""The batch norm of tools/bench/timestep_statistics.py, against PyTorch's own, one timestep at a time."""

import torch
from timestep_statistics import TimestepStatistics
from torch import nn

T, B, C = 3, 4, 5


def test_each_timestep_is_normalised_by_what_was_measured_of_it():
    torch.manual_seed(0)
    bn = nn.BatchNorm2d(C).eval()
    nn.init.uniform_(bn.weight)
    nn.init.normal_(bn.bias)
    bn.running_mean.normal_()
    layer, x = (
        TimestepStatistics(bn, T),
        torch.randn(T * B, C, 6, 6) + torch.arange(T).repeat_interleave(B).view(-1, 1, 1, 1),
    )
    torch.testing.assert_close(layer(x), bn(x))

    def alone(part: torch.Tensor) -> torch.Tensor:
        return nn.functional.batch_norm(part, None, None, bn.weight, bn.bias, training=True)

    wanted = torch.cat([alone(part) for part in x.chunk(T)])
    layer.measuring = True
    torch.testing.assert_close(layer(x), wanted)
    layer.measuring = False
    torch.testing.assert_close(layer(x), bn(x))  # measuring changed nothing yet
    layer.own = (0, 1, 2)
    torch.testing.assert_close(layer(x), wanted)
    layer.own = (0,)
    torch.testing.assert_close(layer(x), torch.cat([wanted[:B], bn(x)[B:]]))
