"""Train or evaluate: python launch/submit.py recipe=NAME key=value ...

    python launch/submit.py --list                          recipes and what they reach
    python launch/submit.py recipe=fashion_sew --dry-run    the resolved configuration and the job, without starting it
    python launch/submit.py recipe=imagenet_sew34 data.train=A.beton data.val=B.beton

The run lives in runs/NAME. The same command again resumes it; Ctrl-C stops it cleanly, at a step boundary.
Exit status: 0 finished, 1 crashed, 2 a mistake in the command, recipe or data, 130 stopped.
"""

import sys

USAGE = "usage: python launch/submit.py recipe=NAME [key=value ...] [--dry-run] | --list | --help"


def main(arguments: list[str]) -> int:
    """The command line; returns the exit status."""
    if "--help" in arguments or "-h" in arguments:
        print(__doc__.strip())
        return 0
    try:
        if arguments == ["--list"]:
            return list_recipes()
        return submit(arguments)
    except KeyboardInterrupt:
        return 130
    except ValueError as error:
        from tdkd_dist.job import is_users_mistake

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
    """Check, submit and follow one run."""
    recipes = [a.removeprefix("recipe=") for a in arguments if a.startswith("recipe=")]
    flags = [a for a in arguments if a.startswith("-")]
    if len(recipes) != 1 or set(flags) - {"--dry-run"}:
        unknown = set(flags) - {"--dry-run"}
        print(f"error: {unknown.pop()}: no such flag" if unknown else "error: which recipe?", file=sys.stderr)
        print(f"{USAGE}\nrecipes: python launch/submit.py --list", file=sys.stderr)
        return 2
    from tdkd_dist import preflight, submission
    from tdkd_dist.recipe import load_config, to_yaml
    from tdkd_dist.run_folder import RunFolder

    config = load_config(recipes[0], [a for a in arguments if not a.startswith(("recipe=", "-"))])
    cluster = submission.find_cluster(config)
    folder = RunFolder(config.run.folder)
    if "--dry-run" in flags:
        findings = preflight.check(config, cluster=cluster, dry_run=True)
        print(to_yaml(config))
        print(f"job: {submission.describe(config, cluster)}")
        print(
            f"global batch: {config.train.batch_size} = {config.launcher.world_size} rank(s) x"
            f" {config.accumulation} micro-batch(es) x {config.micro_batch} images"
        )
        print(f"steps per epoch: {findings.steps_per_epoch(config) or 'known once data.train is here'}")
        for line in findings.absent:
            print(f"not here yet: {line}")
        return 0
    if folder.config_file.exists():
        folder.check_same(config)
        finished = folder.read_summary(config)
        if finished:
            print(f"{folder.path} is finished\n{finished['table']}\nfigure: {finished['figure']}")
            return 0
    findings = preflight.check(config, cluster=cluster)
    folder.create(config)
    print(f"{folder.path}: {submission.describe(config, cluster)}", flush=True)
    return submission.run_to_end(config, folder, cluster, findings.teacher_weights)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
