"What a dub must survive: every frame rate, odd footage, broken files, full disks, impatient users"
import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
import pytest

from musetalk.core import BundleError, ConfigError, FaceError, MediaError, MuseTalkError, save_image
from musetalk.dub import dub, preview
from musetalk.media import VideoSource
from musetalk.sound import audio_duration, write_audio
from musetalk.stages import DubSettings, FaceCache, SpeakingFrame, prefetch, prepare_face, speaking_frames
from musetalk.tasks import run_tasks
from musetalk.track import track_faces
from musetalk.writer import VideoWriter

ROOT = Path(__file__).resolve().parent.parent
RATES = [Fraction(15), Fraction(24000, 1001), Fraction(25), Fraction(30000, 1001), Fraction(50), Fraction(60)]


def write_clip(path, images, fps=25):
    "A video of these images, without loss that matters"
    height, width = images[0].shape[:2]
    with VideoWriter(path, fps, width, height, crf=1) as writer:
        for image in images: writer.write(image)
    return path


def images_of(path): return [frame.image for frame in VideoSource(path)]


def left_behind(folder): return [path.name for path in Path(folder).rglob('.partial-*')]


@pytest.fixture
def words(tmp_path, voice):
    "A sound file"
    write_audio(tmp_path/'words.wav', voice)
    return tmp_path/'words.wav'


@pytest.fixture
def picture(tmp_path, portrait):
    save_image(tmp_path/'she.png', portrait)
    return tmp_path/'she.png'


@pytest.fixture(scope='session')
def clip(tmp_path_factory, portrait):
    "Six frames of a head that moves sideways"
    return write_clip(tmp_path_factory.mktemp('clip')/'clip.mp4', [np.roll(portrait, 2*step, 1) for step in range(6)])


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('musetalk')]


# Length and time

@pytest.mark.parametrize('fps', RATES, ids=str)
def test_length_follows_the_sound(tmp_path, toy, portrait, words, fps):
    source = write_clip(tmp_path/'in.mp4', [portrait]*3, fps)
    report = dub(source, words, tmp_path/'out.mp4', toy, progress=False)
    made = VideoSource(tmp_path/'out.mp4')
    assert made.fps == fps and made.frame_count == report.frames == round(Fraction(1, 2)*fps)
    assert abs(made.duration - audio_duration(words)) <= 1/fps
    assert abs(audio_duration(tmp_path/'out.mp4') - made.duration) <= Fraction(1, 16)


def test_windows_do_not_drift(toy, voice):
    "After a minute the window still lies where exact time puts it"
    samples = np.resize(voice, 61*16000)
    features = toy.audio_encoder.features(samples[56*16000:])  # 56 s is a whole number of blocks
    for fps in (Fraction(24000, 1001), Fraction(60)):
        windows = toy.stream(np.array_split(samples, 61), fps)
        for first in range(0, int(60*fps), 50): taken = windows.take(first, 50)
        start = 50*first*fps.denominator//fps.numerator - 2*toy.left
        shift = start - 56*50
        np.testing.assert_allclose(taken[0], features[shift:shift + taken.shape[1]], atol=1e-4)


@pytest.mark.parametrize('loop,order', [('pingpong', [0, 1, 2, 3, 4, 5, 4, 3, 2, 1, 0, 1]), ('repeat', [0, 1, 2, 3, 4, 5]*2), ('hold', [0, 1, 2, 3, 4] + [5]*7)])
def test_loop_modes(toy, clip, voice, loop, order):
    source = VideoSource(clip)
    made = list(speaking_frames(source, toy.stream([voice], source.fps), 12, toy, DubSettings(loop=loop, batch_size=5)))
    originals = images_of(clip)
    assert [int(np.argmin([np.abs(frame.image.astype(int) - image).sum() for image in originals])) for frame in made] == order


def test_footage_longer_than_the_sound_is_trimmed(tmp_path, toy, portrait, words):
    report = dub(write_clip(tmp_path/'in.mp4', [portrait]*20), words, tmp_path/'out.mp4', toy, progress=False)
    assert report.frames == 12 and report.source['frames'] == 20


def test_rate_can_be_chosen(tmp_path, toy, picture, words):
    assert dub(picture, words, tmp_path/'out.mp4', toy, progress=False, fps='30000/1001').frames == 15


# What is in the picture

