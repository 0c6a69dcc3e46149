"""Checkpoints, folders of results and unfinished runs on disk; everything read is taken to be hostile."""
