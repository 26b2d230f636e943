"""Train or evaluate: python launch/submit.py recipe=NAME key=value ...

    python launch/submit.py --list                          recipes and what they reach
    python launch/submit.py recipe=fashion_sew --dry-run    the resolved configuration and the job, without starting it
    python launch/submit.py recipe=imagenet_sew34 data.train=A.beton data.val=B.beton
    python launch/submit.py recipe=fashion_sew sweep.run.seed=[0,1,2] sweep.loss.beta=[0,0.5]    every combination
    python launch/submit.py recipe=fashion_sew variant=mix  another objective, one of recipes/variants/, over any recipe

    python launch/submit.py status RUN...                   where it is: state, step, speed, accuracy, restarts
    python launch/submit.py logs RUN                        its log, followed while it runs
    python launch/submit.py cancel RUN...                   save a checkpoint and stop

The run lives in runs/NAME. The same command again resumes it; Ctrl-C stops it cleanly, at a step boundary.
A terminal that closes ends the command alone: the job goes on.
Exit status: 0 finished, 1 crashed, 2 a mistake in the command, recipe or data, 129 hung up, 130 stopped.
"""

# Imports are where they are needed: a status line must not wait for torch.

import os
import sys

from tdkd_dist.command_line import Parser, run_tool
from tdkd_dist.mistakes import Mistakes, printable, require


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    try:
        return run_tool(lambda: act(arguments))
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output, `head` for instance, has seen enough; a job goes on without us.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def act(arguments: list[str]) -> int:
    """Do what the arguments say; the exit status. Raises `Mistake`."""
    if arguments[:1] and arguments[0] in ("status", "logs", "cancel"):
        parser = Parser(__doc__)
        parser.add_argument("action")
        parser.add_argument("runs", nargs="+", metavar="RUN")
        options = parser.parse_args(arguments)
        return manage(options.action, options.runs)
    parser = Parser(__doc__)
    parser.add_argument("settings", nargs="*", metavar="key=value", help="recipe=NAME, and keys that differ from it")
    parser.add_argument("--dry-run", action="store_true", help="show the configuration and the job, start nothing")
    parser.add_argument("--list", action="store_true", help="recipes and what they reach")
    options = parser.parse_intermixed_args(arguments)
    return list_recipes() if options.list else submit(options.settings, dry_run=options.dry_run)


def list_recipes() -> int:
    """Every recipe in a line."""
    from tdkd_dist.recipe import list_recipes

    recipes = list_recipes()
    for name, reaches in recipes.items():
        print(f"{name:<{max(map(len, recipes))}}  {reaches}")
    return 0


def submit(settings: list[str], *, dry_run: bool) -> int:
    """Check, submit and follow one run, or the members of a sweep; the exit status."""
    from tdkd_dist.recipe import expand_sweep, load_all

    recipes = [text.removeprefix("recipe=") for text in settings if text.startswith("recipe=")]
    wanted = 0 if any(text.startswith("sweep.recipe=") for text in settings) else 1
    require(len(recipes) == wanted, "which recipe? give recipe=NAME; --list shows them, --help the rest")
    overrides = [text for text in settings if not text.startswith("recipe=")]
    configs = load_all(expand_sweep(recipes[0] if recipes else "", overrides))
    from tdkd_dist.cluster import start

    if dry_run:
        for config in configs:
            start.show(config)
        return 0
    return start.run(configs[0]) if len(configs) == 1 else start.run_sweep(configs)


def manage(action: str, runs: list[str]) -> int:
    """status, logs or cancel, for each run; `Mistake` at the end with those for which it could not be done."""
    from tdkd_dist.cluster import follow, status

    mistakes = Mistakes()
    for path in runs:
        with mistakes.gathered():
            folder = status.open_run(path)
            if action == "logs":
                follow.show_log(folder)
            else:
                print(printable(status.describe_run(folder) if action == "status" else status.cancel(folder)))
    mistakes.tell()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
