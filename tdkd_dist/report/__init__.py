"""Comparison of runs: `runs` reads and groups them, `page` makes one HTML file, `wandb_report` a W&B report."""