def test_speech_reaches_the_mouth_and_nothing_else(tmp_path, toy, portrait, picture, voice):
    source, settings = VideoSource(picture), DubSettings()
    made = list(speaking_frames(source, toy.stream([voice], source.fps), 10, toy, settings))
    results = [frame.result(settings, number) for number, frame in enumerate(made)]
    x1, y1, x2, y2 = made[0].face.box
    touched = np.zeros((160 + 400, 160 + 400), bool)
    touched[200 + y1:200 + y2, 200 + x1:200 + x2] = made[0].face.mask > 0
    outside = ~touched[200:360, 200:360]
    assert outside.any() and not outside.all()
    for result in results: np.testing.assert_array_equal(result[outside], portrait[outside])
    assert any((result != results[0]).any() for result in results)


def test_frame_without_face_passes_through(tmp_path, toy, portrait, voice, caplog):
    (tmp_path/'frames').mkdir()
    for number in range(5): save_image(tmp_path/f'frames/{number}.png', np.full_like(portrait, 90) if number == 2 else portrait)
    source, settings = VideoSource(tmp_path/'frames'), DubSettings()
    made = list(speaking_frames(source, toy.stream([voice], source.fps), 12, toy, settings))
    missed = [number for number, frame in enumerate(made) if frame.face is None]
    assert missed == [2, 6, 10]
    assert all((made[number].result(settings) == 90).all() for number in missed)
    write_audio(tmp_path/'words.wav', voice)
    report = dub(tmp_path/'frames', tmp_path/'words.wav', tmp_path/'out.mp4', toy, progress=False)
    assert (report.frames, report.frames_missed) == (12, 3) and '3 of 12 frames' in caplog.text
    assert json.loads((tmp_path/'out.json').read_text())['frames_missed'] == 3


def test_batches_do_not_matter(toy, clip, voice):
    "One by one or all at once: the same pictures but for rounding"
    def made(size):
        source = VideoSource(clip)
        return [frame.result(DubSettings()).astype(int) for frame in speaking_frames(source, toy.stream([voice], source.fps), 12, toy, DubSettings(batch_size=size))]
    assert max(np.abs(one - other).max() for one, other in zip(made(1), made(12), strict=True)) <= 2


def test_same_inputs_same_bytes(tmp_path, toy, clip, words):
    for name in ('a', 'b'): dub(clip, words, tmp_path/f'{name}.mp4', toy, progress=False, grain=1., seed=7)
    assert (tmp_path/'a.mp4').read_bytes() == (tmp_path/'b.mp4').read_bytes()


