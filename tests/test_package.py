"""What is true of the package as a whole and has no notebook to live in."""
import importlib
import json
import re
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
import pytest
import musetalk

ROOT = Path(__file__).resolve().parent.parent
READER = ConfigParser(delimiters=['='], interpolation=None)
READER.read(ROOT/'settings.ini', encoding='utf-8')
SETTINGS = READER['DEFAULT']
MODULES = sorted(path.stem for path in (ROOT/'musetalk').glob('[!_]*.py'))


def plain_name(requirement): return re.sub('[-_.]+', '-', re.match(r'[\w.-]+', requirement)[0]).lower()


def test_version(): assert musetalk.__version__ == SETTINGS['version']


def test_tested_versions_cover_the_requirements():
    pins = {plain_name(line) for line in (ROOT/'constraints.txt').read_text().splitlines() if '==' in line}
    wanted = SETTINGS['requirements'].split() + SETTINGS['dev_requirements'].split()
    assert not {plain_name(requirement) for requirement in wanted} - pins


def test_commands_exist():
    for entry in SETTINGS['console_scripts'].split():
        module, function = entry.split('=')[1].split(':')
        assert callable(getattr(importlib.import_module(module), function))


@pytest.mark.parametrize('name', MODULES)
def test_module_says_what_it_offers(name):
    module = importlib.import_module(f'musetalk.{name}')
    assert module.__doc__
    for offered in module.__all__:
        value = getattr(module, offered)
        if callable(value) and not getattr(type(value), '__module__', '').startswith('torch'): assert value.__doc__, f'{offered} has no docstring'


def test_import_is_quick():
    "Neither networks nor drawing nor a notebook are loaded before they are needed"
    code = 'import json, sys, musetalk.core; print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))'
    loaded = json.loads(subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True).stdout)
    assert not {'torch', 'diffusers', 'transformers', 'matplotlib', 'librosa', 'IPython'} & set(loaded)
