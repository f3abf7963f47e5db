"""House rules for notebooks that no other tool checks.

An import stands in a cell of its own: building the docs runs every cell that contains an import, whatever its flags say,
and would run the rest of such a cell with it. Exported code names what it imports. Outputs are small, and
tell nothing about the machine or the day on which they were made.
"""
import ast
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOK_LIMIT, TOTAL_LIMIT, CELL_LIMIT = 600_000, 8_000_000, 45
EXPORT = re.compile(r'^#\|\s*(export|exports|exporti)\b', re.M)
NOT_RUN = re.compile(r'^#\|\s*eval:\s*false', re.M)
MACHINE_PATH = re.compile(r'(?<![\w.:/])/(?:home|Users|root|tmp|work|mnt|opt|private|var/folders|usr/lib)/\w|\b[A-Z]:\\+Users\b')
PROGRESS = re.compile(r'\r|\d%\|')


def syntax_tree(source):
    "The statements of a cell, or None for a cell that is not plain Python"
    if source.lstrip()[:1] in ('%', '!'): return None
    try: return ast.parse(source).body
    except SyntaxError: return None


def is_import(node):
    "An import, or the block of imports that only type checkers read"
    if isinstance(node, ast.If) and getattr(node.test, 'id', '') == 'TYPE_CHECKING': return True
    return isinstance(node, (ast.Import, ast.ImportFrom))


def is_docstring(node): return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


def code_faults(source):
    "What is wrong with the code of one cell"
    statements = syntax_tree(source)
    if not statements: return
    exported = bool(EXPORT.search(source))
    others = [node for node in statements if not is_import(node) and not is_docstring(node)]
    if any(is_import(node) for node in statements) and others: yield 'imports and other code in one cell'
    elif not exported and others and not NOT_RUN.search(source):
        inner = [node for statement in others for node in ast.walk(statement) if is_import(node)]
        if inner: yield 'an import inside other code, in a cell that is not exported'
    if exported:
        for node in statements:
            if isinstance(node, ast.ImportFrom) and any(name.name == '*' for name in node.names): yield 'star import in exported code'


def output_texts(output):
    "Every text in one stored output; pictures are left out"
    yield ''.join(output.get('text', ''))
    yield from output.get('traceback', [])
    for kind, data in output.get('data', {}).items():
        if not kind.startswith('image/') or kind == 'image/svg+xml': yield ''.join(data) if isinstance(data, (str, list)) else json.dumps(data)


def output_faults(output):
    "What is wrong with one stored output"
    text = '\n'.join(output_texts(output))
    if output['output_type'] == 'error': yield f"stored error {output.get('ename')}"
    if found := MACHINE_PATH.search(text): yield f'path of one machine in an output: {text[found.start():found.start()+60]!r}'
    if PROGRESS.search(text): yield 'progress bar in an output'
    if any('widget' in kind for kind in output.get('data', {})): yield 'stored widget state; re-run with .ci/run_nbs.py'


def notebook_faults(path):
    "Everything wrong with one notebook, as (cell number, fault)"
    size = path.stat().st_size
    if size > NOTEBOOK_LIMIT: yield 0, f'{size/1000:.0f} KB, more than {NOTEBOOK_LIMIT/1000:.0f}; make its pictures smaller'
    notebook = json.loads(path.read_text(encoding='utf-8'))
    cells = notebook['cells']
    if len(cells) > CELL_LIMIT: yield 0, f'{len(cells)} cells, more than {CELL_LIMIT}; split it at a seam'
    title = ''.join(cells[0]['source']) if cells else ''
    if not re.match(r'# \S.*\n+> \S', title): yield 1, 'must begin with a cell "# Title" and "> one sentence"'
    for number, cell in enumerate(cells, 1):
        if cell['cell_type'] != 'code': continue
        for fault in code_faults(''.join(cell['source'])): yield number, fault
        for output in cell['outputs']:
            for fault in output_faults(output): yield number, fault


def navigation_faults(notebooks):
    "Notebooks that the site's navigation forgets, and entries without a notebook"
    listed = set(re.findall(r'[\w-]+\.ipynb', (ROOT/'_quarto.yml').read_text(encoding='utf-8')))
    present = {path.name for path in notebooks}
    yield from (f'_quarto.yml: {name} is not in the sidebar' for name in sorted(present - listed))
    yield from (f'_quarto.yml: {name} does not exist' for name in sorted(listed - present))


def main():
    notebooks = sorted(path for path in (ROOT/'nbs').rglob('*.ipynb') if not any(part[0] in '._' for part in path.relative_to(ROOT).parts))
    faults = [f'{path.relative_to(ROOT)}:cell {number}: {fault}' for path in notebooks for number, fault in notebook_faults(path)]
    faults += navigation_faults(notebooks)
    total = sum(path.stat().st_size for path in notebooks)
    if total > TOTAL_LIMIT: faults.append(f'nbs: {total/1e6:.1f} MB of notebooks, more than {TOTAL_LIMIT/1e6:.0f}')
    if faults: sys.exit('\n'.join([*faults, f'{len(faults)} fault(s).']))
    print(f'{len(notebooks)} notebooks ({total/1e6:.1f} MB) keep the house rules.')


if __name__ == '__main__': main()
