"""Whole sampling loops in the ranks."""
