"""Fewer or cheaper tokens: slimming, sparse attention, early exit. One published method a package."""
