"""How much of the package the tests inside the notebooks run, by file.

    .venv/bin/python .ci/measure_coverage.py                    prints the table and writes benchmarks/coverage.json
    .venv/bin/python .ci/measure_coverage.py --again NAME ...   runs these notebooks only, and those never run; keeps what the others found

Only `tests/test_notebooks.py` counts: it runs what each notebook shows against the exported module. Each notebook has a
process of its own, since in one that lives long the tracer falls silent after some forty of them. What each found is kept
in runs/coverage.
"""
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path
from musetalk.bench import machine_kind

ROOT = Path(__file__).resolve().parent.parent
KEPT = ROOT/'runs'/'coverage'
SETTINGS = '[run]\nsource = musetalk\nparallel = True\npatch = subprocess, _exit\nconcurrency = thread\ndata_file = {folder}/data\n[report]\nexclude_also =\n    if TYPE_CHECKING\n    if __name__ == .__main__.:\n'
MINUTES = 10  # that a notebook may take


def coverage(folder, word, *words):
    "Call coverage.py with the data in a folder"
    folder.mkdir(parents=True, exist_ok=True)
    (folder/'coveragerc').write_text(SETTINGS.format(folder=folder))
    return subprocess.run([sys.executable, '-m', 'coverage', word, f'--rcfile={folder}/coveragerc', *words], cwd=ROOT, capture_output=True, text=True, timeout=60*MINUTES)


def run(name):
    "Run one notebook; its name if it failed"
    shutil.rmtree(KEPT/name, ignore_errors=True)
    try: done = coverage(KEPT/name, 'run', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', f'tests/test_notebooks.py::test_notebook[{name}]')
    except subprocess.TimeoutExpired: done = None
    passed = done is not None and not done.returncode
    print(name, 'passed' if passed else f'did not end in {MINUTES} minutes' if done is None else done.stdout[-2000:], flush=True)
    return None if passed else name


def main():
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    known = [path.stem for path in sorted((ROOT/'nbs').glob('[!_.]*.ipynb')) if '#| default_exp' in path.read_text(encoding='utf-8')]
    names = [name for name in known if name in sys.argv[2:] or not (KEPT/name).exists()] if sys.argv[1:2] == ['--again'] else known
    with ThreadPoolExecutor(2) as pool: failed = [name for name in pool.map(run, names) if name]
    if failed: sys.exit('Nothing was written. Run them again with --again ' + ' '.join(failed))
    whole = KEPT/'all'
    shutil.rmtree(whole, ignore_errors=True)
    coverage(whole, 'combine', '-q', '--keep', *(str(KEPT/name) for name in known))
    coverage(whole, 'json', '-q', '-o', f'{whole}/report.json')
    report = json.loads((whole/'report.json').read_text())
    files = {Path(name).stem: round(entry['summary']['percent_covered'], 1) for name, entry in sorted(report['files'].items()) if Path(name).name not in ('__init__.py', '_modidx.py')}
    record = dict(command='make coverage', what='lines of the package that the tests inside the notebooks run, percent', machine=machine_kind(), date=date.today().isoformat(),
                  total=round(report['totals']['percent_covered'], 1), files=files)
    (ROOT/'benchmarks'/'coverage.json').write_text(json.dumps(record, indent=2) + '\n')
    for name, share in files.items(): print(f'{name:20} {share:5.1f} %')
    print(f"{'all':20} {record['total']:5.1f} %")


if __name__ == '__main__': main()
