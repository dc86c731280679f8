"""Refuses links that lead out of a model or adapter folder.

A folder from a stranger may link to a private file of the user. That file would then be
copied into a converted folder, or pushed to the Hub.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from interviewmate_mlx.errors import InterviewMateError, list_faults


def refuse_outside_links(
    folder: Path, names: Iterable[str], error_type: type[InterviewMateError]
) -> None:
    """Refuse files that are links to somewhere outside the folder.

    In a Hub cache, links to its blobs are allowed: `snapshots/COMMIT/NAME` is a link
    to `blobs/CHECKSUM` there.

    Args:
        folder: may itself be reached through a link.
        names: the files to check; missing ones are fine.
        error_type: the error to raise.

    Raises:
        InterviewMateError: of type `error_type`; it names every such file.
    """
    root = Path(os.path.realpath(folder))
    allowed = [root]
    if root.parent.name == "snapshots":
        allowed.append(root.parent.parent / "blobs")
    faults = []
    for name in names:
        target = Path(os.path.realpath(root / name))
        if not any(target.is_relative_to(place) for place in allowed):
            faults.append(f"{name}: links to {target}, expected a file in the folder")
    if faults:
        raise error_type(
            f"{folder} holds links to files outside it:\n{list_faults(faults)}\n"
            "If you trust these files, replace the links by copies of them."
        )
