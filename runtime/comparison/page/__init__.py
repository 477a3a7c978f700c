"""A comparison as one HTML page that needs nothing else: docs/compare_page.md."""

from runtime.comparison.page.render import render_page, write_page

__all__ = ["render_page", "write_page"]
