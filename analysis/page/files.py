"""Files that are replaced as a whole."""

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Write a file beside `path` and rename it there: a reader sees the old or the new one, also after a kill.

    A kill may leave a hidden file beside it. Raises OSError; the old file stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_bytes(content)
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
