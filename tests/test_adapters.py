"""The avatar as the face of an agent. The frameworks need environments of their own, so that stand-ins with the same names take their place here;
wherever LiveKit Agents or Pipecat is installed, the stand-ins are compared with it, and the real runner and the real pipeline are run"""
import asyncio
import inspect
import sys
import time
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

import musetalk.adapters as adapters
from musetalk.adapters import AsyncAvatar, livekit_generator, pipecat_service
from musetalk.avatar import Avatar
from musetalk.bundle import load_bundle
from musetalk.core import ConfigError, MediaError, save_image

PATIENT = 120 # seconds; this machine may be busy


def there(name):
    "Whether a module is installed, without importing it"
    try: return find_spec(name) is not None
    except ModuleNotFoundError: return False


needs_livekit = pytest.mark.skipif(not there('livekit.agents'), reason='livekit-agents is not installed')
needs_pipecat = pytest.mark.skipif(not there('pipecat'), reason='pipecat-ai is not installed')


@pytest.fixture(scope='module')
def toy(toy_folder): return load_bundle(toy_folder, device='cpu', dtype='float32')


@pytest.fixture(scope='module')
def avatar(tmp_path_factory, toy, portrait):
    folder = tmp_path_factory.mktemp('avatars')
    save_image(folder/'she.png', portrait[:159, :157])
    return Avatar.prepare(folder/'she.png', 'she', toy, folder/'home', progress=False)


@pytest.fixture(scope='module')
def words(voice): return np.int16(voice*32767)


def finish(coroutine): return asyncio.run(asyncio.wait_for(coroutine, PATIENT))


# What is published, as far as it is used

class VideoFrame:
    def __init__(self, width, height, type, data): self.width, self.height, self.type, self.data = width, height, type, data


class AudioFrame:
    def __init__(self, data, sample_rate, num_channels, samples_per_channel): self.data, self.sample_rate, self.num_channels, self.samples_per_channel = data, sample_rate, num_channels, samples_per_channel


class AudioSegmentEnd: pass


class AvatarOptions:
    def __init__(self, video_width, video_height, video_fps, audio_sample_rate, audio_channels): self.video_width, self.video_height, self.video_fps, self.audio_sample_rate, self.audio_channels = video_width, video_height, video_fps, audio_sample_rate, audio_channels


class VideoGenerator:
    async def push_audio(self, frame): raise NotImplementedError
    def clear_buffer(self): raise NotImplementedError
    def __aiter__(self): raise NotImplementedError


class Frame: pass
class StartFrame(Frame): pass
class EndFrame(Frame): pass
class InterruptionFrame(Frame): pass
class TextFrame(Frame):
    def __init__(self, text): self.text = text


class TTSStoppedFrame(Frame):
    def __init__(self, context_id=None): self.context_id = context_id


class TTSAudioRawFrame(Frame):
    def __init__(self, audio, sample_rate, num_channels, context_id=None): self.audio, self.sample_rate, self.num_channels, self.context_id = audio, sample_rate, num_channels, context_id


class OutputImageRawFrame(Frame):
    def __init__(self, image, size, format): self.image, self.size, self.format = image, size, format


class ServiceSettings:
    def __init__(self, model=None): self.model = model


class AIService:
    def __init__(self, settings=None, **kwargs): self.pushed, self.errors, self.running = [], [], set()
    async def process_frame(self, frame, direction): pass
    async def push_frame(self, frame, direction='down'): self.pushed.append(frame)
    async def push_error(self, error_msg, exception=None): self.errors.append(error_msg)
    async def cleanup(self): pass

    def create_task(self, coroutine):
        task = asyncio.ensure_future(coroutine)
        self.running.add(task)
        task.add_done_callback(self.running.discard)
        return task

    async def cancel_task(self, task): task.cancel(); await asyncio.gather(task, return_exceptions=True)


LIVEKIT = {'livekit.rtc':dict(VideoFrame=VideoFrame, AudioFrame=AudioFrame, VideoBufferType=SimpleNamespace(RGB24='rgb24')),
           'livekit.agents.voice.avatar':dict(AudioSegmentEnd=AudioSegmentEnd, AvatarOptions=AvatarOptions, VideoGenerator=VideoGenerator)}
