"""The custom ops of the domain `doge`; importing this package needs no PyTorch."""
