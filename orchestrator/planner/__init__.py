"""The planner: layouts in, tables out. Pure, vectorised NumPy; see docs/plan.md."""

from weightsync.orchestrator.planner.errors import (
    CoverageError,
    DtypeMismatch,
    LandingTooSmall,
    LayoutError,
    Missing,
    PlanError,
    ProofFailed,
    ShapeMismatch,
    TooComplex,
)
from weightsync.orchestrator.planner.inputs import CostModel, Party
from weightsync.orchestrator.planner.plan import Plan, PlanPart, Sends, make_plan

__all__ = [
    "CostModel",
    "CoverageError",
    "DtypeMismatch",
    "LandingTooSmall",
    "LayoutError",
    "Missing",
    "Party",
    "Plan",
    "PlanError",
    "PlanPart",
    "ProofFailed",
    "Sends",
    "ShapeMismatch",
    "TooComplex",
    "make_plan",
]
