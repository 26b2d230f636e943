"""Bringing a student to where it is used: one file a format, each of which reads back what it wrote."""
