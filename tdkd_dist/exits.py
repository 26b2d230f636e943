"""What stopping by a rule is worth on a validation set, exactly and over all ranks.

Shapes: T timesteps, B batch, K classes, N bins.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkd_dist import distributed
from tdkd_dist.anytime import ExitRule
from tdkd_dist.losses import ensembles
from tdkd_dist.metrics import label_rank

BINS = 4096
"""Of the scores in 0 to 1, equally wide, by which right answers are ranked against wrong ones."""


class ExitCounts:
    """Sums over a validation set of when a rule stops, whether the answer is right then, and how its score ranks that.

    `summary` adds them up over all ranks.
    """

    def __init__(self, rule: ExitRule, num_timesteps: int, device: torch.device) -> None:
        self._rule, self._T = rule, num_timesteps
        zeros = torch.zeros(num_timesteps, dtype=torch.int64, device=device)
        self._stopped_T, self._right_T = zeros, zeros.clone()
        self._ranked_2N = torch.zeros(2, BINS, dtype=torch.int64, device=device)
        """How many wrong and right answers have a score of each bin."""

    def update(self, logits_TBK: Tensor, labels_B: Tensor) -> None:
        """Add a batch: logits `[T, B, K]` of any floating type, class labels `[B]`."""
        means_TBK = ensembles(logits_TBK.float())
        exit_B = self._rule.decide_measured(self._rule.measure(means_TBK)) - 1
        mean_BK = means_TBK.gather(0, exit_B.view(1, -1, 1).expand(1, -1, means_TBK.shape[-1])).squeeze(0)
        right_B = label_rank(mean_BK, labels_B) == 0
        exits_BT = F.one_hot(exit_B, self._T)
        self._stopped_T = self._stopped_T + exits_BT.sum(0)
        self._right_T = self._right_T + (exits_BT * right_B.unsqueeze(1)).sum(0)
        # Patience has no score of its own: its answers are ranked by their probability.
        kind = "confidence" if self._rule.kind == "patience" else self._rule.kind
        score_B = ExitRule(kind, 0).score(mean_BK)
        surer_B = 1 - score_B if kind == "entropy" else score_B
        cell_B = (surer_B * BINS).long().clamp(0, BINS - 1) + BINS * right_B
        self._ranked_2N = self._ranked_2N + torch.bincount(cell_B, minlength=2 * BINS).view(2, BINS)

    def summary(self, energy_mj: list[float] | None = None) -> dict[str, Any]:
        """Of all ranks' samples; every rank must call it.

        - `exit_top1`: accuracy in per cent when each sample stops by the rule; `exit_mean_timesteps`
        - `exit_share`, a list over t: the per cent that stop at t
        - `exit_auroc`: the chance that a right answer's score is above a wrong one's, ties counting half; left out
          if there are no wrong ones, or no right ones
        - `exit_energy_mj`: the mean energy of an image, of `energy_mj`, that up to each t, where it is known
        """
        stopped_T, right_T, ranked_2N = (
            distributed.sum_over_ranks(x).double().cpu() for x in (self._stopped_T, self._right_T, self._ranked_2N)
        )
        samples, auroc = stopped_T.sum(), area_under_roc(*ranked_2N)
        timesteps_T = torch.arange(1, self._T + 1, dtype=torch.float64)
        row: dict[str, Any] = {
            "exit_top1": float(100 * right_T.sum() / samples),
            "exit_mean_timesteps": float((stopped_T * timesteps_T).sum() / samples),
            "exit_share": (100 * stopped_T / samples).tolist(),
        }
        row |= {"exit_auroc": auroc} if auroc is not None else {}
        if energy_mj is not None:
            row["exit_energy_mj"] = float((stopped_T * torch.tensor(energy_mj, dtype=torch.float64)).sum() / samples)
        return row


def area_under_roc(wrong_N: Tensor, right_N: Tensor) -> float | None:
    """How well a score tells right from wrong: the chance that a right sample's is above a wrong one's.

    Of how many of both there are at each score, in rising order. Ties count half (Mann and Whitney 1947); None if all
    are right or all are wrong.
    """
    wrong_N, right_N = wrong_N.double(), right_N.double()
    pairs = float(wrong_N.sum() * right_N.sum())
    return float((right_N * (wrong_N.cumsum(0) - wrong_N / 2)).sum()) / pairs if pairs else None
