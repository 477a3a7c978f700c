"""Doge in plain PyTorch; `model.config` and `model.contract` need no PyTorch."""
