"""Calls into source trees: each tree has a process of its own that imports sglight from there.

    with Tree(Path("/tmp/before")) as tree:
        tree.call("contenders:describe", "conv", settings)   # contenders.describe("conv", settings) in that process

Arguments and results cross as JSON. The process uses the benchmarks of its tree if they can be called like this, since
they know how their sglight is used; for an older tree it uses those beside this file.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).resolve().parent
STOP_S = 5.0


class Tree:
    """A source tree and the process that works for it.

    Attributes:
        path: the folder that has sglight/. name: the folder's name.

    Raises:
        SystemExit: if there is no sglight.
    """

    def __init__(self, path: Path = HERE.parent) -> None:
        self.path = path.resolve()
        self.name = self.path.name
        if not (self.path / "sglight" / "__init__.py").is_file():
            raise SystemExit(
                f"--tree {path} has no sglight/: give the root of a checkout, as of `git worktree add`"
            )
        own = self.path / "benchmarks"
        benchmarks = own if (own / "trees.py").is_file() else HERE
        search = [str(self.path), str(benchmarks), os.environ.get("PYTHONPATH", "")]
        self._process = subprocess.Popen(
            [sys.executable, str(benchmarks / "trees.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Safe path: else the server that processes are forked from would import from the working directory first.
            env={
                **os.environ,
                "PYTHONPATH": os.pathsep.join(filter(None, search)),
                "PYTHONSAFEPATH": "1",
            },
        )

    def __enter__(self) -> Tree:
        found = Path(self.call("trees:location"))
        assert found == self.path, f"sglight was imported from {found}, not from {self.path}"
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()  # ends `serve`
        try:
            self._process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            self._process.terminate()

    def call(self, function: str, *args: Any) -> Any:
        """The result of ``module:function`` in the tree's process.

        Raises:
            RuntimeError: if it fails there, with the traceback.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps([function, args], default=str) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process for {self.path} died in {function}")
        failed, result = json.loads(answer)
        if failed:
            raise RuntimeError(f"{function} failed in {self.path}:\n{result}")
        return result

    def version(self) -> str:
        """Path and commit."""
        command = ["git", "-C", str(self.path), "describe", "--always", "--dirty"]
        done = subprocess.run(command, capture_output=True, text=True)
        return f"{self.path} at {done.stdout.strip() or 'no commit'}"


def location() -> str:
    """The tree that sglight is imported from in this process."""
    return str(Path(import_module("sglight").__file__ or "").resolve().parent.parent)


def serve() -> None:
    """Answer calls from the standard input until it ends. What is called may print: that goes to the standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        function, args = json.loads(line)
        module, name = function.split(":")
        try:
            answer = False, getattr(import_module(module), name)(*args)
        except Exception:
            answer = True, traceback.format_exc()
        print(json.dumps(answer, default=str), file=answers, flush=True)


if __name__ == "__main__":
    serve()
