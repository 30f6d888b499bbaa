"""Lightning callbacks: checkpoints, figures, timing, memory, and what a run prints."""
