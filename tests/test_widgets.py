"""Widgets in a real browser: a notebook shown by Voila, turned from the page, read from the page.

What a widget does is tested in the notebooks, where values are set and buttons clicked without a browser. Here is what only a browser can tell: that what is turned in the
page arrives in the kernel, and that what a thread of the kernel finds arrives in the page.
"""
import json
import os
import socket
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
import pytest
from browser import Browser, needs_browser, wait_for
from musetalk.core import save_image

PATIENT = 240 # seconds until a page stands, on machines that have much else to do
ROOT = Path(__file__).resolve().parent.parent
needs_voila = pytest.mark.skipif(find_spec('voila') is None or find_spec('ipykernel') is None, reason='no Voila is installed')
pytest.importorskip('ipywidgets')

NOTEBOOK = '''
from musetalk.widgets import crop_explorer
panel = crop_explorer('face.png')
panel
'''


def write_notebook(path, *sources):
    cells = [dict(cell_type='code', execution_count=None, id=f'cell{number}', metadata={}, outputs=[], source=source.strip()) for number, source in enumerate(sources)]
    kernel = dict(name='python3', display_name='python3', language='python')
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))


@pytest.fixture
def page(tmp_path, portrait):
    "The address of a page with a crop explorer"
    save_image(tmp_path/'face.png', portrait)
    write_notebook(tmp_path/'demo.ipynb', NOTEBOOK)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), OMP_NUM_THREADS='1', JUPYTER_CONFIG_DIR=str(tmp_path/'config'))
    with open(tmp_path/'log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'voila', 'demo.ipynb', '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1'], cwd=tmp_path, env=environment, stdout=log, stderr=log)
        def stands():
            assert server.poll() is None, (tmp_path/'log').read_text()[-2000:]
            with socket.socket() as line: return line.connect_ex(('127.0.0.1', port)) == 0
        try:
            wait_for(stands, PATIENT)
            yield f'http://127.0.0.1:{port}/'
        finally:
            server.terminate()
            try: server.wait(20)
            except subprocess.TimeoutExpired: server.kill(); server.wait()


PICTURE = "[...document.querySelectorAll('img')].map(image => image.src).join()"


@needs_browser
@needs_voila
def test_crop_explorer_in_a_browser(page, tmp_path):
    "A slider is turned and a number typed; a wrong name and a wrong file are told; the page goes on"
    with Browser() as browser:
        browser.open(page, "document.querySelector('.jupyter-widgets')", PATIENT)
        browser.wait("document.body.innerText.includes('MuseTalk suggests')", PATIENT)
        browser.wait("[...document.querySelectorAll('img')].some(image => image.naturalWidth > 500)")
        def box(): return browser.run("document.body.innerText.match(/box \\(([-\\d, ]+)\\)/)[1].split(', ').map(Number)")
        def turn(label, value):
            "Type beside the slider of that name"
            browser.run(f"[...document.querySelectorAll('.widget-slider')].forEach(slider => {{ if (slider.innerText.startsWith('{label}')) slider.querySelector('.widget-readout').id = 'turned' }})")
            browser.type('#turned', value)
            browser.run("document.getElementById('turned').removeAttribute('id')")
        before, picture = box(), browser.run(PICTURE)
        turn('bbox_shift', 17)
        wait_for(lambda: box() == [before[0], before[1] + 17, before[2], before[3] + 17], PATIENT)
        wait_for(lambda: browser.run(PICTURE) != picture, PATIENT)
        browser.type('input[list]', 'nobody.mp4')
        browser.wait("document.querySelector('[role=status]').innerText.includes('nobody.mp4 does not exist')", PATIENT)
        (tmp_path/'words.png').write_text('no picture either')
        browser.upload('.widget-upload', tmp_path/'words.png')
        browser.wait("document.querySelector('[role=status]').innerText.includes('words.png is not a picture')", PATIENT)
        turn('bbox_shift', 0)
        wait_for(lambda: box() == before, PATIENT)
        browser.upload('.widget-upload', tmp_path/'face.png')
        browser.wait("document.querySelector('input[list]').value === 'face.png (uploaded)' && document.querySelector('[role=status]').innerText === ''", PATIENT)
        assert browser.run('document.documentElement.scrollWidth <= innerWidth')
        assert not [error for error in browser.errors if 'fontawesome' not in error] # Voila's own page asks a CDN for icons
        assert not [url for url in browser.outgoing() if 'fontawesome' not in url]
