"""The commands that make a report's numbers again, and what the numbers depend on."""

from __future__ import annotations

from typing import Any

from fluxc.report.material import Material


def commands(material: Material) -> list[str]:
    """Shell lines, in order; with the options that the stored results name."""
    flux, origin = material.path.name, material.plan.calibration
    lines = [_transform(material)] if "effort" in origin else []
    if material.evaluation:
        lines.append(_eval(flux, material.evaluation["conditions"]))
    if material.bench:
        lines.append(f"fluxc bench {flux}" + "".join(f" --length {x['length']}" for x in material.bench["lengths"]))
    return [*lines, f"fluxc report {flux}"]


def _transform(material: Material) -> str:
    plan, origin = material.plan, material.plan.calibration
    asked = (material.calibration or {}).get("options", {})
    parts = [f"fluxc transform {material.name}", f"--budget {plan.budget:g}", f"--effort {origin['effort']}"]
    for name in ("sparse_kind", "decode"):
        if name in asked:
            parts.append(f"--{name.replace('_', '-')} {asked[name]}")
    return " ".join(parts)


def _eval(flux: str, conditions: dict[str, Any]) -> str:
    options = conditions.get("options")
    if options is None:
        return f"python -m fluxc.bench.quality {flux}"
    parts = [f"fluxc eval {flux}", f"--suite {','.join(options['suites'])}", f"--count {options['count']}"]
    parts += [f"--budget {budget:g}" for budget in conditions["budgets"]]
    parts += [f"--length {length}" for length in options["lengths"]]
    parts += [f"--seed {options['seed']}", *([f"--oracle {options['oracle']}"] if options["oracle"] else [])]
    return " ".join(parts)


def facts(material: Material) -> list[tuple[str, Any]]:
    """Names and values: machine, numbers, prompts, versions, hashes."""
    plan = material.plan
    found: list[tuple[str, Any]] = [
        (
            "model",
            f"{material.name}, {plan.model.family}, {plan.model.dtype}, context {plan.model.context or 'unknown'}",
        ),
        ("plan", plan.digest()),
        ("weights", plan.model.weights),
    ]
    if material.evaluation:
        found += _evaluated(material.evaluation, plan.digest())
    if material.bench:
        conditions = material.bench.get("conditions", {})
        found.append(("timed on", f"{conditions.get('device', 'unknown')}; torch {_torch(conditions)}"))
    return found


def _evaluated(evaluation: dict[str, Any], plan: str) -> list[tuple[str, Any]]:
    conditions = evaluation["conditions"]
    seed = conditions.get("options", conditions).get("seed", "unknown")
    found: list[tuple[str, Any]] = [
        ("evaluated on", f"{conditions.get('device', 'unknown')}; torch {_torch(conditions)}"),
        ("prompts", f"seed {seed}, corpus {conditions.get('corpus', '')[:12]}, held-out texts and wordings"),
    ]
    if conditions.get("plan", plan) != plan:
        found.append(("evaluated plan", f"{conditions['plan']}: not the plan of this folder"))
    rules = dict.fromkeys(suite["rule"] for suite in evaluation["suites"].values() if suite["rule"])
    return found + [("scoring", rule) for rule in rules]


def _torch(conditions: dict[str, Any]) -> str:
    return str(conditions.get("versions", {}).get("torch", "unknown"))
