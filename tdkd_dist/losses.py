"""The objective: cross-entropy, distillation and self-distillation at every timestep.

Yu et al., "Efficient Logit-based Knowledge Distillation of Deep Spiking Neural Networks for Full-Range Timestep
Deployment", ICML 2025.

Shapes: T timesteps, B batch, K classes, S what the terms see (T timesteps, or 1 for the ensemble alone).
"""

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tdkd_dist.mistakes import Mistake

SPREAD_EPS = 1e-7
"""Added to the standard deviation of logits, which is 0 where all are equal."""


class LossTerms(NamedTuple):
    """The weighted sum and its terms, each a mean over timesteps and batch before its weight."""

    total: Tensor
    ce: Tensor
    kl: Tensor
    sd: Tensor
    consistency: Tensor
    mse: Tensor


class TemporalDistillationLoss(nn.Module):
    """The paper's objective TWCE + alpha TWKL + beta TWSD (Yu et al., ICML 2025), and the baseline on the ensemble.

    With student logits z_t, teacher logits q, labels y and temperature tau:

    - ce = 1/T sum_t CE(z_t, y)
    - kl = tau^2/T sum_t KL(softmax(q/tau) || softmax(z_t/tau))
    - sd = tau^2/T sum_t KL(softmax(sg(s)/tau) || softmax(z_t/tau)), with sg stopping the gradient

    `self_target` says what s is: "ensemble", the mean of z_t over all timesteps (the paper); "correct_only", the mean
    over the timesteps that classify the sample correctly, zeros if none does (the paper's released code); "weighted",
    for each t a mean over the other timesteps s, weighted by the softmax over s of (1 - H(softmax z_s)/ln K) cos(z_t,
    z_s): how sure s is, and how similar (SeAl-KD, arXiv 2605.14252).
    `target` says which logits stand for z_t in the terms: "temporal", each timestep's own; "ensemble", the mean over
    all timesteps alone (standard logit distillation); "prefix", the mean m_t over the first t timesteps, which is what
    is deployed at t; "mix", both z_t and m_t, each with half the weight, except that self-distillation sees m_t alone.
    The self-target is always made of the timesteps' own logits. `weights` says what each term's mean over timesteps is:
    "equal", 1/T sum_t, or "linear", 2/(T (T+1)) sum_t t. Since z_i is a part of every m_t from t = i on, equal weights
    move the first of four steps eight times as much as the last by "prefix", and linear ones four times.

    With `standardise` both divergences are of logits from which their mean over classes was subtracted, and which were
    divided by their standard deviation (Sun et al., CVPR 2024): their scale may differ from step to step. With
    `align_errors` the teacher's term gives the class that the student's logits predict, where that is wrong, the logit
    of the right class, and in the teacher's both classes the smaller of its two: the wrong class need not be lowered
    below the right one (SeAl-KD).

    Two more, off by default, are always of the timesteps' own logits and their ensembles m_t = mean(z_1..z_t):

    - consistency = 1/(T-1) sum_{t<T} CE(softmax(sg(m_{t+1})), m_t), added with the weight `consistency` (0.3 is usual):
      each ensemble follows its successor, as adjacent timesteps do in Ding et al., ICLR 2025
    - mse = 1/(T K) sum_t |z_t - 1|^2; `tet` is the lambda of (1 - lambda) ce + lambda mse (Deng et al., ICLR 2022,
      temporal efficient training)
    """

    def __init__(
        self,
        alpha: float,
        beta: float,
        temperature: float,
        self_target: Literal["ensemble", "correct_only", "weighted"] = "ensemble",
        *,
        target: Literal["temporal", "ensemble", "prefix", "mix"] = "temporal",
        weights: Literal["equal", "linear"] = "equal",
        standardise: bool = False,
        align_errors: bool = False,
        label_smoothing: float = 0.0,
        consistency: float = 0.0,
        tet: float = 0.0,
    ) -> None:
        super().__init__()
        if self_target not in ("ensemble", "correct_only", "weighted"):
            raise Mistake(f"loss.self_target={self_target}: must be ensemble, correct_only or weighted")
        if target not in ("temporal", "ensemble", "prefix", "mix"):
            raise Mistake(f"loss.target={target}: must be temporal, ensemble, prefix or mix")
        if weights not in ("equal", "linear"):
            raise Mistake(f"loss.weights={weights}: must be equal or linear")
        if weights != "equal" and target == "mix":
            raise Mistake(f"loss.weights={weights}: loss.target=mix has two terms a timestep; leave it equal")
        if not temperature > 0:
            raise Mistake(f"loss.temperature={temperature}: must be positive")
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.self_target = self_target
        self.target = target
        self.weights = weights
        self.standardise = standardise
        self.align_errors = align_errors
        self.label_smoothing = label_smoothing
        self.consistency = consistency
        self.tet = tet

    def forward(self, student_logits_TBK: Tensor, teacher_logits_BK: Tensor | None, labels: Tensor) -> LossTerms:
        """The terms for logits `[T, B, K]` and `[B, K]`, and labels `[B]` (classes) or `[B, K]` (probabilities).

        Computed in fp32 or, for float64 logits, in float64. `teacher_logits_BK` may be None when alpha is 0. A term
        whose weight is 0 is not computed and reads 0.
        """
        if self.alpha and teacher_logits_BK is None:
            raise ValueError(f"loss.alpha={self.alpha} needs the teacher's logits")
        z_TBK = _at_least_fp32(student_logits_TBK)
        seen_SBK = self._seen(z_TBK)
        log_probs_SBK = F.log_softmax(seen_SBK, dim=-1)
        ce = self._cross_entropy(self._weigh(log_probs_SBK), labels)
        kl = sd = consistency = mse = z_TBK.new_zeros(())
        if (self.alpha or self.beta) and (self.temperature != 1 or self.standardise):
            log_probs_SBK = self._soft(seen_SBK)
        if self.alpha and teacher_logits_BK is not None:
            kl = self._from_teacher(seen_SBK, log_probs_SBK, _at_least_fp32(teacher_logits_BK).to(z_TBK.dtype), labels)
        if self.beta:
            # A mixture's second half are the ensembles.
            own_SBK = log_probs_SBK[len(z_TBK) :] if self.target == "mix" else log_probs_SBK
            sd = self._divergence(self._self_target(z_TBK.detach(), labels), own_SBK)
        total = (1 - self.tet) * ce + self.alpha * kl + self.beta * sd
        if self.consistency and len(z_TBK) > 1:
            mean_TBK = ensembles(z_TBK)
            consistency = F.cross_entropy(mean_TBK[:-1].flatten(0, 1), mean_TBK[1:].detach().softmax(-1).flatten(0, 1))
            total = total + self.consistency * consistency
        if self.tet:
            mse = (z_TBK - 1).square().mean()
            total = total + self.tet * mse
        return LossTerms(total, ce, kl, sd, consistency, mse)

    def _seen(self, z_TBK: Tensor) -> Tensor:
        if self.target == "temporal":
            return z_TBK
        if self.target == "ensemble":
            return z_TBK.mean(0, keepdim=True)
        return torch.cat([z_TBK, ensembles(z_TBK)]) if self.target == "mix" else ensembles(z_TBK)

    def _soft(self, logits: Tensor) -> Tensor:
        """Logarithms of the probabilities that the divergences compare."""
        if self.standardise:
            spread = logits.std(-1, correction=0, keepdim=True)
            logits = (logits - logits.mean(-1, keepdim=True)) / (spread + SPREAD_EPS)
        return F.log_softmax(logits / self.temperature, dim=-1)

    def _weigh(self, values_SBK: Tensor) -> Tensor:
        """Such that the mean over timesteps is the one that `weights` says."""
        S = len(values_SBK)
        if self.weights == "equal" or S == 1:
            return values_SBK
        t_S11 = torch.arange(1, S + 1, device=values_SBK.device, dtype=values_SBK.dtype).view(-1, 1, 1)
        return values_SBK * (2 * t_S11 / (S + 1))

    def _cross_entropy(self, log_probs_SBK: Tensor, labels: Tensor) -> Tensor:
        S, _, K = log_probs_SBK.shape
        smoothing = self.label_smoothing
        if are_classes(labels):
            nll = F.nll_loss(log_probs_SBK.flatten(0, 1), labels.repeat(S))
            return nll if smoothing == 0 else (1 - smoothing) * nll - smoothing * log_probs_SBK.mean()
        return -(((1 - smoothing) * labels + smoothing / K) * log_probs_SBK).sum(-1).mean()

    def _from_teacher(self, seen_SBK: Tensor, log_probs_SBK: Tensor, q_BK: Tensor, labels: Tensor) -> Tensor:
        if not self.align_errors:
            return self._divergence(q_BK, log_probs_SBK)
        right_SB1 = as_classes(labels).expand(len(seen_SBK), -1).unsqueeze(-1)
        guess_SB1 = seen_SBK.argmax(-1, keepdim=True)  # where it is right, all this changes nothing
        aligned_SBK = seen_SBK.scatter(-1, guess_SB1, seen_SBK.gather(-1, right_SB1))
        q_SBK = q_BK.expand_as(seen_SBK)
        smaller_SB1 = torch.minimum(q_SBK.gather(-1, guess_SB1), q_SBK.gather(-1, right_SB1))
        q_SBK = q_SBK.scatter(-1, guess_SB1, smaller_SB1).scatter(-1, right_SB1, smaller_SB1)
        return self._divergence(q_SBK, self._soft(aligned_SBK))

    def _self_target(self, z_TBK: Tensor, labels: Tensor) -> Tensor:
        """`[B, K]`, or `[T, B, K]` where each timestep has its own."""
        if self.self_target == "ensemble":
            return z_TBK.mean(0)
        if self.self_target == "weighted":
            return _weighted_others(z_TBK)
        correct_TB1 = (z_TBK.argmax(-1) == as_classes(labels)).unsqueeze(-1)
        # 1e-8 as in the released code: a sample that no timestep gets right has an all-zero target.
        return (z_TBK * correct_TB1).sum(0) / (correct_TB1.sum(0, dtype=z_TBK.dtype) + 1e-8)

    def _divergence(self, target: Tensor, log_probs_SBK: Tensor) -> Tensor:
        """From the target `[B, K]` or `[S, B, K]`."""
        target_log_probs_SBK = self._soft(target.detach()).expand_as(log_probs_SBK)
        per_class_SBK = F.kl_div(log_probs_SBK, target_log_probs_SBK, log_target=True, reduction="none")
        return self.temperature**2 * self._weigh(per_class_SBK).sum(-1).mean()