PIPECAT = {'pipecat.frames.frames':{kind.__name__:kind for kind in (StartFrame, EndFrame, InterruptionFrame, TextFrame, TTSStoppedFrame, TTSAudioRawFrame, OutputImageRawFrame)},
           'pipecat.services.ai_service':dict(AIService=AIService), 'pipecat.services.settings':dict(ServiceSettings=ServiceSettings)}


@pytest.fixture
def stand_ins(monkeypatch):
    "LiveKit and Pipecat as above, whether they are installed or not"
    for full, content in (LIVEKIT | PIPECAT).items():
        parts = full.split('.')
        for count in range(1, len(parts) + 1):
            name = '.'.join(parts[:count])
            if name not in made: made[name] = ModuleType(name)
            if count > 1: setattr(made['.'.join(parts[:count - 1])], parts[count - 1], made[name])
        vars(made[full]).update(content)
    for name, module in made.items(): monkeypatch.setitem(sys.modules, name, module)
    classes = adapters._livekit_generator, adapters._pipecat_service
    for kind in classes: kind.cache_clear()
    yield
    for kind in classes: kind.cache_clear()


made = {}


def same_signature(ours, real):
    "Whatever ours takes, the real one takes: by the same names, in the same order, and asks for nothing else"
    ours, real = ([parameter for parameter in inspect.signature(kind).parameters.values() if parameter.name != 'self' and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)] for kind in (ours, real))
    names = [parameter.name for parameter in real]
    assert [parameter.name for parameter in ours if parameter.name not in names] == []
    needed = {parameter.name for parameter in real if parameter.default is parameter.empty}
    assert needed <= {parameter.name for parameter in ours}
    positions = [names.index(parameter.name) for parameter in ours if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and real[names.index(parameter.name)].kind is parameter.POSITIONAL_OR_KEYWORD]
    assert positions == sorted(positions)


@needs_livekit
def test_stand_ins_are_like_livekit():
    from importlib import import_module
    for module, content in LIVEKIT.items():
        real = import_module(module)
        for name, ours in content.items():
            if isinstance(ours, type) and ours is not AudioSegmentEnd and ours is not VideoGenerator: same_signature(ours, getattr(real, name))
            else: assert hasattr(real, name)
    generator = import_module('livekit.agents.voice.avatar').VideoGenerator
    assert generator.__abstractmethods__ == {'push_audio', 'clear_buffer', '__aiter__'}
    for name in ('push_audio', 'clear_buffer', '__aiter__'): same_signature(getattr(VideoGenerator, name), getattr(generator, name))
    assert issubclass(adapters._livekit_generator(), generator)


@needs_pipecat
def test_stand_ins_are_like_pipecat():
    from importlib import import_module
    for module, content in PIPECAT.items():
        for name, ours in content.items(): same_signature(ours, getattr(import_module(module), name))
    real = import_module('pipecat.services.ai_service').AIService
    for name in ('process_frame', 'push_frame', 'push_error', 'cleanup', 'create_task', 'cancel_task'):
        same_signature(getattr(AIService, name), getattr(real, name))
        assert inspect.iscoroutinefunction(getattr(AIService, name)) == inspect.iscoroutinefunction(getattr(real, name)), name
    assert issubclass(adapters._pipecat_service(), real)


@pytest.mark.parametrize('make, said', [(livekit_generator, 'pip install livekit-agents'), (pipecat_service, 'pip install pipecat-ai')])
def test_what_is_not_installed_is_told(avatar, monkeypatch, make, said):
    for kind in (adapters._livekit_generator, adapters._pipecat_service): kind.cache_clear()
    for name in ('livekit', 'pipecat', 'pipecat.frames'): monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=said): make(avatar)


# The avatar in an event loop

def test_sound_of_any_kind(avatar, voice, words):
    "Rates and channels as they come; the sound that is given back has the rate that was wanted"
    async def act():
        async with AsyncAvatar(avatar, sample_rate=16000, check=False) as talker:
            await talker.push(words, 16000); talker.end()
            await talker.push(np.stack([words, words], 1), 16000); talker.end()
            await talker.push(np.repeat(words, 3), 48000); talker.end()
            frames, over = [], 0
            async for frame in talker.frames():
                frames.append(frame)
                over += talker.over(frame)
                if over == 3: return frames
    frames = [frame for frame in finish(act()) if frame.speaking]
    for number in range(3):
        heard = np.concatenate([frame.samples for frame in frames if frame.utterance == number])[:8000]
        assert np.abs(heard - voice).max() < (.01 if number < 2 else .1)
    assert [frame.last for frame in frames].count(True) == 3


