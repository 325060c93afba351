"""The house stays in order: imports run downward and are quiet, the README matches the code."""

import ast
import re
import subprocess
import sys

import pytest

from tests.conftest import ROOT

# From the bottom to the top; a module imports only modules that stand before it.
ORDER = (
    *("config", "checks", "config_file", "counts", "command_line", "recipes", "files"),
    *("tokenizer", "left_out"),
    *("manifests", "writer", "shards", "tqdm_bars", "orders", "documents", "rows", "verify"),
    *("download", "chunks", "pydocs", "sources", "hub", "workers", "preparation", "load_fineweb"),
    *("likelihood", "benchmark", "hellaswag", "lambada", "cbt", "wikitext", "tasks", "packing"),
    *("logs", "window_losses", "metrics", "figures", "comparison", "comparison_figures"),
    *("published", "curves", "run_facts", "window_ranking", "trackers", "signals"),
    *("hf_configs", "hf_tokenizer", "hf_card", "hardware", "memory", "plan"),
    *("devices", "roll_call", "distributed", "all_reduce", "attention", "lean", "cross_entropy"),
    *("model", "modern", "sharding", "muon", "optim", "loss_scale", "micro_batch", "outcome"),
    *("fineweb", "checkpoint", "hf_layouts", "hf_import", "hf_export", "decoder", "generate"),
    *("sample", "passage", "scoring", "evaluation", "in_loop_evals", "start", "trainer"),
    *("measuring", "train", "lm_eval_adapter", "evaluate", "hf", "report", "results", "summary"),
    *("main", "arms", "experiments"),
)
WITHOUT_TORCH = (*ORDER[: ORDER.index("devices")], *ORDER[ORDER.index("report") :])


def imports(module: str) -> set[str]:
    tree = ast.parse((ROOT / f"{module}.py").read_text())
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_every_module_has_its_place():
    assert {path.stem for path in ROOT.glob("*.py")} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_run_downward(module):
    above = set(ORDER[ORDER.index(module) :])
    assert not imports(module) & above


def test_importing_does_nothing_but_define(tmp_path):
    """No output, no files, and no heavy package where none is needed."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {WITHOUT_TORCH!r}: __import__(name)\n"
        "heavy = {'datasets', 'transformers', 'matplotlib', 'pyarrow', 'lm_eval'}\n"
        "loaded = {'torch', *heavy} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        f"for name in {ORDER!r}: __import__(name)\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "import torch.distributed; assert not torch.distributed.is_initialized()\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


def test_readme_names_every_file_and_nothing_else():
    tree = re.search(r"```text tree\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    named = set(re.findall(r"^\s*(\S+\.\w+)", tree, re.MULTILINE))
    top = {path.name for path in ROOT.glob("*.py")}
    assert {name for name in named if name.endswith(".py") and "/" not in name} == top
    for name in named:
        assert (ROOT / name).exists() or list(ROOT.glob(f"*/{name}")), name


def test_readme_commands_name_real_scripts_and_options():
    text = (ROOT / "README.md").read_text() + (ROOT / "recipes.py").read_text()
    commands = re.findall(r"(?:python|torchrun)(?: --\S+)* (\w+\.py)([^`\n#]*)", text)
    assert {script for script, _ in commands} >= {"main.py", "load_fineweb.py", "results.py"}
    help_of = {}
    for script, rest in commands:
        assert (ROOT / script).exists(), script
        if script not in help_of and "--" in rest:
            command = [sys.executable, str(ROOT / script), "--help"]
            help_of[script] = subprocess.run(command, capture_output=True, text=True).stdout
        for option in re.findall(r"(--[a-z][\w.-]*)", rest):
            if option != "--group.field":
                assert option in help_of[script], f"{script} {option}"


def test_files_and_functions_stay_small():
    paths = [*ROOT.glob("*.py"), *ROOT.glob("makemore/*.py")]
    long_files = {
        path.name: count for path in paths if (count := len(path.read_text().splitlines())) > 350
    }
    assert not long_files
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f"{path.name}: {node.name}"
