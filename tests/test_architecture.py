"""Who may import what, as docs/architecture.md says it: every import statement of the package is looked at."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in [*(ROOT / "pmlm_dist").rglob("*.py"), ROOT / "train.py"]
}

LAYERS = (
    ("train.py", "cli.py"),
    ("downstream/",),
    ("conversion/", "planning/"),
    ("training/", "decoding/", "commands/inspect.py"),
    ("objectives.py",),
    ("model/", "data/", "corpus/"),
    ("parallel/", "masking/", "vocab.py"),
    ("config.py", "presets.py", "engine/deepspeed_config.py", "devices.py", "ranks.py"),
)
"""From the top; a module imports from the lines below its own, and from its own package."""

BESIDES = {("data/", "pmlm_dist.corpus.shards")}
"""What may be imported from the same line."""

THIRD_PARTIES = {
    "megatron": ("parallel/",),
    "deepspeed": (
        *("engine/deepspeed_engine.py", "checkpoint/engine_state.py", "engine/bf16_optimizer.py"),
        *("training/loop.py", "training/validation.py", "downstream/"),
    ),
    "pydantic": ("engine/deepspeed_engine.py",),
    "safetensors": ("checkpoint/files.py", "conversion/"),
    "webdataset": ("corpus/shards.py",),
    "fsspec": ("data/remote_files.py", "corpus/input/sources.py"),
    "aiohttp": ("data/remote_files.py",),
    "datasets": ("corpus/input/sources.py", "downstream/rows.py"),
    "datasketch": ("corpus/filters/duplicates.py",),
    "mpi4py": ("corpus/prepare/mpi.py",),
    "tokenizers": ("vocab.py",),
    "torch.utils.tensorboard": ("metrics/run_log.py",),
    "transformers": ("conversion/huggingface.py",),
    "onnxruntime": ("conversion/onnx.py",),
    "tyro": ("train.py", "cli.py"),
    "numba": ("masking/",),
    "pyarrow": ("corpus/input/tables.py",),
    "rouge_score": ("downstream/tasks/overlap.py",),
    "sacrebleu": ("downstream/tasks/overlap.py",),
    "sklearn": ("downstream/tasks/scores.py",),
    "scipy": ("downstream/tasks/scores.py",),
    "zstandard": ("corpus/input/compression.py",),
    "rich": ("corpus/prepare/mpi.py", "commands/inspect.py", "planning/report.py"),
    "matplotlib": ("commands/inspect.py", "commands/plot.py"),
    "torch": (
        *("masking/visibility.py", "objectives.py", "data/", "model/", "parallel/", "training/", "conversion/"),
        *("commands/plan.py", "planning/measure.py", "decoding/", "downstream/"),
    ),
    "numpy": (
        *("decoding/", "downstream/finetune.py", "downstream/tasks/seq2seq.py", "commands/generate.py"),
        *("corpus/", "data/", "masking/", "parallel/seeding.py", "commands/inspect.py"),
        *("checkpoint/files.py", "commands/checkpoint.py"),
        *("conversion/pretrained.py", "conversion/onnx.py"),
    ),
}
"""The only places of each; a dependency that is not listed has no place yet."""

WITHOUT_TORCH = [
    *(name for name in MODULES if name.startswith("pmlm_dist.corpus")),
    *(
        "pmlm_dist.masking.blockwise",
        "pmlm_dist.masking.layout",
        "pmlm_dist.masking.seq2seq_layout",
        "pmlm_dist.data.order",
        "pmlm_dist.vocab",
    ),
    *(f"pmlm_dist.training.{name}" for name in ("placement", "checkpoint_files", "checkpoint_folder")),
    *(
        f"pmlm_dist.training.{name}"
        for name in ("exit_codes", "heartbeat", "supervisor", "causes", "processes", "run_lock", "lives", "restarts")
    ),
    "pmlm_dist.commands.checkpoint",
    "pmlm_dist.decoding.settings",
    *(
        "pmlm_dist.config",
        "pmlm_dist.presets",
        "pmlm_dist.engine.deepspeed_config",
        "pmlm_dist.cli",
        "pmlm_dist.launch_environment",
    ),
    *("pmlm_dist.downstream.rows", "pmlm_dist.downstream.settings", "pmlm_dist.downstream.summary", "train"),
]


def imports_of(path: Path) -> set[str]:
    """Full names of what a file imports anywhere in it: modules, and what may be a module or a name of one."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(path: Path) -> set[str]:
    """Modules of the package that a file imports."""
    found = {next((m for m in (name, name.rpartition(".")[0]) if m in MODULES), None) for name in imports_of(path)}
    return {name for name in found if name}