def test_push_waits_for_room_and_gives_way(avatar, words):
    "A minute of speech at once neither fails nor blocks the loop, and an interruption ends the waiting"
    async def act():
        async with AsyncAvatar(avatar, check=False, most=2) as talker:
            pushing = asyncio.ensure_future(talker.push(np.tile(words, 120), 16000))
            await asyncio.sleep(.3)
            full = talker.stream.waiting
            assert not pushing.done()
            talker.interrupt()
            await asyncio.wait_for(pushing, 5)
            return full, talker.stream.waiting, talker.busy
    full, left, busy = finish(act())
    assert 1.5 < full <= 2 and left == 0 and not busy


def test_nonsense_is_refused(avatar):
    async def act():
        async with AsyncAvatar(avatar, check=False) as talker:
            with pytest.raises(MediaError, match='two bytes'): await talker.push(b'odd', 16000)
            with pytest.raises(ConfigError, match='100 Hz'): await talker.push(np.zeros(90, np.float32), 100)
            assert not talker.end() and not talker.busy
    finish(act())


def test_a_pause_is_not_an_end(avatar, words):
    "Nothing comes for a while in the midst of a sentence: the end is where the framework says it is"
    async def act():
        async with AsyncAvatar(avatar, sample_rate=16000, check=False) as talker:
            await talker.push(words, 16000)
            over, shown, count = 0, [], 0
            async for frame in talker.frames():
                shown.append(frame)
                over += talker.over(frame)
                count += 1
                if count == 30: assert over == 0; await talker.push(words, 16000); talker.end()
                if over: return shown
    shown = [frame for frame in finish(act()) if frame.speaking]
    assert sum(len(frame.samples) for frame in shown) == 16000 and [frame.last for frame in shown] == [False]*24 + [True]


def test_what_the_worker_trips_over_is_reported(avatar, toy, words, monkeypatch):
    "The end of what was lost is reported too, so that an agent does not wait for ever, and the next piece is said"
    def broken(*args, **others): raise RuntimeError('out of paint')
    async def act():
        async with AsyncAvatar(avatar, sample_rate=16000, check=False) as talker:
            reports = []
            talker.report = lambda error: reports.append(str(error))
            with monkeypatch.context() as patch:
                patch.setattr(type(toy), 'generate', broken)
                await talker.push(words, 16000); talker.end()
                async for frame in talker.frames():
                    if talker.over(frame): break
            await talker.push(words, 16000); talker.end()
            count = 0
            async for frame in talker.frames():
                count += frame.speaking
                if talker.over(frame): return reports, count
    reports, count = finish(act())
    assert len(reports) == 1 and 'out of paint' in reports[0] and count == 13


def test_frames_keep_time(avatar, words):
    "No frame comes early while it is silent, and two at most while it speaks"
    async def act():
        async with AsyncAvatar(avatar, check=False) as talker:
            start, shown = time.perf_counter(), []
            async for frame in talker.frames():
                shown.append((time.perf_counter() - start - frame.number/25, frame.speaking))
                if frame.number == 5: await talker.push(words, 16000); talker.end()
                if talker.over(frame): return shown
    shown = finish(act())
    assert min(early for early, speaking in shown[:6]) > -.002 and min(early for early, speaking in shown) > -.082


def test_close_ends_the_frames(avatar):
    async def act():
        talker = AsyncAvatar(avatar, check=False)
        async def watch(): return [frame.number async for frame in talker.frames()]
        watching = asyncio.ensure_future(watch())
        await asyncio.sleep(.2)
        await talker.close(); await talker.close()
        return await asyncio.wait_for(watching, 5)
    numbers = finish(act())
    assert numbers == list(range(len(numbers))) and numbers


# LiveKit, with stand-ins

async def pushed_to(face, words):
    for piece in np.array_split(words, 9): await face.push_audio(AudioFrame(piece.tobytes(), 16000, 1, len(piece)))


