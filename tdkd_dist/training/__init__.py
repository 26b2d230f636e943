"""A training on one rank: what it is made of, and the loop."""
