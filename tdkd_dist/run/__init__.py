"""What a run leaves: its folder, log, record, signs of life and pictures."""