def test_livekit_segments(stand_ins, avatar, words):
    "Each end comes back once, after all its sound; an end of nothing does not"
    async def act():
        face, items = livekit_generator(avatar, sample_rate=24000, check=False), []
        await face.push_audio(AudioSegmentEnd())
        for _ in range(2): await pushed_to(face, words); await face.push_audio(AudioSegmentEnd())
        async for item in face:
            items.append(item)
            if sum(isinstance(item, AudioSegmentEnd) for item in items) == 2: break
        await face.aclose()
        return items, face.options
    items, options = finish(act())
    ends = [number for number, item in enumerate(items) if isinstance(item, AudioSegmentEnd)]
    sizes = [sum(item.samples_per_channel for item in part if isinstance(item, AudioFrame)) for part in (items[:ends[0]], items[ends[0]:])]
    assert sizes == [13*960, 13*960] and isinstance(items[ends[0] - 1], AudioFrame)
    pictures = [item for item in items if isinstance(item, VideoFrame)]
    assert {(item.width, item.height, len(item.data), item.type) for item in pictures} == {(156, 158, 156*158*3, 'rgb24')}
    assert (options.video_width, options.video_height, options.video_fps, options.audio_sample_rate, options.audio_channels) == (156, 158, 25, 24000, 1)
    assert all(isinstance(before, VideoFrame) for before, item in zip(items, items[1:]) if isinstance(item, AudioFrame)), 'no sound without its picture'


def test_livekit_interruption(stand_ins, avatar, words):
    "Nothing is heard of what was cleared, not even of the frame that is on its way, and its end is not reported"
    async def act():
        face, after = livekit_generator(avatar, check=False), []
        pull = face.talker.stream.pull
        def slow(wait): frame = pull(wait); time.sleep(.02); return frame
        face.talker.stream.pull = slow
        await pushed_to(face, np.tile(words, 4)); await face.push_audio(AudioSegmentEnd())
        cleared = False
        async for item in face:
            if cleared: after.append(item)
            elif isinstance(item, AudioFrame) and face.talker.stream.pull is slow:
                asyncio.get_running_loop().call_later(.01, face.clear_buffer) # in the midst of a pull
                cleared = True
            if len(after) == 12: break
        left = face.talker.busy, face.talker.stream.waiting
        await face.aclose()
        return after, left
    after, left = finish(act())
    sounds = [number for number, item in enumerate(after) if isinstance(item, AudioFrame)]
    assert left == (False, 0) and not any(isinstance(item, AudioSegmentEnd) for item in after) and (not sounds or max(sounds) <= 1)


# Pipecat, with stand-ins

def spoken(frames, context): return [frame for frame in frames if isinstance(frame, TTSAudioRawFrame) and frame.context_id == context]


def test_pipecat_order(stand_ins, avatar, words):
    "Pictures go on all the time, speech comes back with them and in its own order; what is not speech passes"
    async def act():
        face = pipecat_service(avatar, sample_rate=16000, check=False)
        async def send(*frames):
            for frame in frames: await face.process_frame(frame, 'down')
        start, text, stops, end = StartFrame(), TextFrame('Hello'), [TTSStoppedFrame('a'), TTSStoppedFrame('b'), TTSStoppedFrame('c')], EndFrame()
        await send(stops[2]) # of nothing: passes at once
        await send(start, TTSAudioRawFrame(words.tobytes(), 16000, 1, 'a'), stops[0], text, TTSAudioRawFrame(np.stack([words, words], 1).tobytes(), 16000, 2, 'b'), stops[1], end)
        at_end = list(face.pushed)
        await face.cleanup()
        assert face.task is None and not face.errors
        return at_end, start, text, stops, end
    pushed, start, text, stops, end = finish(act())
    assert pushed[0] is stops[2] and pushed[1] is start and pushed[-1] is end
    assert pushed.index(text) < pushed.index(stops[0]) < pushed.index(stops[1])
    for context, stop in zip('ab', stops):
        sounds = spoken(pushed, context)
        assert len(sounds) == 13 and pushed.index(sounds[-1]) < pushed.index(stop) and sum(len(sound.audio) for sound in sounds) == 13*1280
        assert np.abs(np.frombuffer(b''.join(sound.audio for sound in sounds), np.int16)[:8000].astype(int) - words).max() <= 2
    assert all(frame.size == (156, 158) and len(frame.image) == 156*158*3 and frame.format == 'RGB' for frame in pushed if isinstance(frame, OutputImageRawFrame))


