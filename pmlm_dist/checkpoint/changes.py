"""Settings that differ between a checkpoint and the run that resumes it, each with its effect. Standard library only.

What must not differ is the run's identity, which is compared before (`resume.differences`).
"""

import json
from typing import Any

_EFFECTS = {
    "train.steps": "the learning rate of the remaining steps changes",
    "train.stop_at": "this attempt ends after another step",
    "train.validation": "validation losses compare with earlier ones only roughly",
    "optim": "the remaining steps are trained with it",
    "data.sources": "the same samples are read from there",
    "data.quarantine_limit": "more or fewer shards may be left out",
    "engine.gradient_clipping": "gradients of the remaining steps are clipped otherwise",
    "engine.data_types": "gradients are rounded otherwise",
    "engine.communication_data_type": "gradients are rounded otherwise",
    "engine.fp16": "the loss scale changes otherwise",
    "init": "none, the checkpoint has the weights",
    "topology": "speed and memory; sums are rounded otherwise",
    "engine": "speed and memory; sums are rounded otherwise",
    "model": "speed and memory; sums are rounded otherwise",
}
"""By the longest prefix of a setting's name; of all others: none on what is learned."""
_NONE = "none on what is learned"
_SHOWN_ELSEWHERE = ("ds_config", "zero", "batch.global_", "batch.micro")
"""Settings whose contents are compared as `engine`."""


def changed_settings(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return one line for each setting of the configuration `now` that differs from that of a checkpoint."""
    before, after = _flat(saved), _flat(json.loads(json.dumps(now)))
    lines = []
    for name in sorted(before.keys() | after.keys()):
        is_engine = name.startswith("engine.")
        if name in _SHOWN_ELSEWHERE or (not is_engine and not before.keys() & after.keys() & {name}):
            continue  # a setting that another release lacks
        if before.get(name) != after.get(name):
            lines.append(f"{name} {before.get(name)} -> {after.get(name)}: {_effect(name)}")
    return lines


def _effect(name: str) -> str:
    known = [prefix for prefix in _EFFECTS if name.startswith(prefix)]
    return _EFFECTS[max(known, key=len)] if known else _NONE


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, inner in value.items():
        is_group = isinstance(inner, dict) and name != "sources"
        flat |= _flat(inner, f"{prefix}{name}.") if is_group else {f"{prefix}{name}": inner}
    return flat
