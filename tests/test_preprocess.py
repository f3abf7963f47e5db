"Footage as people really have it: silent, faceless, too short, of varying rate, broken, or none at all"
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from musetalk.cli import main
from musetalk.core import read_json
from musetalk.dataset import FaceClips
from musetalk.preprocess import preprocess

ROOT = Path(__file__).resolve().parent.parent


def film(path, pictures, times=None):
    "A video; `times` in 1/1000 s, where frames do not follow each other evenly"
    with av.open(str(path), 'w') as container:
        track = container.add_stream('libx264', rate=25)
        track.height, track.width, track.pix_fmt = *pictures[0].shape[:2], 'yuv420p'
        track.time_base = track.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture)
            frame.pts, frame.time_base = 40*number if times is None else int(times[number]), Fraction(1, 1000)
            container.mux(track.encode(frame))
        container.mux(track.encode(None))


@pytest.fixture(scope='module')
def footage(tmp_path_factory, portrait):
    "One folder with one of each"
    folder = tmp_path_factory.mktemp('footage')
    picture = np.ascontiguousarray(np.kron(portrait, np.ones((2, 2, 1), np.uint8)))
    film(folder/'silent.mp4', [picture]*30)
    film(folder/'faceless.mp4', [np.full_like(picture, 128)]*30)
    film(folder/'brief.mp4', [picture]*6)
    film(folder/'uneven.mp4', [picture]*24, np.cumsum(np.tile([20, 60, 90], 8)))
    (folder/'broken.mp4').write_bytes(b'no video')
    (folder/'notes.txt').write_text('no footage either')
    return folder


def run(*words, capsys):
    "Exit status and what was complained"
    status = main([str(word) for word in words])
    return status, capsys.readouterr().err


def test_every_refusal_has_its_reason(footage, tmp_path, capsys):
    status, _ = run('preprocess', '--source', footage, '--out', tmp_path/'lessons', '--workers', 1, '--json', capsys=capsys)
    assert status == 0
    reasons = {row['name'].split('_')[0]: row['reason'] for row in read_json(tmp_path/'lessons/rejected.json')}
    assert set(reasons) == {'faceless', 'brief', 'broken'}
    assert 'no face' in reasons['faceless'] and '6 frames' in reasons['brief'] and 'broken.mp4' in reasons['broken']
    rows = {row['name'].split('_')[0]: row for row in FaceClips(tmp_path/'lessons').rows}
    assert set(rows) == {'silent', 'uneven'} and not rows['silent']['sound']
    seconds = 8*(20 + 60 + 90)/1000
    assert abs(rows['uneven']['frames']/25 - seconds) <= .12  # frames are taken at 25 a second by their time stamps


@pytest.mark.parametrize('words,sentence', [
    (['--source', 'gone'], 'gone'), (['--source', 'empty'], 'There is no video'), (['--source', 'files/silent.mp4'], 'is no folder'),
    (['--source', 'files', '--labels', 'gone.json'], 'gone.json'), (['--source', 'files', '--labels', 'labels.json'], 'lost.mp4'),
    (['--source', 'files', '--labels', 'files/notes.txt'], 'notes.txt'), (['--source', 'files', '--bundle', 'maxi'], "no bundle 'maxi'")])
def test_mistakes(footage, tmp_path, monkeypatch, capsys, words, sentence):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'empty').mkdir(); (tmp_path/'files').symlink_to(footage)
    (tmp_path/'labels.json').write_text('[{"file": "lost.mp4"}]')
    status, complaint = run('preprocess', *words, '--out', 'lessons', '--workers', 1, capsys=capsys)
    assert status == 2 and complaint.startswith('musetalk: ') and sentence in complaint and complaint.count('\n') == 1
    assert not (tmp_path/'lessons/clips.json').exists()


@pytest.mark.parametrize('kind', ['vae', 'audio', 'syncnet', 'stage1', 'stage2'])
def test_training_without_footage(tmp_path, capsys, kind):
    (tmp_path/'config.yaml').write_text('exp_name: x\n')
    status, complaint = run('train', kind, '--config', tmp_path/'config.yaml', '--data', tmp_path, capsys=capsys)
    assert status == 2 and 'clips.json' in complaint and 'musetalk preprocess' in complaint and complaint.count('\n') == 1


def contents(folder): return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob('*')) if path.is_file() and not path.name.startswith('.')}


def test_a_run_that_was_killed_goes_on_to_the_same_files(portrait, tmp_path):
    "Signal 9 after the first video; the second run begins with the second video"
    picture = np.ascontiguousarray(np.kron(portrait, np.ones((2, 2, 1), np.uint8)))
    (tmp_path/'raw').mkdir()
    for name, count in (('anna', 25), ('bob', 60)): film(tmp_path/'raw'/f'{name}.mp4', [picture]*count)
    program = f"from musetalk.preprocess import preprocess; preprocess(r'{tmp_path/'raw'}', r'{tmp_path/'cut'}', None, workers=1, show_progress=False)"
    running = subprocess.Popen([sys.executable, '-c', program], cwd=ROOT)
    deadline = time.monotonic() + 300
    while not (tmp_path/'cut/done/anna.json').exists() and running.poll() is None and time.monotonic() < deadline: time.sleep(.005)
    running.kill()
    running.wait()
    assert not (tmp_path/'cut/clips.json').exists(), 'it was too quick to be killed'
    for out in ('cut', 'whole'): preprocess(tmp_path/'raw', tmp_path/out, None, workers=1, show_progress=False)
    assert contents(tmp_path/'cut') == contents(tmp_path/'whole')
