"""Figures printed as PDF in a process of their own while the page is written: a sixth of the time of a large report.

`python -m analysis.figures.printing` is that process: pickled figures in, PDFs out, each after its length.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO

from analysis.figures.saving import Drawing, pdf


class Printer:
    """Prints drawings as PDF: the ones it was given by `begin` in another process, others when they are asked for.

    What cannot be sent there is printed here, and all of it where that process dies; the bytes are the same. To be used
    in a `with`.
    """

    def __init__(self) -> None:
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="printing")  # its thread starts with the first drawing
        self._asked: dict[int, Future[bytes]] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self, drawing: Drawing) -> None:
        try:
            figure = pickle.dumps(drawing.figure)
        except (pickle.PicklingError, AttributeError, TypeError):  # it holds a function without a name, for one
            return
        if self._process is None:
            command = [sys.executable, "-m", "analysis.figures.printing"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)
        self._asked[id(drawing)] = self._asking.submit(_answer, self._process, figure)

    def pdf(self, drawing: Drawing) -> bytes:
        asked = self._asked.get(id(drawing))
        try:
            return drawing.pdf() if asked is None else asked.result()
        except (OSError, EOFError):
            return drawing.pdf()

    def __enter__(self) -> Printer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._process is not None:
            if kind is not None:
                self._process.kill()  # what it has begun is of no use
            self._asking.shutdown(cancel_futures=True)
            self._process.communicate()


def _answer(process: subprocess.Popen[bytes], figure: bytes) -> bytes:
    """The PDF of a pickled figure. Raises OSError or EOFError where the process is gone."""
    assert process.stdin is not None and process.stdout is not None
    send(process.stdin, figure)
    if (answer := receive(process.stdout)) is None:
        raise EOFError("the printing process has ended")
    return answer


def send(stream: IO[bytes], content: bytes) -> None:
    stream.write(len(content).to_bytes(8, "little") + content)
    stream.flush()


def receive(stream: IO[bytes]) -> bytes | None:
    """What `send` sent; None where the other side has ended."""
    length = int.from_bytes(stream.read(8), "little")
    content = stream.read(length)
    return content if length and len(content) == length else None


def main() -> None:
    while (figure := receive(sys.stdin.buffer)) is not None:
        send(sys.stdout.buffer, pdf(pickle.loads(figure)))


if __name__ == "__main__":
    main()
