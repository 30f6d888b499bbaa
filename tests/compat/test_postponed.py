"""In new processes, because others may have imported the packages in full."""

import subprocess
import sys

import pytest

TRAINING = """
import sys
from sglight.compat.postponed import postpone

postpone()
import torch
import pytorch_lightning as pl
import sglight.experiment

net = torch.nn.Linear(2, 2)
optimizer = torch.optim.Adam(net.parameters())
net(torch.ones(3, 2)).sum().backward()
optimizer.step()
optimizer.zero_grad()
assert not isinstance(net, pl.utilities.compile.OptimizedModule)
heavy = ("sympy", "torchvision", "scipy.signal", "torchmetrics.classification", "torch._dynamo.eval_frame")
found = [name for name in heavy if name in sys.modules]
assert not found, found
"""
METRICS = """
import torchmetrics
from torchmetrics.classification import MulticlassAccuracy

assert issubclass(MulticlassAccuracy, torchmetrics.Metric)
accuracy = torchmetrics.Accuracy("multiclass", num_classes=2)
assert float(accuracy(torch.tensor([0, 1, 1, 1]), torch.tensor([0, 1, 1, 0]))) == 0.75
assert torchmetrics.MetricCollection([accuracy]) and torchmetrics.__version__
"""
TRACER = """
compiled = torch.compile(net, backend="eager")
assert isinstance(compiled, pl.utilities.compile.OptimizedModule)
assert not isinstance(net, pl.utilities.compile.OptimizedModule)
assert torch.equal(compiled(torch.ones(3, 2)), net(torch.ones(3, 2)))
marked = torch.optim.Optimizer.zero_grad.__wrapped__
optimizer.zero_grad()
assert marked.__dynamo_disable is not marked  # by the real tracer
optimizer.step()
"""
A_MODULE_FIRST = """
from torch._dynamo.utils import counters
from torch._dynamo import config, utils
import torch._dynamo.utils as again

assert utils is again is torch._dynamo.utils and utils.counters is counters
assert utils.__spec__.loader.get_source("torch._dynamo.utils")
assert torch._dynamo.OptimizedModule is torch._dynamo.eval_frame.OptimizedModule
assert torch.compile(net, backend="eager")(torch.ones(1, 2)).shape == (1, 2)
"""


@pytest.mark.parametrize("then", [METRICS + TRACER, A_MODULE_FIRST], ids=["metrics, then tracer", "module"])
def test_a_training_imports_neither_and_both_come_when_they_are_used(then):
    done = subprocess.run(
        [sys.executable, "-c", TRAINING + then], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
