"""See inside a model: activations, their gradients, statistics of both, and what is wrong."""

from ._capture import capture as capture, capture_grads as capture_grads
from ._diagnose import Diagnosis as Diagnosis, Finding as Finding, diagnose as diagnose
from ._statistics import (
    ActivationStats as ActivationStats,
    activation_stats as activation_stats,
    dead_unit_fraction as dead_unit_fraction,
    effective_rank as effective_rank,
    histogram as histogram,
    saturation_fraction as saturation_fraction,
    singular_value_ratio as singular_value_ratio,
    stable_rank as stable_rank,
    update_ratio as update_ratio,
)
from ._watch import Look as Look, Watch as Watch
