"""Lowerings: one pass per file, canonical model in, a target's model out."""