def test_seed_is_the_grain(toy, portrait):
    noisy = np.uint8((portrait + np.random.default_rng(0).normal(0, 12, portrait.shape)).clip(0, 255))
    record = track_faces([noisy])[0]
    face = prepare_face(noisy, record, toy, DubSettings())
    frame = SpeakingFrame(noisy, face, cv2.GaussianBlur(face.crop, (0, 0), 4))
    one, same, other = (frame.result(DubSettings(grain=1., seed=seed)) for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()
    assert (frame.result(DubSettings(grain=1., seed=1), number=1) == other).all()


def test_faces_are_forgotten(toy, clip):
    from musetalk.stages import tracked_frames
    cache = FaceCache(toy, DubSettings(), limit=800_000)
    for pair in tracked_frames(VideoSource(clip), 30): cache([pair])
    assert cache.size <= 800_000 and cache.size == sum(face.bytes for face in cache.known.values())


def test_preview(tmp_path, toy, clip, words):
    look = preview(clip, words, tmp_path/'look.jpg', time=.3, bundle=toy)
    assert (tmp_path/'look.jpg').exists() and look.panels.shape[1] > 3*look.panels.shape[0] and look.shift_range[0] < 0 < look.shift_range[1]
    with pytest.raises(ConfigError, match='makes no sense'): preview(clip, time=-1, bundle=toy)


# Bad input: one sentence, and nothing is written

def refuses(error, words, *inputs, folder, **given):
    "The message with which `dub` refuses; nothing may be left in the folder of the result"
    with pytest.raises(error, match=words) as caught: dub(*inputs, progress=False, **given)
    assert isinstance(caught.value, MuseTalkError) and '\n' not in str(caught.value)
    assert not Path(folder).exists() or not list(Path(folder).iterdir())


@pytest.fixture
def out(tmp_path): return tmp_path/'results'/'out.mp4'


def test_missing_files(tmp_path, toy, picture, words, out):
    refuses(MediaError, 'gone.mp4 does not exist', tmp_path/'gone.mp4', words, out, toy, folder=out.parent)
    refuses(MediaError, 'gone.wav does not exist', picture, tmp_path/'gone.wav', out, toy, folder=out.parent)


def test_text_named_mp4(tmp_path, toy, words, out):
    (tmp_path/'text.mp4').write_text('This is a letter, not a film.\n'*50)
    refuses(MediaError, 'text.mp4 is', tmp_path/'text.mp4', words, out, toy, folder=out.parent)


def test_truncated_mp4(tmp_path, toy, clip, words, out):
    (tmp_path/'cut.mp4').write_bytes(clip.read_bytes()[:400])
    refuses(MediaError, 'cut.mp4', tmp_path/'cut.mp4', words, out, toy, folder=out.parent)


def test_half_a_video_gives_what_there_is(tmp_path, toy, portrait, words, out):
    rng = np.random.default_rng(0)
    noisy = [np.uint8((portrait + rng.integers(0, 20, portrait.shape)).clip(0, 255)) for _ in range(30)]
    data = write_clip(tmp_path/'whole.mkv', noisy).read_bytes()
    (tmp_path/'half.mkv').write_bytes(data[:len(data)//2])
    assert dub(tmp_path/'half.mkv', words, out, toy, progress=False).frames == 12


def test_no_face_at_all(tmp_path, toy, portrait, words, out):
    save_image(tmp_path/'wall.png', np.full_like(portrait, 90))
    refuses(FaceError, 'No face was found in .*wall.png', tmp_path/'wall.png', words, out, toy, folder=out.parent)
    wall = write_clip(tmp_path/'wall.mp4', [np.full_like(portrait, 90)]*5)
    refuses(FaceError, 'any of the 5 frames', wall, words, out, toy, folder=out.parent)


def test_a_person_who_is_not_there(toy, picture, words, out):
    refuses(FaceError, 'The face 3 was not found', picture, words, out, toy, folder=out.parent, face=3)


def test_zero_length_sound(tmp_path, toy, picture, out):
    write_audio(tmp_path/'none.wav', np.zeros(0, np.float32))
    refuses(MediaError, 'none.wav', picture, tmp_path/'none.wav', out, toy, folder=out.parent)
    write_audio(tmp_path/'blip.wav', np.ones(100, np.float32))
    refuses(MediaError, 'too short for a single frame', picture, tmp_path/'blip.wav', out, toy, folder=out.parent)


def test_silence_is_allowed(tmp_path, toy, picture, out, caplog):
    write_audio(tmp_path/'still.wav', np.zeros(8000, np.float32))
    report = dub(picture, tmp_path/'still.wav', out, toy, progress=False)
    assert report.silent and report.frames == 12 and 'is silent' in caplog.text


def test_sound_as_footage(toy, words, out): refuses(MediaError, 'holds no video', words, words, out, toy, folder=out.parent)


def test_footage_without_sound_as_speech(toy, clip, out): refuses(MediaError, 'has no sound', clip, clip, out, toy, folder=out.parent)


def test_mixed_sizes_in_a_folder(tmp_path, toy, portrait, words, out):
    (tmp_path/'mixed').mkdir()
    for number, image in enumerate((portrait, portrait, portrait[:100])): save_image(tmp_path/f'mixed/{number}.png', image)
    refuses(MediaError, '2.png is 160x100', tmp_path/'mixed', words, out, toy, folder=out.parent)


@pytest.mark.parametrize('name', ['my face', "it's", 'a;rm -rf b', 'дуб 口', 'f%03d', '-in', 'a"b', '$(x)'])
def test_names(tmp_path, toy, picture, words, name):
    shutil.copy(picture, tmp_path/f'{name}.png')
    shutil.copy(words, tmp_path/f'{name}.wav')
    report = dub(tmp_path/f'{name}.png', tmp_path/f'{name}.wav', tmp_path/name/f'{name}.mp4', toy, progress=False)
    assert (tmp_path/name/f'{name}.mp4').exists() and report.path == tmp_path/name/f'{name}.json' and report.path.exists()


def test_output_that_cannot_be_written(tmp_path, toy, picture, words):
    (tmp_path/'file').touch()
    with pytest.raises(MediaError, match='a part of its folder is a file'): dub(picture, words, tmp_path/'file'/'out.mp4', toy, progress=False)
    with pytest.raises(MediaError, match='ends in .mp4'): dub(picture, words, tmp_path/'out.wmv', toy, progress=False)
    with pytest.raises(ConfigError, match='is also an input'): dub(picture, words, picture, toy, progress=False)


def test_full_disk(tmp_path, toy, clip, words):
    "A file-size limit stands for a disk that fills up; the old result survives"
    (tmp_path/'out.mp4').write_bytes(b'yesterday')
    before = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, before[0][1]))
    try:
        with pytest.raises(MediaError, match='Cannot write .*out.mp4'): dub(clip, words, tmp_path/'out.mp4', toy, progress=False, crf=0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before[0])
        signal.signal(signal.SIGXFSZ, before[1])
    assert (tmp_path/'out.mp4').read_bytes() == b'yesterday' and not left_behind(tmp_path)


def test_damaged_bundle(tmp_path, toy_folder, picture, words, out):
    shutil.copytree(toy_folder, tmp_path/'toy')
    weights = next((tmp_path/'toy/unet').glob('*.safetensors'))
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    refuses(BundleError, 'SHA-256 differs', picture, words, out, tmp_path/'toy', folder=out.parent)
    refuses(BundleError, "no bundle 'maxi'", picture, words, out, 'maxi', folder=out.parent)


# Threads and interruptions

def test_error_in_a_stage_reaches_the_caller(tmp_path, toy, clip, words, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError('the network tripped')
    monkeypatch.setattr(type(toy), 'generate', broken)
    with pytest.raises(RuntimeError, match='the network tripped'): dub(clip, words, tmp_path/'out.mp4', toy, progress=False)
    assert not (tmp_path/'out.mp4').exists() and not left_behind(tmp_path)


def test_slow_consumer_holds_the_producer_back():
    made = []
    def numbers():
        for number in range(1000): made.append(number); yield number
    for number in prefetch(numbers(), depth=3):
        time.sleep(.002)
        assert len(made) <= number + 6
        if number == 30: break


def test_ctrl_c(tmp_path, toy_folder, picture, voice):
    write_audio(tmp_path/'long.wav', np.resize(voice, 16000*600))
    words = [sys.executable, '-m', 'musetalk.cli', 'dub', '--video', str(picture), '--audio', str(tmp_path/'long.wav'), '--out', str(tmp_path/'out.mp4'), '--bundle', str(toy_folder)]
    def listen(): signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell starts background jobs deaf to Ctrl-C
    process = subprocess.Popen(words, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=listen)
    deadline = time.monotonic() + 90
    while not any(path.stat().st_size > 0 for path in tmp_path.glob('.partial-*')) and process.poll() is None and time.monotonic() < deadline: time.sleep(.05)
    process.send_signal(signal.SIGINT)
    errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and 'stopped' in errors and 'Traceback' not in errors
    assert not (tmp_path/'out.mp4').exists() and not left_behind(tmp_path)


# Task files

def test_one_task_fails_the_others_do_not_notice(tmp_path, toy_folder, picture, words):
    (tmp_path/'tasks.yaml').write_text(f"""
one: {{video_path: she.png, audio_path: words.wav, result_name: named, bundle: {json.dumps(str(toy_folder))}, crf: 30}}
two: {{video_path: gone.mp4, audio_path: words.wav}}
three: {{video_path: she.png, audio_path: words.wav}}
""")
    results = run_tasks(tmp_path/'tasks.yaml', tmp_path/'results', str(toy_folder), progress=False)
    assert [result.ok for result in results] == [True, False, True] and 'gone.mp4 does not exist' in results[1].error
    assert sorted(path.name for path in (tmp_path/'results').glob('*.mp4')) == ['named.mp4', 'she_words.mp4']
    assert [result.report.settings['crf'] for result in results if result.ok] == [30, 18]


def test_two_tasks_on_the_same_pair_keep_both_results(tmp_path, toy_folder, picture, words):
    (tmp_path/'tasks.yaml').write_text('a: {video_path: she.png, audio_path: words.wav}\nb: {video_path: she.png, audio_path: words.wav, bbox_shift: -3}\n')
    run_tasks(tmp_path/'tasks.yaml', tmp_path/'results', str(toy_folder), progress=False)
    assert sorted(path.name for path in (tmp_path/'results').glob('*.mp4')) == ['she_words_a.mp4', 'she_words_b.mp4']


def test_sound_of_the_result_is_the_speech(tmp_path, toy, picture, words):
    dub(picture, words, tmp_path/'out.mp4', toy, progress=False)
    with av.open(str(tmp_path/'out.mp4')) as container:
        assert [stream.codec_context.name for stream in container.streams] == ['h264', 'aac']
