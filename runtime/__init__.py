"""Everything needed to generate text from a bundle."""
