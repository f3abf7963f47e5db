"""Widgets in a real browser: a notebook shown by Voila, turned from the page, read from the page.

What a widget does is tested in the notebooks, where values are set and buttons clicked without a browser. Here is what only a browser can tell: that what is turned in the
page arrives in the kernel, and that what a thread of the kernel finds arrives in the page.
"""
import json
import os
import socket
import subprocess
import sys
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
import pytest
from browser import Browser, needs_browser, wait_for
from musetalk.bench import demo_portrait, demo_speech
from musetalk.core import save_image
from musetalk.sound import load_audio, write_audio

PATIENT = 240 # seconds until a page stands, on machines that have much else to do
ROOT = Path(__file__).resolve().parent.parent
needs_voila = pytest.mark.skipif(find_spec('voila') is None or find_spec('ipykernel') is None, reason='no Voila is installed')
pytest.importorskip('ipywidgets')

NOTEBOOK = '''
from musetalk.widgets import crop_explorer
crop_explorer('face.png').wait() # what changes while Voila hands over the page would be lost
'''


def write_notebook(path, *sources):
    cells = [dict(cell_type='code', execution_count=None, id=f'cell{number}', metadata={}, outputs=[], source=source.strip()) for number, source in enumerate(sources)]
    kernel = dict(name='python3', display_name='python3', language='python')
    path.write_text(json.dumps(dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)))


@contextmanager
def shown(folder, *sources):
    "The address of a page that Voila makes of these cells"
    write_notebook(folder/'demo.ipynb', *sources)
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    environment = os.environ | dict(PYTHONPATH=os.pathsep.join([str(ROOT), os.environ.get('PYTHONPATH', '')]), OMP_NUM_THREADS='1', JUPYTER_CONFIG_DIR=str(folder/'config'))
    with open(folder/'log', 'w') as log:
        server = subprocess.Popen([sys.executable, '-m', 'voila', 'demo.ipynb', '--no-browser', f'--port={port}', '--Voila.ip=127.0.0.1'], cwd=folder, env=environment, stdout=log, stderr=log)
        def stands():
            assert server.poll() is None, (folder/'log').read_text()[-2000:]
            with socket.socket() as line: return line.connect_ex(('127.0.0.1', port)) == 0
        try:
            wait_for(stands, PATIENT)
            yield f'http://127.0.0.1:{port}/'
        finally:
            server.terminate()
            try: server.wait(20)
            except subprocess.TimeoutExpired: server.kill(); server.wait()


@pytest.fixture
def page(tmp_path, portrait):
    "The address of a page with a crop explorer"
    save_image(tmp_path/'face.png', portrait)
    with shown(tmp_path, NOTEBOOK) as address: yield address


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


WORKBENCH = '''
from musetalk.explorers import audio_explorer, mask_tuner
from musetalk.inside import attention_explorer, loss_explorer
from musetalk.studio import avatar_control, dub_studio, training_monitor
from ipywidgets import VBox
panels = dict(audio=audio_explorer(audio='words.wav'), mask=mask_tuner('face.png', 'words.wav'), attention=attention_explorer(video='face.png', audio='words.wav'), loss=loss_explorer('face.png', 'words.wav'),
              monitor=training_monitor('run', 40, every=.3), studio=dub_studio('face.png', 'words.wav', 'said.mp4'), live=avatar_control('face.png', 'words.wav'))
for name, panel in panels.items(): panel.wait().add_class(f'panel-{name}') # what changes while Voila hands over the page would be lost
VBox(list(panels.values()))
'''


class Bench:
    "One of the panels on the page"
    def __init__(self, browser, name): self.browser, self.place = browser, f"document.querySelector('.panel-{name}')"
    def run(self, code): return self.browser.run(f'(panel => {code})({self.place})')
    def wait(self, code): return wait_for(lambda: self.run(f'!!({code})'), PATIENT, .1, code)
    def text(self): return self.run('panel.innerText')
    def says(self, words): self.wait(f'panel.innerText.includes({json.dumps(words)})')
    def pictures(self): return self.run("[...panel.querySelectorAll('img')].map(image => image.src).join()")

    def changes(self, act):
        "Whether another picture follows"
        before = self.pictures()
        act()
        wait_for(lambda: self.pictures() != before, PATIENT, what='another picture')

    def marked(self, code, act):
        "Do something with the element that an expression finds"
        self.wait(code)
        self.run(f"({code}).id = 'meant'")
        try: act('#meant')
        finally: self.browser.run("document.getElementById('meant')?.removeAttribute('id')")

    def turn(self, label, value): self.marked(f"[...panel.querySelectorAll('.widget-slider')].find(slider => slider.innerText.startsWith('{label}'))?.querySelector('.widget-readout')", lambda place: self.browser.type(place, value))
    def press(self, label): self.marked(f"[...panel.querySelectorAll('button')].find(button => button.innerText.trim() === '{label}' && !button.disabled)", self.browser.click)
    def tick(self, label): self.marked(f"[...panel.querySelectorAll('.widget-checkbox label')].find(box => box.innerText.includes('{label}'))?.querySelector('input')", self.browser.click)


