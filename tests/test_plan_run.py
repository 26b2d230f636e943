"""The laws of tools/plan_run.py's predictions."""

import math

import plan_run
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numbered import Numbered

from tdkd_dist.data.beton.writing import write
from tdkd_dist.recipe import load_config

CONFIG = load_config("imagenet_sew34", [])
IMAGES = 1_281_167
positive = st.floats(1e-3, 1e3)


def plan(links, ranks, micro_s=0.06):
    numbers = {"ranks_per_node": 8, "images": IMAGES, "val_images": 50_000}
    return plan_run.predict(CONFIG, 80_000_000, links, micro_s, ranks=ranks, **numbers)


def test_without_a_cost_of_communication_n_gpus_are_n_times_as_fast():
    free = plan_run.Links(math.inf, math.inf, 0.0)
    one = plan(free, 1)
    assert one.batch == 512
    assert one.images_s == pytest.approx(64 / 0.06)
    for ranks in (2, 8, 64, 512):
        found = plan(free, ranks)
        assert found.efficiency == pytest.approx(1)
        assert found.images_s == pytest.approx(ranks * one.images_s)
        assert found.run_s * ranks == pytest.approx(one.run_s)
    assert plan(free, 512).batch == 512 * 64


@given(gpu=positive, node=positive, latency=st.floats(0, 1e-3), micro_s=st.floats(1e-3, 1))
def test_more_gpus_are_never_more_efficient(gpu, node, latency, micro_s):
    links = plan_run.Links(1e9 * gpu, 1e9 * node, latency)
    # From 8 on, where a step is one micro-batch: below, accumulation hides the all-reduce.
    efficiencies = [plan(links, ranks, micro_s).efficiency for ranks in (8, 16, 64, 512)]
    assert efficiencies == sorted(efficiencies, reverse=True)
    assert all(0 < e <= 1 for e in efficiencies)


def test_the_all_reduce_of_two_nodes_by_hand():
    links = plan_run.Links(100e9, 10e9, 1e-5)
    # 7/8 of 80 MB twice at 100 GB/s, 1/2 of it twice at 10 GB/s, 2 x 4 messages.
    assert plan_run.all_reduce_seconds(80_000_000, links, 16, 8) == pytest.approx(0.0014 + 0.008 + 0.00008)
    assert plan_run.all_reduce_seconds(80_000_000, links, 1, 8) == 0


def test_the_gradients_are_the_students():
    assert plan_run.gradient_bytes(CONFIG) == 4 * 21_797_672  # a plain ResNet-34 has as many


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--step-ms", "60"], "the following arguments are required"),
        (["train.epochs=3"], "which recipe?"),
        (["recipe=imagenet_sew34", "--step-ms", "-1"], "--step-ms -1.0: must be positive"),
        (["recipe=imagenet_sew34", "--step-ms", "inf"], "--step-ms inf: must be positive and finite"),
        (["recipe=imagenet_sew34", "--step-ms", "nan"], "--step-ms nan: must be positive and finite"),
        (["recipe=imagenet_sew34", "--node-gb-s", "nan"], "--node-gb-s nan: must be positive and finite"),
        (["recipe=imagenet_sew34", "--loader-core-ms", "nan"], "--loader-core-ms nan: must be positive and finite"),
        (["recipe=imagenet_sew34", "--latency-us", "nan"], "--latency-us nan: must be finite, and not negative"),
        (["recipe=imagenet_sew34", "--latency-us", "-1"], "--latency-us -1.0: must be finite, and not negative"),
        (["recipe=imagenet_sew34", "--gpus", "many"], "--gpus many: give numbers"),
        (["recipe=imagenet_sew34", "nodes=0", "--step-ms", "60"], "nodes=0: must be at least 1"),
        (["recipe=imagenet_sew35", "--step-ms", "60"], "recipe=imagenet_sew35"),
    ],
)
def test_a_mistake_is_one_line(capsys, arguments, message):
    assert plan_run.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {message}")
    assert said.count("\n") == 1


def test_the_table(capsys):
    assert plan_run.main(["recipe=imagenet_sew34", "--step-ms", "60", "--gpus", "1,512", "--cores", "1"]) == 0
    said = capsys.readouterr().out
    assert "| 1 | 1 | 512 | 1,067 | 100.0% |" in said
    assert "(too slow)" in said


def test_nodes_are_of_as_many_gpus_as_the_recipe_puts_on_one(capsys):
    assert plan_run.main(["recipe=imagenet_sew34", "nodes=1,4", "--step-ms", "60"]) == 0
    rows = [line.split("|")[1:3] for line in capsys.readouterr().out.splitlines() if line.startswith("| ")][1:]
    assert [[int(cell) for cell in row] for row in rows] == [[8, 1], [32, 4]]


def test_settings_may_come_after_options():
    options = plan_run.parse(["recipe=imagenet_sew34", "--step-ms", "60", "nodes=4", "train.epochs=3"])
    assert (options.recipe, options.nodes, options.overrides) == ("imagenet_sew34", [4], ["train.epochs=3"])


def test_synchronised_batch_norms_cost_what_their_messages_take(capsys):
    # 36 norms, forward and backward, 2 x 3 messages of 1 ms each between 8 GPUs: 432 ms on top of 500.
    rest = ["--step-ms=500", "--latency-us=1000", "--gpus=8", "--gpu-gb-s=1e9"]
    for synced, efficiency in (("true", "53.3%"), ("false", "98.8%")):
        assert plan_run.main(["recipe=imagenet_sew34", f"train.sync_bn={synced}", *rest]) == 0
        assert f"| {efficiency} |" in capsys.readouterr().out


def test_the_epoch_is_that_of_the_recipes_own_data_where_it_is_here(tmp_path, capsys):
    write(Numbered(203), tmp_path / "x.beton")
    files = [f"data.{split}={tmp_path / 'x.beton'}" for split in ("train", "val")]
    assert plan_run.main(["recipe=fashion_sew", *files, "--step-ms", "60", "--gpus", "1"]) == 0
    assert " 203 images an epoch" in capsys.readouterr().out
