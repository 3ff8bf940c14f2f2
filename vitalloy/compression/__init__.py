"""Smaller and faster models: quantization/, tokens/, pruning/, one published method a file, on any backbone."""
