from sglight.strategies.staged import Batch, StagedModule  # noqa: F401
