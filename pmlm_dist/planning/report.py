"""A plan as tables on the console."""

from collections.abc import Iterable

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from pmlm_dist.planning.plan import Plan

Rows = Iterable[tuple[str, ...]]


def show(plan: Plan, console: Console | None = None) -> None:
    """Print `plan`."""
    console = console or Console(width=120, highlight=False)
    console.print(
        Group(
            _table("run", "", rows=_run(plan)),
            _table("memory per GPU", "GB", "", rows=_memory(plan)),
            _table("step", "seconds", "", rows=_step(plan)),
            _communication(plan),
            _table("total", "", rows=_total(plan)),
            _table("fitting layouts, fastest first", "GB", "seconds", "MFU", rows=_alternatives(plan)),
        )
    )
    for warning in plan.warnings:
        console.print(Text(f"warning: {warning}", style="bold yellow"))


def _table(*columns: str, rows: Rows) -> Table:
    table = Table(title_justify="left", min_width=60)
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number == 1 and len(columns) > 2 else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _run(plan: Plan) -> Rows:
    estimate, cluster, model = plan.estimate, plan.cluster, plan.config.model
    work, layout, engine = estimate.work, estimate.layout, estimate.job.engine
    shape = f"{model.num_layers} layers, hidden {model.hidden_size}, {model.num_heads} heads, inner {model.ffn_size}"
    vocabulary = f"vocabulary {model.vocab_size:,}, padded to {work.padded_vocabulary:,}"
    ranks = f"{estimate.dp} data-parallel x {layout.tp} tensor-parallel"
    recompute = ", activation checkpointing" if layout.recompute else ""
    split = f"{estimate.dp} x {estimate.accumulation} micro-batches of {layout.micro_batch}"
    return [
        ("model", f"{plan.parameters:,} parameters: {shape}"),
        ("samples", f"{work.context} tokens, {work.predictions} predicted, {work.slots} slots; {vocabulary}"),
        ("cluster", f"{cluster.nodes} x {cluster.gpus_per_node} {cluster.device.name}: {ranks}"),
        ("batch", f"{estimate.global_batch:,} = {split}"),
        ("engine", f"{engine.precision}, ZeRO {layout.zero}, attention {model.attention}{recompute}"),
    ]


def _memory(plan: Plan) -> Rows:
    memory = plan.estimate.memory
    for name in ("weights", "gradients", "optimizer", "activations", "head", "buffers", "reserved"):
        yield name, _gigabytes(getattr(memory, name)), ""
    device = plan.cluster.device
    fits = "fits" if plan.estimate.fits else "DOES NOT FIT"
    yield "total", _gigabytes(memory.device), f"of {device.memory / 1e9:.1f}: {fits}; peak: {memory.moment}"
    cluster, saving = plan.cluster, plan.checkpoints
    host = memory.host + saving.bytes / saving.writers
    of_node = memory.host * cluster.gpus_per_node + saving.bytes / min(saving.writers, cluster.nodes)
    per_node = f"{_gigabytes(of_node)} per node, for offloading and checkpoint staging"
    yield "host memory", _gigabytes(host), per_node


def _step(plan: Plan) -> Rows:
    estimate, device = plan.estimate, plan.cluster.device
    time, peak, batch = estimate.time, device.peak[estimate.job.engine.precision], estimate.global_batch
    products = f"at {device.matrix_share * peak / 1e12:.4g} of {peak / 1e12:.4g} TFLOP/s"
    passes = f"at {device.bandwidth_share * device.bandwidth / 1e9:.4g} of {device.bandwidth / 1e9:.4g} GB/s"
    tokens = estimate.work.context * batch
    return [
        ("matrix products", _seconds(time.products), products),
        ("element-wise operations", _seconds(time.passes), passes),
        ("launch overhead", _seconds(time.issuing), ""),
        ("optimizer step", _seconds(time.update), ""),
        ("communication", _seconds(time.exposed), f"{_seconds(time.hidden)} more overlap with the backward pass"),
        ("total", _seconds(time.total), f"MFU {estimate.mfu:.1%}"),
        ("work", "", f"{estimate.flops:.3e} FLOPs, {plan.slots:,} slots"),
        ("rate", "", f"{batch / time.total:,.4g} sequences/s, {tokens / time.total:,.4g} tokens/s"),
    ]


def _communication(plan: Plan) -> Table:
    rows = [
        (
            f"{sent.collective.group}: {sent.collective.purpose}",
            sent.collective.kind,
            _gigabytes(sent.inside),
            _gigabytes(sent.outside),
            _seconds(sent.seconds),
            "yes" if sent.collective.is_hidden else "",
        )
        for sent in plan.estimate.traffics
    ]
    columns = ("GB sent per GPU and step", "", "in the node", "network", "seconds", "overlaps")
    table = _table(*columns, rows=rows or [("none: one rank", *[""] * 5)])
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _total(plan: Plan) -> Rows:
    saving = plan.checkpoints
    return [
        ("steps", f"{plan.config.steps:,} in {plan.days:.2f} days"),
        ("checkpoint", f"{saving.bytes / 1e9:.2f} GB, {_seconds(saving.seconds)} s to write"),
        ("failures", f"one every {saving.between_failures / 3600:,.1f} hours expected"),
        ("best interval", f"{saving.interval / 60:,.1f} minutes between checkpoints"),
        ("effective time", f"{saving.effective:.2%}"),
    ]


def _alternatives(plan: Plan) -> Rows:
    return [
        (other.layout.options, _gigabytes(other.memory.device), _seconds(other.time.total), f"{other.mfu:.1%}")
        for other in plan.alternatives
    ] or [("none", "", "", "")]


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.3g}" if number < 1e9 else f"{number / 1e9:.2f}"


def _seconds(number: float) -> str:
    return f"{number:.3g}"
