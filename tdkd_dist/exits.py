"""What stopping by a rule is worth on a validation set, exactly and over all ranks.

Shapes: T timesteps, B batch, K classes, N bins.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tdkd_dist import distributed
from tdkd_dist.anytime import ExitRule, Kind
from tdkd_dist.losses import ensembles
from tdkd_dist.metrics import label_rank

BINS = 4096
"""Of the scores in 0 to 1, equally wide, by which right answers are ranked against wrong ones."""

SCORED: tuple[Kind, ...] = ("confidence", "entropy", "margin")
"""Rules with a score that answers can be ranked by. Patience has none; its answers are ranked by their confidence."""


class ExitCounts:
    """Sums over a validation set of when a rule stops, whether the answer is right then, and how its score ranks that.

    `summary` adds them up over all ranks.
    """

    def __init__(self, rule: ExitRule, num_timesteps: int, device: torch.device) -> None:
        self._rule, self._T = rule, num_timesteps
        zeros = torch.zeros(num_timesteps, dtype=torch.int64, device=device)
        self._stopped_T, self._right_T = zeros, zeros.clone()
        self._ranked = torch.zeros(len(SCORED), 2, BINS, dtype=torch.int64, device=device)
        """By each of `SCORED`, how many wrong and right answers have a score of each bin."""

    def update(self, logits_TBK: Tensor, labels_B: Tensor) -> None:
        """Add a batch: logits `[T, B, K]` of any floating type, class labels `[B]`."""
        means_TBK = ensembles(logits_TBK.float())
        exit_B = self._rule.decide_measured(self._rule.measure(means_TBK)) - 1
        mean_BK = means_TBK.gather(0, exit_B.view(1, -1, 1).expand(1, -1, means_TBK.shape[-1])).squeeze(0)
        right_B = label_rank(mean_BK, labels_B) == 0
        exits_BT = F.one_hot(exit_B, self._T)
        self._stopped_T = self._stopped_T + exits_BT.sum(0)
        self._right_T = self._right_T + (exits_BT * right_B.unsqueeze(1)).sum(0)
        self._ranked = self._ranked + torch.stack([rank_answers(mean_BK, right_B, kind) for kind in SCORED])

    def summary(self, energy_mj: list[float] | None = None) -> dict[str, Any]:
        """Of all ranks' samples; every rank must call it.

        - `exit_top1`: accuracy in per cent when each sample stops by the rule; `exit_mean_timesteps`
        - `exit_share`, a list over t: the per cent that stop at t
        - `exit_auroc_confidence`, `exit_auroc_entropy`, `exit_auroc_margin`: the chance that a right answer is surer
          than a wrong one by that score, ties counting half; `exit_auroc`: by the rule's own. Left out if there are no
          wrong ones, or no right ones
        - `exit_energy_mj`: the mean energy of an image, of `energy_mj`, that up to each t, where it is known
        """
        stopped_T, right_T, ranked = (
            distributed.sum_over_ranks(x).double().cpu() for x in (self._stopped_T, self._right_T, self._ranked)
        )
        samples, own = stopped_T.sum(), self._rule.kind if self._rule.kind in SCORED else SCORED[0]
        timesteps_T = torch.arange(1, self._T + 1, dtype=torch.float64)
        row: dict[str, Any] = {
            "exit_top1": float(100 * right_T.sum() / samples),
            "exit_mean_timesteps": float((stopped_T * timesteps_T).sum() / samples),
            "exit_share": (100 * stopped_T / samples).tolist(),
        }
        for kind, ranked_2N in zip(SCORED, ranked, strict=True):
            auroc = area_under_roc(*ranked_2N)
            if auroc is not None:
                row |= {f"exit_auroc_{kind}": auroc} | ({"exit_auroc": auroc} if kind == own else {})
        if energy_mj is not None:
            row["exit_energy_mj"] = float((stopped_T * torch.tensor(energy_mj, dtype=torch.float64)).sum() / samples)
        return row


def rank_answers(mean_BK: Tensor, right_B: Tensor, kind: Kind) -> Tensor:
    """`[2, N]`: how many wrong and right answers are of each sureness by that score, from the least sure on."""
    score_B = ExitRule(kind, 0).score(mean_BK)
    surer_B = 1 - score_B if kind == "entropy" else score_B
    cell_B = (surer_B * BINS).long().clamp(0, BINS - 1) + BINS * right_B
    return torch.bincount(cell_B, minlength=2 * BINS).view(2, BINS)


def area_under_roc(wrong_N: Tensor, right_N: Tensor) -> float | None:
    """How well a score tells right from wrong: the chance that a right sample's is above a wrong one's.

    Of how many of both there are at each score, in rising order. Ties count half (Mann and Whitney 1947); None if all
    are right or all are wrong.
    """
    wrong_N, right_N = wrong_N.double(), right_N.double()
    pairs = float(wrong_N.sum() * right_N.sum())
    return float((right_N * (wrong_N.cumsum(0) - wrong_N / 2)).sum()) / pairs if pairs else None
