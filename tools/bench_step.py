"""How far a training step is from its limit: `bench/step.py`, at the address that users know; --help says more."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent / "bench"))
from step import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
