"""Train or evaluate: python launch/submit.py recipe=NAME key=value ...

    python launch/submit.py --list                          recipes and what they reach
    python launch/submit.py recipe=fashion_sew --dry-run    the resolved configuration and the job, without starting it
    python launch/submit.py recipe=imagenet_sew34 data.train=A.beton data.val=B.beton
    python launch/submit.py recipe=fashion_sew sweep.run.seed=[0,1,2] sweep.loss.beta=[0,0.5]    every combination

    python launch/submit.py status RUN...                   where it is: state, step, speed, accuracy, restarts
    python launch/submit.py logs RUN                        its log, followed while it runs
    python launch/submit.py cancel RUN...                   save a checkpoint and stop

The run lives in runs/NAME. The same command again resumes it; Ctrl-C stops it cleanly, at a step boundary.
Exit status: 0 finished, 1 crashed, 2 a mistake in the command, recipe or data, 130 stopped.
"""

import os
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tdkd_dist.config import Config

USAGE = """usage: python launch/submit.py recipe=NAME [key=value ...] [--dry-run]
       python launch/submit.py status|logs|cancel RUN | --list | --help"""


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return 0
    try:
        if arguments[:1] and arguments[0] in ("status", "logs", "cancel") and len(arguments) > 1:
            return manage(arguments[0], arguments[1:])
        if arguments == ["--list"]:
            return list_recipes()
        return submit(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # Whoever read our output, `head` for instance, has seen enough; a job goes on without us.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except ValueError as error:
        from tdkd_dist.cluster.job import is_users_mistake

        if not is_users_mistake(error):
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2


def list_recipes() -> int:
    """Every recipe in a line."""
    from tdkd_dist.recipe import list_recipes

    recipes = list_recipes()
    for name, reaches in recipes.items():
        print(f"{name:<{max(map(len, recipes))}}  {reaches.removeprefix('Reaches: ')}")
    return 0


def submit(arguments: list[str]) -> int:
    """Check, submit and follow one run, or the members of a sweep one after the other."""
    recipes = [a.removeprefix("recipe=") for a in arguments if a.startswith("recipe=")]
    flags = [a for a in arguments if a.startswith("-")]
    wanted = 0 if any(a.startswith("sweep.recipe=") for a in arguments) else 1
    if len(recipes) != wanted or set(flags) - {"--dry-run"}:
        unknown = set(flags) - {"--dry-run"}
        print(f"error: {unknown.pop()}: no such flag" if unknown else "error: which recipe?", file=sys.stderr)
        print(f"{USAGE}\nrecipes: python launch/submit.py --list", file=sys.stderr)
        return 2
    from tdkd_dist.recipe import expand_sweep, load_config

    overrides = [a for a in arguments if not a.startswith(("recipe=", "-"))]
    members = expand_sweep(recipes[0] if recipes else "", overrides)
    configs = [load_config(recipe, own) for recipe, own in members]
    if "--dry-run" in flags:
        for config in configs:
            show(config)
        return 0
    if len(configs) == 1:
        return run(configs[0])
    return run_sweep(configs)


def show(config: "Config") -> None:
    """What would be run, and what is missing for it."""
    from tdkd_dist.cluster import preflight, submission
    from tdkd_dist.recipe import to_yaml
    from tdkd_dist.run.folder import RunFolder

    cluster = submission.find_cluster(config)
    findings = preflight.check(config, cluster=cluster, dry_run=True)
    print(to_yaml(config))
    print(f"job: {submission.describe(config, cluster)}")
    print(
        f"global batch: {config.train.batch_size} = {config.launcher.world_size} rank(s) x"
        f" {config.accumulation} micro-batch(es) x {config.micro_batch} images"
    )
    print(f"steps per epoch: {findings.steps_per_epoch(config) or 'known once data.train is here'}")
    if cluster == "slurm":
        print(f"batch script:\n{submission.batch_script(config, RunFolder(config.run.folder))}")
    for line in findings.absent:
        print(f"not here yet: {line}")
    for line in findings.advice:
        print(f"note: {line}")


def run(config: "Config") -> int:
    """Submit and follow one run, unless it is finished; its exit status."""
    from tdkd_dist.cluster import preflight, submission
    from tdkd_dist.run.folder import RunFolder

    cluster = submission.find_cluster(config)
    folder = RunFolder(config.run.folder)
    if folder.config_file.exists():
        folder.check_same(config)
        finished = folder.read_summary(config)
        if finished:
            print(f"{folder.path} is finished\n{finished['table']}\nfigure: {finished['figure']}")
            return 0
    submission.refuse_if_alive(folder)
    findings = preflight.check(config, cluster=cluster)
    folder.create(config)
    print(f"{folder.path}: {submission.describe(config, cluster)}", flush=True)
    for line in findings.advice:
        print(f"note: {line}", flush=True)
    return submission.run_to_end(config, folder, cluster, findings.teacher_weights)


def run_sweep(configs: "list[Config]") -> int:
    """The members that are not finished: here one after the other, on Slurm as one job array."""
    from tdkd_dist.cluster import follow, preflight, submission
    from tdkd_dist.run.folder import RunFolder

    cluster = submission.find_cluster(configs[0])
    for folder, config in ((RunFolder(config.run.folder), config) for config in configs):
        if folder.config_file.exists():
            folder.check_same(config)
    found = [preflight.check(config, cluster=cluster) for config in configs]
    weights = [findings.teacher_weights for findings in found]
    if cluster == "slurm":
        for line in found[0].advice:
            print(f"note: {line}", flush=True)
        outcomes = run_array(configs, weights)
    else:
        outcomes = {}
        for k, config in enumerate(configs, start=1):
            print(f"\n[{k}/{len(configs)}] {config.run.name}", flush=True)
            outcomes[config.run.name] = run(config)
            if outcomes[config.run.name] == follow.STOPPED:
                print("the sweep is stopped; the same command goes on from here")
                return follow.STOPPED
    states = {follow.FINISHED: "finished", follow.USERS_MISTAKE: "refused", follow.CRASHED: "crashed"}
    print("\nthe sweep:")
    for name, status in outcomes.items():
        print(f"  {name}: {states.get(status, 'stopped')}")
    return max(outcomes.values())


def run_array(configs: "list[Config]", weights: list[str | None]) -> dict[str, int]:
    """A sweep on Slurm, followed member by member; each one's exit status. Ctrl-C stops all members."""
    from tdkd_dist.cluster import scheduler, submission
    from tdkd_dist.cluster.follow import FINISHED, STOPPED, Follower
    from tdkd_dist.run.folder import RunFolder

    outcomes = {config.run.name: FINISHED for config in configs}
    folders = [RunFolder(config.run.folder) for config in configs]
    left = [k for k, config in enumerate(configs) if folders[k].read_summary(config) is None]
    for k in left:
        submission.refuse_if_alive(folders[k])
        folders[k].create(configs[k])
    home = folders[0].path.parent / "sweep"
    jobs = submission.submit_array([configs[k] for k in left], [weights[k] for k in left], home) if left else []
    outcomes |= {configs[k].run.name: STOPPED for k in left}
    try:
        print(f"{len(left)} of {len(configs)} runs submitted as one job array", flush=True)
        for k, job in zip(left, jobs, strict=True):
            print(f"\n{configs[k].run.name}", flush=True)
            follower = Follower(job, folders[k], "slurm")
            outcomes[configs[k].run.name] = follower.follow()
            if follower.interrupted:
                raise KeyboardInterrupt
    except KeyboardInterrupt:
        for job in jobs:
            scheduler.ask_to_stop("slurm", str(job.job_id))
    return outcomes


def manage(action: str, runs: list[str]) -> int:
    """status, logs or cancel, for each run."""
    from tdkd_dist.cluster import status
    from tdkd_dist.cluster.follow import show_log

    for path in runs:
        folder = status.open_run(path)
        if action == "status":
            print(status.describe_run(folder))
        elif action == "cancel":
            print(status.cancel(folder))
        else:
            show_log(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