def test_pipecat_interruption(stand_ins, avatar, words):
    async def act():
        face = pipecat_service(avatar, check=False)
        for frame in (StartFrame(), TTSAudioRawFrame(np.tile(words, 6).tobytes(), 16000, 1, 'a'), TTSStoppedFrame('a')): await face.process_frame(frame, 'down')
        while not spoken(face.pushed, 'a'): await asyncio.sleep(.01)
        await face.process_frame(InterruptionFrame(), 'down')
        count = len(face.pushed)
        await asyncio.sleep(.3)
        after = face.pushed[count:]
        for frame in (TTSAudioRawFrame(words.tobytes(), 16000, 1, 'b'), TTSStoppedFrame('b'), EndFrame()): await face.process_frame(frame, 'down')
        await face.cleanup()
        return after, face.pushed
    after, pushed = finish(act())
    assert after and all(isinstance(frame, OutputImageRawFrame) for frame in after)
    assert [frame.context_id for frame in pushed if isinstance(frame, TTSStoppedFrame)] == ['b'] and len(spoken(pushed, 'b')) == 13


def test_pipecat_is_told_of_errors(stand_ins, avatar, toy, words, monkeypatch):
    def broken(*args, **others): raise RuntimeError('out of paint')
    async def act():
        face = pipecat_service(avatar, check=False)
        await face.process_frame(StartFrame(), 'down')
        await face.process_frame(TTSAudioRawFrame(b'odd', 16000, 1, 'a'), 'down')
        monkeypatch.setattr(type(toy), 'generate', broken)
        for frame in (TTSAudioRawFrame(words.tobytes(), 16000, 1, 'b'), TTSStoppedFrame('b')): await face.process_frame(frame, 'down')
        while len(face.errors) < 2 or not any(isinstance(frame, TTSStoppedFrame) for frame in face.pushed): await asyncio.sleep(.02)  # errors come by a task of their own
        await face.cleanup()
        return face.errors
    errors = finish(act())
    assert len(errors) == 2 and 'two bytes' in errors[0] and 'out of paint' in errors[1]


# The real ones, with the model that comes along

@pytest.fixture(scope='module')
def astronaut(tmp_path_factory):
    from musetalk.bench import demo_portrait
    folder = tmp_path_factory.mktemp('astronauts')
    save_image(folder/'she.png', demo_portrait(256))
    return Avatar.prepare(folder/'she.png', 'she', load_bundle('mini', 'cpu'), folder/'home', progress=False)


@pytest.fixture(scope='module')
def speech():
    from musetalk.bench import demo_speech
    from musetalk.sound import load_audio
    return np.int16(load_audio(demo_speech())[8000:40000]*32767) # 2 s


class Room:
    "A room of LiveKit with nobody else in it"
    def __init__(self): self.local_participant = self
    def on(self, *event): pass
    def off(self, *event): pass
    def isconnected(self): return True
    async def publish_track(self, track, options): return self
    async def wait_for_subscription(self): pass


