"""What the command line does with checked configurations: show, run, and run a sweep."""

from tdkd_dist.cluster import follow, preflight, scheduler, submission
from tdkd_dist.cluster.follow import FINISHED, STOPPED, Follower
from tdkd_dist.config import Config
from tdkd_dist.mistakes import Mistake, Mistakes, printable
from tdkd_dist.recipe import to_yaml
from tdkd_dist.run.folder import RunFolder


def show(config: Config) -> None:
    """What would be run, and what is missing for it."""
    try:
        cluster, absent = submission.find_cluster(config), []
    except Mistake as mistake:  # the batch script can be looked at anywhere
        cluster, absent = "slurm", mistake.lines
    findings = preflight.check(config, cluster=cluster, dry_run=True)
    findings.absent += absent
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


def run(config: Config, findings: preflight.Findings | None = None) -> int:
    """Submit and follow one run, unless it is finished; its exit status. It is checked, unless `findings` are given."""
    cluster = submission.find_cluster(config)
    folder = RunFolder(config.run.folder)
    folder.check(config)
    finished = folder.read_summary(config)
    if finished:
        print(printable(f"{folder.path} is finished\n{finished['table']}\nfigure: {finished['figure']}"))
        return 0
    submission.refuse_if_alive(folder)
    findings = findings or preflight.check(config, cluster=cluster)
    folder.create(config, findings.data)
    print(f"{folder.path}: {submission.describe(config, cluster)}", flush=True)
    for line in findings.advice:
        print(f"note: {line}", flush=True)
    return submission.run_to_end(config, folder, cluster, findings.teacher_weights)


def run_sweep(configs: list[Config]) -> int:
    """The members that are not finished: here one after the other, on Slurm as one job array."""
    cluster = submission.find_cluster(configs[0])
    mistakes = Mistakes()
    for config in configs:
        with mistakes.gathered():
            RunFolder(config.run.folder).check(config)
    mistakes.tell()
    found = preflight.check_all(configs, cluster=cluster)
    if cluster == "slurm":
        for line in found[0].advice:
            print(f"note: {line}", flush=True)
        outcomes = run_array(configs, found)
    else:
        outcomes = {}
        for k, (config, findings) in enumerate(zip(configs, found, strict=True), start=1):
            print(f"\n[{k}/{len(configs)}] {config.run.name}", flush=True)
            outcomes[config.run.name] = run(config, findings)
            if outcomes[config.run.name] == STOPPED:
                print("the sweep is stopped; the same command goes on from here")
                return STOPPED
    states = {FINISHED: "finished", follow.USERS_MISTAKE: "refused", follow.CRASHED: "crashed"}
    print("\nthe sweep:")
    for name, status in outcomes.items():
        print(f"  {name}: {states.get(status, 'stopped')}")
    return max(outcomes.values())


def run_array(configs: list[Config], found: list[preflight.Findings]) -> dict[str, int]:
    """A sweep on Slurm, followed member by member; each one's exit status. Ctrl-C stops all members."""
    outcomes = {config.run.name: FINISHED for config in configs}
    folders = [RunFolder(config.run.folder) for config in configs]
    left = [k for k, config in enumerate(configs) if folders[k].read_summary(config) is None]
    for k in left:
        submission.refuse_if_alive(folders[k])
        folders[k].create(configs[k], found[k].data)
    home = folders[0].path.parent / "sweep"
    jobs = (
        submission.submit_array([configs[k] for k in left], [found[k].teacher_weights for k in left], home)
        if left
        else []
    )
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
