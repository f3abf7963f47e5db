"What a live stream must survive: stalls, floods, garbage, storms of interruptions, failing workers, viewers that vanish"
import threading
import time
from fractions import Fraction

import numpy as np
import pytest
import torch

from musetalk.avatar import Avatar, with_rest_face
from musetalk.batcher import Batcher, CapacityError, StreamError
from musetalk.bundle import load_bundle
from musetalk.core import ConfigError, MediaError, MuseTalkError, save_image
from musetalk.media import VideoSource
from musetalk.stages import dub_settings, speaking_frames
from musetalk.stream import AvatarStream
from musetalk.writer import VideoWriter

LOUD = dict(check=False, quiet=None)


@pytest.fixture(scope='module')
def home(tmp_path_factory): return tmp_path_factory.mktemp('avatars')


@pytest.fixture(scope='module')
def footage(tmp_path_factory, portrait):
    path = tmp_path_factory.mktemp('footage')/'she.mp4'
    with VideoWriter(path, 25, 160, 160, crf=1) as writer:
        for step in range(16): writer.write(np.roll(portrait, step % 7, 1))
    return path


@pytest.fixture(scope='module')
def toy(toy_folder):
    "The small model with lips that move when it hears something"
    bundle = load_bundle(toy_folder, device='cpu', dtype='float32')
    torch.manual_seed(1)
    torch.nn.init.normal_(bundle.adapter.basis, std=.04)
    return bundle


@pytest.fixture(scope='module')
def avatar(home, toy, footage): return Avatar.prepare(footage, 'she', toy, home, progress=False, batch_size=1)


@pytest.fixture(scope='module')
def long_voice(voice): return np.concatenate([voice, .5*voice[::-1], voice, .2*voice])


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert not [thread for thread in threading.enumerate() if thread.name.startswith('musetalk')]


def speech_frames(stream, most=400):
    "Frames until the first one that carries no speech"
    frames = []
    while (frame := stream.pull(None)).speaking: frames.append(frame); assert len(frames) < most
    return frames


# Same speech, same frames

@pytest.mark.parametrize('rate', [Fraction(25), Fraction(30000, 1001)], ids=str)
def test_same_frames_as_a_dub(home, toy, footage, long_voice, rate):
    settings = dub_settings(batch_size=1, fps=rate, grain=.5)
    other = Avatar.prepare(footage, f'at {rate.numerator}', toy, home, progress=False, batch_size=1, fps=rate, grain=.5)
    source = VideoSource(footage, rate)
    total = round(2*rate)
    expected = [frame.result(settings, number) for number, frame in enumerate(speaking_frames(source, toy.stream([long_voice], rate), total, toy, settings))]
    with Batcher(toy, batch_size=1) as batcher, AvatarStream(other, batcher, live=False, order='plain', **LOUD) as stream:
        for piece in np.array_split(long_voice, 57): stream.push(piece)
        stream.end()
        frames = speech_frames(stream)
    assert len(frames) in (total, total + 1) and frames[-1].last
    for frame, image in zip(frames, expected): assert (frame.image == image).all()
    assert max(np.abs(image.astype(int) - with_rest_face(other.image(frame.index), other.face(frame.index)[1])).max() for frame, image in zip(frames, expected)) >= 20
    sound = np.concatenate([frame.samples for frame in frames])
    assert (sound[:len(long_voice)] == long_voice).all() and not sound[len(long_voice):].any()
    assert [frame.time for frame in frames] == [number/rate for number in range(len(frames))]


def test_large_batches_change_little(avatar, long_voice):
    def made(size):
        with Batcher(avatar.bundle, batch_size=size) as batcher, AvatarStream(avatar, batcher, live=False, **LOUD) as stream:
            stream.push(long_voice); stream.end()
            return np.stack([frame.image for frame in speech_frames(stream)])
    one, eight = made(1), made(8)
    assert len(one) == 50 and np.abs(one.astype(int) - eight).max() <= 2


@pytest.mark.parametrize('size', [1, 37, 160, 641, 8000, 32000])
def test_pieces_of_any_size(avatar, long_voice, size):
    piece = long_voice[:6000]
    with AvatarStream(avatar, live=False, **LOUD) as stream:
        for start in range(0, len(piece), size): stream.push(piece[start:start + size])
        stream.end()
        frames = speech_frames(stream)
    assert len(frames) == 10 and (np.concatenate([frame.samples for frame in frames])[:6000] == piece).all()


@pytest.mark.parametrize('rate', [8000, 22050, 44100, 48000])
def test_rates_and_channels(avatar, rate):
    sound = np.int16(12000*np.sin(np.arange(rate)/rate*800))
    with AvatarStream(avatar, sample_rate=48000, live=False, **LOUD) as stream:
        for piece in np.array_split(np.stack([sound, sound], 1), 23): stream.push(piece, rate)
        stream.end()
        frames = speech_frames(stream)
        assert stream.figures()['drift_ms'] == 0
    assert len(frames) in (25, 26) and {len(frame.samples) for frame in frames} == {1920}
    assert abs(np.abs(np.concatenate([frame.samples for frame in frames])).max() - 12000/32768) < .03


