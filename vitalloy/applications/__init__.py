"""Whole systems for one job each: a folder a system, with model, data, and a pipeline that returns typed results."""
