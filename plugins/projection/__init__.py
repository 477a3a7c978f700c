"""Kernels of the projections of a decode step and of the head; importing needs no PyTorch."""
