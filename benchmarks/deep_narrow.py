"""What could make deep and narrow dense networks faster: a Hamiltonian segment, 2 wide, 32 steps, batch 64.

    python benchmarks/deep_narrow.py

CPU time of forward and backward pass on one thread, in turn (A B A B ...), over that of the loop that one would write
at first:

* naive loop: a module a step, everything left to autograd. segment: what sglight has.
* fewest operations: the calls of torch that the arithmetic needs, and nothing else. A half step cannot begin before
  the one before it has ended, so it takes three in the forward pass (product with bias, tanh, addition) and two in the
  backward pass, and the weight gradients of all steps take two. That bounds what torch's operations can reach.
* torch.compile: of the plain loop. Its first call is measured in new processes, without and with a filled cache.
* C++: both passes as loops over numbers in an extension built by `torch.utils.cpp_extension` (needs a compiler).
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from functools import partial
from statistics import median
from time import perf_counter, process_time
from typing import Any

import machine
import torch
from rich.console import Console
from rich.table import Table
from segment import Naive, one_pass
from timing import by_name, cpu_s_each, in_turn, ratios, spread
from torch import Tensor

from sglight.networks import Segment

WIDTH, STEPS, BATCH = 2, 32, 64
Work = Callable[[], Any]

SOURCE = """
#include <torch/extension.h>
#include <cmath>
#include <vector>

// state [B, 2C], weight [N, C, C], bias [N, C] -> the final state, and the tape [N, 4, B, C] of y, s_z, z+, s_y
std::vector<at::Tensor> forward(at::Tensor state, at::Tensor weight, at::Tensor bias, double step) {
  const int64_t N = weight.size(0), C = weight.size(1), B = state.size(0);
  auto out = state.clone();
  auto tape = at::empty({N, 4, B, C}, state.options());
  const float h = step, *w = weight.data_ptr<float>(), *b = bias.data_ptr<float>();
  float* x = out.data_ptr<float>();
  float* t = tape.data_ptr<float>();
  for (int64_t n = 0; n < N; ++n, w += C * C, b += C, t += 4 * B * C) {
    for (int64_t s = 0; s < B; ++s) {
      float *y = x + 2 * C * s, *z = y + C;
      float *ty = t + s * C, *tsz = ty + B * C, *tz = tsz + B * C, *tsy = tz + B * C;
      for (int64_t i = 0; i < C; ++i) {
        float p = b[i];
        for (int64_t j = 0; j < C; ++j) p += w[j * C + i] * y[j];
        ty[i] = y[i];
        tsz[i] = std::tanh(p);
        tz[i] = z[i] -= h * tsz[i];
      }
      for (int64_t i = 0; i < C; ++i) {
        float p = b[i];
        for (int64_t j = 0; j < C; ++j) p += w[i * C + j] * z[j];
        tsy[i] = std::tanh(p);
        y[i] += h * tsy[i];
      }
    }
  }
  return {out, tape};
}

// the gradients of state, weight and bias
std::vector<at::Tensor> backward(at::Tensor grad, at::Tensor tape, at::Tensor weight, double step) {
  const int64_t N = weight.size(0), C = weight.size(1), B = grad.size(0);
  auto out = grad.clone(), weights = at::zeros_like(weight), biases = at::zeros({N, C}, weight.options());
  const float h = step;
  for (int64_t n = N - 1; n >= 0; --n) {
    const float* w = weight.data_ptr<float>() + n * C * C;
    const float* t = tape.data_ptr<float>() + n * 4 * B * C;
    float* gw = weights.data_ptr<float>() + n * C * C;
    float* gb = biases.data_ptr<float>() + n * C;
    for (int64_t s = 0; s < B; ++s) {
      float *gy = out.data_ptr<float>() + 2 * C * s, *gz = gy + C;
      const float *y = t + s * C, *sz = y + B * C, *z = sz + B * C, *sy = z + B * C;
      for (int64_t i = 0; i < C; ++i) {
        const float p = h * gy[i] * (1 - sy[i] * sy[i]);
        gb[i] += p;
        for (int64_t j = 0; j < C; ++j) {
          gz[j] += p * w[i * C + j];
          gw[i * C + j] += p * z[j];
        }
      }
      for (int64_t i = 0; i < C; ++i) {
        const float p = -h * gz[i] * (1 - sz[i] * sz[i]);
        gb[i] += p;
        for (int64_t j = 0; j < C; ++j) {
          gy[j] += p * w[j * C + i];
          gw[j * C + i] += p * y[j];
        }
      }
    }
  }
  return {out, weights, biases};
}
"""


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=9, help="turns of each (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=0.3, help="length of a turn (default: %(default)s)")
    parser.add_argument("--without-compile", action="store_true", help="which takes minutes")
    parser.add_argument("--without-cpp", action="store_true", help="which needs a compiler")
    return parser.parse_args()


def parts() -> tuple[Segment, Tensor, Tensor]:
    """The segment, a state, and a gradient."""
    draw = torch.Generator().manual_seed(1)
    state, grad = (torch.randn(BATCH, 2 * WIDTH, generator=draw) for _ in range(2))
    return Segment("hamiltonian", STEPS, WIDTH, "dense", seed=1), state.requires_grad_(), grad


def fewest(segment: Segment, state: Tensor, grad: Tensor) -> Work:
    """The operations that both passes cannot do without; their results are not used."""
    h, halves = segment.step_size, 2 * segment.steps
    weights = [w.detach() for w in segment.weight for _ in range(2)]
    biases = [b.detach().expand(BATCH, WIDTH).clone() for b in segment.bias for _ in range(2)]
    y, g = state.detach()[:, :WIDTH].contiguous(), grad[:, :WIDTH].contiguous()
    stacked = torch.randn(halves, BATCH, WIDTH)

    def work() -> None:
        x, tape = y, []
        for w, b in zip(weights, biases, strict=True):
            s = torch.addmm(b, x, w).tanh_()
            tape.append(s)
            x = torch.add(x, s, alpha=h)
        into = g.clone()
        for w, s in zip(reversed(weights), reversed(tape), strict=True):
            into.addmm_(torch.ops.aten.tanh_backward(into, s), w, alpha=h)
        torch.bmm(stacked.transpose(1, 2), stacked)
        stacked.sum(1)

    return work


def compiled(segment: Segment) -> Callable[[Tensor], Tensor]:
    """The plain loop, to be compiled at the first call."""
    return torch.compile(segment.reference)  # type: ignore[no-any-return]


def first_call(cache: str, sender: Any) -> None:
    """In a new process: send the wall seconds of the first two passes that are compiled."""
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
    machine.set_threads(1)
    segment, state, grad = parts()
    run = compiled(segment)
    start = perf_counter()
    one_pass(segment, run, state, grad)
    first = perf_counter()
    one_pass(segment, run, state, grad)
    sender.send((first - start, perf_counter() - first))


def in_new_process(cache: str) -> tuple[float, float]:
    """The result of `first_call`."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=first_call, args=(cache, sender))
    process.start()
    found: tuple[float, float] = receiver.recv()
    process.join()
    return found