IMPORTS = {name: own_imports(path) for name, path in MODULES.items()}


def place(module: str) -> str:
    """Where a module lies, as the layers name it: `training/` or `vocab.py`."""
    relative = MODULES[module].relative_to(ROOT).as_posix().removeprefix("pmlm_dist/")
    folder, slash, _ = relative.partition("/")
    return f"{folder}{slash}"


def layer(module: str) -> int:
    return next(number for number, places in enumerate(LAYERS) if place(module) in places)


PLACED = [name for name in MODULES if name != "pmlm_dist"]


def test_something_is_looked_at():
    assert len(MODULES) > 40
    assert "pmlm_dist.parallel.groups" in IMPORTS["pmlm_dist.training.loop"]
    assert "pmlm_dist.training.loop" in IMPORTS["train"]


@pytest.mark.parametrize("module", PLACED)
def test_every_module_has_a_layer_and_imports_point_down(module: str):
    assert place(module) in {entry for places in LAYERS for entry in places}, f"{place(module)} stands in no layer"
    for imported in IMPORTS[module] - {"pmlm_dist"}:
        allowed = (
            layer(imported) > layer(module)
            or place(imported) == place(module)
            or layer(module) == len(LAYERS) - 1 == layer(imported)
            or (place(module), imported) in BESIDES
        )
        assert allowed, f"{module} imports {imported}"


def test_no_module_imports_itself_over_others():
    list(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names the circle


@pytest.mark.parametrize("module", PLACED)
def test_every_dependency_is_imported_in_its_own_place_only(module: str):
    path = MODULES[module].relative_to(ROOT).as_posix().removeprefix("pmlm_dist/")
    for name in imports_of(MODULES[module]):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ("pmlm_dist", "train"):
            continue
        known = [entry for entry in THIRD_PARTIES if name == entry or name.startswith(f"{entry}.")]
        assert known, f"{path} imports {name}, which has no place"
        places = THIRD_PARTIES[max(known, key=len)]
        assert any(path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in places), (path, name)


@pytest.mark.parametrize("module", ["config", "presets", "engine_config"])
def test_settings_need_the_standard_library_alone(module: str):
    for name in imports_of(ROOT / "pmlm_dist" / f"{module}.py"):
        assert name.partition(".")[0] in sys.stdlib_module_names or name.startswith("pmlm_dist.config."), name


def test_the_model_takes_tensors_and_the_objectives_know_settings_alone():
    assert not [name for name, imports in IMPORTS.items() if ".model." in name and "pmlm_dist.data.batch" in imports]
    assert IMPORTS["pmlm_dist.objectives"] <= {"pmlm_dist.config"}


def test_corpus_masks_and_settings_work_without_torch():
    """Also over what others import: preparing a corpus, and the command line before it sets the number of threads."""
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


def test_the_document_names_the_same_layers():
    (block,) = re.findall(r"## Layers.*?```\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    assert tuple(tuple(re.findall(r"\w+(?:/|\.py)", line)) for line in block.strip().splitlines()) == LAYERS


def test_the_document_names_the_same_places_of_dependencies():
    rows: dict[str, str] = dict(re.findall(r"^\| ([\w.]+) \| (.*) \|$", DOCUMENT, flags=re.MULTILINE))
    written = {"megatron.core": "megatron", "tensorboard": "torch.utils.tensorboard"}
    assert len(rows) >= 8
    for name, cell in rows.items():
        assert set(re.findall(r"`([\w/]+(?:/|\.py))`", cell)) == set(THIRD_PARTIES[written.get(name, name)]), name
