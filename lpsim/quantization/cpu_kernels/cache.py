"""When Numba compiles a kernel anew: `fingerprint`, which a kernel takes of the files that it depends on.

Numba keeps compiled functions on disk. It uses one again as long as the date of its file, its bytecode and its closure
are the same, whatever has become of the functions that it calls. So a kernel's closure holds the fingerprint of their
files: when one of them changes, so does the closure.
"""

import hashlib
from pathlib import Path


def fingerprint(*files: Path) -> int:
    """48 bits of a hash of the files' contents."""
    return int.from_bytes(hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()[:6], "big")