def test_quicker_ears(avatar, long_voice):
    with AvatarStream(avatar, live=False, quick=True, **LOUD) as quick, AvatarStream(avatar, live=False, **LOUD) as usual:
        assert quick.latency == pytest.approx(usual.latency - .12)
        quick.push(long_voice); quick.end()
        assert len(speech_frames(quick)) == 50


def test_one_clock_at_an_odd_rate(home, toy, footage, long_voice):
    rate = Fraction(30000, 1001)
    other = Avatar.prepare(footage, 'odd', toy, home, progress=False, fps=rate)
    with AvatarStream(other, sample_rate=44100, live=False, **LOUD) as stream:
        frames = [stream.pull() for _ in range(301)]
    starts = np.cumsum([0] + [len(frame.samples) for frame in frames])[:-1]
    assert max(abs(start/44100 - float(frame.time)) for start, frame in zip(starts, frames)) < 1/44100 and frames[300].time == 300/rate


# Rest, fade and loop

def test_silence_is_the_prepared_rest(avatar):
    with AvatarStream(avatar, live=False, check=False) as stream:
        frames = [stream.pull() for _ in range(60)]
    for frame in frames: assert (frame.image == with_rest_face(avatar.image(frame.index), avatar.face(frame.index)[1])).all()
    assert [frame.index for frame in frames] == [avatar.index(position) for position in range(60)]


def test_silence_in_open_speech_needs_no_painting(avatar, long_voice):
    with AvatarStream(avatar, live=False, check=False) as stream:
        stream.push(np.zeros(48000, np.float32)); stream.end()
        frames = speech_frames(stream)
        assert len(frames) == 75 and stream.batcher.counts['paint'] == 0
    for frame in frames: assert (frame.image == with_rest_face(avatar.image(frame.index), avatar.face(frame.index)[1])).all()


def test_no_jump_between_rest_and_speech(avatar, voice):
    "Speech fades in over four frames and out over the four after it; between, it is seen as it is"
    def shown(fade):
        with AvatarStream(avatar, live=False, order='plain', fade=fade, **LOUD) as stream:
            before = [stream.pull() for _ in range(5)]
            stream.push(np.concatenate([voice, voice])); stream.end()
            return before, speech_frames(stream), [stream.pull() for _ in range(4)]
    (_, whole, _), (_, faded, after) = shown(0), shown(.16)
    rests = [with_rest_face(avatar.image(frame.index), avatar.face(frame.index)[1]) for frame in faded]
    assert max(np.abs(frame.image.astype(int) - rest).max() for frame, rest in zip(whole, rests)) >= 20, 'speech must differ from rest'
    for number, (frame, full, rest) in enumerate(zip(faded, whole, rests)):
        weight = min(1, (number + 1)/4)
        mixed = rest + weight*weight*(3 - 2*weight)*(full.image.astype(float) - rest)
        assert np.abs(frame.image - mixed).max() <= 1 and (weight < 1 or (frame.image == full.image).all())
    assert (after[-1].image == with_rest_face(avatar.image(after[-1].index), avatar.face(after[-1].index)[1])).all()


# Faults

def test_worker_raises(avatar, voice, monkeypatch):
    def broken(*args, **kwargs): raise RuntimeError('the network tripped')
    with AvatarStream(avatar, live=False, **LOUD) as stream:
        with monkeypatch.context() as patch:
            patch.setattr(type(avatar.bundle), 'generate', broken)
            stream.push(voice); stream.end()
            with pytest.raises(StreamError, match='RuntimeError: the network tripped'): stream.pull()
            assert not stream.pull().speaking and stream.waiting == 0
        stream.push(voice); stream.end()
        assert len(speech_frames(stream)) == 13


def test_ears_raise(avatar, voice, monkeypatch):
    def broken(*args, **kwargs): raise ValueError('deaf')
    with AvatarStream(avatar, live=False, **LOUD) as stream, monkeypatch.context() as patch:
        patch.setattr(avatar.bundle.audio_encoder, 'block', broken, raising=False)
        stream.push(voice); stream.end()
        with pytest.raises(StreamError, match='ValueError: deaf'): stream.pull()


def test_scheduler_raises(avatar, voice, monkeypatch):
    def broken(*args, **kwargs): raise KeyError('lost')
    with AvatarStream(avatar, live=False, **LOUD) as stream:
        with monkeypatch.context() as patch:
            patch.setattr(Batcher, '_neediest', broken)
            with pytest.raises(StreamError, match='KeyError'):
                stream.push(voice)
                stream.pull()
        with pytest.raises(StreamError, match='worker of this stream was closed'): stream.pull()


