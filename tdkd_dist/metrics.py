"""Exact full-range metrics: what the student is worth after every timestep.

Shapes: T timesteps, B batch, K classes, G thresholds, N bins.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tdkd_dist import distributed
from tdkd_dist.losses import are_classes, as_classes, ensembles
from tdkd_dist.mistakes import Mistake

ECE_BINS = 15
TIGHTNESS = torch.logspace(0, -3, 49, dtype=torch.float64)
"""Thresholds of the early-exit curves: confidence at least 1 - x, or normalised entropy at most x."""
EXIT_RULES = ("confidence", "entropy")


def label_rank(logits: Tensor, labels_B: Tensor) -> Tensor:
    """`[..., B]`: how many classes rank before the label in logits `[..., B, K]`; 0 means the label is predicted.

    Of tied classes the lower index ranks first. A logit that is not a number never counts as correct.
    """
    K = logits.shape[-1]
    index = labels_B.unsqueeze(-1).expand(*logits.shape[:-1], 1)
    own = logits.gather(-1, index)
    earlier = torch.arange(K, device=logits.device) < index
    # not(<=) rather than >: a NaN then ranks before the label instead of behind it.
    return (~(logits <= own) | ((logits == own) & earlier)).sum(-1)


def first_exits(stops_GTB: Tensor) -> Tensor:
    """`[G, B]`: the first timestep (from 0) at which a sample stops, or the last one."""
    stops_GTB = stops_GTB.clone()
    stops_GTB[:, -1] = True
    return stops_GTB.to(torch.uint8).argmax(1)


class TimestepCounts:
    """Sums over a validation set of the ensemble after t = 1..T timesteps and of each single timestep.

    Counts are integers and losses float64 sums, kept on the logits' device; `summary` adds them up over all ranks, so
    the result is that of one process whatever the shares and batch sizes.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._tightness_G = TIGHTNESS

    def update(self, logits_TBK: Tensor, labels_B: Tensor) -> None:
        """Add a batch: logits `[T, B, K]` of any floating type, class labels `[B]`."""
        T, B, K = logits_TBK.shape
        z_TBK = logits_TBK.double()
        mean_TBK = ensembles(z_TBK)
        rank_TB = label_rank(mean_TBK, labels_B)
        log_probs_TBK = F.log_softmax(mean_TBK, dim=-1)
        nll_TB = F.nll_loss(log_probs_TBK.flatten(0, 1), labels_B.repeat(T), reduction="none").view(T, B)
        confidence_TB = log_probs_TBK.amax(-1).exp()
        self._add("top1", (rank_TB == 0).sum(1))
        self._add("top5", (rank_TB < min(5, K)).sum(1))
        self._add("step_top1", (label_rank(z_TBK, labels_B) == 0).sum(1))
        self._add("loss", nll_TB.sum(1))
        self._add("confidence", confidence_TB.sum(1))
        self._add("samples", torch.full((T,), B, device=z_TBK.device))
        self._add_calibration(confidence_TB, rank_TB == 0)
        self._add_exits("confidence", confidence_TB, rank_TB == 0)
        entropy_TB = -(log_probs_TBK.exp() * log_probs_TBK).nansum(-1) / math.log(max(K, 2))
        self._add_exits("entropy", entropy_TB, rank_TB == 0)
        self._add_first_correct(rank_TB == 0)

    def summary(self, num_timesteps: int, device: torch.device) -> dict[str, Any]:
        """The metrics of all ranks' samples; a rank that saw none must call it too. `Mistake` if no rank saw one.

        - `top1`, `top5`, `step_top1` (per cent), `loss`, `confidence`, `ece`, each a list over t: see `update`; ECE
          is the expected calibration error over 15 equal bins (lo, hi] of the confidence (Guo et al. 2017).
        - `top1_mean`, by which checkpoints are compared: the mean over t of top-1. `samples`: their count.
        - `first_correct_aet`: the mean of the first t at which a sample is right, over those that ever are; an oracle's
          average exit timestep. `never_correct`: the others, in per cent.
        - `exit_confidence`, `exit_entropy`: the early-exit curve, a dict of lists over thresholds: `threshold`,
          `mean_timesteps`, `top1` (per cent), and `histogram`, the per cent of samples that exit at t = 1..T.
        """
        T = num_timesteps
        total = {name: self._total(name, shape, device) for name, shape in _shapes(T).items()}
        samples = int(total["samples"][0])
        if samples == 0:
            raise Mistake("data.val holds no sample")
        row: dict[str, Any] = {}
        for name, scale in (("top1", 100), ("top5", 100), ("step_top1", 100), ("loss", 1), ("confidence", 1)):
            row[name] = [scale * value / samples for value in total[name].tolist()]
        gaps_TN = (total["bin_confidence"] - total["bin_correct"]).view(T, ECE_BINS).abs()
        row["ece"] = [value / samples for value in gaps_TN.sum(1).tolist()]
        row["top1_mean"] = 100 * total["top1"].sum().item() / samples / T
        row["samples"] = samples
        timesteps_T = torch.arange(1, T + 1, dtype=torch.float64)
        firsts_T = total["first_correct"]
        row["first_correct_aet"] = ((firsts_T * timesteps_T).sum() / firsts_T.sum().clamp(min=1)).item()
        row["never_correct"] = 100 * (1 - firsts_T.sum().item() / samples)
        for rule in EXIT_RULES:
            exits_GT = total[f"exits_{rule}"].view(-1, T)
            row[f"exit_{rule}"] = {
                "threshold": ((1 - TIGHTNESS) if rule == "confidence" else TIGHTNESS).tolist(),
                "mean_timesteps": ((exits_GT * timesteps_T).sum(1) / samples).tolist(),
                "top1": (100 * total[f"exit_correct_{rule}"] / samples).tolist(),
                "histogram": (100 * exits_GT / samples).tolist(),
            }
        return row

    def _add_calibration(self, confidence_TB: Tensor, correct_TB: Tensor) -> None:
        T = len(confidence_TB)
        edges = torch.arange(1, ECE_BINS, dtype=torch.float64, device=confidence_TB.device) / ECE_BINS
        cell_TB = torch.bucketize(confidence_TB, edges)
        cell_TB = cell_TB + ECE_BINS * torch.arange(T, device=cell_TB.device).unsqueeze(1)
        for name, value_TB in (("bin_confidence", confidence_TB), ("bin_correct", correct_TB.double())):
            zeros = torch.zeros(T * ECE_BINS, dtype=torch.float64, device=cell_TB.device)
            self._add(name, zeros.index_add(0, cell_TB.flatten(), value_TB.flatten()))

    def _add_exits(self, rule: str, score_TB: Tensor, correct_TB: Tensor) -> None:
        T = len(score_TB)
        if self._tightness_G.device != score_TB.device:  # once, since the host waits for such a copy
            self._tightness_G = TIGHTNESS.to(score_TB.device)
        threshold_G11 = self._tightness_G.view(-1, 1, 1)
        stops_GTB = score_TB >= 1 - threshold_G11 if rule == "confidence" else score_TB <= threshold_G11
        exit_GB = first_exits(stops_GTB)
        self._add(f"exits_{rule}", F.one_hot(exit_GB, T).sum(1).flatten())
        self._add(f"exit_correct_{rule}", correct_TB.gather(0, exit_GB).sum(1))

    def _add_first_correct(self, correct_TB: Tensor) -> None:
        first_B = correct_TB.to(torch.uint8).argmax(0)
        ever_B = correct_TB.any(0)
        self._add("first_correct", (F.one_hot(first_B, len(correct_TB)) * ever_B.unsqueeze(1)).sum(0))

    def _add(self, name: str, values: Tensor) -> None:
        self._sums[name] = self._sums[name] + values if name in self._sums else values

    def _total(self, name: str, length: int, device: torch.device) -> Tensor:
        zeros = torch.zeros(length, dtype=torch.float64, device=device)
        return distributed.sum_over_ranks(self._sums.get(name, zeros).double()).cpu()


