"What guests of the app do to it: use it, bring the wrong things, two at once, walk away in the middle; and what it asks of the rest of the world (nothing)"
import http.client
import json
import os
import time
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip('gradio', reason="needs the extra: pip install 'musetalk[app]'")

from browser import Browser, needs_browser, wait_for

from musetalk.app import Workshop
from musetalk.app_intake import AppLimits
from musetalk.app_page import APP_POLICY, run_app, running_app
from musetalk.bundle import Bundle
from musetalk.core import ConfigError, save_image
from musetalk.media import VideoSource
from musetalk.sound import write_audio

LIMITS = AppLimits(upload_bytes=400_000, speech_seconds=10)


@pytest.fixture(scope='module')
def things(tmp_path_factory, portrait, voice):
    "What guests bring"
    folder = tmp_path_factory.mktemp('things')
    save_image(folder/'she.png', portrait)
    save_image(folder/'wall.png', np.full((64, 64, 3), 90, np.uint8))
    write_audio(folder/'words.wav', voice)
    write_audio(folder/'silent.wav', np.zeros(8000))
    write_audio(folder/'speech.wav', np.tile(voice, 12))
    write_audio(folder/'sermon.wav', np.tile(voice, 21))
    write_audio(folder/'huge.wav', np.zeros(300_000))
    (folder/'letter.png').write_text('Dear friend')
    (folder/'letter.mp4').write_text('Dear friend')
    return folder


@pytest.fixture(scope='module')
def served(toy_folder):
    "A workshop and the address of its page"
    workshop = Workshop(toy_folder, 'cpu', LIMITS)
    with running_app(workshop) as address: yield workshop, address
    assert not workshop.folder.exists(), 'files are left'


@pytest.fixture(scope='module')
def browser():
    with Browser(1280, 860) as browser: yield browser


@pytest.fixture
def page(served, browser):
    "The page, fresh; afterwards nothing of this guest may be left"
    workshop, address = served
    browser.errors.clear()
    browser.open(address, "document.querySelector('#generate') && window.gradio_config")
    yield browser
    assert not browser.outgoing() and not browser.errors
    browser.do('Page.navigate', url='about:blank')
    wait_for(lambda: not workshop.sessions.known and not workshop.line.tickets and {path.name for path in workshop.folder.iterdir()} <= {'demo', 'vibe_edit_history'}, what='an empty workshop')


def said(page, field): return page.run(f"document.querySelector('#{field} .prose').innerText.trim()")


def says(page, field, words): page.wait(f"document.querySelector('#{field} .prose').innerText.includes({json.dumps(words)})")


def press(page, button): page.run(f"document.querySelector('#{button}').click()") # a passing notice may lie over it


def choose(page, radio, value, appears):
    "Press a choice until what it shows is there: a page that is just being built hears nothing"
    def chosen():
        if page.run(f"!!document.querySelector('#{appears}')"): return True
        page.run(f"document.querySelector('#{radio} input[value={value}]').click()")
        time.sleep(1)
    wait_for(chosen, what=appears)


def bring(page, things, face=None, sound=None):
    "Choose files, and wait until they are looked at"
    if face:
        kind = 'video' if face.endswith('.mp4') else 'picture'
        choose(page, 'face-kind', kind.title(), kind)
        if page.run(f"!!document.querySelector('#{kind} button[aria-label=\"Clear\"], #{kind} button[aria-label=\"Remove Image\"]')"): page.click(f'#{kind} button[aria-label="Clear"], #{kind} button[aria-label="Remove Image"]')
        page.upload(f'#{kind} input[type=file]', things/face)
        page.wait("document.querySelector('#face-fact .prose').innerText.trim()")
    if sound:
        page.upload('#sound input[type=file]', things/sound)
        page.wait("document.querySelector('#voice-fact .prose').innerText.trim()")


@needs_browser
def test_from_picture_to_video(page, served, things):
    "The whole way: files, one frame, the dub, the comparison, the report"
    workshop, address = served
    bring(page, things, 'she.png', 'words.wav')
    assert said(page, 'face-fact') == '160×160 picture' and said(page, 'voice-fact') == '0.5 s of sound'
    press(page, 'test')
    says(page, 'found', 'pixels from')
    page.wait("[...document.querySelectorAll('#slider img, #panels img')].length >= 3 && [...document.querySelectorAll('#slider img, #panels img')].every(image => image.naturalWidth > 100)")
    press(page, 'generate')
    says(page, 'report', '12, 25 a second; a face in every one')
    page.wait("document.querySelector('#dubbed video') && document.querySelector('#dubbed video').duration > .4 && document.querySelector('#dubbed video').videoWidth === 160")
    page.run("[...document.querySelectorAll('[role=tab]')].find(tab => tab.innerText.trim() === 'Compare').click()")
    page.wait("document.querySelector('#both video') && document.querySelector('#both video').videoWidth === 320")
    says(page, 'status', 'Done in')
    page.wait("document.querySelector('#download') && document.querySelector('#download-report')")
    report = page.run("(async () => (await fetch(document.querySelector('#dubbed video').src.replace(/[.]mp4$/, '.json'))).json())()")
    assert report['frames'] == 12 and report['bundle']['name'] == 'toy' and str(workshop.folder) not in json.dumps(report)
    session, = workshop.sessions.known.values()
    assert VideoSource(session.job.result.video).frame_count == 12 and not page.run("document.querySelector('#generate').disabled") and not page.run("!!document.querySelector('#cancel')")


