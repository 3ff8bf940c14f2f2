"""Weights left out: one published method a package."""
