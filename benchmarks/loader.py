"""Samples per second of our loader against torchvision's data set behind a DataLoader, on MNIST.

    python benchmarks/loader.py --data ../shared/data

Both serve all 60,000 training pictures, shuffled, normalised, as float32 batches. They take turns (A B A B ...); the
table shows medians. Ours serves 54,000, the rest being its validation split: rates are per sample served.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import count
from typing import Any

import machine
import torch
import torchvision
from rich.console import Console
from rich.table import Table
from timing import by_name, in_turn, ratios
from torch.utils.data import DataLoader
from torchvision import transforms

from sglight.data.images import TorchvisionData
from sglight.data.loader import BatchLoader

MEAN, STD = 0.1307, 0.3081


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data", default="../shared/data", help="folder that holds MNIST/raw (default: %(default)s)"
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each loader (default: %(default)s)")
    parser.add_argument(
        "--batch-size", type=int, default=128, help="samples in a batch (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2], help="num_workers (default: 0 2)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default: %(default)s)")
    parser.add_argument("--augment", action="store_true", help="random crops with padding 2 on both sides")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    return parser.parse_args()


def ours(options: argparse.Namespace, folder: str) -> BatchLoader:
    """Whole batches by index."""
    data = TorchvisionData(
        "mnist",
        folder,
        raw_dir=options.data,
        batch_size=options.batch_size,
        augment=options.augment,
        crop_padding=2,
    )
    data.prepare_data()
    data.setup("fit")
    return data.train_dataloader()


def theirs(options: argparse.Namespace, workers: int, folder: str) -> DataLoader[Any]:
    """One sample at a time, with the usual transform."""
    crop = [transforms.RandomCrop(28, padding=2)] if options.augment else []
    transform = transforms.Compose([*crop, transforms.ToTensor(), transforms.Normalize((MEAN,), (STD,))])
    samples = torchvision.datasets.MNIST(options.data, transform=transform)
    return DataLoader(
        samples, options.batch_size, shuffle=True, num_workers=workers, persistent_workers=workers > 0
    )


def seconds_per_sample(loader: Iterable[Any], epochs: Iterator[int]) -> float:
    """The next epoch, every batch touched."""
    if isinstance(loader, BatchLoader):
        loader.sampler.set_epoch(next(epochs))
    start, samples = time.perf_counter(), 0
    for x, y in loader:
        samples += len(y)
        assert x.dtype == torch.float32
    return (time.perf_counter() - start) / samples


def measure(loaders: dict[str, Iterable[Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds per sample of each loader, taken in turn, after a round to warm up."""
    runs = {name: partial(seconds_per_sample, loader, count()) for name, loader in loaders.items()}
    return by_name(in_turn(runs, rounds, warm_up=1))


def report(times: dict[str, list[float]], options: argparse.Namespace) -> dict[str, Any]:
    """Rates, ratios, and what they were measured with."""
    rates = {name: 1 / statistics.median(values) for name, values in times.items()}
    slower = {name: statistics.median(ratios(values, times["sglight"])) for name, values in times.items()}
    return {
        "samples_per_s": rates,
        "ratio": slower,
        "rounds": options.rounds,
        "batch_size": options.batch_size,
        "augment": options.augment,
        "threads": options.threads,
        "machine": f"{machine.summary()}, torchvision {torchvision.__version__}",
    }


def show(result: dict[str, Any]) -> None:
    """The table."""
    table = Table("loader", "samples/s", "sglight is faster by", title="MNIST, training epoch")
    for name, rate in result["samples_per_s"].items():
        table.add_row(name, f"{rate:,.0f}", f"{result['ratio'][name]:.1f} x")
    console = Console()
    console.print(table)
    console.print(
        f"medians of {result['rounds']} rounds in turn, batch {result['batch_size']}, augment {result['augment']}, "
        f"{result['threads']} thread(s); {result['machine']}"
    )


def main() -> None:
    """Measures and prints."""
    options = arguments()
    machine.set_threads(options.threads)
    warnings.filterwarnings("ignore", message=".*suggested max number of worker.*")
    make: dict[str, Callable[[str], Iterable[Any]]] = {"sglight": partial(ours, options)}
    for workers in options.workers:
        make[f"DataLoader, num_workers={workers}"] = partial(theirs, options, workers)
    with tempfile.TemporaryDirectory() as folder:
        times = measure({name: build(folder) for name, build in make.items()}, options.rounds)
    result = report(times, options)
    if options.json:
        print(json.dumps(result, indent=2))
    else:
        show(result)


if __name__ == "__main__":
    main()
