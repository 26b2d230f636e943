"""The checks of `tools/gpu_acceptance.py`, by subject; each is a function of a `Scale` that gives what it `Found`."""
