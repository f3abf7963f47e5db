"What a server must survive: people who vanish, flood, send nonsense, storm, or were not invited; and what a browser sees of it"
import gc
import hashlib
import http.client
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

for needed in ('fastapi', 'uvicorn', 'websockets', 'aiortc'): pytest.importorskip(needed, reason="needs the extra: pip install 'musetalk[serve]'")

from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from browser import CHROMIUM, Browser, needs_browser, wait_for
from musetalk.avatar import Avatar
from musetalk.batcher import Batcher
from musetalk.bundle import load_bundle
from musetalk.cli import main
from musetalk.core import ConfigError, save_image
from musetalk.live import Studio
from musetalk.session import ServeLimits, unpack_frame
from musetalk.media import VideoSource
from musetalk.picture import read_image
from musetalk.serve import bind, memory_bytes, running, serve
from musetalk.sound import write_audio

PATIENT = 60 # seconds; this machine may be busy


@pytest.fixture(scope='module')
def toy(toy_folder): return load_bundle(toy_folder, device='cpu', dtype='float32')


@pytest.fixture(scope='module')
def picture(tmp_path_factory, portrait):
    path = tmp_path_factory.mktemp('pictures')/'she.png'
    save_image(path, portrait)
    return path


@pytest.fixture(scope='module')
def home(tmp_path_factory, toy, picture):
    folder = tmp_path_factory.mktemp('avatars')
    Avatar.prepare(picture, 'she', toy, folder, progress=False).close()
    return folder


def new_studio(toy, home, speak=None, **limits): return Studio(toy, home, limits=ServeLimits(**{'requests_per_second':1000, 'burst':1000} | limits), check=False, speak=speak)


@pytest.fixture(scope='module')
def served(toy, home):
    "A studio and the address at which it is served"
    studio = new_studio(toy, home)
    with running(studio) as address: yield studio, address


@pytest.fixture
def studio(served):
    yield served[0]
    wait_for(lambda: not served[0].sessions and not served[0].avatars)
    assert not list(Path(served[0].scratch.name).iterdir()), 'uploads are left'


@pytest.fixture
def address(served, studio): return served[1]


def ask(address, method, path, body=None, **headers):
    connection = http.client.HTTPConnection(address.removeprefix('http://'), timeout=PATIENT)
    if isinstance(body, dict): body, headers = json.dumps(body), headers | {'Content-Type':'application/json'}
    connection.request(method, path, body, headers)
    answer = connection.getresponse()
    text = answer.read()
    connection.close()
    try: return answer.status, json.loads(text)
    except ValueError: return answer.status, text


class Line:
    "A client of the WebSocket"
    def __init__(self, address, query='avatar=she', **options):
        self.opened = connect(f"{address.replace('http', 'ws')}/v1/stream?{query}", open_timeout=PATIENT, max_size=None, max_queue=None, close_timeout=2, **options)
        self.line, self.frames = self.opened.__enter__(), []

    def __enter__(self): return self

    def __exit__(self, *problem): self.opened.__exit__(*problem)

    def send(self, message): self.line.send(json.dumps(message) if isinstance(message, dict) else message)

    def until(self, *kinds):
        "The next message of one of these kinds; frames are kept on the way"
        while True:
            message = self.line.recv(PATIENT)
            if isinstance(message, bytes): self.frames.append(unpack_frame(message)); del self.frames[:-500]
            elif (message := json.loads(message))['type'] in kinds: return message

    def farewell(self):
        "The last message and the code with which the line was closed"
        last = None
        try:
            while True:
                message = self.line.recv(PATIENT)
                if isinstance(message, str): last = json.loads(message)
        except ConnectionClosed as closed: return last, closed.rcvd.code if closed.rcvd else None


@pytest.fixture(scope='module')
def words(voice): return (voice*32767).astype('<i2').tobytes()


# What is there

def test_what_is_there(address):
    status, health = ask(address, 'GET', '/health')
    assert status == 200 and health['status'] == 'ok' and health['bundle'] == 'toy' and health['avatars'] >= 1
    status, avatars = ask(address, 'GET', '/v1/avatars')
    assert status == 200 and avatars[0]['name'] == 'she' and avatars[0]['width'] == 160 and not avatars[0]['in_use']
    status, image = ask(address, 'GET', '/v1/avatars/she/picture')
    assert status == 200 and image[:3] == b'\xff\xd8\xff'
    status, described = ask(address, 'GET', '/openapi.json')
    assert {'/v1/avatars', '/v1/sessions', '/v1/sessions/{number}/say', '/metrics'} <= set(described['paths']) and '/v1/stream' in described['info']['description']
    for path, found in (('/', b'<title>musetalk</title>'), ('/static/page.js', b'RTCPeerConnection'), ('/static/page.css', b'.screen'), ('/static/icon.svg', b'<svg')): assert found in ask(address, 'GET', path)[1]


