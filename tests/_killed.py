"""For a process that kills itself at the n-th time that it comes to a place."""

from __future__ import annotations

import os
import signal
from typing import Any


class Killer:
    def __init__(self, place: str, times: int) -> None:
        self.place, self.times_left = place, times

    def at(self, here: str) -> None:
        if here == self.place:
            self.times_left -= 1
            if self.times_left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    def around(self, owner: Any, name: str, before: str, after: str) -> None:
        """Let there be a place before, and one after every call of a function."""
        original = getattr(owner, name)

        def call(*arguments: Any, **settings: Any) -> Any:
            self.at(before)
            result = original(*arguments, **settings)
            self.at(after)
            return result

        setattr(owner, name, call)
