"""A run imports nothing of what it postpones: in a new process, because others may have imported it."""

import subprocess
import sys

RUN = """
import sys
from sglight.__main__ import main

sys.argv[1:] = [
    "dataset=ellipse", "strategy=backprop", "trainer.max_epochs=1", "trainer.limit_train_batches=1",
    "callbacks.figures.enabled=false", "callbacks.timeline.enabled=false", "hydra.run.dir=run",
]
main()
heavy = ("sympy", "sklearn", "torchvision", "scipy.signal", "torchmetrics.classification", "torch._dynamo.eval_frame")
found = [name for name in heavy if name in sys.modules]
assert not found, found
"""


def test_a_run_imports_neither_a_compiler_nor_metrics(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", RUN], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")
