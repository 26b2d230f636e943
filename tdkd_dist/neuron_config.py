"""The constants of a spiking neuron, apart from its arithmetic: reading a recipe must not wait for torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tdkd_dist.limits import Section, limited
from tdkd_dist.mistakes import Mistakes

SLOPES = {"sigmoid": 4.0, "atan": 2.0, "rectangle": 1.0, "triangle": 1.0}
"""Each surrogate gradient's default slope."""


@dataclass
class NeuronConfig(Section):
    """One spiking neuron's constants; every layer of a student shares them.

    Charge: ``v <- v_r + decay * (v - v_r) + x`` with ``v_r = v_reset or 0``, from ``v = v_init`` at the start, and at
    first with ``first_scale * x``; a spike when ``v >= threshold``.
    Raises `Mistake`, naming the key, for a value outside its range.
    """

    section: ClassVar[str] = "student.neuron"
    kind: Literal["if", "lif", "plif"] = "lif"
    """`if`: no leak (decay 1, whatever `decay` says); `plif`: each layer learns its decay, starting from `decay`."""
    decay: float = limited(0.5, "[0, 1]")
    """Share of the membrane potential that a timestep keeps."""
    threshold: float = limited(1.0, "> 0", most=1000)
    """The membrane potential from which on a neuron fires."""
    v_reset: float | None = limited(None, "[-1000, 1000]")
    """None: soft reset (subtract the threshold); a number: hard reset to it."""
    surrogate: Literal["sigmoid", "atan", "rectangle", "triangle"] = "sigmoid"
    """The shape of the gradient that stands in for the spike's."""
    surrogate_alpha: float | None = limited(None, "> 0", most=1000)
    """Slope of the surrogate gradient; None: the surrogate's own default (sigmoid 4, atan 2, the others 1)."""
    detach_reset: bool = False
    """Stop the gradient through the spike in the reset."""
    v_init: float | int | Literal["learned"] | None = limited(None, "[-1000, 1000]")
    """The membrane potential that every image starts from; None: the reset value. `learned`: each channel of each layer
    learns its own, starting from the reset value (Shen et al., NeurIPS 2024)."""
    first_scale: float | int | Literal["learned"] | None = limited(None, "[0, 100]")
    """What the first timestep's current is multiplied by, since the later ones find membranes that like currents have
    charged; None: 1. `learned`: each channel of each layer learns its own, starting from 1."""

    def check_together(self, found: Mistakes) -> None:
        """What concerns several keys of the section."""
        found.require(
            self.kind != "plif" or 0 < self.decay < 1,
            f"student.neuron.decay={self.decay}: must be in (0, 1) for kind=plif",
        )
        found.require(
            self.v_reset is None or not self.v_reset >= self.threshold,
            f"student.neuron.v_reset={self.v_reset}: must be below student.neuron.threshold={self.threshold}",
        )
        found.require(
            self.v_init is None or isinstance(self.v_init, str) or not self.v_init >= self.threshold,
            f"student.neuron.v_init={self.v_init}: must be below student.neuron.threshold={self.threshold}",
        )

    @property
    def slope(self) -> float:
        """The surrogate's slope with its default filled in."""
        return SLOPES[self.surrogate] if self.surrogate_alpha is None else self.surrogate_alpha
