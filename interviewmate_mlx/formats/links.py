"""A folder that came from elsewhere may hold links; what they lead to is not part of it.

A link to a file of the user's would have that file copied into a converted folder, or
pushed to the Hub.
"""

import os
from collections.abc import Iterable
from pathlib import Path

from interviewmate_mlx.errors import InterviewMateError, list_faults


def refuse_links_out(folder: Path, names: Iterable[str], kind: type[InterviewMateError]) -> None:
    """Refuse files of a folder that lie elsewhere, but for those of a Hub cache.

    There, `snapshots/COMMIT/NAME` is a link to `blobs/CHECKSUM`.

    Args:
        folder: itself may be reached by a link.
        names: of files in it, those that are read; some need not be there.
        kind: what is raised.

    Raises:
        InterviewMateError: of that kind; every such file is named.
    """
    root = Path(os.path.realpath(folder))
    homes = [root]
    if root.parent.name == "snapshots":
        homes.append(root.parent.parent / "blobs")
    faults = []
    for name in names:
        target = Path(os.path.realpath(root / name))
        if not any(target.is_relative_to(home) for home in homes):
            faults.append(f"{name}: leads to {target}, expected a file in the folder")
    if faults:
        raise kind(
            f"{folder} holds links to files outside it:\n{list_faults(faults)}\n"
            "If you trust them, put copies of those files in their place."
        )
