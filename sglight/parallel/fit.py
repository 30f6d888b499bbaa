"""What `Trainer.fit` and its kin do in worker processes, and what of it comes back to the process that called."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytorch_lightning as pl
from pytorch_lightning.strategies.launchers.launcher import _Launcher
from pytorch_lightning.trainer.states import TrainerFn, TrainerState
from typing_extensions import override

from sglight.parallel.launcher import cores, launch
from sglight.strategies.base import StagedModule

if TYPE_CHECKING:
    from sglight.parallel.strategy import StageStrategy


@dataclass
class Outcome:
    """What worker 0 sends back."""

    result: Any
    state: TrainerState
    state_dict: dict[str, Any]
    progress: dict[str, Any]
    callback_metrics: dict[str, Any]
    callback_states: dict[str, Any]
    fit_loop: dict[str, Any]


class StageLauncher(_Launcher):
    """Runs a function of the Trainer in worker processes, and brings back what they have learnt.

    The caller's module gets all stages, its Trainer the metrics and progress, its callbacks their states.
    """

    def __init__(self, strategy: StageStrategy) -> None:
        self._strategy = strategy

    @property
    @override
    def is_interactive_compatible(self) -> bool:
        # What is defined in a notebook cannot be imported by the workers.
        return False

    @override
    def launch(
        self, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any
    ) -> Any:
        s = self._strategy
        workers = s.num_processes
        threads = s.threads or max(cores() // workers, 1)
        if trainer is None:
            return launch(
                function, *args, workers=workers, threads=threads, idle_timeout_s=s.idle_timeout_s, **kwargs
            )
        outcome: Outcome = launch(
            _in_worker, trainer, function, args, kwargs,
            workers=workers, threads=threads, idle_timeout_s=s.idle_timeout_s,
        )  # fmt: skip
        _take_over(trainer, outcome)
        return outcome.result

    @override
    def kill(self, signum: int) -> None:
        """Workers end with `launch`."""


def _in_worker(
    trainer: pl.Trainer, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Outcome | None:
    result = function(*args, **kwargs)
    strategy: StageStrategy = trainer.strategy  # type: ignore[assignment]
    if not strategy.is_global_zero:
        return None
    return Outcome(
        result,
        trainer.state,
        strategy.final_state,
        trainer.lightning_module.progress(),  # type: ignore[operator]
        {name: value.cpu() for name, value in trainer.callback_metrics.items()},
        {callback.state_key: callback.state_dict() for callback in trainer.callbacks},  # type: ignore[attr-defined]
        trainer.fit_loop.state_dict(),
    )


def _take_over(trainer: pl.Trainer, outcome: Outcome) -> None:
    trainer.state = outcome.state
    trainer.callback_metrics.update(outcome.callback_metrics)
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if state := outcome.callback_states.get(callback.state_key):
            callback.load_state_dict(state)
    if outcome.state.fn == TrainerFn.FITTING:
        trainer.fit_loop.load_state_dict(outcome.fit_loop)
    module = trainer.lightning_module
    assert isinstance(module, StagedModule)
    module.configure_model()
    module.go_on_from(outcome.progress)
    module.load_state_dict(outcome.state_dict)
