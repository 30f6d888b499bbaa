"""The earlier name of `sglight.gradients`: code that imports estimators from here goes on working."""

from sglight.gradients import (
    Estimator,
    SyntheticGradient,
    prediction_cost,
    prediction_values,
    synthetic_gradient,
)

__all__ = ["Estimator", "SyntheticGradient", "prediction_cost", "prediction_values", "synthetic_gradient"]
