"""The end of a decode step's block with experts, as one kernel; importing needs no PyTorch."""
