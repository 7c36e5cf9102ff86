"""Figures drawn and printed by a process of its own while the page goes on: a third of the time of a large report.

`python -m analysis.figures.printing` is that process: pickled drawings with the names of the forms that are wanted come
in, these forms go out, each after its length.
"""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import IO

from analysis.figures.saving import FORMS, Drawing


class Printer:
    """Makes `forms` (of FORMS) of drawings in another process, from `begin` to `finish`. To be used in a `with`.

    What cannot be sent there, or where that process dies, is made here when it is asked for; the bytes are the same.
    """

    def __init__(self, forms: Sequence[str] = FORMS) -> None:
        self._forms = forms
        self._asking = ThreadPoolExecutor(1, thread_name_prefix="printing")  # its thread starts with the first drawing
        self._asked: dict[int, Future[bytes]] = {}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process, which takes a second or two, before there is a drawing."""
        if self._process is None:
            command = [sys.executable, "-m", "analysis.figures.printing"]
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)

    def begin(self, drawing: Drawing) -> None:
        try:
            content = pickle.dumps((drawing, self._forms))
        except (pickle.PicklingError, AttributeError, TypeError):  # it holds a function without a name, for one
            return
        self.start()
        assert self._process is not None
        self._asked[id(drawing)] = self._asking.submit(_answer, self._process, content)

    def finish(self, drawings: Sequence[Drawing]) -> None:
        """Wait for the forms of the drawings, and put them where each would keep its own.

        From the last on, those that the other process has not come to are made here meanwhile.
        """
        for drawing in reversed(drawings):
            asked = self._asked.pop(id(drawing), None)
            if asked is None or asked.cancel():
                _printed(drawing, self._forms)
                continue
            with contextlib.suppress(OSError, EOFError):  # that process has died: made when they are asked for
                drawing.__dict__.update(pickle.loads(asked.result()))

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


def _answer(process: subprocess.Popen[bytes], drawing: bytes) -> bytes:
    """The forms of a pickled drawing, pickled. Raises OSError or EOFError where the process is gone."""
    assert process.stdin is not None and process.stdout is not None
    send(process.stdin, drawing)
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
    while (content := receive(sys.stdin.buffer)) is not None:
        drawing, forms = pickle.loads(content)
        send(sys.stdout.buffer, pickle.dumps(_printed(drawing, forms)))


def _printed(drawing: Drawing, forms: Sequence[str]) -> dict[str, bytes]:
    return {form: getattr(drawing, form) for form in forms}


if __name__ == "__main__":
    main()
