"""From a command to a job that runs: checks, submission, following and ending it, here or on Slurm."""
