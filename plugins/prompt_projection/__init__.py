"""Kernels of the projections of many tokens; importing needs no PyTorch."""
