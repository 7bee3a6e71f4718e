"""Experiments that DVC keeps: read, run as a sweep, compared, reproduced."""