def test_page_asks_nobody_else():
    "No address of another host in the page, but for the name of a file format"
    for file in Path(Batcher.__init__.__code__.co_filename).with_name('static').iterdir():
        assert 'http' not in file.read_text().replace('http://www.w3.org/2000/svg', ''), file.name


def test_metrics(address, words):
    with Line(address) as line:
        line.send(words); line.send(dict(type='end'))
        line.until('spoken')
        rows = dict(row.split() for row in ask(address, 'GET', '/metrics')[1].decode().splitlines() if not row.startswith('#'))
    assert float(rows['musetalk_sessions']) == 1 and float(rows['musetalk_frames_total']) >= 13 and float(rows['musetalk_memory_bytes']) > 0 and float(rows['musetalk_drift_seconds']) == 0


# Speech through the WebSocket

@pytest.mark.parametrize('kind', ['jpeg', 'h264'])
def test_speech_comes_back_with_its_picture(address, voice, words, kind):
    with Line(address, f'avatar=she&format={kind}') as line:
        ready = line.until('ready')
        assert (ready['fps'], ready['width'], ready['height'], ready['sample_rate']) == (25, 160, 160, 16000)
        for start in range(0, len(words), 2222): line.send(words[start:start + 2222])
        line.send(dict(type='end'))
        assert line.until('spoken')['seconds'] == .52
        line.send(dict(type='figures'))
        assert line.until('figures')['drift_ms'] == 0
    spoken = [frame for frame in line.frames if frame['speaking']]
    assert np.abs(np.concatenate([frame['samples'] for frame in spoken])[:8000] - voice).max() < 1e-4 and spoken[-1]['last']
    assert all(abs(frame['time'] - frame['number']/25) < 1e-6 for frame in line.frames) and any(frame['picture'] for frame in line.frames)
    if kind == 'jpeg': assert all(frame['picture'][:2] == b'\xff\xd8' for frame in line.frames if frame['picture'])


@pytest.mark.parametrize('query, said', [('avatar=she&sample_rate=5', 'sample rate of 5'), ('avatar=she&sample_rate=abc', 'is no number'), ('avatar=she&sample_rate=999999999', 'sample rate of'), ('avatar=she&format=gif', 'use jpeg or h264'),
                                         ('avatar=nobody', 'no avatar'), ('', 'cannot be the name'), ('avatar=../../etc', 'cannot be the name'), ('avatar=%00', 'cannot be the name')])
def test_what_makes_no_sense_is_told(address, query, said):
    with Line(address, query) as line:
        last, code = line.farewell()
    assert said in last['message'] and code == 1008


def test_garbage(address, words):
    with Line(address) as line:
        line.until('ready')
        for garbage, said in ((b'odd', 'two bytes'), ('no json', 'no JSON'), ('[]', 'Unknown command'), ('{"type": "dance"}', "'dance'"), ('"interrupt"', 'Unknown'), ({'type':'say', 'text':' '}, 'no text'), ({'type':'say', 'text':'x', 'speed':'fast'}, 'no JSON command')):
            line.send(garbage)
            assert said in line.until('error')['message']
        line.send(words); line.send(dict(type='end'))
        assert line.until('spoken')['seconds'] == .52


def test_nothing_but_garbage(address):
    with Line(address) as line:
        line.until('ready')
        for _ in range(110): line.send(b'odd')
        last, code = line.farewell()
    assert 'good-bye' in last['message'] and code == 1008


def test_message_that_is_too_large(address):
    with Line(address) as line:
        line.until('ready')
        try: line.send(bytes(1_000_002))
        except ConnectionClosed: pass
        assert line.farewell()[1] == 1009


def test_sound_stalls(address, words):
    "Speech that dries up is shown to its end, and more may follow"
    with Line(address) as line:
        for _ in range(2):
            line.send(words)
            assert line.until('spoken')['seconds'] == .52


def test_sound_floods(studio, address, words):
    with Line(address) as line:
        line.until('ready')
        for _ in range(4): line.send(words*58)
        full = line.until('full')
        assert 20 < full['waiting_seconds'] <= 30
        session, = studio.sessions.values()
        assert session.stream.waiting <= 30
        line.send(dict(type='interrupt'))
        line.until('interrupted')
        assert session.stream.waiting == 0


def test_storm_of_interruptions(address, words):
    with Line(address) as line:
        for _ in range(100): line.send(words); line.send(dict(type='interrupt'))
        for _ in range(100): line.until('interrupted')
        line.send(words); line.send(dict(type='end'))
        assert line.until('spoken')['seconds'] == .52


def test_too_many_commands(address):
    with Line(address) as line:
        try:
            for _ in range(600): line.send(dict(type='interrupt'))
        except ConnectionClosed: pass # already shown out
        assert line.until('error')['message'] in ('Too many commands.', 'Nothing of this makes sense; good-bye.')


def test_client_vanishes(studio, address, words):
    "A cable that is cut: no good-bye, six times. Threads and sessions return"
    for _ in range(6):
        line = Line(address)
        line.until('ready')
        line.send(words)
        line.line.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
        line.line.socket.shutdown(socket.SHUT_RDWR)
        line.line.socket.close()
    wait_for(lambda: not studio.sessions and not studio.avatars and not studio.batcher.sessions)
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == 'musetalk-session'])