@needs_livekit
def test_real_livekit(astronaut, speech, monkeypatch):
    "LiveKit's own runner, synchronizer and sources: an answer that is heard to its end, one that is cut off, and one more"
    from livekit import rtc
    from livekit.agents.voice.avatar import AvatarRunner, QueueAudioOutput
    seen, heard, pairs, last = {}, {}, [], [None]
    push, capture, play = rtc.AVSynchronizer.push, rtc.VideoSource.capture_frame, rtc.AudioSource.capture_frame
    async def pushed(self, frame, timestamp=None):
        if isinstance(frame, rtc.AudioFrame): pairs.append((last[0], frame))
        else: last[0] = frame
        await push(self, frame, timestamp)
    def captured(self, frame, **others): seen[id(frame)] = time.perf_counter(), frame; return capture(self, frame, **others)
    async def played(self, frame): heard[id(frame)] = time.perf_counter() + self.queued_duration, frame; await play(self, frame)
    for kind, name, wrapper in ((rtc.AVSynchronizer, 'push', pushed), (rtc.VideoSource, 'capture_frame', captured), (rtc.AudioSource, 'capture_frame', played)): monkeypatch.setattr(kind, name, wrapper)

    async def act():
        face, audio = livekit_generator(astronaut, sample_rate=24000, check=False), QueueAudioOutput(sample_rate=24000)
        runner = AvatarRunner(Room(), audio_recv=audio, video_gen=face, options=face.options)
        await runner.start()
        async def say():
            for piece in np.array_split(np.repeat(speech, 3)[::2], 100): await audio.capture_frame(rtc.AudioFrame(piece.tobytes(), 24000, 1, len(piece)))
            audio.flush()
        told = []
        await asyncio.sleep(1)
        for cut in (False, True, False):
            await say()
            if cut:
                while not audio._data_ch.empty() or len(pairs) < 70: await asyncio.sleep(.01)
                audio.clear_buffer()
            told.append(await audio.wait_for_playout())
            if cut: await asyncio.sleep(.5)
        await runner.aclose(); await face.aclose()
        return told
    told = finish(act())
    assert [event.interrupted for event in told] == [False, True, False]
    assert told[0].playback_position == pytest.approx(2, abs=.05) and told[2].playback_position == pytest.approx(2, abs=.05) and .5 < told[1].playback_position < 1.5
    offsets = 1000*np.array([heard[id(sound)][0] - seen[id(picture)][0] for picture, sound in pairs if id(picture) in seen])
    print(f'LiveKit {rtc.__version__}: {len(seen)} pictures, {len(pairs)} pieces of sound, which is heard {np.median(offsets):.0f} ms after its picture (5 to 95 %: {np.percentile(offsets, 5):.0f} to {np.percentile(offsets, 95):.0f})')
    assert abs(np.median(offsets)) < 80


@needs_pipecat
def test_real_pipecat(astronaut, speech):
    "A pipeline of Pipecat's: an answer, one that is cut off, one more, and the end"
    from pipecat.frames import frames as kinds
    from pipecat.frames.frames import InterruptionFrame, OutputImageRawFrame, TTSAudioRawFrame, TTSStoppedFrame
    from pipecat.tests.utils import SleepFrame, run_test
    def say(context): return [TTSAudioRawFrame(piece.tobytes(), 16000, 1, context_id=context) for piece in np.array_split(speech, 20)] + [TTSStoppedFrame(context_id=context)]
    async def act():
        face, came = pipecat_service(astronaut, sample_rate=24000, check=False), []
        push = face.push_frame
        async def pushed(frame, *direction): came.append(frame); await push(frame, *direction)
        face.push_frame = pushed
        def script(): # what is sent waits for what came
            yield from say('one')
            while not any(isinstance(frame, TTSStoppedFrame) for frame in came): yield SleepFrame(.05)
            yield from say('two')
            while sum(isinstance(frame, TTSAudioRawFrame) and frame.context_id == 'two' for frame in came) < 10: yield SleepFrame(.05)
            yield InterruptionFrame()
            yield SleepFrame(.3)
            yield from say('three')
        down, up = await run_test(face, frames_to_send=script(), start_timeout=20)
        assert face.talker.stream.closed
        return down, up
    down, up = finish(act())
    assert not [frame for frame in up if isinstance(frame, kinds.ErrorFrame)]
    stops = [frame.context_id for frame in down if isinstance(frame, TTSStoppedFrame)]
    lengths = {context:sum(len(frame.audio)//2 for frame in down if isinstance(frame, TTSAudioRawFrame) and frame.context_id == context)/24000 for context in ('one', 'two', 'three')}
    print('Pipecat:', len([frame for frame in down if isinstance(frame, OutputImageRawFrame)]), 'pictures,', lengths, stops)
    assert stops == ['one', 'three'] and lengths['one'] == lengths['three'] == 2 and 0 < lengths['two'] < 2
    speaking = [before for before, frame in zip(down, down[1:]) if isinstance(frame, TTSAudioRawFrame)]
    assert all(isinstance(frame, OutputImageRawFrame) and frame.size == (256, 256) for frame in speaking)
