"""How much of the package the tests inside the notebooks run, by file.

    .venv/bin/python .ci/measure_coverage.py            prints the table and writes benchmarks/coverage.json

Only `tests/test_notebooks.py` counts: it runs what each notebook shows against the exported module.
"""
import json
import os
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from musetalk.bench import machine_kind

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = '[run]\nsource = musetalk\nparallel = True\npatch = subprocess, _exit\nconcurrency = thread\ndata_file = {folder}/data\n[report]\nexclude_also =\n    if TYPE_CHECKING\n    if __name__ == .__main__.:\n'


def measured(folder):
    "The report of coverage.py"
    settings = Path(folder)/'coveragerc'
    settings.write_text(SETTINGS.format(folder=folder))
    def coverage(*words): return subprocess.run([sys.executable, '-m', 'coverage', *words], cwd=ROOT).returncode
    failed = coverage('run', f'--rcfile={settings}', '-m', 'pytest', '-q', '-p', 'no:cacheprovider', '-n', '2', 'tests/test_notebooks.py')
    coverage('combine', '-q', f'--rcfile={settings}')
    coverage('json', '-q', f'--rcfile={settings}', '-o', f'{folder}/report.json')
    return failed, json.loads(Path(folder, 'report.json').read_text())


def main():
    os.environ.setdefault('OMP_NUM_THREADS', '1')
    with tempfile.TemporaryDirectory() as folder: failed, report = measured(folder)
    if failed: sys.exit('some notebooks failed; nothing was written')
    files = {Path(name).stem: round(entry['summary']['percent_covered'], 1) for name, entry in sorted(report['files'].items()) if Path(name).name not in ('__init__.py', '_modidx.py')}
    record = dict(command='make coverage', what='lines of the package that the tests inside the notebooks run, percent', machine=machine_kind(), date=date.today().isoformat(),
                  total=round(report['totals']['percent_covered'], 1), files=files)
    (ROOT/'benchmarks'/'coverage.json').write_text(json.dumps(record, indent=2) + '\n')
    for name, share in files.items(): print(f'{name:20} {share:5.1f} %')
    print(f"{'all':20} {record['total']:5.1f} %")


if __name__ == '__main__': main()
