"""Text for a file that goes into the repository: without folders of one machine."""

from __future__ import annotations

import re
import sys
import tempfile
from pathlib import Path

# Whatever is left of these once the known folders are gone; the second kind names a person.
_REST = re.compile(r"(?<![\w.~/}-])/(?:(?:root|tmp|work)(?![\w-])|(?:home|Users)/[^/\s]+)")


def without_machine_paths(text: str) -> str:
    """Replace the current folder, Python's, the home and temporary files by words."""
    places = {
        str(Path.cwd()): "CURRENT-FOLDER",
        sys.prefix: "PYTHON",
        sys.base_prefix: "PYTHON",
        str(Path.home()): "HOME",
        tempfile.gettempdir(): "TEMPORARY",
    }
    for place in sorted(places, key=len, reverse=True):  # the longest first: they contain another
        if len(place) > 1:
            text = text.replace(place, places[place])
    return _REST.sub("FOLDER", text)
