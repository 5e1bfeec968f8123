"""Conversion of checkpoints to FP8 and FP4: plan from headers, stream, journal, report."""
