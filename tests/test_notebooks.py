"""The tests inside the notebooks, run once more against the exported package.

`nbdev_test` runs each notebook from its own source and would not notice a helper that was never exported, or an import
that only a test cell makes. Here the exported cells are not run: the notebook starts with everything that its finished module holds.
"""
import gc
import sys
from pathlib import Path
import pytest
from execnb.shell import CaptureShell
from fastcore.xtras import working_directory
from nbdev.config import get_config
from nbdev.frontmatter import FrontmatterProc
from nbdev.process import NBProcessor

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = get_config(path=ROOT)
SKIPPED = set(SETTINGS.tst_flags.split())
EXPORTED = {'export', 'exports', 'exporti'}
NOTEBOOKS = sorted(path for path in (ROOT/'nbs').glob('[!_.]*.ipynb') if '#| default_exp' in path.read_text(encoding='utf-8'))  # the others have no module; nbdev_test runs them
START = 'import {module} as _module\nglobals().update({{name: value for name, value in vars(_module).items() if not name.startswith("__")}})'


def directives(cell): return set(cell.directives_) if cell.cell_type == 'code' else set()


def left_out(cell):
    "Whether a cell is not run: text, exported code, and what nbdev_test skips too"
    if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
    if cell.directives_.get('eval:', [''])[0].lower() == 'false': return True
    return bool(directives(cell) & (SKIPPED | EXPORTED))


def module_of(notebook):
    "The module that a notebook exports, or None"
    for cell in notebook.cells:
        if 'default_exp' in directives(cell): return f"{SETTINGS.lib_name}.{cell.directives_['default_exp'][0]}"


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(path, monkeypatch):
    monkeypatch.setenv('IN_TEST', '1')
    notebook = NBProcessor(path, procs=FrontmatterProc, process=True).nb
    if notebook.frontmatter_.get('skip_exec'): pytest.skip('the notebook asks not to be run')
    shell, module = CaptureShell(path), module_of(notebook)
    with working_directory(path.parent):
        shell.run_cell(START.format(module=module))
        shell.run_all(notebook, exc_stop=True, preproc=left_out)
    assert Path(sys.modules[module].__file__).parent == ROOT/SETTINGS.lib_name
    shell.reset(new_session=False)
    if 'matplotlib.pyplot' in sys.modules: sys.modules['matplotlib.pyplot'].close('all')
    gc.collect()