def _shapes(T: int) -> dict[str, int]:
    """How long each sum is, so that a rank without samples takes part."""
    G = len(TIGHTNESS)
    per_timestep = ("top1", "top5", "step_top1", "loss", "confidence", "samples", "first_correct")
    lengths = dict.fromkeys(per_timestep, T) | {"bin_confidence": T * ECE_BINS, "bin_correct": T * ECE_BINS}
    for rule in EXIT_RULES:
        lengths |= {f"exits_{rule}": G * T, f"exit_correct_{rule}": G}
    return lengths


def ensemble_losses(logits_TBK: Tensor, labels: Tensor) -> Tensor:
    """`[3, T]`: sums over a batch of the ensembles' cross-entropy and of correct samples after t, and the batch size.

    `labels` are classes `[B]` or probabilities `[B, K]`, of which the largest counts as the class.
    """
    T, B, _ = logits_TBK.shape
    mean_TBK = ensembles(logits_TBK.detach().float())
    repeated = labels.repeat(T) if are_classes(labels) else labels.repeat(T, 1)
    loss_T = F.cross_entropy(mean_TBK.flatten(0, 1), repeated, reduction="none").view(T, B).sum(1)
    correct_T = (mean_TBK.argmax(-1) == as_classes(labels)).sum(1)
    return torch.stack([loss_T, correct_T, torch.full_like(loss_T, B)]).double()
