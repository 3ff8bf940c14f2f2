"""Smaller and faster models: quantization/, one method a file, on any backbone."""
