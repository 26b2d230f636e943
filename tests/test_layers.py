"""Every module has a floor and imports only from floors below its own, inside functions too. So there is no circle."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = """
mistakes
files curves distributed memory first_timestep
limits command_line batch_norm losses
neuron_config launcher_config loss_config metrics
config neurons
recipe
students.base students.outside
students.resnet
students.relu_resnet students.sew_resnet students.ms_resnet students.spiking_resnet
students
weights activity data.normalise
teachers
data.batch data.crops data.mixing
data.frames data.jitter data.sources.source data.beton.layout
data.sources.arrays data.sources.classes data.sources.folder data.sources.guarded
data.sources.parquet data.sources.ground_truth
data.sources.archives
data.sources data.beton.manifest data.frame_decoder
data.events.recording
data.events.apart data.events.places data.events.splits data.events.framing
data.events.aedat2 data.events.aedat3 data.events.aedat4 data.events.atis data.events.hdf5 data.events.npz
data.events.folders data.events.gesture
data.events data.events.framed
data.beton.writing data.beton.verify data.beton.staging data.checks data.ffcv_reader data.folder_reader
data.loaders anytime export.plain
calibration exits export.program
export.agreement export.onnx export.nir
validate
run.reading run.figures run.log
run.heartbeat run.progress
run.folder
run.record
training.compilation training.guard training.meter training.state
training.engine
training.checkpoint training.step
training.rank
training.trainer
report.runs
report.figures report.tables
report.features report.wandb_report
report.page
cluster.scheduler cluster.slurm
cluster.preflight cluster.job cluster.status
cluster.endings
cluster.follow
cluster.submission
cluster.start
"""
"""From the ground up. The package itself stands above all: it imports the students when timm is imported."""
EMPTY = {"data", "data.beton", "run", "training", "cluster", "report", "export"}
"""Wings whose `__init__` says what they are and imports nothing."""
ONLY_IN = {
    "deepspeed": ["training.engine"],
    "submitit": ["cluster."],
    "ffcv": ["data.ffcv_reader", "data.frame_decoder"],
    "wandb": ["run.record", "report.wandb_report"],
    "omegaconf": ["recipe"],
    "matplotlib": ["run.figures", "report.figures", "export.agreement"],
    "onnx": ["export.onnx"],
    "nir": ["export.nir"],
}
"""Which modules know a library."""
LIGHT = ("students", "losses", "weights", "neurons")
"""What imports without what only a training needs."""


def parse() -> dict[str, set[str]]:
    """What each module imports, by name without the package's; other libraries' by their first name."""
    paths = {module_of(path): path for path in (ROOT / "tdkd_dist").rglob("*.py")}
    found = {}
    for module, path in paths.items():
        found[module] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: say where it imports from in full"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                continue
            for name in names:
                package, _, rest = name.partition(".")
                own = rest if rest in paths else rest.rpartition(".")[0]
                found[module].add(own if package == "tdkd_dist" else package)
    return found


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT / "tdkd_dist").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


IMPORTS = parse()
FLOOR = {name: number for number, names in enumerate(FLOORS.split("\n")) for name in names.split()}


def test_every_module_has_a_floor():
    assert set(IMPORTS) - EMPTY - {""} == set(FLOOR)
    assert not any(IMPORTS[name] for name in EMPTY)


@pytest.mark.parametrize("module", FLOOR)
def test_a_module_imports_from_below(module):
    upward = {name for name in IMPORTS[module] & {*FLOOR, ""} if name == "" or FLOOR[name] >= FLOOR[module]}
    assert not upward, f"{module} imports {', '.join(sorted(upward))}, which stand no lower"


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_is_known_in_one_place(library):
    knowing = {module for module, names in IMPORTS.items() if library in names}
    assert knowing
    assert all(module.startswith(tuple(ONLY_IN[library])) for module in knowing), knowing


@pytest.mark.parametrize("module", LIGHT)
def test_a_network_needs_no_training_libraries(module):
    reached, left = set(), {module}
    while left:
        reached |= left
        left = {name for own in left for name in IMPORTS.get(own, ())} - reached
    assert not reached & {"deepspeed", "ffcv", "wandb", "submitit", "omegaconf", "matplotlib"}


def test_the_product_does_not_know_its_commands():
    above = {
        path.stem for folder in ("launch", "tools", "tools/bench", "tests") for path in (ROOT / folder).glob("*.py")
    }
    assert not above & {name for names in IMPORTS.values() for name in names - FLOOR.keys()}


def test_contributing_shows_these_floors():
    assert "\n".join(f"    {line}" for line in FLOORS.strip().splitlines()) in (ROOT / "CONTRIBUTING.md").read_text()
