"""What stopping by a rule is worth: sums over batches and ranks against scikit-learn and plain counting."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from tdkd_dist.anytime import ExitRule
from tdkd_dist.cluster import preflight
from tdkd_dist.exits import BINS, ExitCounts, area_under_roc
from tdkd_dist.losses import ensembles
from tdkd_dist.mistakes import Mistake
from tdkd_dist.recipe import load_config

T, B, K = 4, 300, 5
CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "rule", [ExitRule("confidence", 0.6), ExitRule("entropy", 0.5), ExitRule("margin", 0.3), ExitRule("patience", 1)]
)
def test_the_counts_are_those_of_the_whole_set(rule):
    generator = torch.Generator().manual_seed(0)
    logits, labels = torch.randn(T, B, K, generator=generator) * 2, torch.randint(K, (B,), generator=generator)
    logits += 2 * torch.nn.functional.one_hot(labels, K)
    counts = ExitCounts(rule, T, CPU)
    for part in torch.arange(B).split(70):
        counts.update(logits[:, part], labels[part])
    row = counts.summary([1.0, 2.0, 3.0, 5.0])
    exits = rule.decide(logits)
    means = ensembles(logits)[exits - 1, torch.arange(B)]
    right = (means.argmax(-1) == labels).numpy()
    assert row["exit_top1"] == pytest.approx(100 * right.mean())
    assert row["exit_mean_timesteps"] == pytest.approx(exits.double().mean().item())
    assert row["exit_share"] == pytest.approx([100 * (exits == t).double().mean().item() for t in range(1, T + 1)])
    assert row["exit_energy_mj"] == pytest.approx(np.array([1.0, 2.0, 3.0, 5.0])[exits.numpy() - 1].mean())
    p = np.sort(means.double().softmax(-1).numpy())
    sureness = {
        "confidence": p[:, -1],
        "entropy": 1 + (p * np.log(p)).sum(1) / np.log(K),
        "margin": p[:, -1] - p[:, -2],
    }
    for kind, score in sureness.items():
        assert row[f"exit_auroc_{kind}"] == pytest.approx(roc_auc_score(right, np.floor(score * BINS)), abs=1e-4)
        pairs = np.sign(score[right][:, None] - score[~right])
        assert row[f"exit_auroc_{kind}"] == pytest.approx(((1 + pairs) / 2).mean(), abs=2e-3), "but for the bins"
    assert row["exit_auroc"] == row["exit_auroc_confidence" if rule.kind == "patience" else f"exit_auroc_{rule.kind}"]


@settings(max_examples=50)
@given(scores=st.lists(st.integers(0, 8), min_size=2, max_size=60), seed=st.integers(0, 2**16))
def test_the_ranking_is_scikit_learns(scores, seed):
    right = np.random.default_rng(seed).random(len(scores)) < 0.6
    counts = [torch.bincount(torch.tensor(scores)[torch.from_numpy(chosen)], minlength=9) for chosen in (~right, right)]
    found = area_under_roc(*counts)
    if right.all() or not right.any():
        assert found is None
    else:
        assert found == pytest.approx(roc_auc_score(right, scores))


def test_without_mistakes_there_is_nothing_to_rank():
    counts = ExitCounts(ExitRule(), 2, CPU)
    counts.update(torch.eye(3).expand(2, 3, 3) * 9, torch.arange(3))
    assert not [key for key in counts.summary() if key.startswith("exit_auroc")]


def test_a_rule_chosen_on_what_is_reported_is_refused(tmp_path):
    path = tmp_path / "rule.json"
    config = load_config("fashion_sew", [f"eval.exit={path}"])
    found = preflight.Findings(data={"val": "a" * 64})
    with pytest.raises(Mistake, match="No such file"):
        preflight._check_exit(config, str(path), found, False)
    preflight._check_exit(config, str(path), found, True)
    assert found.absent == [f"eval.exit={path}: no such file"]
    ExitRule("confidence", 0.9, 4, {"signature": "b" * 64}).save(path)
    preflight._check_exit(config, str(path), found, False)
    ExitRule("confidence", 0.9, 4, {"signature": "a" * 64}).save(path)
    with pytest.raises(Mistake, match=r"eval\.exit=\S+: was chosen on data\.val=\S+ itself"):
        preflight._check_exit(config, str(path), found, False)
    ExitRule("confidence", 0.9, 6).save(path)
    with pytest.raises(Mistake, match=r"a rule for 6 timesteps; set eval\.num_timesteps=6, not 4"):
        preflight._check_exit(config, str(path), found, False)
