"""The structure of the package, as docs/design/architecture.md states it: imports, sizes, the tree."""

import ast
import graphlib
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENT = (ROOT / "docs" / "design" / "architecture.md").read_text(encoding="utf-8")
MODULES = {
    path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".").removesuffix(".__init__"): path
    for path in [*(ROOT / "pmlm_dist").rglob("*.py"), ROOT / "train.py"]
}

LAYERS = (
    ("train.py",),
    ("cli.py",),
    ("commands/",),
    ("downstream/",),
    ("conversion/",),
    ("training/", "decoding/"),
    ("planning/",),
    ("checkpoint/",),
    ("metrics/",),
    ("supervision/", "engine/"),
    ("objectives.py", "likelihood/"),
    ("model/", "data/", "corpus/"),
    ("parallel/", "masking/", "vocabulary/"),
    (
        *("config.py", "presets.py", "devices.py", "launch_environment.py", "console.py", "files.py"),
        *("folder_lock.py", "json_input.py", "options.py", "ranges.py", "relations.py"),
    ),
)
"""From the top; a module imports from the lines below its own, and from its own package."""

SAME_LINE_OR_ABOVE = {("data/", "pmlm_dist.corpus.shards"), ("supervision/", "pmlm_dist.checkpoint.folder")}
"""The exceptions."""

THIRD_PARTIES = {
    "megatron": ("parallel/",),
    "deepspeed": (*("engine/", "checkpoint/engine_state.py", "training/", "downstream/"),),
    "pydantic": ("engine/deepspeed_engine.py",),
    "safetensors": ("checkpoint/files.py", "conversion/"),
    "webdataset": ("corpus/shards.py",),
    "fsspec": ("data/remote_files.py", "corpus/input/"),
    "aiohttp": ("data/remote_files.py",),
    "datasets": ("corpus/input/", "downstream/rows.py"),
    "datasketch": ("corpus/filters/duplicates.py",),
    "mpi4py": ("corpus/prepare/mpi.py",),
    "tokenizers": ("vocabulary/",),
    "torch.utils.tensorboard": ("metrics/run_log.py",),
    "transformers": ("conversion/",),
    "onnxruntime": ("conversion/onnx.py",),
    "tyro": ("cli.py",),
    "numba": ("masking/",),
    "pyarrow": ("corpus/input/",),
    "rouge_score": ("downstream/tasks/overlap.py",),
    "sacrebleu": ("downstream/tasks/overlap.py",),
    "sklearn": ("downstream/tasks/scores.py", "downstream/embed.py"),
    "scipy": ("downstream/tasks/scores.py",),
    "triton": ("model/triton_kernels.py", "model/elementwise_kernels.py", "parallel/cross_entropy_kernel.py"),
    "zstandard": ("corpus/input/",),
    "rich": ("corpus/prepare/mpi.py", "commands/inspect.py", "planning/report.py"),
    "matplotlib": ("commands/inspect.py", "commands/plot.py"),
    "torch": (
        *("masking/visibility.py", "objectives.py", "data/", "model/", "parallel/", "training/", "engine/", "metrics/"),
        *("checkpoint/", "conversion/", "commands/", "planning/measure.py", "decoding/", "downstream/", "likelihood/"),
    ),
    "numpy": (
        *("decoding/", "downstream/", "corpus/", "data/", "masking/", "parallel/seeding.py", "commands/"),
        *("checkpoint/files.py", "conversion/", "likelihood/"),
    ),
}
"""The only places of each dependency; one that is not listed has no place yet."""

WITHOUT_TORCH = [
    *(name for name in MODULES if name.startswith(("pmlm_dist.corpus", "pmlm_dist.supervision"))),
    *(f"pmlm_dist.masking.{name}" for name in ("blockwise", "layout", "seq2seq_layout")),
    *(f"pmlm_dist.checkpoint.{name}" for name in ("fragments", "files", "folder")),
    *(
        "pmlm_dist.data.order",
        "pmlm_dist.vocabulary.vocabulary",
        "pmlm_dist.commands.checkpoint",
        "pmlm_dist.decoding.settings",
    ),
    *("pmlm_dist.config", "pmlm_dist.presets", "pmlm_dist.engine.deepspeed_config", "pmlm_dist.cli", "train"),
    *("pmlm_dist.downstream.rows", "pmlm_dist.downstream.settings", "pmlm_dist.downstream.summary"),
]

LARGEST_FILE, LARGEST_FOLDER, LARGEST_DOCUMENT = 400, 15, 150
"""Lines of a Python file, Python files of a folder, lines of docs/design/architecture.md."""


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
    """Where a module lies, as the layers name it: `training/` or `config.py`."""
    relative = MODULES[module].relative_to(ROOT).as_posix().removeprefix("pmlm_dist/")
    folder, slash, _ = relative.partition("/")
    return f"{folder}{slash}"


def layer(module: str) -> int:
    return next(number for number, places in enumerate(LAYERS) if place(module) in places)


PLACED = [name for name in MODULES if name != "pmlm_dist"]


