"""Where a stage's gradient comes from when it does not wait for the true one."""

from sglight.gradients.synthetic import (
    Estimator,
    SyntheticGradient,
    prediction_cost,
    prediction_values,
    synthetic_gradient,
)

__all__ = ["Estimator", "SyntheticGradient", "prediction_cost", "prediction_values", "synthetic_gradient"]
