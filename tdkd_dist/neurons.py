"""Spiking neurons."""

from dataclasses import dataclass
from typing import Literal


@dataclass
class NeuronConfig:
    """One spiking neuron's constants; every layer of a student shares them.

    Charge: ``v <- v_r + decay * (v - v_r) + x`` with ``v_r = v_reset or 0``; a spike when ``v >= threshold``.
    """

    kind: Literal["if", "lif", "plif"] = "lif"
    decay: float = 0.5
    threshold: float = 1.0
    v_reset: float | None = None
    """None: soft reset (subtract the threshold); a number: hard reset to it."""
    surrogate: Literal["sigmoid", "atan", "rectangle", "triangle"] = "sigmoid"
    surrogate_alpha: float | None = None
    """Slope of the surrogate gradient; None: the surrogate's own default (sigmoid 4, atan 2, the others 1)."""
    detach_reset: bool = False
    """Stop the gradient through the spike in the reset."""