def test_reader_that_does_not_read(toy, home, words):
    "A client that takes nothing loses pictures, then the connection"
    studio = new_studio(toy, home, late_frames=10)
    with running(studio) as address:
        raw = socket.create_connection(('127.0.0.1', int(address.rpartition(':')[2])))
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.sendall(b'GET /v1/stream?avatar=she&sample_rate=192000 HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: MDEyMzQ1Njc4OWFiY2RlZg==\r\n\r\n')
        wait_for(lambda: studio.sessions)
        wait_for(lambda: not studio.sessions)
        raw.close()


def test_worker_raises(address, words, toy, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError('the network tripped')
    with Line(address) as line:
        line.until('ready')
        with monkeypatch.context() as patch:
            patch.setattr(type(toy), 'generate', broken)
            line.send(words); line.send(dict(type='end'))
            assert 'the network tripped' in line.until('error')['message']
        line.send(words); line.send(dict(type='end'))
        assert line.until('spoken')['seconds'] == .52


def test_worker_dies(studio, address, words, monkeypatch):
    "Without a worker a session cannot go on; the next one gets a new worker"
    def broken(*args): raise KeyError('lost')
    with Line(address) as line:
        line.until('ready')
        with monkeypatch.context() as patch:
            patch.setattr(Batcher, '_next', broken)
            line.send(words)
            last, code = line.farewell()
        assert 'cannot go on' in last['message'] and code == 1001
    with Line(address) as line:
        line.send(words); line.send(dict(type='end'))
        assert line.until('spoken')['seconds'] == .52


# Who may come in

def test_token(toy, home):
    with running(new_studio(toy, home), token='secret') as address:
        for headers in ({}, dict(Authorization='Bearer wrong'), dict(Authorization='secrets'), dict(Authorization='Bearer ')):
            for method, path in (('GET', '/v1/avatars'), ('POST', '/v1/avatars?name=x'), ('DELETE', '/v1/avatars/she'), ('GET', '/metrics'), ('GET', '/openapi.json'), ('POST', '/v1/sessions'), ('GET', '/v1/sessions?token=wrong')):
                assert ask(address, method, path, **headers)[0] == 401, path
        assert ask(address, 'GET', '/health')[0] == ask(address, 'GET', '/')[0] == ask(address, 'GET', '/v1/avatars', Authorization='Bearer secret')[0] == 200
        for query in ('avatar=she', 'avatar=she&token=wrong'):
            with pytest.raises(InvalidStatus) as refused: Line(address, query)
            assert refused.value.response.status_code == 401
        with Line(address, 'avatar=she&token=secret') as line: line.until('ready')
        with Line(address, additional_headers=dict(Authorization='Bearer secret')) as line: line.until('ready')


def test_pages_of_others(address):
    assert ask(address, 'GET', '/v1/avatars', Host='evil.example')[0] == 421
    assert ask(address, 'POST', '/v1/avatars?name=x', b'x', Origin='https://evil.example')[0] == 403
    with pytest.raises(InvalidStatus) as refused: Line(address, origin='https://evil.example')
    assert refused.value.response.status_code == 403


def test_too_often(toy, home):
    with running(new_studio(toy, home, requests_per_second=.01, burst=5)) as address:
        assert [ask(address, 'GET', '/v1/avatars')[0] for _ in range(8)] == [200]*5 + [429]*3


def test_no_room(toy, home):
    studio = new_studio(toy, home, sessions=2)
    with running(studio) as address, Line(address) as one, Line(address) as two:
        one.until('ready'); two.until('ready')
        with Line(address) as three: last, code = three.farewell()
        assert 'room for no more' in last['message'] and code == 1013 and ask(address, 'GET', '/health')[1]['status'] == 'full'
        two.line.close()
        wait_for(lambda: len(studio.sessions) == 1)
        with Line(address) as three: three.until('ready')


def test_machine_is_too_slow(toy, home):
    studio = Studio(toy, home, limits=ServeLimits(requests_per_second=1000))
    studio.batcher.paint_seconds, studio.batcher.hear_seconds = 1., .1
    with running(studio) as address, Line(address) as line:
        last, code = line.farewell()
        assert 'too few for 1 streams' in last['message'] and code == 1013 and studio.counts['refused'] == 1


# Uploads and names

@pytest.mark.parametrize('path', ['/v1/avatars/..%2F..%2Fetc', '/v1/avatars/%2e%2e', '/v1/avatars/..%5C..%5Cetc', '/v1/avatars/.partial-0', '/v1/avatars/she%00', '/static/../serve.py', '/static/%2e%2e/serve.py', '/static/..%2f..%2fsetup.py', '/static//etc/passwd'])
@pytest.mark.parametrize('method', ['GET', 'DELETE'])
def test_paths_lead_nowhere(address, home, path, method):
    status, text = ask(address, method, path + '/picture' if method == 'GET' and '/v1/' in path else path)
    assert status in (400, 404, 405) and (home/'she').exists() and b'import' not in bytes(str(text), 'utf-8')


@pytest.mark.parametrize('name', ['../../evil', '..', '/etc/passwd', 'a/b', 'a\\b', '.hidden', 'x'*65, '', 'a\n'])
def test_names_of_avatars(studio, address, home, name):
    from urllib.parse import quote
    before = sorted(home.parent.rglob('*'))
    assert ask(address, 'POST', f'/v1/avatars?name={quote(name, safe="")}', b'data')[0] == 400
    assert sorted(home.parent.rglob('*')) == before and not studio.jobs


def finished_job(address, job):
    while job['state'] in ('waiting', 'working'): time.sleep(.05); job = ask(address, 'GET', f"/v1/jobs/{job['id']}")[1]
    return job


def test_avatar_from_upload_to_deletion(address, home, picture):
    status, job = ask(address, 'POST', '/v1/avatars?name=new%20one&filename=..%2F..%2Fme.PNG', picture.read_bytes())
    assert status == 202 and finished_job(address, job)['state'] == 'done' and (home/'new one'/'avatar.json').exists()
    with Line(address, 'avatar=new%20one') as line:
        line.until('ready')
        status, told = ask(address, 'DELETE', '/v1/avatars/new%20one')
        assert status == 409 and 'is in use' in told['error']
        shutil.rmtree(home/'new one') # by somebody who does not ask
        line.send(dict(type='interrupt'))
        line.until('interrupted')
    wait_for(lambda: ask(address, 'GET', '/v1/sessions')[1] == [])
    with Line(address, 'avatar=new%20one') as line: assert 'no avatar' in line.farewell()[0]['message']
    assert ask(address, 'DELETE', '/v1/avatars/new%20one')[0] == 404


@pytest.mark.parametrize('data', [b'this is no video', b'\x89PNG\r\n\x1a\n' + bytes(64), b'RIFF\xff\xff\xff\xffAVI ' + bytes(512)], ids=['text', 'png', 'avi'])
def test_upload_that_is_no_video(studio, address, home, data):
    job = finished_job(address, ask(address, 'POST', '/v1/avatars?name=junk&filename=x.mp4', data)[1])
    assert job['state'] == 'failed' and studio.scratch.name not in job['error'] and not (home/'junk').exists() and not list(home.glob('.partial-*'))


def raw_answer(address, request, body=()):
    "The first line of the answer to a request that is written by hand"
    with socket.create_connection(('127.0.0.1', int(address.rpartition(':')[2])), timeout=PATIENT) as line:
        line.sendall(request)
        try:
            for piece in body: line.sendall(piece)
        except OSError: pass # the server has hung up
        return line.recv(4096).split(b'\r\n')[0].decode()


@pytest.mark.parametrize('path', ['/v1/avatars?name=big', '/v1/sessions/none/sound'])
def test_two_gigabytes_are_refused_before_they_are_sent(studio, address, path):
    answer = raw_answer(address, f'POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2000000001\r\n\r\n'.encode())
    assert ' 413 ' in answer and not list(Path(studio.scratch.name).iterdir())


def test_long_requests_elsewhere(address):
    assert ' 413 ' in raw_answer(address, b'POST /v1/sessions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000001\r\n\r\n')


def test_upload_without_a_length_is_counted(toy, home):
    studio = new_studio(toy, home, upload_bytes=300_000)
    with running(studio) as address:
        chunk = b'10000\r\n' + bytes(65536) + b'\r\n'
        assert ' 413 ' in raw_answer(address, b'POST /v1/avatars?name=big HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n', [chunk]*5)
        assert not list(Path(studio.scratch.name).iterdir())


def test_upload_that_is_cut_off(studio, address):
    with socket.create_connection(('127.0.0.1', int(address.rpartition(':')[2]))) as line:
        line.sendall(b'POST /v1/avatars?name=half HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n' + bytes(1000))
        wait_for(lambda: list(Path(studio.scratch.name).iterdir()))
    wait_for(lambda: not list(Path(studio.scratch.name).iterdir()))
    assert 'half' not in studio.names()


# Things to say

def test_sound_file(studio, address, voice, tmp_path):
    write_audio(tmp_path/'words.wav', np.concatenate([voice, voice]), 16000)
    with Line(address) as line:
        session = line.until('ready')['session']
        assert ask(address, 'POST', f'/v1/sessions/{session}/sound?filename=words.wav', (tmp_path/'words.wav').read_bytes())[0] == 202
        assert line.until('spoken')['seconds'] == 1
        assert ask(address, 'POST', f'/v1/sessions/{session}/sound', b'noise')[0] == 202
        assert 'The upload' in line.until('error')['message']
        assert ask(address, 'GET', f'/v1/sessions/{session}')[1]['avatar'] == 'she'
        assert ask(address, 'DELETE', f'/v1/sessions/{session}')[0] == 204
        assert line.farewell()[1] == 1001


def test_interruption_stops_a_file_and_what_waits_behind_it(address, voice, tmp_path, studio):
    write_audio(tmp_path/'long.wav', np.tile(voice, 140), 16000)
    data = (tmp_path/'long.wav').read_bytes()
    with Line(address) as line:
        number = line.until('ready')['session']
        for _ in range(3): assert ask(address, 'POST', f'/v1/sessions/{number}/sound', data)[0] == 202
        session = studio.session(number)
        wait_for(lambda: session.stream.waiting > 5)
        assert ask(address, 'POST', f'/v1/sessions/{number}/interrupt')[0] == 200
        wait_for(lambda: session.jobs.empty() and session.stream.waiting == 0)
        time.sleep(.2)
        assert session.stream.waiting == 0 and not list(Path(studio.scratch.name).iterdir())


def test_text_without_a_voice(address, monkeypatch):
    monkeypatch.setattr('musetalk.speak.find_spec', lambda name: None)
    with Line(address) as line:
        session = line.until('ready')['session']
        status, told = ask(address, 'POST', f'/v1/sessions/{session}/say', dict(text='Hello'))
        assert status == 501 and 'musetalk[tts]' in told['error']
        line.send(dict(type='say', text='Hello'))
        assert 'musetalk[tts]' in line.until('error')['message']


def test_text(toy, home, voice):
    said = []
    def speak(text, path, speed): said.append((text, speed)); write_audio(path, voice, 16000)
    studio = new_studio(toy, home, speak, text_characters=10)
    with running(studio) as address, Line(address) as line:
        session = line.until('ready')['session']
        assert ask(address, 'POST', f'/v1/sessions/{session}/say', dict(text='Hello', speed=1.5))[0] == 202
        assert line.until('spoken')['seconds'] == .52 and said == [('Hello', 1.5)]
        for body, status in ((dict(text='x'*11), 413), (dict(text=' '), 400), (dict(text='x', speed=9), 400), (dict(), 422), (dict(text=None), 422)): assert ask(address, 'POST', f'/v1/sessions/{session}/say', body)[0] == status
        assert not list(Path(studio.scratch.name).iterdir())


# Life and death of the server

def test_restart_in_mid_session(toy, home, words):
    "The server goes, the line ends with a code that says so; it comes back at the same place, and the client with it"
    first = new_studio(toy, home)
    with running(first) as address:
        line = Line(address)
        line.until('ready')
        line.send(words)
    last, code = line.farewell()
    assert code in (1001, 1006, 1012, None) and first.closed and not first.sessions and not Path(first.scratch.name).exists()
    with running(new_studio(toy, home), port=int(address.rpartition(':')[2])) as again, Line(again) as line:
        line.send(words); line.send(dict(type='end'))
        assert line.until('spoken')['seconds'] == .52


def test_memory_returns(toy, home, words):
    "After twenty sessions: no session, no thread, and no more memory than after five; and the server's own threads end with it"
    before, made, resident = set(threading.enumerate()), weakref.WeakSet(), []
    studio = new_studio(toy, home)
    with running(studio) as address:
        for number in range(20):
            with Line(address) as line:
                line.until('ready')
                made.update(studio.sessions.values())
                if number % 4 == 0: line.send(words)
            del line
            wait_for(lambda: not studio.sessions and not studio.avatars, pause=.01)
            if number in (4, 19): gc.collect(); resident.append(memory_bytes()/1e6)
        assert studio.counts['sessions'] == 20 and not studio.avatars and not studio.batcher.sessions
    wait_for(lambda: not [thread for thread in set(threading.enumerate()) - before if thread.name.startswith('musetalk') and 'serve' not in thread.name])
    gc.collect()
    assert len(made) <= 1 and not any(thread.is_alive() for session in made for thread in session.threads)
    assert resident[1] - resident[0] < 20, resident # megabytes


def test_taken_port(served, toy, home):
    port = int(served[1].rpartition(':')[2])
    with pytest.raises(ConfigError, match='Cannot listen on 127.0.0.1'): bind('127.0.0.1', port)
    with pytest.raises(ConfigError, match='choose another'): bind('no such host.invalid', 0)


def test_token_is_made_beyond_loopback(toy, home, monkeypatch):
    "Listening to everybody without a token is not possible by accident"
    told = []
    class Nothing:
        def run(self, sockets): told.append(sockets[0].getsockname())
    monkeypatch.setattr('musetalk.serve.make_server', lambda app, limits: Nothing())
    studio = new_studio(toy, home)
    serve(studio, '127.0.0.1', 0, tell=told.append)
    serve(studio, '0.0.0.0', 0, tell=told.append)
    serve(studio, '0.0.0.0', 0, 'mine', tell=told.append)
    assert '?token=' not in told[0] and len(told[2].partition('?token=')[2]) == 32 and told[4].endswith('?token=mine')
    studio.scratch.cleanup(); studio.workers.shutdown()


# Calls

def offer_of_a_browser(directory='recvonly'):
    import asyncio
    from aiortc import RTCPeerConnection
    async def made():
        caller = RTCPeerConnection()
        caller.createDataChannel('control')
        caller.addTransceiver('video', 'recvonly'); caller.addTransceiver('audio', 'recvonly')
        await caller.setLocalDescription(await caller.createOffer())
        sdp = caller.localDescription.sdp
        await caller.close()
        return sdp
    return asyncio.run(made())


def test_call_that_nobody_takes(toy, home):
    "A browser that calls and is never heard of again"
    studio = new_studio(toy, home, connect_seconds=1)
    with running(studio) as address:
        status, answer = ask(address, 'POST', '/v1/sessions', dict(avatar='she', sdp=offer_of_a_browser()))
        assert status == 201 and answer['type'] == 'answer' and 'm=video' in answer['sdp']
        assert len(ask(address, 'GET', '/v1/sessions')[1]) == 1
        wait_for(lambda: not studio.sessions and not studio.peers and not studio.avatars)


def test_offers_that_are_none(studio, address):
    for body, status in ((dict(avatar='she', sdp='x'), 400), (dict(avatar='she', sdp='m=audio 9\nm=video 9\n'), 400), (dict(avatar='nobody', sdp='m=audio 9\nm=video 9\n'), 404), (dict(avatar='../x', sdp='m=audio 9\nm=video 9\n'), 400), (dict(sdp='x'), 422), (dict(avatar=1, sdp=[]), 422)):
        assert ask(address, 'POST', '/v1/sessions', body)[0] == status
    assert not studio.sessions and not studio.peers


# From the command line

def test_avatar_commands(toy_folder, picture, voice, tmp_path, capsys):
    "Prepare, list, speak, the original's avatar file, delete"
    write_audio(tmp_path/'words.wav', voice, 16000)
    (tmp_path/'realtime.yaml').write_text(f'she_2:\n  preparation: True\n  video_path: "{picture}"\n  bbox_shift: 2\n  audio_clips:\n    audio_0: "{tmp_path}/words.wav"\n')
    def run(*words):
        status = main(['avatar', *words, '--avatars', str(tmp_path/'avatars')])
        return status, capsys.readouterr()
    common = ['--bundle', str(toy_folder), '--device', 'cpu', '--no-progress']
    status, told = run('prepare', 'anna', '--video', str(picture), *common)
    assert status == 0 and 'anna: 160x160, 1 frames' in told.out
    status, told = run('speak', 'anna', '--audio', str(tmp_path/'words.wav'), '--out', str(tmp_path/'out.mp4'), *common, '--json')
    assert status == 0 and json.loads(told.out)[0]['frames'] == 13 and VideoSource(tmp_path/'out.mp4').frame_count == 13
    status, told = run('--config', str(tmp_path/'realtime.yaml'), '--result-dir', str(tmp_path/'results'), *common)
    assert status == 0 and VideoSource(tmp_path/'results'/'she_2'/'audio_0.mp4').frame_count == 13
    assert [row['name'] for row in json.loads(run('list', '--json')[1].out)] == ['anna', 'she_2']
    assert run('delete', 'anna')[0] == 0 and run('delete', 'anna')[0] == 2


def test_serve_command(toy_folder, picture, tmp_path, monkeypatch, capsys):
    "The first start prepares somebody to look at; the token may come from the environment"
    started = []
    monkeypatch.setattr('musetalk.serve.serve', lambda studio, host, port, token, tell: started.append((studio.names(), host, port, token, studio.limits.sessions)) or studio.scratch.cleanup())
    monkeypatch.setattr('musetalk.bench.demo_portrait', lambda size: read_image(picture))
    monkeypatch.setenv('MUSETALK_TOKEN', 'mine')
    words = ['serve', '--bundle', str(toy_folder), '--device', 'cpu', '--avatars', str(tmp_path), '--port', '0', '--sessions', '3']
    assert main(words) == 0 and main([*words, '--video', str(picture), '--name', 'anna', '--token', 'other']) == 0
    assert started == [(['Astronaut'], '127.0.0.1', 0, 'mine', 3), (['Astronaut', 'anna'], '127.0.0.1', 0, 'other', 3)]
    monkeypatch.setattr('musetalk.serve.find_spec', lambda name: None)
    assert main(words) == 2 and "pip install 'musetalk[serve]'" in capsys.readouterr().err


# Broadcasts

LISTENER = """
import av, sys
with av.open(sys.argv[1], 'r', format='flv', options={'listen':'1'}) as container:
    pictures, sounds = [], 0
    for frame in container.decode():
        if isinstance(frame, av.VideoFrame): pictures.append(float(frame.pts*frame.time_base))
        else: sounds += 1
        if len(pictures) > 20 and sounds > 20: break
print(len(pictures), sounds, round(min(pictures), 2), frame is not None)
"""


def free_port():
    with bind('127.0.0.1', 0) as taken: return taken.getsockname()[1]


def test_broadcast(studio, address):
    target = f'rtmp://127.0.0.1:{free_port()}/live/key'
    listener = subprocess.Popen([sys.executable, '-c', LISTENER, target], stdout=subprocess.PIPE, text=True)
    try:
        status, session = ask(address, 'POST', '/v1/broadcasts', dict(avatar='she', address=target))
        assert status == 201
        pictures, sounds, first, _ = listener.communicate(timeout=PATIENT)[0].split()
        assert int(pictures) > 20 and int(sounds) > 20 and float(first) < .1
    finally:
        listener.kill()
        assert ask(address, 'DELETE', f"/v1/sessions/{session['id']}")[0] in (204, 404)


def test_broadcast_to_nowhere(studio, address, monkeypatch):
    for wrong in ('/tmp/file.flv', 'file:x', 'http://127.0.0.1/x', ''): assert ask(address, 'POST', '/v1/broadcasts', dict(avatar='she', address=wrong))[0] == 400
    monkeypatch.setitem(sys.modules, 'pyvirtualcam', None)
    status, answer = ask(address, 'POST', '/v1/broadcasts', dict(avatar='she', address='camera:'))
    assert status == 400 and 'musetalk[camera]' in str(answer)
    assert not studio.sessions
    status, session = ask(address, 'POST', '/v1/broadcasts', dict(avatar='she', address=f'rtmp://127.0.0.1:{free_port()}/live/key'))
    wait_for(lambda: studio.peers[session['id']].tries)
    assert ask(address, 'GET', '/health')[0] == 200 and ask(address, 'DELETE', f"/v1/sessions/{session['id']}")[0] == 204


# A browser

STATS = """(async () => { for (const row of (await call.peer.getStats()).values()) if (row.type === 'inbound-rtp' && row.kind === 'video')
  return {frames: row.framesDecoded, freezes: row.freezeCount, time: row.timestamp, width: row.frameWidth} })()"""


def connected(browser, address):
    "The page, in a call"
    browser.open(address, "document.querySelector('.avatar[aria-checked=true]') && !document.getElementById('start').disabled")
    browser.click('#start')
    browser.wait("document.body.dataset.state === 'live' && document.getElementById('video').videoWidth === 160")


@needs_browser
def test_browser(toy, home, voice, tmp_path):
    "The page calls, plays, is interrupted, hears a microphone; it asks nobody else, and has nothing to complain of"
    write_audio(tmp_path/'words.wav', np.tile(voice, 20), 16000)
    studio = new_studio(toy, home)
    with running(studio, token='secret') as address, Browser() as browser:
        connected(browser, f'{address}/?token=secret')
        assert browser.run('location.search') == '' # the token does not stay in the address
        session, = studio.sessions.values()
        first = browser.run(STATS)
        browser.upload('#sound', tmp_path/'words.wav')
        wait_for(lambda: session.stream.waiting > 2)
        wait_for(lambda: browser.run(STATS)['frames'] - first['frames'] > 30)
        browser.click('#interrupt')
        browser.wait('call.interrupted === 1')
        assert session.stream.waiting == 0
        browser.click('#microphone')
        wait_for(lambda: session.microphone and session.response is not None) # it beeps
        browser.click('#microphone')
        wait_for(lambda: not session.microphone)
        assert not browser.errors and not browser.outgoing()
    wait_for(lambda: not studio.sessions and not studio.peers) # the `with` has ended the browser first


@needs_browser
def test_browser_is_told_what_is_wrong(toy, home):
    "A wrong token, no room, no microphone: each is said in words, and can be put right"
    studio = new_studio(toy, home, sessions=1)
    with running(studio, token='secret') as address, Browser(flags='--deny-permission-prompts') as browser:
        browser.open(f'{address}/?token=wrong', "document.getElementById('gate').open")
        browser.wait("document.getElementById('gate-message').textContent.includes('not the right one')")
        browser.type('#token', 'secret')
        browser.wait("!document.getElementById('gate').open && !document.getElementById('start').disabled")
        with Line(address, 'avatar=she&token=secret') as line:
            line.until('ready')
            browser.click('#start')
            browser.wait("document.getElementById('message').textContent.includes('room for no more')")
        browser.wait("document.body.dataset.state === 'live'") # tries again by itself
        browser.run("navigator.mediaDevices.getUserMedia = () => Promise.reject(new DOMException('no', 'NotAllowedError'))")
        browser.click('#microphone')
        browser.wait("document.getElementById('message').textContent.includes('microphone')")
        assert browser.run("document.getElementById('microphone').getAttribute('aria-pressed')") == 'false'


@needs_browser
def test_browser_comes_back(toy, home):
    "The server goes and comes back at the same place: the page says so meanwhile, calls again by itself, and is let go of when its browser is killed"
    with Browser() as browser:
        with running(new_studio(toy, home)) as address: connected(browser, address)
        browser.wait("document.body.dataset.state === 'waiting' && document.getElementById('message').textContent.includes('Trying again')")
        again = new_studio(toy, home, silent_seconds=1)
        with running(again, port=int(address.rpartition(':')[2])):
            browser.wait("document.body.dataset.state === 'live' && call.connects === 2 && document.getElementById('video').currentTime > 0 && document.getElementById('message').hidden")
            assert len(again.sessions) == 1
            browser.process.kill() # no good-bye
            wait_for(lambda: not again.sessions and not again.peers and not again.avatars)


@needs_browser
@pytest.mark.skipif(not os.environ.get('RUN_SLOW'), reason='looks for a face in every frame that was received; set RUN_SLOW=1')
def test_measured_in_a_browser(toy, home, tmp_path):
    "The recording that the browser makes of what it received has a face and the sound that was said"
    from musetalk.browser import STATS, Chromium, call_page, recorded, say_file, with_pauses
    from musetalk.bench import demo_speech
    from musetalk.sound import load_audio
    speech = with_pauses(load_audio(demo_speech())[:20800*2])
    write_audio(tmp_path/'words.wav', speech, 16000)
    studio = new_studio(toy, home)
    with running(studio) as address, Chromium() as browser:
        live = studio.session(call_page(browser, address))
        begin = lambda: say_file(address, live.id, tmp_path/'words.wav')
        lag = recorded(browser, live, begin, tmp_path/'received.webm')
        assert browser.run(STATS)['width'] == 160
    heard = load_audio(tmp_path/'received.webm')
    assert -400 <= lag['lag_ms'] <= 400 and np.abs(heard).max() > .1 and len(heard) > 4*16000


# A server that is killed

SUPERVISOR = """
import os, sys
import musetalk.avatar, musetalk.serve, musetalk.webrtc
from musetalk.cli import main
while True:
    child = os.fork()
    if not child: os._exit(main(sys.argv[1:]))
    print(child, flush=True)
    if os.waitpid(child, 0)[1] != 9: break # it ended by itself
"""


def folder_hash(folder): return {str(path.relative_to(folder)):hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob('*')) if path.is_file()}


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_killed_and_started_again(toy_folder, home, picture, words, tmp_path):
    """`kill -9` in the midst of speech, of an upload and of a preparation, with a supervisor that starts the server again: lines end, the page says so and
    comes back by itself, a new session works, nothing half is left, the avatars are as they were; `kill` ends it cleanly"""
    avatars, scratch, port = tmp_path/'avatars', tmp_path/'scratch', free_port()
    shutil.copytree(home/'she', avatars/'she')
    scratch.mkdir()
    before, address = folder_hash(avatars/'she'), f'http://127.0.0.1:{port}'
    def up():
        try: return ask(address, 'GET', '/health')[0] == 200
        except OSError: return False
    command = [sys.executable, '-c', SUPERVISOR, 'serve', '--bundle', str(toy_folder), '--device', 'cpu', '--avatars', str(avatars), '--port', str(port), '--no-check']
    with open(tmp_path/'log', 'w') as log, ExitStack() as stack:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=os.environ | dict(TMPDIR=str(scratch)))
        stack.callback(server.wait, 30)
        stack.callback(server.kill)
        def next_child():
            while not (line := server.stdout.readline().strip()).isdigit(): assert line, (tmp_path/'log').read_text()
            return int(line)
        child = next_child()
        stack.callback(lambda: Path(f'/proc/{child}').exists() and os.kill(child, signal.SIGKILL))
        wait_for(up)
        browser = stack.enter_context(Browser()) if CHROMIUM and os.environ.get('RUN_SLOW') else None # a call costs ten seconds of a processor
        if browser: connected(browser, address)
        with Line(address) as line, socket.create_connection(('127.0.0.1', port)) as half:
            line.until('ready')
            line.send(words)
            half.sendall(b'POST /v1/avatars?name=half HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n' + bytes(1000))
            wait_for(lambda: list(scratch.glob('musetalk-serve-*/*')))
            assert ask(address, 'POST', '/v1/avatars?name=other', picture.read_bytes())[0] == 202
            os.kill(child, signal.SIGKILL)
            assert line.farewell() == (None, None) or line.frames
        left, = scratch.glob('musetalk-serve-*.lock')
        assert left.with_suffix('').exists() # what nobody could remove
        if browser: browser.wait("document.body.dataset.state === 'waiting' && !document.getElementById('message').hidden")
        child = next_child()
        wait_for(up)
        with Line(address) as line:
            line.send(words); line.send(dict(type='end'))
            assert line.until('spoken')['seconds'] == .52
        if browser: browser.wait("document.body.dataset.state === 'live' && call.connects === 2")
        job = finished_job(address, ask(address, 'POST', '/v1/avatars?name=other', picture.read_bytes())[1])
        assert job['state'] == 'done' and sorted(path.name for path in avatars.iterdir()) == ['other', 'she'] and folder_hash(avatars/'she') == before
        assert len(list(scratch.glob('musetalk-serve-*.lock'))) == 1 and not left.exists() and not left.with_suffix('').exists()
        os.kill(child, signal.SIGTERM)
        assert server.wait(PATIENT) == 0 and not list(scratch.glob('musetalk-serve-*'))
