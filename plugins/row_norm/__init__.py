"""Norm of rows, for what reads a normed row more than once."""