def test_one_session_fails_the_other_does_not_notice(avatar, voice, monkeypatch):
    with Batcher(avatar.bundle) as batcher, AvatarStream(avatar, batcher, live=False, **LOUD) as one, AvatarStream(avatar, batcher, live=False, **LOUD) as two:
        def broken(position): raise OSError('its files are gone')
        monkeypatch.setattr(two, '_index', broken)
        for stream in (one, two): stream.push(voice); stream.end()
        assert len(speech_frames(one)) == 13
        with pytest.raises(StreamError, match='files are gone'): two.pull()


def test_sound_stalls(avatar, voice):
    "An utterance without an end is ended after `patience`, all of it is shown, and the next one begins"
    with AvatarStream(avatar, live=False, patience=.2, **LOUD) as stream:
        for _ in range(2):
            stream.push(voice)
            frames = speech_frames(stream)
            assert len(frames) == 13 and (np.concatenate([frame.samples for frame in frames])[:8000] == voice).all()
        assert frames[0].utterance == 1 and frames[-1].last


def test_live_stall_does_not_block(avatar, voice):
    with AvatarStream(avatar, patience=30, **LOUD) as stream:
        stream.push(voice[:2000])
        start = time.monotonic()
        frames = [stream.pull() for _ in range(20)]
        assert time.monotonic() - start < 5 and not any(frame.speaking for frame in frames)


def test_sound_floods(avatar, voice):
    hour = np.tile(voice, 7200)
    with AvatarStream(avatar, live=False, most=3, **LOUD) as stream:
        with pytest.raises(StreamError, match='no room for more; 3597.00 s were not taken'): stream.push(hour, timeout=.05)
        assert stream.waiting == 3
        thread = threading.Thread(target=lambda: stream.push(hour[:16000*5]))
        thread.start()
        total = 0
        while thread.is_alive() or stream.waiting: total += stream.pull().speaking; assert stream.waiting <= 3
        thread.join()
    assert total >= 200 - 1


def test_interruption_frees_a_blocked_push(avatar, voice):
    with AvatarStream(avatar, live=False, most=1, **LOUD) as stream:
        thread = threading.Thread(target=lambda: stream.push(np.tile(voice, 20)))
        thread.start()
        while stream.waiting < 1: time.sleep(.005)
        stream.interrupt()
        thread.join(5)
        assert not thread.is_alive() and stream.waiting == 0 and not stream.pull().speaking


@pytest.mark.parametrize('garbage', [np.full(90, np.nan), np.array([np.inf, 0]), np.zeros((90, 90)), np.zeros((3, 3, 3)), b'odd', 'text', None, 7, np.arange(90), np.ones(9, complex), np.full(90, 3e4), [['a']], {}],
                         ids=lambda value: type(value).__name__)
def test_garbage(avatar, voice, garbage):
    with AvatarStream(avatar, live=False, **LOUD) as stream:
        with pytest.raises(MediaError) as caught: stream.push(garbage)
        assert '\n' not in str(caught.value)
        stream.push(voice); stream.end()
        assert len(speech_frames(stream)) == 13


@pytest.mark.parametrize('rate', [1, 100, 10**9, -16000])
def test_wrong_rate(avatar, voice, rate):
    with AvatarStream(avatar, **LOUD) as stream, pytest.raises(ConfigError, match='makes no sense'): stream.push(voice, rate)
    with pytest.raises(ConfigError, match='makes no sense'): AvatarStream(avatar, sample_rate=rate, **LOUD)


def test_rate_changes_in_mid_speech(avatar, voice):
    with AvatarStream(avatar, live=False, **LOUD) as stream:
        stream.push(voice, 16000); stream.push(voice, 8000); stream.end()
        frames = speech_frames(stream)
    assert [frame.utterance for frame in frames].count(0) == 13 and [frame.utterance for frame in frames].count(1) == 25


def test_storm_of_interruptions(avatar, voice):
    with AvatarStream(avatar, live=False, **LOUD) as stream:
        for number in range(100):
            stream.push(voice)
            for _ in range(number % 4): stream.pull()
            said = stream.interrupt()
            frame = stream.pull(0)
            assert said['spoken'] == (number % 4)/25 and not frame.speaking and not frame.samples[80:].any() and stream.waiting == 0
        stream.push(voice); stream.end()
        frames = speech_frames(stream)
        assert len(frames) == 13 and (np.concatenate([frame.samples for frame in frames])[:8000] == voice).all()
        assert stream.figures()['interrupts'] == 100


