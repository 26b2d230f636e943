"""The objective's keys, apart from its arithmetic: reading a recipe must not wait for torch."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from tdkd_dist.limits import Section, limited
from tdkd_dist.mistakes import Mistakes


@dataclass
class LossConfig(Section):
    """Cross-entropy + alpha * distillation + beta * self-distillation (Yu et al., ICML 2025); see `losses`."""

    section: ClassVar[str] = "loss"
    target: Literal["temporal", "ensemble", "prefix", "mix"] = "temporal"
    """Which logits each term sees: every timestep's own, the final ensemble only, the ensemble after each step, or half
    of the first and half of the last (`mix`)."""
    weights: Literal["equal", "linear"] = "equal"
    """Of the timesteps in each term: `linear`, in proportion to t. Of ensembles it makes up for that early steps are a
    part of more of them."""
    standardise: bool = False
    """In both distillation terms, subtract the logits' mean over classes and divide by their standard deviation."""
    alpha: float = limited(0.2, ">= 0", most=10_000)
    """Weight of the teacher's term; 0: the teacher is not run."""
    beta: float = limited(0.5, ">= 0", most=10_000)
    """Weight of self-distillation."""
    temperature: float = limited(1.0, "[0.01, 1000]")
    """Divides the logits before both distillation terms, which are multiplied by its square."""
    align_errors: bool = False
    """In the teacher's term, where the student errs, give its class the logit of the right one; the teacher's too."""
    self_target: Literal["ensemble", "correct_only", "weighted"] = "ensemble"
    """What self-distillation learns from: the mean over timesteps, that of the timesteps that are right, or for each
    timestep a mean of the others, weighted by how sure and how similar they are."""
    label_smoothing: float = limited(0.0, "[0, 1)")
    """Share of each label that is spread over all classes."""
    consistency: float = limited(0.0, ">= 0", most=10_000)
    """Weight of each ensemble's cross-entropy to the next one, one timestep later (0.3 is usual); 0: off."""
    tet: float = limited(0.0, "[0, 1)")
    """Lambda of temporal efficient training: (1 - lambda) cross-entropy + lambda MSE of the logits to 1; 0: off."""

    def check_together(self, found: Mistakes) -> None:
        """What concerns several keys of the section."""
        found.require(
            self.self_target != "weighted" or self.target == "temporal",
            f"loss.self_target=weighted: a mean for each timestep, which needs loss.target=temporal, not {self.target}",
        )
        found.require(
            self.weights == "equal" or self.target != "mix",
            f"loss.weights={self.weights}: loss.target=mix has two terms a timestep; leave it equal",
        )
