"""Where a stage's gradient comes from when it does not wait for the true one."""

from sglight.estimators.synthetic import Estimator, SyntheticGradient, synthetic_gradient

__all__ = ["Estimator", "SyntheticGradient", "synthetic_gradient"]
