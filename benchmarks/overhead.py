"""What Lightning, the loader, the callbacks and the logger add: a whole run against a bare PyTorch loop.

Both train the same network on the same batches with Adam and validate after every epoch, in turn (A B A B ...), in
one process. The whole run is what the command does between the first batch and the end of the training: TensorBoard,
checkpoints, learning-rate log and all. The bare loop has a list of ready batches and nothing else.

    python benchmarks/overhead.py experiment=mnist_conv dataset.raw_dir=../shared/data --batches 60
    python benchmarks/overhead.py experiment=ellipse
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
from pathlib import Path
from statistics import median
from time import perf_counter, process_time
from typing import Any

import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_dir

from sglight import experiment
from sglight.callbacks.timing import EpochTimer
from sglight.config import CONF, check, to_plain


def whole_run(plain: dict[str, Any], folder: Path) -> tuple[float, float, float]:
    """Wall and CPU seconds of `Trainer.fit` from the first batch to the end, and the final validation loss."""
    datamodule = experiment.build_datamodule(plain)
    module = experiment.build_module(plain, datamodule)
    _, callbacks = experiment.build_callbacks(plain["callbacks"], folder)
    timer = EpochTimer()
    trainer = experiment.build_trainer(plain, folder, [*callbacks, timer])
    cpu = process_time()
    trainer.fit(module, datamodule)
    return timer.fit_s, process_time() - cpu, float(trainer.callback_metrics["val/loss"])


def bare_loop(plain: dict[str, Any]) -> tuple[float, float, float]:
    """The same by a loop over lists of batches (their making is not timed)."""
    datamodule = experiment.build_datamodule(plain)
    module = experiment.build_module(plain, datamodule)
    module.configure_model()
    net = module.stage(0)
    loader, limit = datamodule.train_dataloader(), plain["trainer"]["limit_train_batches"]
    epochs = []
    for epoch in range(plain["trainer"]["max_epochs"]):
        loader.sampler.set_epoch(epoch)
        epochs.append([batch for _, batch in zip(range(limit or len(loader)), loader, strict=False)])
    validation = list(datamodule.val_dataloader())
    optimizer = torch.optim.Adam(net.parameters(), lr=plain["strategy"]["optimizer"]["lr"], foreach=True)
    start, cpu = perf_counter(), process_time()
    for batches in epochs:
        net.train()
        for x, y in batches:
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        net.eval()
        with torch.no_grad():
            losses = [F.cross_entropy(net(x), y, reduction="sum") for x, y in validation]
    wall = perf_counter() - start
    return wall, process_time() - cpu, float(sum(losses)) / datamodule.val_size


def main() -> None:
    """Measure, print a table, and write JSON if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", help="of the command, such as experiment=mnist_conv")
    parser.add_argument("--batches", type=int, help="training batches an epoch (default: all)")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3", job_name="sglight"):
        overrides = [
            "strategy=backprop",
            "strategy.scheduler.name=none",
            "strategy.regularisation.smoothness=0",
        ]
        overrides += [f"trainer.max_epochs={options.epochs}", f"trainer.threads={options.threads}"]
        overrides += ["trainer.accelerator=cpu", "callbacks.figures.enabled=false"]
        if options.batches:
            overrides.append(f"trainer.limit_train_batches={options.batches}")
        plain = to_plain(check(compose("config", [*options.overrides, *overrides])))
    experiment.set_up(plain)
    torch.set_num_threads(options.threads)
    runs: dict[str, list[tuple[float, float, float]]] = {"whole run": [], "bare loop": []}
    with tempfile.TemporaryDirectory() as folder:
        for i in range(options.rounds + 1):
            results = {"whole run": whole_run(plain, Path(folder) / str(i)), "bare loop": bare_loop(plain)}
            if i:  # the first round warms up
                for name, result in results.items():
                    runs[name].append(result)
    ratios = [a[0] / b[0] for a, b in zip(runs["whole run"], runs["bare loop"], strict=True)]
    summary = {
        name: {
            "wall_s": median(r[0] for r in results),
            "cpu_s": median(r[1] for r in results),
            "val_loss": results[-1][2],
        }
        for name, results in runs.items()
    }
    print(f"\n{' '.join(options.overrides)}, {options.rounds} rounds, {options.threads} thread(s)")
    print(
        f"{platform.processor() or platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}"
    )
    for name, row in summary.items():
        print(
            f"{name:>10}: {row['wall_s']:8.3f} s wall, {row['cpu_s']:8.3f} s CPU, validation loss {row['val_loss']:.4f}"
        )
    print(f"ratio of wall times: median {median(ratios):.3f}, {min(ratios):.3f} to {max(ratios):.3f}")
    if options.json:
        options.json.write_text(json.dumps({"runs": runs, "summary": summary, "ratios": ratios}, indent=2))


if __name__ == "__main__":
    main()
