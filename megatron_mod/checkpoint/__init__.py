"""Checkpoint folders: what is in them, whether it is what was written, and how it is written."""