@needs_browser
def test_settings_that_count(page, toy):
    "Only the controls that have an effect are there, those that are not installed say how to get them"
    page.run("[...document.querySelectorAll('[role=tab]')].find(tab => tab.innerText.trim() === 'Model and look').click()")
    page.wait("document.querySelector('#feather')")
    there = page.run("['left_cheek_width', 'right_cheek_width', 'feather', 'loop', 'crf', 'bbox_shift', 'match', 'sharpen', 'parsing_mode'].filter(name => document.getElementById(name))")
    assert there == ['left_cheek_width', 'right_cheek_width', 'feather', 'loop', 'crf'] and 'musetalk download v1.5' in page.text()
    page.run("[...document.querySelectorAll('[role=tab]')].find(tab => tab.innerText.trim() === 'Face and voice').click()")
    choose(page, 'voice-kind', 'Text', 'text')
    from musetalk.app import voice_missing
    assert page.run("document.querySelector('#text textarea').disabled") == bool(voice_missing()) and voice_missing() in page.text()


@needs_browser
def test_wrong_things(page, served, things):
    "One sentence for each, in its place; the page goes on working"
    bring(page, things, 'letter.png')
    assert said(page, 'face-fact') == 'letter.png is not a picture; save it as PNG or JPEG.'
    bring(page, things, 'letter.mp4')
    says(page, 'face-fact', 'letter.mp4 is not a video')
    press(page, 'generate')
    says(page, 'status', 'letter.mp4 is not a video')
    bring(page, things, 'wall.png', 'silent.wav')
    says(page, 'voice-fact', 'silent: the mouth will have nothing to say')
    press(page, 'generate')
    says(page, 'status', 'No face was found in wall.png')
    press(page, 'test')
    says(page, 'status', 'shows no face')
    assert page.run("!document.querySelector('#generate').disabled && !document.querySelector('#cancel')") and not list(Path(served[0].folder).rglob('result-*'))


@needs_browser
@pytest.mark.parametrize('sound, words', [('sermon.wav', 'sermon.wav is longer than 10 seconds'), ('huge.wav', 'maximum allowed size'), ('letter.png', 'Invalid file type')])
def test_sounds_that_are_not_taken(page, things, sound, words):
    page.upload('#sound input[type=file]', things/sound)
    page.wait(f"document.body.innerText.includes({json.dumps(words)})")
    page.errors.clear() # the browser itself complains about an answer 413
    press(page, 'generate')
    says(page, 'status', 'There is no face yet')


@needs_browser
def test_cancelled_in_the_middle(page, served, things, monkeypatch):
    slow(monkeypatch)
    bring(page, things, 'she.png', 'speech.wav')
    press(page, 'generate')
    says(page, 'status', 'Frame 16 of 150')
    press(page, 'cancel')
    says(page, 'status', 'Stopped; nothing of it was kept.')
    page.wait("!document.querySelector('#generate').disabled && !document.querySelector('#cancel')")
    session, = served[0].sessions.known.values()
    assert session.job.finished and not list(session.folder.iterdir()) and not served[0].line.tickets


def slow(monkeypatch, seconds=.4):
    "Painting takes its time"
    generate = Bundle.generate
    def slowly(*given): time.sleep(seconds); return generate(*given)
    monkeypatch.setattr(Bundle, 'generate', slowly)


@needs_browser
def test_two_guests(page, served, things, monkeypatch):
    "The same files at the same time; one waits, then closes the page in the middle of its turn"
    workshop, address = served
    slow(monkeypatch)
    bring(page, things, 'she.png', 'speech.wav')
    press(page, 'generate')
    says(page, 'status', 'Frame')
    with Browser(390, 800) as other:
        other.open(address, "document.querySelector('#generate') && window.gradio_config")
        bring(other, things, 'she.png', 'words.wav')
        press(other, 'generate')
        says(other, 'status', 'Waiting for 1 other dub')
        first, second = workshop.sessions.known.values()
        assert first.folder != second.folder and set(first.held.values()) - {None} != set(second.held.values()) - {None}
        press(page, 'cancel')
        says(other, 'status', 'Done in')
        assert '12, 25 a second' in said(other, 'report') and said(page, 'status').startswith('Stopped')
        assert other.run('document.documentElement.scrollWidth') <= 390 and not other.errors
        press(other, 'generate')
        says(other, 'status', 'Frame')
    wait_for(lambda: len(workshop.sessions.known) == 1 and second.job.finished and not second.folder.exists(), what='the other guest gone')
    assert [path for path in first.held.values() if path and Path(path).exists()] # what both had is still there for the first


