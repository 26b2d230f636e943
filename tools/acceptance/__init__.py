"""The checks of `tools/gpu_acceptance.py`, by subject; each is a function of a `Scale` that gives what it `Found`."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "bench"))