def cpp(segment: Segment, folder: str) -> tuple[Callable[[Tensor], Tensor], float]:
    """The segment by an extension, and the seconds that it took to build."""
    from torch.utils.cpp_extension import load_inline

    start = perf_counter()
    library: Any = load_inline(
        "deep_narrow",
        SOURCE,
        functions=["forward", "backward"],
        extra_cflags=["-O3", "-march=native"],
        build_directory=folder,
    )
    built = perf_counter() - start
    h = segment.step_size

    class Extension(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, state: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            out, tape = library.forward(state, weight, bias, h)
            ctx.save_for_backward(tape, weight)
            return out  # type: ignore[no-any-return]

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Any:
            tape, weight = ctx.saved_tensors
            return tuple(library.backward(grad.contiguous(), tape, weight, h))

    return lambda state: Extension.apply(state, segment.weight, segment.bias), built  # type: ignore[no-any-return]


def check(segment: Segment, run: Callable[[Tensor], Tensor], state: Tensor, grad: Tensor) -> None:
    """Compare output and gradients with those of the segment.

    Raises:
        AssertionError: if they differ by more than rounding errors.
    """

    def results(forward: Callable[[Tensor], Tensor]) -> list[Tensor]:
        one_pass(segment, forward, state, grad)
        found = [forward(state).detach(), state.grad, segment.weight.grad, segment.bias.grad]
        return [x.clone() for x in found if x is not None]

    torch.testing.assert_close(results(run), results(segment.forward), rtol=1e-3, atol=1e-3)


def main() -> None:
    """Measure and print."""
    options = arguments()
    machine.set_threads(1)
    segment, state, grad = parts()
    naive, notes = Naive(segment), list[str]()
    runs: dict[str, Work] = {
        "naive loop": partial(one_pass, naive, naive.forward, state, grad),
        "segment": partial(one_pass, segment, segment.forward, state, grad),
        "fewest operations of torch": fewest(segment, state, grad),
    }
    with tempfile.TemporaryDirectory() as folder:
        if not options.without_cpp:
            extension, seconds = cpp(segment, folder)
            check(segment, extension, state, grad)
            runs["C++"] = partial(one_pass, segment, extension, state, grad)
            notes.append(f"C++: {seconds:.0f} s to build")
        if not options.without_compile:
            cache = os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(folder, "cache")
            for when in ("without a cache", "with the cache of the process before"):
                first, second = in_new_process(cache)
                notes.append(f"torch.compile: first pass {first:.1f} s, second {second:.3f} s, {when}")
            run = compiled(segment)
            check(segment, run, state, grad)
            runs["torch.compile"] = partial(one_pass, segment, run, state, grad)
        turns = {name: partial(cpu_s_each, work, options.seconds) for name, work in runs.items()}
        times = by_name(in_turn(turns, options.rounds, warm_up=1))
    table = Table(title=f"CPU ms, median of {options.rounds} turns, 1 thread, {machine.summary()}")
    for column in ("", "forward + backward", "naive loop / this", "range"):
        table.add_column(column)
    for name, values in times.items():
        ratio = spread(ratios(times["naive loop"], values))
        span = f"{ratio['min']:.2f} to {ratio['max']:.2f}"
        table.add_row(name, f"{1e3 * median(values):.3f}", f"{ratio['median']:.2f}", span)
    Console(width=140).print(table)
    print("\n".join(notes))
    print(f"CPU seconds of this process: {process_time():.0f}")


if __name__ == "__main__":
    main()
