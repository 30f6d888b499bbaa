"""The network: opening, segments with connectors between them, classifier; whole, or cut into stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from itertools import accumulate, pairwise
from typing import Any, Self, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from sglight.config.shapes import check_shapes
from sglight.networks.dynamics import Dynamics, find_dynamics
from sglight.networks.parts import (
    Classifier,
    Connector,
    ConvOpening,
    Linear,
    PadOpening,
    RepeatOpening,
    Shape,
)
from sglight.networks.parts import Conv as ConvPart
from sglight.networks.seeding import draw_seed
from sglight.networks.segment import Rule, Segment, SegmentSpec, choose, keep_frozen

ExtraCost = float | Callable[[Shape], float]
AnyStage = TypeVar("AnyStage", bound="Stage")

# The cost of an elementwise operation (activate, add, copy) on one value, in multiplications of a matrix product or
# convolution; measured on one core by `benchmarks/stages.py --profile`.
ELEMENTWISE = 64


@dataclass(frozen=True)
class NetworkSpec:
    """The architecture of a network, without parameters: enough to build any part of it in any process.

    Args:
        shape: of one sample: ``(D,)`` or ``(C, H, W)``.
        classes: number of logits.
        steps, horizon, channels: N, T and C of each segment: a number, or a list with one entry a segment.
        opening: how a sample becomes the first state: ``pad``, ``repeat``, ``linear`` or ``conv``.
        opening_normalisation: ``none``, or ``batch`` after a ``conv`` opening.
        connector: how the width changes between segments: ``pad`` or ``linear``.
        pool: whether connectors halve the size of images.
        head: whether the classifier takes all of y (``flatten``) or its mean over the image (``pool``).
        seed: of the initial values.

    The other arguments are those of `Segment`.

    Raises:
        ValueError: for a choice that does not exist or does not go with another; the text names the key.

    >>> spec = NetworkSpec(shape=(2,), classes=3, channels=4, steps=8, horizon=2.0)
    >>> spec.state_shape(0), spec.step_sizes()[0]  # a hamiltonian state has two fields, y and z
    ((8,), 0.25)
    >>> spec.with_steps(2).steps
    (16,)
    """

    shape: Shape
    classes: int
    dynamics: str = "hamiltonian"
    kernel: str = "dense"
    steps: int | Sequence[int] = 8
    horizon: float | Sequence[float] = 4.0
    channels: int | Sequence[int] = 64
    kernel_size: int = 3
    activation: str = "tanh"
    gamma: float = 0.0
    initial_velocity: str = "zero"
    normalisation: str = "none"
    groups: int = 8
    opening: str = "linear"
    opening_normalisation: str = "none"
    connector: str = "pad"
    pool: bool = True
    head: str = "flatten"
    reversible: bool = False
    init: str = "random"
    init_scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("shape", "channels", "steps", "horizon"):
            value = getattr(self, name)
            object.__setattr__(self, name, tuple(value) if isinstance(value, Sequence) else (value,))
        count = len(self.widths)
        for name in ("steps", "horizon"):
            value = getattr(self, name)
            if len(value) == 1:
                object.__setattr__(self, name, value * count)
            elif len(value) != count:
                raise ValueError(
                    f"model.{name} has {len(value)} entries and model.channels {count}: "
                    "give one number, or one a segment"
                )
        for name, options in _OPTIONS.items():
            choose(dict.fromkeys(options), getattr(self, name), f"model.{name}")
        if not self.segments:
            raise ValueError("model.channels is empty; give one width a segment")
        check_shapes(self.shape, self.kernel, self.widths, self.opening, self.connector, self.pool)

    @property
    def widths(self) -> tuple[int, ...]:
        """The channels of each segment, as a tuple."""
        return self.channels  # type: ignore[return-value]

    @property
    def total_steps(self) -> int:
        """The number of time steps of all segments together."""
        return sum(self.steps)  # type: ignore[arg-type]

    @property
    def rule(self) -> Dynamics:
        """The dynamics of all segments."""
        return find_dynamics(self.dynamics)

    @property
    def has_statistics(self) -> bool:
        """Whether it has batch normalisation, with its running statistics."""
        return "batch" in (self.normalisation, self.opening_normalisation)

    @property
    def segments(self) -> list[SegmentSpec]:
        """The specification of each segment."""
        names = {f.name for f in fields(SegmentSpec)} - {"steps", "channels", "horizon"}
        shared = {name: getattr(self, name) for name in names}
        sizes = zip(self.steps, self.widths, self.horizon, strict=True)  # type: ignore[arg-type]
        return [SegmentSpec(steps=n, channels=c, horizon=t, **shared) for n, c, t in sizes]

    @property
    def segment_shapes(self) -> list[Shape]:
        """Shape of y in each segment, without the batch."""
        if self.kernel == "dense":
            return [(c,) for c in self.widths]
        halvings = [2 ** (k if self.pool else 0) for k in range(len(self.widths))]
        return [
            (c, self.shape[1] // d, self.shape[2] // d) for c, d in zip(self.widths, halvings, strict=True)
        ]

    def with_steps(self, factor: int) -> NetworkSpec:
        """The same network with ``factor`` times as many steps over the same horizon."""
        return replace(self, steps=tuple(n * factor for n in self.steps))  # type: ignore[union-attr]

    def coarsened(self, factor: int) -> NetworkSpec:
        """The same network with ``factor`` times fewer steps over the same horizon.

        Raises:
            ValueError: if ``factor`` does not divide the number of steps of each segment.
        """
        steps: tuple[int, ...] = self.steps  # type: ignore[assignment]
        if any(n % factor for n in steps):
            raise ValueError(
                f"model.steps={list(steps)} cannot be divided by {factor}; choose multiples of it in each segment"
            )
        return replace(self, steps=tuple(n // factor for n in steps))

    def state_shape(self, position: int) -> Shape:
        """Shape of the state after the first ``position`` time steps; at the end of a segment, after its connector."""
        segment = self._segment_after(position)
        channels, *image = self.segment_shapes[segment]
        return (self.rule.fields * channels, *image)

    def time(self, position: int) -> float:
        """The part of all time steps that the first ``position`` are, in [0, 1]."""
        return position / self.total_steps

    def step_sizes(self) -> list[float]:
        """The step size h of each time step, in order."""
        return [segment.step_size for segment in self.segments for _ in range(segment.steps)]

    def step_costs(self) -> list[float]:
        """Multiplications per sample of each time step in the forward pass, in order.

        Those of the opening are counted with the first step, those of a connector with the step before it, and those of
        the classifier with the last step.
        """
        costs: list[float] = []
        taps = self.kernel_size**2 if self.kernel == "conv" else 1
        shapes = self.segment_shapes
        for k, (segment, shape) in enumerate(zip(self.segments, shapes, strict=True)):
            costs += [self.rule.maps * segment.channels**2 * taps * math.prod(shape[1:])] * segment.steps
            if self.connector == "linear" and k + 1 < len(shapes):
                costs[-1] += self.rule.fields * segment.channels * math.prod(shapes[k + 1])
        first, last = self.segment_shapes[0], self.segment_shapes[-1]
        if self.opening == "conv":
            costs[0] += self.shape[0] * math.prod(first) * self.kernel_size**2
        elif self.opening == "linear":
            costs[0] += (self.shape[0] if self.kernel == "conv" else math.prod(self.shape)) * math.prod(first)
        costs[-1] += self.classes * (last[0] if self.head == "pool" else math.prod(last))
        return costs

    def step_values(self) -> list[int]:
        """Elementwise operations per sample of each time step, in order; opening and so on as in `step_costs`."""
        values: list[int] = []
        sizes = [math.prod(shape) for shape in self.segment_shapes]
        for k, (segment, size) in enumerate(zip(self.segments, sizes, strict=True)):
            values += [self.rule.activations * size] * segment.steps
            if k + 1 < len(sizes):
                values[-1] += self.rule.fields * size
        values[0] += self.rule.fields * sizes[0]
        values[-1] += sizes[-1]
        return values

    def step_work(self) -> list[float]:
        """The cost of each time step per sample: `step_costs` + `ELEMENTWISE` * `step_values`, in multiplications."""
        pairs = zip(self.step_costs(), self.step_values(), strict=True)
        return [cost + ELEMENTWISE * values for cost, values in pairs]

    def cuts(self, stages: int, extra_cost: ExtraCost = 0.0, multiple: int = 1) -> list[int]:
        """Where to cut the network into stages of nearly equal cost: M + 1 positions from 0 to the number of steps.

        Args:
            stages: M, from 1 to the number of steps.
            extra_cost: what each stage but the last costs besides its steps (its estimator), in multiplications per
                sample: a number, or a function of the shape of the state that leaves the stage.
            multiple: all cuts are multiples of it; it must divide the number of steps of each segment.

        Raises:
            ValueError: if there are fewer steps (or fewer groups of ``multiple`` steps) than stages.

        >>> NetworkSpec(shape=(2,), classes=2, steps=8).cuts(4)
        [0, 2, 4, 6, 8]
        """
        if not 1 <= stages <= self.total_steps // multiple:
            level = f" of the coarsest level, {multiple} times fewer than" if multiple > 1 else ","
            raise ValueError(
                f"strategy.stages={stages} must be from 1 to the number of time steps{level} {self.total_steps} "
                "(model.steps, over all segments)"
            )
        work, extra = self.step_work(), self._extra_costs(extra_cost)
        together = [sum(work[a : a + multiple]) for a in range(0, len(work), multiple)]
        return [multiple * cut for cut in balanced(together, stages, extra[::multiple])]

    def stage_work(self, cuts: Sequence[int], extra_cost: ExtraCost = 0.0) -> list[float]:
        """The cost of each stage between ``cuts`` per sample, in multiplications; arguments as in `cuts`."""
        steps, extra = self.step_work(), [*self._extra_costs(extra_cost), 0.0]
        return [sum(steps[a:b]) + extra[b] for a, b in pairwise(cuts)]

    def _extra_costs(self, extra_cost: ExtraCost) -> list[float]:
        """The ``extra_cost`` of a stage that ends before step p, for every p."""
        extra = extra_cost if callable(extra_cost) else lambda _shape: extra_cost
        return [extra(self.state_shape(p)) for p in range(self.total_steps)]

    def _segment_after(self, position: int) -> int:
        """The index of the segment in which the step after ``position`` lies; at the end, the last segment."""
        for k, steps in enumerate(self.steps):  # type: ignore[arg-type]
            if position < steps:
                return k
            position -= steps
        return len(self.widths) - 1


_OPTIONS = {
    "kernel": ("dense", "conv"),
    "initial_velocity": ("zero", "paper"),
    "opening": ("pad", "repeat", "linear", "conv"),
    "opening_normalisation": ("none", "batch"),
    "connector": ("pad", "linear"),
    "head": ("flatten", "pool"),
}


def balanced(costs: Sequence[float], parts: int, extra: Sequence[float] | None = None) -> list[int]:
    """Splits ``costs`` into contiguous parts so that the largest part is as small as possible: the cuts.

    This is linear partitioning, solved by dynamic programming. ``extra[p]`` is added to a part that ends before step
    p > 0; the last part has none.

    >>> balanced([1, 1, 1, 3], parts=2)
    [0, 3, 4]
    """
    extra = [0.0] * len(costs) if extra is None else extra
    steps = len(costs)
    prefix = [0.0, *accumulate(costs)]

    def cost(a: int, b: int) -> float:
        return prefix[b] - prefix[a] + (extra[b] if b < steps else 0.0)

    # best[b]: (cost of the most expensive part, cuts) for the first b steps in m parts.
    best: dict[int, tuple[float, list[int]]] = {b: (cost(0, b), [0, b]) for b in range(1, steps + 1)}
    for m in range(2, parts + 1):
        best = {b: _best_last_cut(best, b, m - 1, cost) for b in range(m, steps + 1)}
    return best[steps][1]


def _best_last_cut(
    best: dict[int, tuple[float, list[int]]], b: int, lowest: int, cost: Callable[[int, int], float]
) -> tuple[float, list[int]]:
    """The best partition of the first b steps whose last part begins at some a >= lowest; ties: the earliest cuts."""
    found = math.inf, [b]
    for a in range(b - 1, lowest - 1, -1):
        last = cost(a, b)
        if last > found[0]:
            # A longer last part costs even more.
            break
        found = min(found, (max(best[a][0], last), [*best[a][1], b]))
    return found


class Stage(nn.Module):
    """A contiguous slice of a network: the time steps from ``start`` to ``stop``, counted over all segments.

    The opening belongs to the first step, the classifier to the last, a connector to the step before it. The whole
    state is passed from stage to stage, so that the stages in turn compute the function of the whole network, bit for
    bit.

    ``forward`` takes samples ``[B, *shape]`` (first stage) or a state ``[B, fields * C, ...]``, and returns a state
    or (last stage) logits ``[B, classes]``.

    >>> import torch
    >>> spec = NetworkSpec(shape=(2,), classes=3, channels=4, steps=8)
    >>> first, last = Stage(spec, 0, 5), Stage(spec, 5, 8)
    >>> last(first(torch.zeros(10, 2))).shape
    torch.Size([10, 3])
    """

    def __init__(self, spec: NetworkSpec, start: int = 0, stop: int | None = None) -> None:
        super().__init__()
        self.spec, self.start, self.stop = spec, start, spec.total_steps if stop is None else stop
        self.is_first, self.is_last = self.start == 0, self.stop == spec.total_steps
        self.opening = _opening(spec) if self.is_first else None
        self.segments = nn.ModuleDict()
        self.connectors = nn.ModuleDict()
        offset = 0
        for k, segment in enumerate(spec.segments):
            a, b = max(self.start - offset, 0), min(self.stop - offset, segment.steps)
            if a < b:
                self.segments[str(k)] = Segment(**segment.__dict__, seed=spec.seed, index=k, start=a, stop=b)
                if b == segment.steps and k + 1 < len(spec.widths):
                    self.connectors[str(k)] = _connector(spec, k)
            offset += segment.steps
        self.classifier = (
            Classifier(spec.head, spec.segment_shapes[-1], spec.classes, spec.seed) if self.is_last else None
        )

    @override
    def forward(self, x: Tensor) -> Tensor:
        state = self.open(x) if self.is_first else x
        for part in self.flow():
            state = part(state)
        return state if self.classifier is None else self.classifier(state)

    def open(self, x: Tensor) -> Tensor:
        """The state before the first step, from samples ``[B, *shape]``.

        Raises:
            ValueError: for samples of another shape.
        """
        assert self.opening is not None
        if x.shape[1:] != self.spec.shape:
            raise ValueError(
                f"the network takes samples of shape {list(self.spec.shape)}, not {list(x.shape[1:])}"
            )
        y = self.opening(x if self.spec.kernel == "conv" else x.flatten(1))
        # Under autocast the opening returns a lower precision; states accumulate over many steps and keep the full one.
        y = y.to(x.dtype)
        return torch.cat(self.spec.rule.start(y, self.spec.initial_velocity), 1)

    def plain(self, on: bool = True) -> Self:
        """Switches to plain loops over the steps, which autograd can differentiate more than once; returns itself.

        The hand-written backward passes are faster, but give first derivatives only. `torch.func` and `torch.export`
        use the plain loops by themselves; second derivatives by `torch.autograd` need this switch.
        """
        for segment in self.segments.values():
            assert isinstance(segment, Segment)
            segment.plain = on
        return self

    def flow(self) -> Iterator[nn.Module]:
        """Segments and connectors in the order in which a state passes them."""
        for key, segment in self.segments.items():
            yield segment
            if key in self.connectors:
                yield self.connectors[key]

    def trajectory(self, x: Tensor) -> list[Tensor]:
        """All states on the way of x: after the opening, after each step and after each connector."""
        states = [self.open(x) if self.is_first else x]
        for part in self.flow():
            states += part.trajectory(states[-1])[1:] if isinstance(part, Segment) else [part(states[-1])]
        return states

    def first_samples(self) -> dict[str, Tensor]:
        """The parameters of the first step, by their names in the state dict.

        The stage before this one needs them to refine and to regularise across the cut. Empty if this stage begins
        with a new segment, as parameters are not continuous in time there.
        """
        key, segment = next(iter(self.segments.items()))
        assert isinstance(segment, Segment)
        return segment.sample(0, f"segments.{key}.") if segment.start > 0 else {}

    def last_samples(self) -> dict[str, Tensor]:
        """The parameters of the last step, for the stage after this one; empty if that begins a new segment."""
        key, segment = list(self.segments.items())[-1]
        assert isinstance(segment, Segment)
        return segment.sample(-1, f"segments.{key}.") if segment.stop < segment.spec.steps else {}

    def refine(self, rule: Rule = "linear", following: Mapping[str, Tensor] | None = None) -> Stage:
        """A copy with twice as many steps over the same horizon, which approximates the same function.

        Opening, connectors and classifier are copied.

        Args:
            rule: ``linear`` or ``constant``, see `Segment.refine`.
            following: the `first_samples` of the stage after this one.
        """
        return self._prolonged_to(
            Stage(self.spec.with_steps(2), 2 * self.start, 2 * self.stop), rule, following or {}
        )

    def _prolonged_to(self, fine: AnyStage, rule: Rule, following: Mapping[str, Tensor]) -> AnyStage:
        example = next(self.parameters())
        fine.to(example.device, example.dtype)
        for key, segment in self.segments.items():
            assert isinstance(segment, Segment)
            prefix = f"segments.{key}."
            after = {n.removeprefix(prefix): row for n, row in following.items() if n.startswith(prefix)}
            fine.segments[key] = segment.refine(rule, after)
        own = {name: value for name, value in self.state_dict().items() if not name.startswith("segments.")}
        fine.load_state_dict(own, strict=False)
        return keep_frozen(self, fine).train(self.training)


class StableNet(Stage):
    """A whole network: samples ``[B, *shape]`` in, logits ``[B, classes]`` out.

    Its arguments are those of `NetworkSpec`. Without ``seed`` one is drawn from torch's global generator.

    >>> import torch
    >>> net = StableNet(shape=(2,), classes=3, dynamics="hamiltonian", steps=8, channels=4)
    >>> net(torch.zeros(10, 2)).shape
    torch.Size([10, 3])
    >>> [stage.segments["0"].steps for stage in net.split(2)]
    [4, 4]
    >>> net.refine().spec.steps
    (16,)
    """

    def __init__(self, shape: Sequence[int], classes: int, **options: Any) -> None:
        seed = options.pop("seed", None)
        spec = NetworkSpec(tuple(shape), classes, **options, seed=draw_seed() if seed is None else seed)
        super().__init__(spec)

    def split(self, stages: int | Sequence[int], extra_cost: ExtraCost = 0.0) -> list[Stage]:
        """The network as a list of stages. Their parameters are views of its own: training them trains the network.

        Operations that replace the memory of parameters end the sharing: `double`, `to` another device,
        `copy.deepcopy`, `load_state_dict(assign=True)`. Do these first, then split.

        Args:
            stages: how many, balanced by cost; or the cuts themselves, M + 1 positions from 0 to the number of steps.
            extra_cost: see `NetworkSpec.cuts`.

        Raises:
            ValueError: for more stages than steps, or cuts that do not rise from 0 to the number of steps.

        >>> net = StableNet(shape=(2,), classes=2, steps=8, channels=4)
        >>> [(stage.start, stage.stop) for stage in net.split([0, 3, 8])]
        [(0, 3), (3, 8)]
        """
        cuts = self.spec.cuts(stages, extra_cost) if isinstance(stages, int) else list(stages)
        if cuts[0] != 0 or cuts[-1] != self.spec.total_steps or any(a >= b for a, b in pairwise(cuts)):
            raise ValueError(f"cuts {cuts} must rise from 0 to the number of steps, {self.spec.total_steps}")
        return [share(self, Stage(self.spec, a, b)) for a, b in pairwise(cuts)]

    @override
    def refine(self, rule: Rule = "linear", following: Mapping[str, Tensor] | None = None) -> StableNet:
        spec = self.spec.with_steps(2)
        fine = StableNet(**{f.name: getattr(spec, f.name) for f in fields(spec)})
        return self._prolonged_to(fine, rule, following or {})


def share(whole: Stage, part: Stage) -> Stage:
    """Makes the parameters and buffers of ``part`` views of those of ``whole``; returns ``part``."""
    for name, module in part.named_modules():
        source = whole.get_submodule(name)
        rows = slice(None)
        if isinstance(module, Segment):
            assert isinstance(source, Segment)
            rows = slice(module.start - source.start, module.stop - source.start)
        for key, parameter in source.named_parameters(recurse=False):
            setattr(module, key, nn.Parameter(parameter.detach()[rows], parameter.requires_grad))
        for key, buffer in source.named_buffers(recurse=False):
            # Scalars such as batch normalisation's counter have no rows.
            setattr(module, key, buffer[rows] if buffer.ndim else buffer)
    return part.train(whole.training)


def _opening(spec: NetworkSpec) -> nn.Module:
    width, conv = spec.widths[0], spec.kernel == "conv"
    match spec.opening:
        case "pad":
            return PadOpening(width)
        case "repeat":
            return RepeatOpening(width)
        case "conv":
            return ConvOpening(
                spec.shape[0], width, spec.kernel_size, spec.activation, spec.opening_normalisation, spec.seed
            )
        case _ if conv:
            return ConvPart(spec.shape[0], width, 1, spec.seed, "opening")
        case _:
            return Linear(math.prod(spec.shape), width, spec.seed, "opening")


def _connector(spec: NetworkSpec, k: int) -> Connector:
    widths = spec.widths
    return Connector(
        spec.connector, spec.kernel, spec.pool, widths[k], widths[k + 1], spec.rule.fields, spec.seed, k
    )