@needs_browser
def test_server_stops(toy_folder, things, browser, monkeypatch):
    "In the middle of a dub: the page says so, and no file is left"
    slow(monkeypatch)
    workshop = Workshop(toy_folder, 'cpu', LIMITS)
    with running_app(workshop) as address:
        browser.open(address, "document.querySelector('#generate') && window.gradio_config")
        bring(browser, things, 'she.png', 'speech.wav')
        press(browser, 'generate')
        says(browser, 'status', 'Frame')
    assert not workshop.folder.exists() and not workshop.line.tickets
    browser.wait("document.querySelector('#mt-gone')?.innerText.includes('musetalk was stopped')")
    browser.do('Page.navigate', url='about:blank')


# Without a browser

def ask(address, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(address.removeprefix('http://'), timeout=60)
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read().decode(errors='replace')
    connection.close()
    return answer.status, text, answer.headers


def test_strangers(served):
    address = served[1]
    status, text, headers = ask(address, 'GET', '/')
    assert status == 200 and headers['content-security-policy'] == APP_POLICY and 'fonts.googleapis' not in text + ask(address, 'GET', '/theme.css')[1]
    assert ask(address, 'GET', '/', Host='evil.example')[0] == 421 and ask(address, 'POST', '/gradio_api/upload', b'x', Origin='http://evil.example')[0] == 403
    config = json.loads(ask(address, 'GET', '/config')[1])
    assert not config['analytics_enabled'] and config['title'] == 'musetalk' and all(event['api_visibility'] == 'private' for event in config['dependencies'] if event['targets'] and event['targets'][0][1] != 'unload')


def test_files_of_this_machine(served, things):
    "Neither by address, nor as an 'upload' that never was one"
    address, secret = served[1], things/'she.png'
    assert ask(address, 'GET', f'/gradio_api/file={secret}')[0] == 403
    config = json.loads(ask(address, 'GET', '/config')[1])
    ids = {component['props'].get('elem_id'): component['id'] for component in config['components']}
    look = next(event for event in config['dependencies'] if ids['face-kind'] in event['inputs'] and len(event['inputs']) == 3)
    stolen = dict(path=str(secret), meta={'_type':'gradio.FileData'}, orig_name='she.png')
    body = json.dumps(dict(data=['Picture', None, stolen], fn_index=look['id'], session_hash='thief'))
    status, text, _ = ask(address, 'POST', '/gradio_api/queue/join', body, **{'Content-Type':'application/json'})
    event = json.loads(text).get('event_id')
    connection = http.client.HTTPConnection(address.removeprefix('http://'), timeout=60)
    connection.request('GET', '/gradio_api/queue/data?session_hash=thief')
    told = b''
    stream = connection.getresponse()
    while b'process_completed' not in told and (line := stream.readline()): told += line
    connection.close()
    assert event and b'160\\u00d7160' not in told and '160×160'.encode() not in told and b'"success":false' in told.replace(b' ', b'')


def test_run_app(toy_folder, monkeypatch):
    "A token beyond loopback; the folder goes with the program, also after an error"
    told, folders, before = [], [], os.environ.get('GRADIO_TEMP_DIR')
    class Nothing:
        def __init__(self, door, workshop): self.door, self.workshop = door, workshop
        def run(self, sockets):
            assert os.environ['GRADIO_TEMP_DIR'] == str(self.workshop.folder) and self.workshop.folder.is_dir()
            folders.append(self.workshop.folder); told.append(self.door.token)
            wait_for(lambda: self.workshop._loaded) # the model is loaded before anybody asks
    monkeypatch.setattr('musetalk.app_page._server', Nothing)
    for host, token in (('127.0.0.1', None), ('0.0.0.0', None), ('0.0.0.0', 'mine')): run_app(str(toy_folder), host, 0, token, 'cpu', tell=told.append)
    assert told[0].startswith('http://localhost:') and told[1] is None and told[3] in told[2] and len(told[3]) == 32 and told[4].endswith('?token=mine') and told[5] == 'mine'
    assert not any(folder.exists() for folder in folders) and os.environ.get('GRADIO_TEMP_DIR') == before
    monkeypatch.setattr('musetalk.app_page.find_spec', lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'musetalk\[app\]'"): run_app(str(toy_folder), port=0)
