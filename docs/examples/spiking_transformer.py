"""A small spiking transformer, a student from outside the package (docs/adding_a_student.md).

After Spikformer (Zhou et al. 2023, arXiv:2209.15425): queries, keys and values are spikes, and attention needs no
softmax. It is made to be read, not to reach anything.

Shapes: T timesteps, B images, C channels, h heads, d channels a head, N = H * W patches. Between the layers x is
`[T*B, C, H, W]`, T-major.
"""

from torch import Tensor, nn

from tdkd_dist.neurons import NeuronConfig, SpikingNeuron
from tdkd_dist.students import SpikingNet


def project(in_channels: int, out_channels: int, patch: int = 1) -> nn.Sequential:
    """A linear map of every patch, as a convolution, and a batch norm."""
    conv = nn.Conv2d(in_channels, out_channels, patch, patch, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(out_channels))


class Block(nn.Module):
    """Spiking self-attention and a spiking MLP, each added to its real-valued input."""

    def __init__(self, net: "SpikingTransformer", channels: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.sn_in, self.sn_attended, self.sn_mlp = (net.make_neuron(channels) for _ in range(3))
        self.sn_hidden = net.make_neuron(2 * channels)
        self.queries, self.keys, self.values = (project(channels, channels) for _ in range(3))
        self.sn_q, self.sn_k, self.sn_v = (net.make_neuron(channels) for _ in range(3))
        self.out = project(channels, channels)
        self.widen, self.narrow = project(channels, 2 * channels), project(2 * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """`[T*B, C, H, W]` in and out."""
        spikes = self.sn_in(x)
        q, k, v = (  # [T*B, h, d, N]
            sn(layer(spikes)).flatten(2).unflatten(1, (self.heads, -1))
            for layer, sn in ((self.queries, self.sn_q), (self.keys, self.sn_k), (self.values, self.sn_v))
        )
        # Without a softmax the products may be taken in either order: (k v) first takes N d^2, not N^2 d.
        attended = ((v @ k.transpose(2, 3)) @ q) * (q.shape[2] * q.shape[3]) ** -0.5
        x = x + self.out(self.sn_attended(attended.reshape(x.shape)))
        hidden = self.sn_hidden(self.widen(self.sn_mlp(x)))
        y: Tensor = x + self.narrow(hidden)
        return y


class SpikingTransformer(SpikingNet):
    """Patches of 4 x 4 pixels, two blocks, a neuron, and a classifier on the mean over patches."""

    def __init__(
        self, num_classes: int, in_chans: int, num_timesteps: int, neuron: NeuronConfig, width: int = 64, heads: int = 4
    ) -> None:
        super().__init__(num_classes, in_chans, num_timesteps, neuron)
        self.embed = project(in_chans, width, patch=4)
        self.blocks = nn.Sequential(*(Block(self, width, heads) for _ in range(2)))
        self.sn_head: SpikingNeuron = self.make_neuron(width)
        self.make_classifier(width)

    def forward_features(self, x: Tensor) -> Tensor:
        """`[T, B, C, H, W]`: the last neurons' spikes at every patch."""
        return self.unfold(self.sn_head(self.blocks(self.embed(self.fold(x)))))


def spiking_transformer(
    num_classes: int, in_chans: int, num_timesteps: int, neuron: NeuronConfig, width: int = 64
) -> SpikingTransformer:
    """What `student.model=...:spiking_transformer` calls; `width` is the channels of a patch."""
    return SpikingTransformer(num_classes, in_chans, num_timesteps, neuron, width)
