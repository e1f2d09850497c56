"""Memory of a recipe's training step, known before any weight is loaded: `maskft plan`."""

from maskft.plan.planning import Change, Plan, Row, plan

__all__ = ["Change", "Plan", "Row", "plan"]
