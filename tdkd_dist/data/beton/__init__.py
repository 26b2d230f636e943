"""FFCV files: their layout and manifest, writing and verifying them, copies on a node's own disk."""