def test_interruption_does_not_click(avatar):
    with AvatarStream(avatar, live=False, **LOUD) as stream:
        stream.push(np.full(16000, .5, np.float32))
        for _ in range(3): stream.pull()
        stream.interrupt()
        samples = stream.pull().samples
    assert samples[0] == .5 and np.abs(np.diff(samples)).max() < .02 and not samples[80:].any()


def test_close_in_the_middle(avatar, voice):
    stream = AvatarStream(avatar, live=False, most=1, **LOUD)
    errors = []
    def blocked(act):
        try: act()
        except StreamError as error: errors.append(str(error))
    stream.push(voice)
    threads = [threading.Thread(target=blocked, args=(act,)) for act in (lambda: stream.push(np.tile(voice, 30)), lambda: [stream.pull() for _ in range(10**6)])]
    for thread in threads: thread.start()
    time.sleep(.1)
    stream.close(); stream.close()
    for thread in threads: thread.join(5)
    assert len(errors) == 2 and all('closed' in error for error in errors)
    for act in (stream.pull, stream.interrupt, stream.end, lambda: stream.push(voice)):
        with pytest.raises(StreamError, match='is closed'): act()


def test_viewer_vanishes(avatar, voice):
    "A generator that is dropped and a stream that is closed leave no thread"
    stream = AvatarStream(avatar, **LOUD)
    stream.push(voice)
    for frame in stream.frames(): break
    stream.close()
    assert list(stream.frames()) == []


def test_deleted_while_in_use(home, avatar, voice):
    with AvatarStream(avatar, live=False, **LOUD) as stream:
        with pytest.raises(ConfigError, match="'she' is in use; close the streams"): Avatar.delete('she', home)
        stream.push(voice); stream.end()
        assert len(speech_frames(stream)) == 13


def test_deleted_before(home, toy, portrait, tmp_path):
    save_image(tmp_path/'she.png', portrait)
    gone = Avatar.prepare(tmp_path/'she.png', 'gone', toy, home, progress=False)
    Avatar.delete('gone', home)
    with pytest.raises(ConfigError, match='not there any more'): AvatarStream(gone, **LOUD)


# Several sessions

def test_sessions_are_served_alike(avatar, long_voice):
    with Batcher(avatar.bundle) as batcher:
        streams = [AvatarStream(avatar, batcher, live=False, **LOUD) for _ in range(4)]
        for stream in streams: stream.push(long_voice); stream.end()
        shown = [0]*4
        def watch(number):
            while streams[number].pull().speaking: shown[number] += 1
        threads = [threading.Thread(target=watch, args=(number,)) for number in range(4)]
        for thread in threads: thread.start()
        while all(thread.is_alive() for thread in threads): assert max(shown) - min(shown) <= 25; time.sleep(.002)
        for thread in threads: thread.join()
        for stream in streams: stream.close()
    assert shown == [50]*4 and batcher.counts['paint'] == 200 and batcher.counts['batches'] < 200


def test_a_hoarder_does_not_starve_others(avatar, long_voice, voice):
    "One session with an hour of speech, one that says a word: the word comes within a batch or two"
    with Batcher(avatar.bundle) as batcher, AvatarStream(avatar, batcher, live=False, most=60, **LOUD) as rich, AvatarStream(avatar, batcher, live=False, **LOUD) as poor:
        rich.push(np.tile(long_voice, 20))
        for _ in range(5): rich.pull()
        poor.push(voice); poor.end()
        before = batcher.counts['paint']
        assert poor.pull().speaking and batcher.counts['paint'] - before <= 3*batcher.batch_size


def test_room(avatar):
    with Batcher(avatar.bundle) as batcher:
        batcher.hear_seconds, batcher.paint_seconds = .1, .016
        with AvatarStream(avatar, batcher) as first:
            assert batcher.room(first.fps, 0)[0] == pytest.approx(1.)
            with pytest.raises(CapacityError, match='This machine makes 45 frames a second, too few for 2 streams at 25') as caught: AvatarStream(avatar, batcher)
            assert isinstance(caught.value, MuseTalkError)
            AvatarStream(avatar, batcher, check=False).close()
        with AvatarStream(avatar, batcher) as again: assert not again.pull().speaking


def test_clock_pace(avatar, voice):
    "Frames never come before their time, and speech that is pushed in real time is shown whole, however slow the machine"
    sound, frames = np.tile(voice, 2), []
    with AvatarStream(avatar, patience=60, **LOUD) as stream:
        def speak():
            for piece in np.array_split(sound, 25): stream.push(piece); time.sleep(.04)
            stream.end()
        thread, start = threading.Thread(target=speak), time.monotonic()
        for frame in stream.frames(60):
            frames.append(frame)
            assert time.monotonic() - start >= float(frame.time) - .001
            if frame.number == 3: thread.start()
            if frame.last: break
        thread.join()
    assert (np.concatenate([frame.samples for frame in frames if frame.speaking]) == sound).all()
