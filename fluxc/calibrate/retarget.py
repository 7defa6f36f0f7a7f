"""`fluxc.calibrate`: another budget for a calibrated model, from the curve in its own plan."""

from __future__ import annotations

from pathlib import Path

from fluxc.artifact import update_plan
from fluxc.budget import check_budget
from fluxc.exporters import engine_dir
from fluxc.flux_dir import open_flux
from fluxc.plan import Plan


def calibrate(path: str | Path, *, budget: float, dry_run: bool = False) -> tuple[Plan, Plan]:
    """Select `budget` in the plan of a model.flux or engine directory; returns the plan before and after.

    Nothing is measured or fitted again, and only `plan.json` (with its hash in the manifest) changes; with `dry_run`
    not even that. Raises PlanError for a budget outside 0..1 or outside what the plan was calibrated for,
    ArchiveError for a directory that is damaged or no model.flux.
    """
    if (Path(path) / engine_dir.NAME).is_file():
        return _calibrate_engine(path, budget, dry_run)
    before = open_flux(path, verify_weights=False).plan
    after = before.with_budget(check_budget(budget))
    if not dry_run:
        update_plan(path, after)
    return before, after


def _calibrate_engine(path: str | Path, budget: float, dry_run: bool) -> tuple[Plan, Plan]:
    engine = engine_dir.open_engine(path)
    after = engine.plan.with_budget(check_budget(budget))
    if not dry_run:
        engine_dir.update_plan(engine, after)
    return engine.plan, after
