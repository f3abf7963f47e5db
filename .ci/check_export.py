"""Are all notebooks clean, and does the package hold exactly what they export?

Cleaning and exporting are done on a copy, which is then compared with this tree file by file: nothing here is changed,
and it makes no difference whether git is present or what it thinks of the checkout.
"""
import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IGNORED = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints', '*.mp4', '*.wav')


def files_below(folder, pattern):
    "The matching files by their path relative to `folder`, as text"
    found = (path for path in folder.rglob(pattern) if '.ipynb_checkpoints' not in path.parts)
    return {path.relative_to(folder).as_posix(): path.read_text(encoding='utf-8') for path in found}


def first_difference(found, wanted):
    "A few lines that show where two texts part"
    lines = difflib.unified_diff(found.splitlines(), wanted.splitlines(), 'is', 'should be', n=0, lineterm='')
    return [f'      {line[:150]}' for line in list(lines)[2:9]]


def compare(folder, found, wanted, fault, remedy):
    "Say what differs between two sets of files, and return how many do"
    wrong = 0
    for name in sorted(found.keys() | wanted.keys()):
        if found.get(name) == wanted.get(name): continue
        wrong += 1
        if name not in wanted: print(f'{folder}/{name}: no notebook exports this module; delete it')
        elif name not in found: print(f'{folder}/{name}: missing; run {remedy}')
        else: print(f'{folder}/{name}: {fault}; run {remedy}', *first_difference(found[name], wanted[name]), sep='\n')
    return wrong


def main():
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch)/ROOT.name
        copy.mkdir()
        for name in ('settings.ini', 'README.md'):
            if (ROOT/name).exists(): shutil.copy(ROOT/name, copy/name)
        shutil.copytree(ROOT/'nbs', copy/'nbs', ignore=IGNORED)
        (copy/'musetalk').mkdir()
        shutil.copy(ROOT/'musetalk'/'__init__.py', copy/'musetalk')
        environment = {name: value for name, value in os.environ.items() if name != 'IN_TEST'}
        for tool in ('clean', 'export'):
            command = [sys.executable, '-c', f'from nbdev.{"clean" if tool == "clean" else "doclinks"} import nbdev_{tool}; nbdev_{tool}()']
            subprocess.run(command, cwd=copy, env=environment, check=True)
        notebooks = files_below(ROOT/'nbs', '*.ipynb')
        wrong = compare('nbs', notebooks, files_below(copy/'nbs', '*.ipynb'), 'not clean', '.venv/bin/nbdev_clean')
        wrong += compare('musetalk', files_below(ROOT/'musetalk', '*.py'), files_below(copy/'musetalk', '*.py'),
                         'not what its notebook exports', '.venv/bin/nbdev_export')
    if not notebooks: sys.exit('No notebooks found in nbs.')
    if wrong: sys.exit(f'{wrong} file(s) out of step with the notebooks.')
    print(f'{len(notebooks)} notebooks are clean, and the package is what they export.')


if __name__ == '__main__': main()
