"""The layout: which modules there are, which way they import, how long they are; README is true."""

import ast
import re
import subprocess
import sys

import pytest

from tests.tiny import ROOT

# Left may not import right. Modules of one group may import each other.
ORDER = (
    *("config", "tqdm_bars", "utils", "recipes", "loss", "corpus", "model modern", "fineweb"),
    *("load_fineweb", "training", "hf", "evals hellaswag", "sample evaluate", "analysis results"),
    *("train", "main", "experiments"),
)
LIMITS = {
    **{"config": 290, "utils": 240, "recipes": 260, "tqdm_bars": 90, "loss": 130, "model": 250},
    **{"modern": 250, "fineweb": 240, "load_fineweb": 240, "train": 450, "main": 220},
    "sample": 220,
}
# Modules at the root that are still to be replaced: no order among them, and 500 lines.
LEAVING = {
    *("arms", "benchmark", "cbt", "comparison", "comparison_figures", "curves", "evaluation"),
    *("figures", "hf_card", "hf_configs", "hf_export", "hf_import", "hf_layouts"),
    *("hf_tokenizer", "hub", "lambada", "likelihood", "lm_eval_adapter", "metrics", "packing"),
    *("passage", "published", "report", "run_facts", "scoring", "tasks"),
    *("wikitext", "window_ranking"),
}
WITHOUT_TORCH = ("config", "utils", "recipes", "tqdm_bars")
WITHOUT_TORCH += ("corpus.shards", "corpus.sources", "corpus.tokenizer")
PLACE = {name: place for place, group in enumerate(ORDER) for name in group.split()}
# What imports the wrong way until it is replaced, too.
STILL = {"hf.py": {"evaluate"}}
PACKAGES = ("corpus", "training", "evals", "analysis")
PATHS = [path for path in ROOT.glob("*.py") if path.stem in PLACE]
PATHS += [path for name in PACKAGES for path in ROOT.glob(f"{name}/*.py")]
NEW = sorted(path.relative_to(ROOT).as_posix() for path in PATHS)


def imports(file: str) -> set[str]:
    """Return the first names of what a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    return names


def test_the_root_holds_the_modules_of_the_layout_and_those_that_leave():
    root = {path.stem for path in ROOT.glob("*.py")}
    assert root - LEAVING <= PLACE.keys(), "neither in the layout nor leaving"
    assert root >= LEAVING, "gone: take it off the list"
    assert PLACE.keys() - root <= set(PACKAGES)


@pytest.mark.parametrize("file", NEW)
def test_imports_run_one_way(file):
    name = file.removesuffix(".py").split("/")[0]
    right = {other for other, place in PLACE.items() if place > PLACE[name]}
    assert imports(file) & right == STILL.get(file, set())
    # The half that trains is finished; what reads it still has parts at the root.
    if PLACE[name] <= PLACE["training"]:
        assert not imports(file) & LEAVING, "imports what leaves"


@pytest.mark.parametrize("file", NEW)
def test_files_keep_their_limits(file):
    lines = len((ROOT / file).read_text().splitlines())
    limit = LIMITS.get(file.removesuffix(".py"), 500)
    assert lines <= limit, f"{file}: {lines} lines of {limit}"


def test_counts(capsys):
    """Print how much there is, for whoever wants to know: `pytest -rP tests/test_layout.py`."""
    count = {}
    for pattern in ("*.py", *(f"{name}/*.py" for name in PACKAGES), "tests/**/*.py"):
        files = list(ROOT.glob(pattern))
        lines = sum(len(path.read_text().splitlines()) for path in files)
        count[pattern] = lines
        print(f"{pattern}: {len(files)} files, {lines} lines")
    leaving = sum(len((ROOT / f"{name}.py").read_text().splitlines()) for name in LEAVING)
    print(f"leaving: {len(LEAVING)} files, {leaving} lines")
    assert count["*.py"] > leaving > 0


def test_importing_does_nothing_but_define(tmp_path):
    """No output, no files, and no heavy package where none is needed."""
    light = [name for name in WITHOUT_TORCH if (ROOT / f"{name.replace('.', '/')}.py").exists()]
    modules = [file.removesuffix(".py").replace("/", ".") for file in NEW]
    modules = [name.removesuffix(".__init__") for name in [*modules, *sorted(LEAVING)]]
    code = (
        f"import importlib, sys; sys.path.insert(0, {str(ROOT)!r})\n"
        f"for name in {light!r}: importlib.import_module(name)\n"
        "heavy = {'datasets', 'transformers', 'matplotlib', 'pyarrow', 'lm_eval'}\n"
        "loaded = {'torch', *heavy} & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded\n"
        "import torch.distributed; assert not torch.distributed.is_initialized()\n"
    )
    command = [sys.executable, "-W", "error::UserWarning", "-c", code]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [("--help",), ("quickstart", "--plan")])
def test_help_and_plan_start_without_torch(tmp_path, words):
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['main.py', *{words!r}]\n"
        "import runpy, contextlib\n"
        f"with contextlib.suppress(SystemExit): runpy.run_path({str(ROOT / 'main.py')!r}, "
        "run_name='__main__')\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert result.returncode == 0 and len(result.stdout) > 300, result.stderr.decode()


def test_readme_names_every_file_and_nothing_else():
    tree = re.search(r"```text tree\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    named, folder = set(), ""
    for indent, name in re.findall(r"^( *)(\S+)", tree, re.MULTILINE):
        folder = folder if indent else name if name.endswith("/") else ""
        named.add(folder + name if indent else name)
        assert (ROOT / (folder + name if indent else name)).exists(), name
    root = {path.name for path in ROOT.glob("*.py")}
    packages = {file for file in NEW if "/" in file and not file.endswith("__init__.py")}
    assert {name for name in named if name.endswith(".py")} == root | packages


@pytest.mark.slow
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
