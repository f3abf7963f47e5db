"What a prepared face must survive: changed footage, changed weights, kills, deletion in use, names that lead elsewhere"
import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from musetalk.avatar import Avatar, loop_plan, source_index, with_rest_face
from musetalk.core import BundleError, ConfigError, FaceError, MediaError, MuseTalkError, save_image
from musetalk.media import VideoSource
from musetalk.store import Footage, held
from musetalk.writer import VideoWriter

ROOT = Path(__file__).resolve().parent.parent


def write_clip(path, images, fps=25):
    height, width = images[0].shape[:2]
    with VideoWriter(path, fps, width, height, crf=1) as writer:
        for image in images: writer.write(image)
    return path


@pytest.fixture(scope='module')
def clip(tmp_path_factory, portrait):
    "Twelve frames of a head that moves sideways"
    return write_clip(tmp_path_factory.mktemp('clip')/'clip.mp4', [np.roll(portrait, 2*step, 1) for step in range(12)])


@pytest.fixture
def picture(tmp_path, portrait):
    save_image(tmp_path/'she.png', portrait)
    return tmp_path/'she.png'


@pytest.fixture
def home(tmp_path): return tmp_path/'avatars'


def made(home, name): return json.loads((home/name/'avatar.json').read_text())


def test_prepared_once_loaded_often(home, toy, clip):
    avatar = Avatar.prepare(clip, 'a', toy, home, progress=False)
    before = (home/'a'/'avatar.json').stat().st_mtime_ns
    assert Avatar.prepare(clip, 'a', toy, home, progress=False).info == Avatar.load('a', toy, home).info == avatar.info
    assert (home/'a'/'avatar.json').stat().st_mtime_ns == before
    assert avatar.info['frames'] == 12 and avatar.info['cost']['seconds'] > 0 and not {file.suffix for file in (home/'a').iterdir()} - {'.json', '.npz', '.safetensors', '.mp4', ''}


def test_another_setting_other_footage_other_weights(home, toy, clip, picture, tmp_path):
    keys = [Avatar.prepare(clip, 'a', toy, home, progress=False).info['key']]
    keys += [Avatar.prepare(clip, 'a', toy, home, progress=False, bbox_shift=2).info['key']]
    keys += [Avatar.prepare(picture, 'a', toy, home, progress=False).info['key']]
    from musetalk.bundle import Bundle
    other = Bundle(toy.vae, toy.painter, toy.audio_encoder, toy.adapter, toy.config)
    loaded = Avatar.load('a', other, home, progress=False)
    assert len({*keys, loaded.info['key']}) == 4 and loaded.info['content'] == made(home, 'a')['content']
    assert Avatar.prepare(picture, 'a', other, home, progress=False).info['key'] == loaded.info['key']


def test_content_counts_and_not_the_name(home, toy, clip, tmp_path):
    copy = tmp_path/'other name.mp4'
    copy.write_bytes(clip.read_bytes())
    assert Avatar.prepare(clip, 'a', toy, home, progress=False).info['key'] == Avatar.prepare(copy, 'a', toy, home, progress=False).info['key']


def test_folder_of_pictures(home, toy, portrait, tmp_path):
    for number in range(9): save_image(tmp_path/f'pictures/{number}.png', np.roll(portrait, number, 1))
    avatar = Avatar.prepare(tmp_path/'pictures', 'a', toy, home, progress=False, fps=30)
    assert avatar.fps == 30 and avatar.frame_count == 9 and (home/'a'/'footage.mkv').exists()
    for number in (8, 0, 4, 3, 2): assert (avatar.image(number) == np.roll(portrait, number, 1)).all()


def test_frames_without_a_face_are_shown_as_they_are(home, toy, portrait, tmp_path):
    wall = np.full_like(portrait, 90)
    images = [portrait]*12 + [wall]*12 + [portrait]*6
    avatar = Avatar.prepare(write_clip(tmp_path/'in.mp4', images), 'a', toy, home, progress=False)
    missing = [number for number in range(30) if avatar.face(number)[0] is None]
    assert missing and set(missing) <= set(range(12, 24)) and avatar.info['frames_without_face'] == len(missing)
    number = missing[0]
    assert with_rest_face(avatar.image(number), avatar.face(number)[1]) is avatar.image(number)


def test_odd_rate(home, toy, portrait, tmp_path):
    avatar = Avatar.prepare(write_clip(tmp_path/'in.mp4', [portrait]*3, Fraction(30000, 1001)), 'a', toy, home, progress=False)
    assert avatar.fps == Fraction(30000, 1001) == Avatar.load('a', toy, home).fps


# Bad input: one sentence, and nothing is left

@pytest.mark.parametrize('name', ['', '..', '../a', 'a/b', '/etc', '.hidden', 'a\nb', 'x'*65])
def test_names_that_lead_elsewhere(home, toy, picture, name):
    for act in (lambda: Avatar.prepare(picture, name, toy, home, progress=False), lambda: Avatar.load(name, toy, home), lambda: Avatar.delete(name, home)):
        with pytest.raises(ConfigError, match='cannot be the name') as caught: act()
        assert '\n' not in str(caught.value)


