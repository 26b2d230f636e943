"""Exact full-range metrics: what the student is worth after every timestep.

Shapes: T timesteps, B batch, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from tdkd_dist import distributed
from tdkd_dist.losses import ensembles


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


class TimestepCounts:
    """Sums over a validation set of the ensemble after t = 1..T timesteps and of each single timestep.

    Counts are integers and losses float64 sums, kept on the logits' device; `summary` adds them up over all ranks, so
    the result is that of one process whatever the shares and batch sizes.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}

    def update(self, logits_TBK: Tensor, labels_B: Tensor) -> None:
        """Add a batch: logits `[T, B, K]` of any floating type, class labels `[B]`."""
        T, B, K = logits_TBK.shape
        z_TBK = logits_TBK.double()
        mean_TBK = ensembles(z_TBK)
        rank_TB = label_rank(mean_TBK, labels_B)
        log_probs_TBK = F.log_softmax(mean_TBK, dim=-1)
        nll_TB = F.nll_loss(log_probs_TBK.flatten(0, 1), labels_B.repeat(T), reduction="none").view(T, B)
        self._add("top1", (rank_TB == 0).sum(1))
        self._add("top5", (rank_TB < min(5, K)).sum(1))
        self._add("step_top1", (label_rank(z_TBK, labels_B) == 0).sum(1))
        self._add("loss", nll_TB.sum(1))
        self._add("confidence", log_probs_TBK.amax(-1).exp().sum(1))
        self._add("samples", torch.full((T,), B, device=z_TBK.device))

    def summary(self, num_timesteps: int, device: torch.device) -> dict[str, float]:
        """`top1_t1`, `top5_t1`, `step_top1_t1` (per cent), `loss_t1`, `confidence_t1`, ... over all ranks' samples.

        `top1_mean` is the mean over t of top-1, the number by which checkpoints are compared; `samples` their count.
        A rank that saw no sample must call it too. Raises `ValueError` if no rank saw one.
        """
        names = ("top1", "top5", "step_top1", "loss", "confidence", "samples")
        zeros = torch.zeros(num_timesteps, dtype=torch.float64, device=device)
        table = torch.stack([self._sums.get(name, zeros).double() for name in names])
        rows = dict(zip(names, distributed.sum_over_ranks(table).cpu(), strict=True))
        samples = int(rows["samples"][0])
        if samples == 0:
            raise ValueError("data.val holds no sample")
        row: dict[str, float] = {}
        for name, scale in (("top1", 100), ("top5", 100), ("step_top1", 100), ("loss", 1), ("confidence", 1)):
            row |= {f"{name}_t{t}": scale * value / samples for t, value in enumerate(rows[name].tolist(), start=1)}
        row["top1_mean"] = 100 * rows["top1"].sum().item() / samples / num_timesteps
        row["samples"] = samples
        return row

    def _add(self, name: str, values_T: Tensor) -> None:
        self._sums[name] = self._sums[name] + values_T if name in self._sums else values_T
