"""The backends that run a bundle's step."""
