"""Turn a checkpoint of the released code, of spikingjelly or of a ReLU ResNet into a student's file.

    python tools/import_weights.py model_weights.pth student.safetensors --format official \
        model=preact_resnet34 num_timesteps=4 neuron.decay=0.2
    python tools/import_weights.py sew34.pth student.safetensors --format spikingjelly decay_input=true \
        model=sew_resnet34 neuron.kind=if neuron.surrogate=atan neuron.detach_reset=true
    python tools/import_weights.py resnet34.tv_in1k init.safetensors --format timm model=sew_resnet34

The key=value arguments are those of a recipe's `student:` section, and `decay_input` (spikingjelly's own default is
true). What was trained with other constants than these says nothing: give the ones of the training. With `recipe=NAME`
its student is the start, and the file says that its images are the recipe's: size, mean, std, crop, frames.
"""

import difflib
import sys
from pathlib import Path

from tdkd_dist.command_line import Parser, check_output, run_tool
from tdkd_dist.config import StudentConfig, flatten
from tdkd_dist.mistakes import Mistake
from tdkd_dist.recipe import load_config
from tdkd_dist.weights import import_student


def parse_student(pairs: list[str]) -> StudentConfig:
    """A `student:` section from `key=value` texts; `Mistake` naming the key for one that does not exist or fit."""
    from omegaconf import OmegaConf
    from omegaconf.errors import ConfigKeyError, OmegaConfBaseException

    for text in pairs:
        if "=" not in text:
            raise Mistake(f"{text}: key=value wanted, such as model=sew_resnet34")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(StudentConfig), OmegaConf.from_dotlist(pairs))
        student = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        near = difflib.get_close_matches(str(error.full_key), flatten(StudentConfig()), n=1)
        if isinstance(error, ConfigKeyError):
            reason = "no such key" + (f"; did you mean {near[0]}?" if near else "")
        raise Mistake(f"{error.full_key}: {reason}") from error
    assert isinstance(student, StudentConfig)
    return student


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 with one line on stderr for a user's mistake."""
    return run_tool(lambda: convert(arguments), "import_weights")


def convert(arguments: list[str] | None) -> None:
    """Write what the command line asks for. Raises `Mistake`."""
    parser = Parser(__doc__)
    parser.add_argument("source", help="the checkpoint; with --format timm also a timm model's name with its tag")
    parser.add_argument("dest", help="the safetensors file to write")
    parser.add_argument("--format", required=True, choices=("official", "spikingjelly", "timm"))
    parser.add_argument("student", nargs="*", metavar="key=value", help="the student: section, and decay_input=true")
    options = parser.parse_intermixed_args(arguments)
    check_output(Path(options.dest), "DEST")
    if Path(options.dest).resolve() == Path(options.source).resolve():
        raise Mistake(f"{options.dest}: is the source itself; name another file")
    decay_input = [text for text in options.student if text.startswith("decay_input=")]
    if any(text not in ("decay_input=true", "decay_input=false") for text in decay_input):
        raise Mistake(f"{decay_input[0]}: must be true or false")
    pairs = [text for text in options.student if text not in decay_input]
    recipes = [text.partition("=")[2] for text in pairs if text.startswith("recipe=")]
    if recipes:
        config = load_config(recipes[-1], [f"student.{text}" for text in pairs if not text.startswith("recipe=")])
        student, data = config.student, config.data
    else:
        student, data = parse_student(pairs), None
    decays = "decay_input=true" in decay_input
    try:
        print(import_student(options.source, options.dest, options.format, student, decay_input=decays, data=data))
    except OSError as error:
        raise Mistake(f"{options.dest}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
