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

import sys
from pathlib import Path

from tdkd_dist.command_line import Parser, check_output, run_tool
from tdkd_dist.mistakes import Mistake, Mistakes
from tdkd_dist.recipe import load_config, parse_student
from tdkd_dist.weights import import_student


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
    found = Mistakes()
    found.gather(check_output, Path(options.dest), "DEST")
    itself = Path(options.dest).resolve() == Path(options.source).resolve()
    found.require(not itself, f"{options.dest}: is the source itself; name another file")
    decay_input = [text for text in options.student if text.startswith("decay_input=")]
    for text in decay_input:
        found.require(text in ("decay_input=true", "decay_input=false"), f"{text}: must be true or false")
    pairs = [text for text in options.student if not text.startswith(("decay_input=", "recipe="))]
    recipes = [text.partition("=")[2] for text in options.student if text.startswith("recipe=")]
    data = None
    with found.gathered():
        if recipes:
            config = load_config(recipes[-1], [f"student.{text}" for text in pairs])
            student, data = config.student, config.data
        else:
            student = parse_student(pairs)
    found.tell()
    decays = "decay_input=true" in decay_input
    try:
        print(import_student(options.source, options.dest, options.format, student, decay_input=decays, data=data))
    except OSError as error:
        raise Mistake(f"{options.dest}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main())