def test_bad_footage(home, toy, portrait, tmp_path):
    (tmp_path/'text.mp4').write_text('not a film\n'*90)
    save_image(tmp_path/'wall.png', np.full_like(portrait, 90))
    for path, error in ((tmp_path/'text.mp4', MediaError), (tmp_path/'gone.mp4', MediaError), (tmp_path/'wall.png', FaceError)):
        with pytest.raises(error) as caught: Avatar.prepare(path, 'a', toy, home, progress=False)
        assert isinstance(caught.value, MuseTalkError) and '\n' not in str(caught.value)
    with pytest.raises(ConfigError, match='Unknown setting'): Avatar.prepare(tmp_path/'wall.png', 'a', toy, home, nonsense=1)
    with pytest.raises(BundleError, match="no bundle 'maxi'"): Avatar.prepare(tmp_path/'wall.png', 'a', 'maxi', home)
    assert not home.exists() or not list(home.iterdir())


def test_a_failure_leaves_the_old_avatar(home, toy, clip, monkeypatch):
    before = Avatar.prepare(clip, 'a', toy, home, progress=False).info
    def broken(*args, **kwargs): raise RuntimeError('the network tripped')
    monkeypatch.setattr(type(toy), 'generate', broken)
    with pytest.raises(RuntimeError, match='tripped'): Avatar.prepare(clip, 'a', toy, home, progress=False, bbox_shift=3)
    assert Avatar.load('a', toy, home).info == before and [path.name for path in home.iterdir()] == ['a']


def test_a_folder_that_is_no_avatar_is_not_touched(home, toy, picture):
    (home/'mine').mkdir(parents=True)
    (home/'mine'/'letter.txt').write_text('dear')
    with pytest.raises(ConfigError, match='is no avatar'): Avatar.prepare(picture, 'mine', toy, home, progress=False)
    with pytest.raises(ConfigError, match='no avatar'): Avatar.delete('mine', home)
    assert (home/'mine'/'letter.txt').exists() and Avatar.list(home) == []


def test_killed_preparation(home, toy, toy_folder, picture, portrait, tmp_path):
    "A preparation that was killed leaves no avatar, and the next one sweeps up"
    clip = write_clip(tmp_path/'long.mp4', [np.roll(portrait, step % 9, 1) for step in range(250)])
    code = f"from musetalk.avatar import Avatar; Avatar.prepare({str(clip)!r}, 'a', {str(toy_folder)!r}, {str(home)!r}, progress=False)"
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 90
    while not list(home.glob('.partial-*/faces-*')) and process.poll() is None and time.monotonic() < deadline: time.sleep(.02)
    assert process.poll() is None, 'it was ready before it could be killed'
    Avatar.prepare(picture, 'b', toy, home, progress=False)
    assert len(list(home.glob('.partial-*'))) == 1, 'a preparation at work must not be swept away'
    process.kill(); process.wait()
    assert Avatar.list(home) == [made(home, 'b')]
    Avatar.prepare(picture, 'c', toy, home, progress=False)
    assert sorted(path.name for path in home.iterdir()) == ['b', 'c']


def test_in_use_by_another_process(home, toy, picture):
    Avatar.prepare(picture, 'a', toy, home, progress=False)
    code = f"import time\nfrom musetalk.store import held\nwith held({str(home/'a')!r}): print('held', flush=True); time.sleep(90)"
    process = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == 'held\n'
        with pytest.raises(ConfigError, match="'a' is in use"): Avatar.delete('a', home)
        with pytest.raises(ConfigError, match="'a' is in use"): Avatar.prepare(picture, 'a', toy, home, progress=False, bbox_shift=1)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait(); process.stdout.close()
    Avatar.delete('a', home)
    assert list(home.iterdir()) == []


def test_gone(home, toy, picture):
    avatar = Avatar.prepare(picture, 'a', toy, home, progress=False)
    Avatar.delete('a', home)
    with pytest.raises(ConfigError, match='not there any more'): held(avatar.folder).__enter__()
    with pytest.raises(ConfigError, match="no avatar 'a'"): Avatar.load('a', toy, home)


# Loops and memory

@pytest.mark.parametrize('count', [1, 2, 3, 8, 40])
def test_loops_stay_inside(count):
    plan = loop_plan(np.random.default_rng(0).integers(0, 255, (count, 576), np.uint8))
    seen = {source_index(position, plan['mode'], plan['start'], plan['stop']) for position in range(5*count)}
    assert seen == set(range(plan['stop'])) and plan['stop'] <= count and plan['stop'] - plan['start'] >= min(count, count//2)


def test_jump_is_found():
    angle = 2*np.pi*np.arange(90)/30
    looks = np.uint8(120 + 60*np.sin(angle)[:, None]*np.linspace(-1, 1, 576) + 40*np.cos(angle)[:, None])
    plan = loop_plan(looks)
    assert plan['mode'] == 'repeat' and (plan['stop'] - plan['start']) % 30 == 0 and plan['seam'] < plan['step']


def test_memory_of_frames_is_bounded(clip):
    source = VideoSource(clip)
    exact = [frame.image for frame in source]
    footage = Footage(source, limit=3*exact[0].nbytes)
    for index in [*range(12), *range(10, -1, -1), 7, 7, 2, 11]:
        assert (footage.image(index) == exact[index]).all() and footage.size <= footage.limit
    footage.close()
    assert footage.size == 0 and (footage.image(5) == exact[5]).all()
    footage.close()