def test_import_scan_finds_known_imports():
    assert len(MODULES) > 40
    assert "pmlm_dist.parallel.groups" in IMPORTS["pmlm_dist.training.attempt"]
    assert "pmlm_dist.training.run" in IMPORTS["pmlm_dist.cli"]


@pytest.mark.parametrize("module", PLACED)
def test_imports_point_down(module: str):
    assert place(module) in {entry for places in LAYERS for entry in places}, f"{place(module)} is in no layer"
    for imported in IMPORTS[module] - {"pmlm_dist"}:
        allowed = (
            layer(imported) > layer(module)
            or place(imported) == place(module)
            or layer(module) == len(LAYERS) - 1 == layer(imported)
            or (place(module), imported) in SAME_LINE_OR_ABOVE
        )
        assert allowed, f"{module} imports {imported}"


def test_import_graph_has_no_cycle():
    list(graphlib.TopologicalSorter(IMPORTS).static_order())  # raises CycleError, which names the cycle


@pytest.mark.parametrize("module", PLACED)
def test_third_party_imports_are_in_their_places(module: str):
    path = MODULES[module].relative_to(ROOT).as_posix().removeprefix("pmlm_dist/")
    for name in imports_of(MODULES[module]):
        top = name.partition(".")[0]
        if top in sys.stdlib_module_names or top in ("pmlm_dist", "train"):
            continue
        known = [entry for entry in THIRD_PARTIES if name == entry or name.startswith(f"{entry}.")]
        assert known, f"{path} imports {name}, which has no place"
        places = THIRD_PARTIES[max(known, key=len)]
        assert any(path == entry or (entry.endswith("/") and path.startswith(entry)) for entry in places), (path, name)


@pytest.mark.parametrize("module", ["config", "presets", "ranges", "files", "console", "launch_environment"])
def test_lowest_layer_needs_the_standard_library_alone(module: str):
    for name in imports_of(ROOT / "pmlm_dist" / f"{module}.py"):
        assert name.partition(".")[0] in sys.stdlib_module_names or place_of_name(name) in LAYERS[-1], name


def place_of_name(name: str) -> str:
    """The place of the module that an import names, or names something of."""
    return place(name if name in MODULES else name.rpartition(".")[0])


def test_model_and_objectives_import_no_batch():
    assert not [name for name, imports in IMPORTS.items() if ".model." in name and "pmlm_dist.data.batch" in imports]
    assert IMPORTS["pmlm_dist.objectives"] <= {"pmlm_dist.config"}


def test_corpus_supervision_and_settings_import_no_torch():
    """Also indirectly: preparing a corpus, and the command line before it sets the number of threads."""
    code = f"import sys, {', '.join(WITHOUT_TORCH)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0


@pytest.mark.parametrize("root", ["pmlm_dist", "tests", "benchmarks"])
def test_files_and_folders_are_small(root: str):
    files = [path for path in (ROOT / root).rglob("*.py") if "__pycache__" not in path.parts]
    lines = {path.relative_to(ROOT).as_posix(): len(path.read_text(encoding="utf-8").splitlines()) for path in files}
    assert not {name: count for name, count in lines.items() if count > LARGEST_FILE}
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in files)
    assert not {name: count for name, count in folders.items() if count > LARGEST_FOLDER and root == "pmlm_dist"}


def test_document_is_short():
    assert len(DOCUMENT.splitlines()) <= LARGEST_DOCUMENT


def test_document_names_the_layers():
    (block,) = re.findall(r"## Layers.*?```\n(.*?)```", DOCUMENT, flags=re.DOTALL)
    assert tuple(tuple(re.findall(r"\w+(?:/|\.py)", line)) for line in block.strip().splitlines()) == LAYERS


def test_document_names_the_places_of_dependencies():
    rows: dict[str, str] = dict(re.findall(r"^\| ([\w.]+) \| (.*) \|$", DOCUMENT, flags=re.MULTILINE))
    written = {"megatron.core": "megatron", "tensorboard": "torch.utils.tensorboard"}
    named = {written.get(name, name): cell for name, cell in rows.items() if written.get(name, name) in THIRD_PARTIES}
    assert named.keys() == THIRD_PARTIES.keys()
    for name, cell in named.items():
        assert set(re.findall(r"`([\w/]+(?:/|\.py))`", cell)) == set(THIRD_PARTIES[name]), name


def test_document_shows_the_tree_as_built():
    (section,) = re.findall(r"## Tree\n(.*?)\n## ", DOCUMENT, flags=re.DOTALL)
    written = {
        folder: set(re.findall(r"`(\w+)`", modules))
        for folder, modules in re.findall(r"^\| `(pmlm_dist/[\w/]*)` \| ([^|]*) \|", section, flags=re.MULTILINE)
    }
    built: dict[str, set[str]] = {}
    for path in (ROOT / "pmlm_dist").rglob("*.py"):
        folder = f"{path.parent.relative_to(ROOT).as_posix()}/"
        built.setdefault(folder, set())
        if path.stem != "__init__":
            built[folder].add(path.stem)
    assert written == {folder: modules for folder, modules in built.items() if modules}