@pytest.fixture(scope='module')
def bench(tmp_path_factory):
    "A page with all the other panels, and the folder it works in"
    if find_spec('voila') is None or find_spec('ipykernel') is None: pytest.skip('no Voila is installed')
    folder = tmp_path_factory.mktemp('bench')
    save_image(folder/'face.png', demo_portrait(320))
    write_audio(folder/'words.wav', load_audio(demo_speech())[16000:38400])
    (folder/'run').mkdir()
    with shown(folder, WORKBENCH) as address, Browser() as browser:
        browser.open(address, "document.querySelectorAll('[class*=panel-]').length == 7", PATIENT)
        browser.folder = folder
        yield browser
        browser.look(folder/'page.png', height=4200)
        assert browser.run('document.documentElement.scrollWidth <= innerWidth')
        assert not [error for error in browser.errors if 'fontawesome' not in error and 'RANGE_NOT_SATISFIABLE blob:' not in error] # the latter: a player of ipywidgets that has nothing to play yet
        assert not [url for url in browser.outgoing() if 'fontawesome' not in url]


@needs_browser
def test_audio_explorer_in_a_browser(bench):
    panel = Bench(bench, 'audio')
    panel.says('frame 0 stands for 0.000 s')
    panel.changes(lambda: panel.turn('frame', 20))
    panel.says('frame 20 stands for 0.800 s')
    panel.run("(panel.querySelector('select').selectedIndex += 1, panel.querySelector('select').dispatchEvent(new Event('change', {bubbles: true})))")
    wait_for(lambda: 'frame 20 stands for 0.800 s' not in panel.text(), PATIENT)


@needs_browser
def test_mask_tuner_in_a_browser(bench):
    panel = Bench(bench, 'mask')
    panel.says('options: none, these are the usual values')
    panel.changes(lambda: panel.turn('feather', .2))
    panel.says('--feather 0.2')
    panel.changes(lambda: panel.turn('moment', 3))
    panel.press('Reset')
    panel.says('options: none, these are the usual values')


@needs_browser
def test_attention_and_losses_in_a_browser(bench):
    panel = Bench(bench, 'attention')
    panel.wait("[...panel.querySelectorAll('img')].some(image => image.naturalWidth > 500)")
    panel.changes(lambda: panel.turn('token', 1))
    panel = Bench(bench, 'loss')
    panel.wait("[...panel.querySelectorAll('img')].some(image => image.naturalWidth > 500)")
    panel.changes(lambda: panel.turn('blur', 4))
    panel.changes(lambda: panel.press('Reset'))


@needs_browser
def test_training_monitor_in_a_browser(bench):
    "A run that goes on while it is watched"
    panel = Bench(bench, 'monitor')
    panel.says('waiting for run')
    def log(*steps):
        with open(bench.folder/'run/log.jsonl', 'a') as file:
            for step in steps: file.write(json.dumps(dict(step=step, loss=1/step, seconds=.5)) + '\n')
    log(*range(1, 11))
    panel.says('step 10 of 40')
    panel.changes(lambda: log(11, 12))
    panel.says('step 12 of 40, 0.5 s a step, 14 s left')
    panel.changes(lambda: panel.tick('log scale'))


@needs_browser
def test_dub_studio_in_a_browser(bench):
    "One frame, a dub that is cancelled, a dub that is played"
    panel = Bench(bench, 'studio')
    panel.changes(lambda: panel.press('Preview one frame'))
    panel.says('MuseTalk suggests a bbox_shift')
    panel.press('Dub')
    panel.press('Cancel')
    panel.says('Cancelled; nothing was written.')
    assert not (bench.folder/'said.mp4').exists()
    panel.press('Dub')
    panel.says('said.mp4: 35 frames at 25 a second')
    panel.wait("panel.querySelector('video').videoWidth == 320 && panel.querySelector('video').duration > 1.3")


@needs_browser
def test_avatar_control_in_a_browser(bench):
    panel = Bench(bench, 'live')
    panel.press('Start')
    panel.changes(lambda: panel.says('frames shown'))
    panel.press('Say it')
    panel.says('1.4 s of speech are on their way.')
    panel.press('Interrupt')
    panel.says('Interrupted after')
    panel.press('Stop')
    panel.wait("[...panel.querySelectorAll('button')].some(button => button.innerText.trim() === 'Start' && !button.disabled)")
