"""Recipes, overrides, and the one line that each mistake gets."""

import csv
import re
import subprocess
import sys
from dataclasses import Field, fields
from typing import Any, get_args, get_type_hints

import pytest

from tdkd_dist.config import Config, flatten
from tdkd_dist.limits import Section
from tdkd_dist.mistakes import Mistake
from tdkd_dist.neuron_config import NeuronConfig
from tdkd_dist.recipe import (
    ACCURACY,
    RECIPES,
    VARIANTS,
    expand_sweep,
    list_recipes,
    load_config,
    read_config,
    save_config,
)


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("base: fashion_sew\ntrain: {epochs: 7}\nstudent: {neuron: {decay: 0.25}}\n")
    return str(path)


def test_a_recipe_extends_its_base_and_overrides_win(recipe):
    config = load_config(recipe, ["train.epochs=9", "student.neuron.v_reset=0"])
    assert (config.train.epochs, config.student.neuron.decay, config.student.neuron.v_reset) == (9, 0.25, 0.0)
    assert config.student.model == "sew_resnet8"
    assert config.run.name == "mine"


@pytest.mark.parametrize("name", list_recipes())
def test_every_recipe_fits_the_schema_and_names_its_command(name):
    load_config(name, [])
    text = (RECIPES / f"{name}.yaml").read_text()
    assert text.startswith(f"# python launch/submit.py recipe={name}")


def test_the_table_of_accuracies_fits_the_recipes():
    names = list_recipes()
    with ACCURACY.open(newline="") as file:
        for row in csv.DictReader(file):
            assert row["recipe"] in names
            assert row["kind"] in ("measured", "published", "published without distillation")
            assert len(row["top1"].split()) == int(row["timesteps"])
            assert row["source"]
            if row["kind"] == "measured":
                assert all(row[key] for key in ("seeds", "hardware", "commit", "date"))
    assert names["fashion_ablation/all"].startswith("86.63 87.80 87.98 88.15 % top-1 at t = 1..4 (3 seeds, ")
    assert names["imagenet_preact34"] == "not measured; published: 71.04 % at T = 4"
    assert names["imagenet_sew34"] == "not measured"


def test_listing_recipes_needs_no_torch():
    code = "import sys; from launch.submit import main; main(['--list']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=RECIPES.parent, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_two_variants_are_not_one():
    with pytest.raises(Mistake, match=r"^variant=mix variant=all: give one variant$"):
        load_config("fashion_sew", ["variant=mix", "variant=all"])


def test_a_mistake_in_a_file_names_the_file(tmp_path, monkeypatch):
    path = tmp_path / "mine.yaml"
    for text, message in (
        ("losss: {alpha: 1}", f"losss: no such key; did you mean loss? (in {path})"),
        ("", f"{path}: a recipe is a mapping of sections"),
        ("base: nope", f"{path}: base: recipe=nope: no such recipe"),
    ):
        path.write_text(text)
        with pytest.raises(Mistake) as caught:
            load_config(str(path), [])
        assert str(caught.value).startswith(message)
    monkeypatch.setenv("TDKD_SITE", "nope")
    with pytest.raises(Mistake, match=r"^TDKD_SITE=nope: no such file"):
        load_config("fashion_sew", [])


