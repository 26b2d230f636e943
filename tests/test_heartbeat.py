"""Signs of life in real processes, one of which hangs."""

import json
import subprocess
import sys
import time
from pathlib import Path

from tdkd_dist.run.heartbeat import EXIT_STATUS, Heartbeat, Sign, find_laggard, read_signs

HANGING = """
import sys, time
from pathlib import Path
from tdkd_dist.run.heartbeat import Heartbeat
with Heartbeat(Path(sys.argv[1]), rank=int(sys.argv[2]), timeout_s=1.0) as heartbeat:
    heartbeat.beat(sys.argv[3], 7)
    time.sleep(600)
"""


def test_a_hanging_rank_ends_itself_and_the_one_that_others_waited_for_is_named(tmp_path: Path) -> None:
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", HANGING, str(tmp_path), str(rank), phase], stderr=subprocess.PIPE, text=True
        )
        for rank, phase in enumerate(("training", "waiting for data", "training"))
    ]
    for rank, process in enumerate(ranks):
        _, said = process.communicate(timeout=120)
        assert process.returncode == EXIT_STATUS
        assert f"rank {rank} on " in said
        assert "has not moved for 1 s" in said
    signs = read_signs(tmp_path)
    assert [sign.rank for sign in signs] == [0, 1, 2]
    laggard = find_laggard(signs)
    assert laggard is not None
    assert (laggard.rank, laggard.phase, laggard.step) == (1, "waiting for data", 7)


def test_a_rank_that_moves_lives_on(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, rank=3, timeout_s=1.0) as heartbeat:
        for step in range(15):
            heartbeat.beat("training", step)
            time.sleep(0.1)
    (sign,) = read_signs(tmp_path)
    assert (sign.rank, sign.step, sign.hung) == (3, 14, False)
    assert find_laggard([sign]) is None


def test_tells_where_the_time_went(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, rank=0, timeout_s=10.0) as heartbeat:
        heartbeat.beat("opening data", 0)
        time.sleep(0.2)
        heartbeat.beat("training", 0)
        time.sleep(0.1)
        heartbeat.beat("opening data", 0)
        time.sleep(0.2)
        heartbeat.beat("saving", 1)
        said = heartbeat.describe_time()
    total, parts = (
        float(said.split()[0]),
        dict(part.rsplit(" ", 1) for part in said[said.index("(") + 1 : -1].split(", ")),
    )
    assert list(parts) == ["importing", "opening data", "training"]
    assert 0.4 <= float(parts["opening data"]) < 1
    assert 0.1 <= float(parts["training"]) < 0.5
    # From the start of this process, which has imported torch.
    assert float(parts["importing"]) > 0.5
    assert abs(sum(map(float, parts.values())) - total) < 0.3


def test_the_least_far_rank_is_the_laggard_and_broken_signs_are_left_out(tmp_path: Path) -> None:
    signs = [Sign(k, "host", 1, phase, step, 0.0, hung=k == 0) for k, (phase, step) in
             enumerate([("waiting for data", 5), ("agreeing", 4), ("training", 4)])]  # fmt: skip
    laggard = find_laggard(signs)
    assert laggard is not None
    assert laggard.rank == 2
    (tmp_path / "rank-00000.json").write_text('{"rank": 0, "ho')
    (tmp_path / "rank-00001.json").write_text(json.dumps({"rank": 1}))
    assert read_signs(tmp_path) == []