def are_classes(labels: Tensor) -> bool:
    """Whether labels are classes `[B]`; else they are probabilities `[B, K]`."""
    return labels.ndim == 1


def as_classes(labels: Tensor) -> Tensor:
    """`[B]`: classes; of probabilities `[B, K]` the most probable."""
    return labels if are_classes(labels) else labels.argmax(-1)


def ensembles(logits_TBK: Tensor) -> Tensor:
    """`[T, B, K]`: the mean of the logits over the first t timesteps, for t = 1..T; what is deployed at t."""
    T = logits_TBK.shape[0]
    steps_T11 = torch.arange(1, T + 1, device=logits_TBK.device, dtype=logits_TBK.dtype).view(T, 1, 1)
    return logits_TBK.cumsum(0) / steps_T11


def _weighted_others(z_TBK: Tensor) -> Tensor:
    """For each timestep the mean of the others' logits, weighted by how sure and how similar they are; alone: its own.

    SeAl-KD, arXiv 2605.14252.
    """
    T, _, K = z_TBK.shape
    if T == 1:
        return z_TBK
    log_probs_TBK = F.log_softmax(z_TBK, dim=-1)
    sureness_TB = 1 + (log_probs_TBK.exp() * log_probs_TBK).sum(-1) / math.log(K) if K > 1 else z_TBK.new_ones(T, 1)
    direction_TBK = F.normalize(z_TBK, dim=-1)
    scores_TTB = (direction_TBK.unsqueeze(1) * direction_TBK).sum(-1) * sureness_TB
    itself_TT1 = torch.eye(T, dtype=torch.bool, device=z_TBK.device).unsqueeze(-1)
    weights_TTB = scores_TTB.masked_fill(itself_TT1, -math.inf).softmax(1)
    return torch.einsum("tsb,sbk->tbk", weights_TTB, z_TBK)


def _at_least_fp32(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()
