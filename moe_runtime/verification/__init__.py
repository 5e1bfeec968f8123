"""Checking a checkpoint that somebody has written: its files, its numbers, and its source."""