def test_what_is_saved_is_read_back(recipe, tmp_path):
    config = load_config(recipe, ["train.compile=true", "data.mean=[0.1,0.2,0.3]"])
    save_config(config, tmp_path / "config.yaml")
    assert read_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.btach_size=3", "train.btach_size: no such key; did you mean train.batch_size?"),
        ("student.neuron.decya=1", "student.neuron.decya: no such key; did you mean student.neuron.decay?"),
        ("lr=3", "lr: no such key; did you mean optim.lr?"),
        ("train.epochs=many", "train.epochs: Value 'many'"),
        ("train.epochs=1.5", "train.epochs: Value '1.5'"),
        (
            "data.mean=[a,b,c]",
            "data.mean: not of its kind; must be a list of 3 numbers",
        ),
        ("launcher.setup=module", "launcher.setup: not of its kind; must be a list, such as [a, b]"),
        ("loss=3", "loss: not of its kind; must be a section: keys with their values"),
        ("student.neuron.v_init=learn", "student.neuron.v_init: "),
        ("run.name=", "run.name: "),
        ("variant=", "variant=: name one, or leave it out"),
        ("student.num_timesteps=0", "student.num_timesteps=0: must be at least 1"),
        ("student.connect=XOR", "student.connect: Invalid value 'XOR'"),
        ("train.compile=maybe", "train.compile=maybe: must be auto, true or false"),
        ("teacher.name=null", "loss.alpha=0.2 needs a teacher: set teacher.name, or loss.alpha=0"),
        ("train.batch_size=127", "train.batch_size=127 does not divide over 2 ranks"),
        ("train.micro_batch=48", "train.micro_batch=48 does not divide a rank's share of 64 images"),
        ("train.epochs=0", "train.epochs=0 evaluates a file: set student.checkpoint=FILE"),
        ("loss.temperature=0", "loss.temperature=0.0: must be in [0.01, 1000]"),
        ("loss.alpha=inf", "loss.alpha=inf: must be at least 0"),
        ("optim.momentum=nan", "optim.momentum=nan: must be in [0, 1)"),
        ("data.mean=[nan,0,0]", "data.mean=(nan, 0.0, 0.0): must be in [-100, 100]"),
        ("data.std=[1e-300,1,1]", "data.std=(1e-300, 1.0, 1.0): must be in [0.001, 100]"),
        ("run.seed=18446744073709551616", "run.seed=18446744073709551616: must be in [0, 4294967295]"),
        ("student.num_timesteps=1000000000", "student.num_timesteps=1000000000: must be at most 1,024"),
        ("optim.warmup_epochs=99", "optim.warmup_epochs=99: train.epochs="),
        ("run.name=..", "run.name=..: must be one part of a path"),
        ("run.name=a/b", "run.name=a/b: must be one part of a path"),
        ("run.dir=/", "run.dir=/: must be a folder for this run alone"),
        ("run.dir=.", "run.dir=.: must be a folder for this run alone"),
        ("run.dir=''", "run.dir=: must be a folder for this run alone"),
        ("run.name=${oc.env:HOME}", "run.name: ${...} is not resolved"),
        ("wandb.project=${run.name}", "wandb.project: ${...} is not resolved"),
        ("train.epochs=*a", "train.epochs=*a: not readable as YAML"),
        ("data.train=a\x1b[2J", "data.train=a\\x1b[2J: not readable as YAML"),
        ("data.train='a\u200eb'", "data.train=a\\u200eb: must be text without control characters"),
        ("launcher.gpus_per_node=8", "launcher.tasks_per_node=2: must equal launcher.gpus_per_node=8"),
        ("nonsense", "nonsense: an override is key=value"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(override, message):
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        load_config("fashion_sew", [override])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def numeric_keys() -> list[tuple[type[Section], Field[Any]]]:
    """Every key whose value is a number, or numbers, with its section."""
    found = []
    sections = [NeuronConfig, *(f.default_factory for f in fields(Config))]
    for section in sections:
        hints = get_type_hints(section)
        found += [
            pytest.param(section, f, id=f"{section.section}.{f.name}")
            for f in fields(section)
            if {int, float} & {hints[f.name], *get_args(hints[f.name])}
        ]
    assert len(found) >= 60
    return found


@pytest.mark.parametrize(("section", "key"), numeric_keys())
def test_every_number_has_a_finite_range(section, key):
    """A key that is new has one too, or fails here."""
    many = isinstance(getattr(section(), key.name), list | tuple)
    for number in (float("inf"), float("-inf"), float("nan"), 1e30, -1e30):
        with pytest.raises(Mistake) as caught:
            section(**{key.name: [number] * 3 if many else number})
        line = next(line for line in caught.value.lines if line.startswith(f"{section.section}.{key.name}="))
        assert re.search(r": must be (at least \S+|at most [0-9,]+|positive|in [\[(].*[\])])", line), line


def test_a_secret_of_the_environment_stays_there(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "s3cr3t")
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("base: fashion_sew\nwandb: {project: '${oc.env:SECRET}'}\n")
    with pytest.raises(Mistake, match=r"mine\.yaml: \$\{\.\.\.\} is not resolved") as caught:
        load_config(str(recipe), [])
    assert "s3cr3t" not in str(caught.value)


def test_an_evaluation_has_a_name_of_its_own():
    config = load_config("fashion_sew", ["train.epochs=0", "student.checkpoint=x"])
    assert config.run.name == "fashion_sew-eval"
    assert load_config("fashion_sew", ["train.epochs=0", "student.checkpoint=x", "run.name=y"]).run.name == "y"


def test_unknown_recipes(tmp_path):
    with pytest.raises(ValueError, match="recipe=fashion_swe: no such recipe; did you mean fashion_sew"):
        load_config("fashion_swe", [])
    with pytest.raises(ValueError, match="no such file"):
        load_config(str(tmp_path / "none.yaml"), [])
    broken = tmp_path / "broken.yaml"
    broken.write_text("train: [")
    with pytest.raises(ValueError, match="not readable as YAML"):
        load_config(str(broken), [])
    loop = tmp_path / "loop.yaml"
    loop.write_text("base: loop")
    with pytest.raises(ValueError, match="leads back"):
        load_config(str(loop), [])


def test_batches_are_cut_into_equal_shares():
    config = load_config("fashion_sew", ["train.batch_size=96", "train.micro_batch=16"])
    assert (config.launcher.world_size, config.micro_batch, config.accumulation) == (2, 16, 3)
    # One GPU runs a recipe made for eight by accumulating.
    one = load_config("imagenet_sew34", ["launcher.gpus_per_node=1"])
    assert (one.micro_batch, one.accumulation) == (64, 8)


def test_the_contracts_keys_exist():
    keys = set(flatten(Config()))
    for section, names in {
        "run": "name seed dir",
        "data": "train val format image_size workers",
        "teacher": "name checkpoint pretrained min_top1",
        "student": "model checkpoint num_classes num_timesteps neuron.decay connect width in_chans",
        "loss": "target alpha beta temperature self_target label_smoothing",
        "optim": "name lr momentum weight_decay",
        "train": "epochs max_steps batch_size micro_batch precision compile",
        "eval": "num_timesteps every",
        "launcher": "cluster nodes tasks_per_node gpus_per_node max_restarts",
        "wandb": "project entity mode",
    }.items():
        assert {f"{section}.{name}" for name in names.split()} <= keys


def test_a_sweep_is_every_combination_the_first_key_changing_slowest():
    members = expand_sweep("", ["sweep.recipe=[a/twce,a/sce]", "train.epochs=3", "sweep.run.seed=[0,1]"])
    assert members == [
        (f"a/{name}", ["train.epochs=3", f"run.seed={seed}", f"run.name={name}-seed{seed}"])
        for name in ("twce", "sce")
        for seed in (0, 1)
    ]


def test_members_of_a_sweep_are_named_and_placed_apart():
    members = expand_sweep("fashion_sew", ["run.name=mine", "run.dir=out", "sweep.loss.beta=[0, 0.5]"])
    configs = [load_config(recipe, overrides) for recipe, overrides in members]
    assert [c.loss.beta for c in configs] == [0, 0.5]
    assert [str(c.run.folder) for c in configs] == ["out/mine-beta0", "out/mine-beta0.5"]


@pytest.mark.parametrize("text", ["sweep.run.seed=3", "sweep.run.seed=[]", "sweep.run.seed=[1", "sweep.run.seed"])
def test_a_sweep_wants_a_list(text):
    with pytest.raises(ValueError, match=r"^sweep\.run\.seed.*: a list is wanted, such as sweep\.run\.seed=\[1,2\]$"):
        expand_sweep("fashion_sew", [text])


@pytest.mark.parametrize("name", sorted(path.stem for path in VARIANTS.glob("*.yaml")))
def test_every_variant_goes_over_every_student_recipe(name):
    for recipe in ("imagenet_sew34", "imagenette_sew18_cpu", "cifar10_resnet18"):
        config = load_config(recipe, [f"variant={name}", "train.epochs=3"])
        assert config.run.name == f"{recipe}-{name}"
        plain = load_config(recipe, ["train.epochs=3"])
        assert (config.data, config.optim, config.train.epochs) == (plain.data, plain.optim, 3)
    assert (VARIANTS / f"{name}.yaml").read_text().startswith("# ")
    assert f"variants/{name}" not in list_recipes()


def test_a_variant_wins_over_the_recipe_and_loses_to_the_command_line(tmp_path):
    config = load_config("fashion_sew", ["loss.beta=0.3", "variant=seal"])
    assert (config.loss.alpha, config.loss.beta, config.loss.self_target) == (0.6, 0.3, "weighted")
    (tmp_path / "mine.yaml").write_text("base: [mix, all_v_half]\nloss: {alpha: 1}\n")
    with pytest.raises(ValueError, match=r"/mine\.yaml: base: recipe=mix: no such recipe"):
        load_config("fashion_sew", [f"variant={tmp_path / 'mine.yaml'}"])
    (tmp_path / "mine.yaml").write_text("base: [variants/all_v_half, variants/mix]\nloss: {alpha: 1}\n")
    config = load_config("fashion_sew", [f"variant={tmp_path / 'mine.yaml'}"])
    assert (config.loss.target, config.loss.alpha, config.student.neuron.v_init) == ("mix", 1, 0.5)
    assert config.run.name == "fashion_sew-mine"
    with pytest.raises(ValueError, match=r"^variant=mixed: no such file in recipes/variants; there are all, "):
        load_config("fashion_sew", ["variant=mixed"])


def test_a_sweep_goes_through_variants():
    members = expand_sweep("fashion_sew", ["sweep.variant=[all,mix]", "sweep.run.seed=[0]", "run.dir=out"])
    configs = [load_config(recipe, overrides) for recipe, overrides in members]
    assert [str(c.run.folder) for c in configs] == ["out/fashion_sew-all-seed0", "out/fashion_sew-mix-seed0"]
    assert [c.loss.target for c in configs] == ["temporal", "mix"]


def test_the_weighted_self_target_is_each_timesteps_own():
    with pytest.raises(ValueError, match=r"^loss\.self_target=weighted: .*needs loss\.target=temporal, not mix$"):
        load_config("fashion_sew", ["loss.self_target=weighted", "loss.target=mix"])


def test_a_site_wins_over_the_recipe_and_loses_to_the_command_line(tmp_path, monkeypatch):
    config = load_config("fashion_sew", ["site=sandbox", "launcher.time_min=7"])
    assert (config.launcher.nodes, config.launcher.tasks_per_node, config.launcher.time_min) == (2, 1, 7)
    assert load_config("fashion_sew", []).launcher.nodes == 1
    (tmp_path / "mine.yaml").write_text("launcher: {partition: fast}")
    monkeypatch.setenv("TDKD_SITE", str(tmp_path / "mine.yaml"))
    assert load_config("fashion_sew", []).launcher.partition == "fast"
    assert load_config("imagenet_sew34", ["site=example"]).launcher.setup[0] == "module purge"
    with pytest.raises(ValueError, match=r"^site=none: no such file in launch/sites; there are example, sandbox$"):
        load_config("fashion_sew", ["site=none"])
