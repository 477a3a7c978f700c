"""The kernel that chooses next tokens from logits; importing needs no PyTorch."""
