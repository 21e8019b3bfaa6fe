"""Checks of a run's settings: the range of each (`ranges.py`), and relations between several."""

from collections.abc import Mapping

from pmlm_dist.config import KERNEL_HEAD_SIZES, MaskingConfig, ModelConfig, MultipleOf4, ObjectiveConfig, RunConfig
from pmlm_dist.ranges import range_problems


def divisors(number: int) -> list[int]:
    """All positive divisors of `number`, ascending."""
    return [d for d in range(1, number + 1) if number % d == 0]


def problems(config: RunConfig) -> list[str]:
    """One sentence for each invalid setting of `config`: setting, value, constraint, way out."""
    return [*range_problems(config), *relation_problems(config)]


def relation_problems(config: RunConfig) -> list[str]:
    """The problems between two or more settings of `config`; ranges of single settings are not checked."""
    return [
        *_model_relations(config.model),
        *_parallel_relations(config.model, tp=config.parallel.tp),
        *_span_relations(config.masking),
        *_objective_relations(config.objective, config.masking),
        *_mixture_relations(config.data.sources),
        *_schedule_relations(config),
    ]


def problems_of_model(model: ModelConfig, *, tp: int) -> list[str]:
    """The problems of `model` on `tp` tensor-parallel ranks."""
    return [*range_problems(model, prefix="model."), *_model_relations(model), *_parallel_relations(model, tp=tp)]


def _model_relations(model: ModelConfig) -> list[str]:
    problems = []
    if model.num_heads > 0 and model.hidden_size % model.num_heads:
        problems.append(
            f"model.num_heads ({model.num_heads}) must divide model.hidden_size ({model.hidden_size}): "
            f"use one of {divisors(model.hidden_size)}"
        )
    # A quarter of the buckets are exact distances; the others divide by log(max_distance / exact), which must be > 0.
    if MultipleOf4.holds(model.relative_buckets) and model.relative_max_distance <= model.relative_buckets // 4:
        problems.append(
            f"model.relative_max_distance ({model.relative_max_distance}) must exceed a quarter of "
            f"model.relative_buckets ({model.relative_buckets // 4}): use 128"
        )
    if model.attention == "triton" and model.head_dim not in KERNEL_HEAD_SIZES:
        problems.append(
            f"model.hidden_size / model.num_heads ({model.head_dim}) must be one of {KERNEL_HEAD_SIZES} with "
            "model.attention triton: use another number of heads, or --model.attention auto"
        )
    return problems


def _parallel_relations(model: ModelConfig, *, tp: int) -> list[str]:
    problems = []
    for name in ("num_heads", "ffn_size"):
        size = getattr(model, name)
        if tp > 0 and size > 0 and size % tp:
            usable = [d for d in divisors(size) if 128 % d == 0]
            problems.append(f"parallel.tp ({tp}) must divide model.{name} ({size}): use one of {usable}")
    if tp > 0 and 128 % tp:
        problems.append(
            f"parallel.tp ({tp}) must divide 128, the multiple that the vocabulary is padded to: use a power of two"
        )
    return problems


def _span_relations(masking: MaskingConfig) -> list[str]:
    if 2 <= masking.min_span <= masking.max_span:
        return []
    return [
        f"masking.min_span ({masking.min_span}) and masking.max_span ({masking.max_span}) must satisfy "
        "2 <= min_span <= max_span: the paper uses 2 and 6"
    ]


def _objective_relations(objective: ObjectiveConfig, masking: MaskingConfig) -> list[str]:
    parts = objective.kind.split("+")
    if masking.prefix_share and parts == ["ae"]:
        return [
            f"masking.prefix_share ({masking.prefix_share}) must be 0 with objective.kind ae, which predicts nothing "
            "in a prefix sample: use another kind"
        ]
    weights = {"objective.ae_weight": objective.ae_weight} if "ae" in parts else {}
    if "par" in parts or "ar" in parts:
        weights["objective.par_weight"] = objective.par_weight
    if any(weights.values()):
        return []
    zeros = " and ".join(f"{name} ({weight})" for name, weight in weights.items())
    return [f"{zeros} must not be 0: with objective.kind {objective.kind} nothing would be learned; the paper uses 1"]


def _mixture_relations(sources: Mapping[str, float]) -> list[str]:
    weights = list(sources.values())
    if not weights or 0 < sum(weights) / 1000 <= min(weights) < float("inf") > sum(weights):
        return []
    return [f"data.sources ({dict(sources)}): weights must be positive and at least a thousandth of their sum"]


def _schedule_relations(config: RunConfig) -> list[str]:
    warmup, steps = config.optim.warmup_steps, config.train.steps
    if not warmup >= steps > 0:
        return []
    return [
        f"optim.warmup_steps ({warmup}) must be below train.steps ({steps}): the paper's share of about 5 % would be "
        f"{max(1, steps // 20)}"
    ]
