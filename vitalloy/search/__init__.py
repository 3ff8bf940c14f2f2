"""Designing or finding an architecture: one method a file."""
