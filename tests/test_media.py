"Containers, odd inputs and failures of `musetalk.media`, with tiny files made on the spot"
import json
import os
import resource
import signal
import wave
from fractions import Fraction

import av
import cv2
import numpy as np
import pytest
from PIL import Image

from musetalk.core import MediaError
from musetalk.media import VideoSource, constant_rate, frame_count_for, loop_order, looped, media_info
from musetalk.picture import ColorTags, read_image
from musetalk.sound import AudioSource, audio_blocks, audio_duration, load_audio, write_audio
from musetalk.writer import VideoWriter

RATES = [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(15), Fraction(25), Fraction(50), Fraction(60)]
KINDS = [('mp4', 'libx264', 'yuv420p'), ('mov', 'libx264', 'yuv420p'), ('mov', 'qtrle', 'rgb24'), ('mov', 'prores_ks', 'yuv422p10le'),
         ('avi', 'mpeg4', 'yuv420p'), ('avi', 'libx264', 'yuv420p'), ('avi', 'mjpeg', 'yuvj420p'), ('mkv', 'libx264', 'yuv420p'),
         ('webm', 'libvpx', 'yuv420p'), ('webm', 'libvpx-vp9', 'yuv420p'), ('flv', 'flv', 'yuv420p'), ('flv', 'libx264', 'yuv420p')]


def numbered(index, width=96, height=64):
    "A frame that shows its number as eight black or white bars"
    image = np.zeros((height, width, 3), np.uint8)
    for bit in range(8): image[:, bit*width//8:(bit + 1)*width//8] = 255*(index >> bit & 1)
    return image

def number(image):
    "The number that a frame shows"
    height, width = image.shape[:2]
    return sum(int(image[height//2, int((bit + .5)*width/8)].mean() > 128) << bit for bit in range(8))

def make_video(path, count=20, fps=Fraction(25), codec='libx264', pixels='yuv420p', options=None, times=None, time_base=None, rotation=None,
               make=numbered, start=0, width=96, height=64, sound=None):
    "Write a video with PyAV alone, so that the reader is not judged by our own writer"
    with av.open(str(path), 'w') as container:
        stream = container.add_stream(codec, rate=fps, options=options or {})
        stream.width, stream.height, stream.pix_fmt = width, height, pixels
        if rotation is not None: stream.set_display_rotation(rotation)
        if time_base: stream.codec_context.time_base = time_base
        if sound is not None: track = container.add_stream('pcm_s16le', rate=8000, layout='mono')
        for index in range(count):
            frame = av.VideoFrame.from_ndarray(make(index, width, height)).reformat(format=pixels)
            frame.pts, frame.time_base = (times[index], time_base) if times else (index + start, 1/Fraction(fps))
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
        if sound is not None:
            samples, first = sound
            block = av.AudioFrame.from_ndarray((samples[None]*32767).astype(np.int16), 's16', 'mono')
            block.sample_rate, block.pts, block.time_base = 8000, first, Fraction(1, 8000)
            container.mux([*track.encode(block), *track.encode(None)])
    return path

def numbers(frames): return [number(frame.image) for frame in frames]


# Containers and frame rates

@pytest.mark.parametrize('fps', RATES, ids=str)
@pytest.mark.parametrize('suffix,codec,pixels', KINDS, ids=lambda value: str(value))
def test_containers(tmp_path, suffix, codec, pixels, fps):
    source = VideoSource(make_video(tmp_path/f'clip.{suffix}', 12, fps, codec, pixels))
    assert (source.fps, source.frame_count, source.duration) == (fps, 12, 12/fps)
    frames = list(source)
    assert numbers(frames) == list(range(12)) == [frame.index for frame in frames]
    assert [frame.time for frame in frames] == [index/fps for index in range(12)]
    assert numbers(looped(source, 30, 'pingpong', chunk=4)) == list(loop_order(12, 30, 'pingpong'))

@pytest.mark.parametrize('fps', RATES, ids=str)
@pytest.mark.parametrize('suffix', ['mp4', 'mov', 'mkv'])
def test_written_rates_are_exact(tmp_path, suffix, fps):
    with VideoWriter(tmp_path/f'out.{suffix}', fps, 96, 64) as writer:
        for index in range(9): writer.write(numbered(index))
    source = VideoSource(tmp_path/f'out.{suffix}')
    assert (source.fps, source.frame_count) == (fps, 9) and numbers(source) == list(range(9))
    with av.open(str(tmp_path/f'out.{suffix}')) as container: assert container.streams.video[0].average_rate == fps

def test_constant_rate():
    assert constant_rate(Fraction(2997, 100), Fraction(2997, 100)) == Fraction(30000, 1001)
    assert constant_rate(Fraction(29), Fraction(29)) == 29
    assert constant_rate(Fraction(2955, 100), Fraction(90000)) == Fraction(30000, 1001)
    assert constant_rate(Fraction(27), Fraction(90000)) == 27
    assert constant_rate(None) == 25 and constant_rate(Fraction(1000), Fraction(30)) == 30
    for fps in RATES: assert constant_rate(fps, fps) == fps


# Time stamps

def test_variable_rate_is_retimed(tmp_path):
    times = [0, 100, 133, 167, 200, 467, 500, 533]
    path = make_video(tmp_path/'vfr.mkv', 8, Fraction(30), times=times, time_base=Fraction(1, 1000))
    source = VideoSource(path, fps=30)
    assert numbers(source) == [0, 0, 0, 1, 2, 3, 4, 4, 4, 4, 4, 4, 4, 4, 5, 6, 7]
    assert source.frame_count == 17 and VideoSource(path).rate_varies

def test_other_rate_on_request(tmp_path):
    source = VideoSource(make_video(tmp_path/'clip.mp4', 20, Fraction(50)), fps='25')
    assert source.frame_count == 10 and source.duration == Fraction(2, 5)
    assert all(abs(2*index - seen) <= 1 for index, seen in enumerate(numbers(source)))
    source = VideoSource(tmp_path/'clip.mp4', fps=100)
    assert numbers(source) == [index//2 for index in range(40)]

LONG = [('mp4', 'libx264', {'g':'250', 'bf':'3', 'b_strategy':'0'}, 0), ('mp4', 'libx264', {'x264-params':'keyint=10:min-keyint=10:open-gop=1:bframes=3:scenecut=0'}, 0),
        ('mkv', 'libx264', {'x264-params':'keyint=10:min-keyint=10:open-gop=1:bframes=3:scenecut=0'}, 0), ('mp4', 'libx264', {'g':'9'}, 40),
        ('mkv', 'libx264', {'g':'9'}, 7), ('mp4', 'libx264', {'g':'7', 'bf':'2'}, -5), ('avi', 'mpeg4', {'g':'9', 'bf':'2'}, 0), ('webm', 'libvpx-vp9', {'g':'16'}, 0)]

@pytest.mark.parametrize('suffix,codec,options,start', LONG)
def test_backwards_equals_forwards(tmp_path, suffix, codec, options, start):
    path = make_video(tmp_path/f'long.{suffix}', 60, Fraction(25), codec, options=options, start=start,
                      make=lambda i, w, h: np.roll(cv2.circle(numbered(i, w, h), (i, 30), 12, (200, 60, 20), -1), i, 0))
    source = VideoSource(path)
    whole = [frame.image.copy() for frame in source]
    assert len(whole) == source.frame_count
    for chunk in (5, 48):
        for frame, index in zip(looped(source, 2*len(whole) + 7, 'pingpong', chunk), loop_order(len(whole), 2*len(whole) + 7, 'pingpong'), strict=True):
            assert frame.index == index and (frame.image == whole[index]).all()
    for start in (1, 17, len(whole) - 1): assert (next(source.frames(start, start + 1)).image == whole[start]).all()
    assert list(source.frames(9, 9)) == [] and len(list(source.frames(55, 1000))) == len(whole) - 55

@pytest.mark.parametrize('mode,expected', [('pingpong', [0, 1, 2, 3, 2, 1, 0, 1, 2]), ('repeat', [0, 1, 2, 3, 0, 1, 2, 3, 0]), ('hold', [0, 1, 2, 3, 3, 3, 3, 3, 3])])
def test_loop_modes(tmp_path, mode, expected):
    source = VideoSource(make_video(tmp_path/'clip.mp4', 4))
    assert list(loop_order(4, 9, mode)) == expected == numbers(looped(source, 9, mode)) == [f.index for f in looped(source, 9, mode)]
    assert list(loop_order(1, 3, mode)) == [0, 0, 0] and list(loop_order(2, 5, 'pingpong')) == [0, 1, 0, 1, 0]

def test_unknown_loop_mode():
    with pytest.raises(MediaError, match='pingpong, repeat or hold'): list(loop_order(3, 4, 'bounce'))


# Orientation, sizes, pixel formats, colour

@pytest.mark.parametrize('degrees', [0, 90, 180, -90])
def test_rotation(tmp_path, degrees):
    corner = lambda i, w, h: cv2.rectangle(np.full((h, w, 3), 30, np.uint8), (0, 0), (w//2 - 1, h//2 - 1), (250, 250, 250), -1)
    source = VideoSource(make_video(tmp_path/'turned.mp4', 3, rotation=degrees, make=corner))
    expected = np.rot90(corner(0, 96, 64), degrees//90)
    assert source.first().image.shape == expected.shape == (source.height, source.width, 3)
    assert np.abs(source.first().image.astype(int) - expected).mean() < 4

@pytest.mark.parametrize('width,height', [(101, 75), (100, 75), (101, 76), (98, 70), (97, 63)])
def test_odd_sizes(tmp_path, width, height):
    image = cv2.resize(np.random.default_rng(0).integers(0, 255, (8, 8, 3)).astype(np.uint8), (width, height))
    image[-1], image[:, -1] = (220, 40, 40), (40, 40, 220)
    with VideoWriter(tmp_path/'odd.mp4', 25, width, height, crf=2) as writer: writer.write(image)
    seen = VideoSource(tmp_path/'odd.mp4').first().image.astype(int)
    assert seen.shape == (height + height % 2, width + width % 2, 3)
    assert np.abs(seen[:height, :width].mean(2) - image.mean(2)).mean() < 3
    if height % 2: assert np.abs(seen[-1, 4:-4] - (220, 40, 40)).max() <= 8

def test_odd_source(tmp_path):
    source = VideoSource(make_video(tmp_path/'odd.webm', 4, codec='libvpx-vp9', width=97, height=63))
    assert source.first().image.shape == (63, 97, 3) and numbers(source) == list(range(4))

COLORS = [(128, 128, 128), (255, 255, 255), (0, 0, 0), (200, 40, 50), (30, 180, 60), (40, 60, 210), (222, 184, 160)]
TAGS = [None, ColorTags(1, 1, 1), ColorTags(6, 6, 6), ColorTags(5, 6, 5), ColorTags(9, 14, 9), ColorTags(1, 13, 1, True), ColorTags(2, 2, 2), ColorTags(5, 6, 6, True)]

@pytest.mark.parametrize('tags', TAGS, ids=str)
def test_colour_is_kept(tmp_path, tags):
    with VideoWriter(tmp_path/'flat.mp4', 25, 64, 64, color=tags, crf=18) as writer:
        for color in COLORS: writer.write(np.full((64, 64, 3), color, np.uint8))
    source = VideoSource(tmp_path/'flat.mp4')
    for frame, color in zip(source, COLORS, strict=True): assert np.abs(frame.image.astype(int) - color).max() <= 3
    if tags: assert (source.color.primaries, source.color.transfer, source.color.full_range) == (tags.primaries, tags.transfer, tags.full_range)
    if tags and tags.matrix != 2: assert source.color.matrix == tags.matrix
    with av.open(str(tmp_path/'flat.mp4')) as container:      # another reader, told nothing
        for frame, color in zip(container.decode(video=0), COLORS, strict=True):
            assert np.abs(frame.to_ndarray(format='rgb24', interpolation='BICUBIC').astype(int) - color).max() <= 4

@pytest.mark.parametrize('width,height,matrix', [(64, 48, 6), (1280, 720, 1), (720, 1280, 1)])
def test_default_matrix_follows_size(tmp_path, width, height, matrix):
    with VideoWriter(tmp_path/'tag.mp4', 25, width, height) as writer: writer.write(np.full((height, width, 3), 90, np.uint8))
    assert VideoSource(tmp_path/'tag.mp4').color.matrix == matrix

@pytest.mark.parametrize('codec,pixels,suffix', [('libx264', 'yuv444p', 'mp4'), ('libx264', 'yuv422p', 'mp4'), ('libx264', 'yuv420p10le', 'mp4'),
                                                 ('libx264', 'gray', 'mp4'), ('ffv1', 'gray', 'mkv'), ('ffv1', 'bgr0', 'mkv'), ('qtrle', 'argb', 'mov'), ('mjpeg', 'yuvj422p', 'avi')])
def test_pixel_formats(tmp_path, codec, pixels, suffix):
    gray = pixels == 'gray'
    make = lambda i, w, h: np.full((h, w, 3), 140 if gray else (180, 90, 40), np.uint8)
    source = VideoSource(make_video(tmp_path/f'clip.{suffix}', 2, codec=codec, pixels=pixels, make=make))
    assert np.abs(source.first().image.astype(int) - make(0, 1, 1)).max() <= 4

def test_pixel_aspect_is_kept(tmp_path):
    with VideoWriter(tmp_path/'wide.mp4', 25, 96, 64, color=ColorTags(pixel_aspect=Fraction(16, 15))) as writer: writer.write(numbered(1))
    assert VideoSource(tmp_path/'wide.mp4').color.pixel_aspect == Fraction(16, 15)


# Pictures and folders

@pytest.mark.parametrize('suffix', ['png', 'jpg', 'jpeg', 'bmp', 'tif', 'tiff', 'webp', 'PNG'])
def test_pictures(tmp_path, suffix):
    image = cv2.resize(numbered(5), (80, 60))
    Image.fromarray(image).save(tmp_path/f'p.{suffix}')
    source = VideoSource(tmp_path/f'p.{suffix}')
    assert (source.kind, source.width, source.height, source.fps, source.frame_count) == ('image', 80, 60, 25, 1)
    assert np.abs(source.first().image.astype(int) - image).mean() < 8
    frames = list(looped(source, 5))
    assert [f.index for f in frames] == [0]*5 and all(f.image is frames[0].image for f in frames)

@pytest.mark.parametrize('mode,value', [('L', 90), ('1', 1), ('P', 3), ('CMYK', (0, 0, 0, 0)), ('I;16', 257*90), ('LA', (90, 255)), ('F', .5)])
def test_picture_modes(tmp_path, mode, value):
    Image.new(mode, (20, 10), value).save(tmp_path/('p.jpg' if mode == 'CMYK' else 'p.tif' if mode in 'F' else 'p.png'))
    image = read_image(next(tmp_path.iterdir()))
    assert image.shape == (10, 20, 3) and image.dtype == np.uint8
    if mode in ('L', 'I;16', 'LA'): assert (image == 90).all()
    if mode == 'F': assert (image == 128).all()

def test_alpha_lies_on_white(tmp_path):
    rgba = np.zeros((4, 6, 4), np.uint8)
    rgba[:, 2:4], rgba[:, 4:] = (200, 100, 0, 255), (200, 100, 0, 128)
    Image.fromarray(rgba).save(tmp_path/'cut.png')
    image = read_image(tmp_path/'cut.png')
    assert (image[:, :2] == 255).all() and (image[:, 2:4] == (200, 100, 0)).all() and np.abs(image[:, 4:].astype(int) - (227, 177, 127)).max() <= 1

@pytest.mark.parametrize('code', range(1, 9))
def test_exif_orientation(tmp_path, code):
    image = numbered(3, 48, 16)
    stored = {1:image, 2:image[:, ::-1], 3:image[::-1, ::-1], 4:image[::-1], 5:image.transpose(1, 0, 2), 6:np.rot90(image, 1),
              7:np.rot90(image.transpose(1, 0, 2), 2), 8:np.rot90(image, -1)}[code]
    exif = Image.Exif()
    exif[0x0112] = code
    (tmp_path/'f').mkdir()
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path/'f'/'p.png', exif=exif)
    assert (read_image(tmp_path/'f'/'p.png') == image).all()
    source = VideoSource(tmp_path/'f')
    assert (source.width, source.height) == (48, 16) and (source.first().image == image).all()

def test_folder_in_natural_order(tmp_path):
    for index in (10, 2, 1, 33, 9): Image.fromarray(numbered(index)).save(tmp_path/f'f{index}.png')
    (tmp_path/'notes.txt').write_text('not a picture')
    (tmp_path/'.hidden.png').write_text('neither')
    (tmp_path/'f3').mkdir()
    source = VideoSource(tmp_path, fps='30000/1001')
    assert (source.kind, source.frame_count, source.fps) == ('folder', 5, Fraction(30000, 1001))
    assert numbers(source) == [1, 2, 9, 10, 33] and numbers(looped(source, 8, chunk=2)) == [1, 2, 9, 10, 33, 10, 9, 2]

def test_folder_with_mixed_sizes(tmp_path):
    for index in range(4): Image.fromarray(numbered(index, 96, 80 if index == 2 else 64)).save(tmp_path/f'{index}.png')
    with pytest.raises(MediaError, match=r'2\.png is 96x80 but most .* 96x64.*resize'): VideoSource(tmp_path)

def test_folder_without_pictures(tmp_path):
    with pytest.raises(MediaError, match='holds no pictures'): VideoSource(tmp_path)


# Sound

def tone(seconds, rate, hertz=440): return (.5*np.sin(2*np.pi*hertz*np.arange(round(seconds*rate))/rate)).astype(np.float32)

def write_wav(path, channels, rate):
    with wave.open(str(path), 'wb') as file:
        file.setparams((channels.shape[0], 2, rate, 0, 'NONE', ''))
        file.writeframes((channels.T*32767).round().astype('<i2').tobytes())
    return path

@pytest.mark.parametrize('rate', [8000, 16000, 22050, 44100, 48000, 96000])
@pytest.mark.parametrize('channels', [1, 2, 6])
def test_sound_becomes_mono_16k(tmp_path, rate, channels):
    path = write_wav(tmp_path/'a.wav', np.stack([tone(1.5, rate)]*channels), rate)
    samples = load_audio(path)
    assert samples.dtype == np.float32 and len(samples) == 24000 and audio_duration(path) == Fraction(3, 2)
    if channels < 6: assert np.abs(samples - tone(1.5, 16000))[200:-200].max() < 2e-3
    assert np.abs(samples).max() <= 1
    blocks = list(audio_blocks(path, .37))
    assert {len(block) for block in blocks[:-1]} == {5920} and (np.concatenate(blocks) == samples).all()

@pytest.mark.parametrize('suffix,codec', [('mp3', 'libmp3lame'), ('m4a', 'aac'), ('flac', 'flac'), ('ogg', 'libopus'), ('opus', 'libopus'), ('aiff', 'pcm_s16be')])
def test_sound_formats(tmp_path, suffix, codec):
    with av.open(str(tmp_path/f'a.{suffix}'), 'w') as container:
        stream = container.add_stream(codec, rate=48000, layout='mono')
        block = av.AudioFrame.from_ndarray(tone(1, 48000)[None], 'fltp', 'mono')
        block.sample_rate, block.pts, block.time_base = 48000, 0, Fraction(1, 48000)
        fifo, resampler = av.AudioFifo(), av.AudioResampler(stream.format, 'mono', 48000)
        for piece in resampler.resample(block): fifo.write(piece)
        while piece := fifo.read(stream.frame_size or 1024, partial=True): container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    samples = load_audio(tmp_path/f'a.{suffix}')
    assert abs(len(samples)/16000 - 1) < .06 and np.abs(samples).max() > .3
    assert abs(float(audio_duration(tmp_path/f'a.{suffix}')) - len(samples)/16000) < 1e-3

@pytest.mark.parametrize('late', [-.25, 0, .25])
def test_sound_is_placed_against_its_video(tmp_path, late):
    samples = np.zeros(8000, np.float32)
    samples[4000] = .9                                         # a click half a second in
    path = make_video(tmp_path/'av.mkv', 25, start=10, sound=(samples, round((.4 + late)*8000)))
    heard = load_audio(path)
    assert abs(int(np.abs(heard).argmax())/16000 - (.5 + late)) < .002

def test_sixteen_bit_samples_are_exact(tmp_path):
    samples = np.random.default_rng(0).integers(-32767, 32768, 4000)
    write_audio(tmp_path/'a.wav', samples/32767)
    assert (load_audio(tmp_path/'a.wav') == (samples/32768).astype(np.float32)).all()

def test_long_gap_in_sound_is_filled(tmp_path):
    make_video(tmp_path/'v.mkv', 50)
    with av.open(str(tmp_path/'gap.mkv'), 'w') as container:
        video, track = container.add_stream('libx264', rate=25), container.add_stream('pcm_s16le', rate=8000, layout='mono')
        video.width, video.height, video.pix_fmt = 96, 64, 'yuv420p'
        for index in range(50): container.mux(video.encode(av.VideoFrame.from_ndarray(numbered(index))))
        container.mux(video.encode(None))
        for first in (0, 12000):
            block = av.AudioFrame.from_ndarray((tone(.5, 8000)[None]*32767).astype(np.int16), 's16', 'mono')
            block.sample_rate, block.pts, block.time_base = 8000, first, Fraction(1, 8000)
            container.mux(track.encode(block))
    heard = load_audio(tmp_path/'gap.mkv')
    assert len(heard) == 32000 and np.abs(heard[9000:23000]).max() < .01 and np.abs(heard[24100:]).max() > .4


# Writing with sound

@pytest.mark.parametrize('fps', RATES, ids=str)
def test_frames_and_sound_have_one_length(tmp_path, fps):
    path = write_wav(tmp_path/'a.wav', np.stack([tone(1.37, 44100), tone(1.37, 44100, 300)]), 44100)
    seconds = audio_duration(path)
    count = frame_count_for(seconds, fps)
    with VideoWriter(tmp_path/'o.mp4', fps, 96, 64, audio=path, duration=seconds) as writer:
        for index in range(count): writer.write(numbered(index))
    source = VideoSource(tmp_path/'o.mp4')
    assert source.frame_count == count == round(seconds*fps) and source.has_audio
    assert abs(source.duration - audio_duration(tmp_path/'o.mp4')) <= 1/fps
    with av.open(str(tmp_path/'o.mp4')) as container:
        sound = container.streams.audio[0]
        assert (sound.codec_context.name, sound.rate, sound.channels) == ('aac', 44100, 2)
        assert abs(sound.duration*sound.time_base - count/fps) <= 1/fps

@pytest.mark.parametrize('channels,rate,kept', [(1, 11025, (1, 11025)), (2, 8000, (2, 8000)), (6, 48000, (6, 48000)), (8, 44100, (2, 44100)), (2, 12345, (2, 48000)), (1, 192000, (1, 48000))])
def test_rate_and_channels_are_kept(tmp_path, channels, rate, kept):
    path = write_wav(tmp_path/'a.wav', np.stack([tone(.5, rate)]*channels), rate)
    with VideoWriter(tmp_path/'o.mp4', 25, 96, 64, audio=path) as writer:
        for index in range(12): writer.write(numbered(index))
    info = media_info(tmp_path/'o.mp4')
    assert (info['channels'], info['sample_rate']) == kept and abs(info['audio_seconds'] - .48) < .001

@pytest.mark.parametrize('suffix', ['mp4', 'mov', 'mkv'])
@pytest.mark.parametrize('rate', [16000, 44100, 48000, 10000])
def test_click_meets_flash(tmp_path, suffix, rate):
    samples, flash = np.zeros(2*rate, np.float32), 30
    samples[round(flash/25*rate):][:rate//100] = .9*np.sign(np.sin(np.arange(rate//100)*2))
    path = write_wav(tmp_path/'a.wav', samples[None], rate)
    with VideoWriter(tmp_path/f'o.{suffix}', 25, 96, 64, audio=path) as writer:
        for index in range(50): writer.write(np.full((64, 96, 3), 255*(index == flash), np.uint8))
    brightness = np.array([frame.image.mean() for frame in VideoSource(tmp_path/f'o.{suffix}')])
    heard = np.abs(load_audio(tmp_path/f'o.{suffix}'))
    loudness = np.array([heard[640*index:640*(index + 1)].sum() for index in range(50)])
    assert brightness.argmax() == flash and np.correlate(loudness, brightness, 'full').argmax() - 49 == 0
    assert abs(int((heard > .3).argmax())/16000 - flash/25) < .01

def test_longer_sound_is_trimmed_and_interleaved(tmp_path):
    path = write_wav(tmp_path/'a.wav', tone(30, 16000)[None], 16000)
    with VideoWriter(tmp_path/'o.mp4', 25, 96, 64, audio=path) as writer:
        for index in range(60): writer.write(numbered(index))
    assert abs(audio_duration(tmp_path/'o.mp4') - Fraction(60, 25)) <= Fraction(1, 25)
    with av.open(str(tmp_path/'o.mp4')) as container:
        ends = {'video':Fraction(0), 'audio':Fraction(0)}
        for packet in container.demux():
            if not packet.size: continue
            ends[packet.stream.type] = packet.dts*packet.time_base
            assert abs(ends['video'] - ends['audio']) < 1.5

def test_video_as_sound(tmp_path):
    path = make_video(tmp_path/'talk.mkv', 25, sound=(tone(1, 8000), 0))
    with VideoWriter(tmp_path/'o.mp4', 25, 96, 64, audio=path) as writer:
        for index in range(25): writer.write(numbered(index))
    assert VideoSource(tmp_path/'o.mp4').has_audio and media_info(tmp_path/'o.mp4')['sample_rate'] == 8000

@pytest.mark.parametrize('name', ['with space.mp4', "quo'te \"two\".mp4", 'semi;colon && $HOME.mp4', '你好 привет.mp4', 'a:b#c%03d.mp4', '-dash.mp4', 'concat:x.mp4'])
def test_names(tmp_path, name):
    sound = write_wav(tmp_path/name.replace('.mp4', '.wav'), tone(.2, 16000)[None], 16000)
    with VideoWriter(tmp_path/name, 25, 96, 64, audio=sound) as writer:
        for index in range(5): writer.write(numbered(index))
    assert numbers(VideoSource(tmp_path/name)) == list(range(5)) and media_info(tmp_path/name)['file'] == name

def test_relative_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with VideoWriter('-o.mp4', 25, 96, 64) as writer: writer.write(numbered(7))
    assert numbers(VideoSource('-o.mp4')) == [7] and os.listdir() == ['-o.mp4']

def test_crf_changes_size(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    for crf in (10, 40):
        with VideoWriter(tmp_path/f'{crf}.mp4', 25, 96, 64, crf=crf) as writer: writer.write(noise)
    assert (tmp_path/'10.mp4').stat().st_size > 2*(tmp_path/'40.mp4').stat().st_size

def test_same_input_same_file(tmp_path):
    sound = write_wav(tmp_path/'a.wav', tone(.4, 16000)[None], 16000)
    for name in 'xy':
        with VideoWriter(tmp_path/f'{name}.mp4', 25, 96, 64, audio=sound) as writer:
            for index in range(10): writer.write(numbered(index))
    assert (tmp_path/'x.mp4').read_bytes() == (tmp_path/'y.mp4').read_bytes()


# Failures

def test_missing_files(tmp_path):
    for use in (VideoSource, load_audio, audio_duration, media_info, audio_blocks, AudioSource):
        with pytest.raises(MediaError, match='no.mp4 does not exist; check'): use(tmp_path/'no.mp4')
    with pytest.raises(MediaError, match='no.wav does not exist'): VideoWriter(tmp_path/'o.mp4', 25, 96, 64, audio=tmp_path/'no.wav')

@pytest.mark.parametrize('text', ['hello, I am text', '1\n00:00:01,000 --> 00:00:02,000\nsubtitle\n', '', '\x00\x01\x02'*100, '<html></html>', '#EXTM3U\nother.mp4\n'])
@pytest.mark.parametrize('suffix', ['mp4', 'txt', 'wav'])
def test_no_media(tmp_path, text, suffix):
    path = tmp_path/f'fake.{suffix}'
    path.write_text(text)
    for use in (VideoSource, load_audio, media_info):
        with pytest.raises(MediaError, match='fake'): use(path)

def test_no_picture(tmp_path):
    (tmp_path/'p.png').write_text('hello')
    with pytest.raises(MediaError, match='p.png is not a picture; save'): VideoSource(tmp_path/'p.png')
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)).save(tmp_path/'q.jpg')
    (tmp_path/'q.jpg').write_bytes((tmp_path/'q.jpg').read_bytes()[:900])
    with pytest.raises(MediaError, match='q.jpg is damaged or cut off'): VideoSource(tmp_path/'q.jpg')

def test_sound_as_video_and_video_without_sound(tmp_path):
    with pytest.raises(MediaError, match='a.wav holds no video; give'): VideoSource(write_wav(tmp_path/'a.wav', tone(.2, 8000)[None], 8000))
    with pytest.raises(MediaError, match='v.mp4 has no sound; give'): load_audio(make_video(tmp_path/'v.mp4', 3))
    assert media_info(tmp_path/'a.wav')['kind'] == 'audio'

def test_zero_length_sound(tmp_path):
    path = write_wav(tmp_path/'a.wav', np.zeros((1, 0)), 16000)
    for use in (load_audio, audio_duration, media_info):
        with pytest.raises(MediaError, match='a.wav'): use(path)
    assert not load_audio(write_wav(tmp_path/'quiet.wav', np.zeros((1, 800)), 16000)).any()

def test_truncated_video(tmp_path, caplog):
    noisy = lambda i, w, h: np.random.default_rng(i).integers(0, 255, (h, w, 3)).astype(np.uint8)
    with VideoWriter(tmp_path/'whole.mp4', 25, 96, 64) as writer:
        for index in range(40): writer.write(noisy(index, 96, 64))
    data = (tmp_path/'whole.mp4').read_bytes()
    (tmp_path/'half.mp4').write_bytes(data[:len(data)//2])     # the index lies in front, so half of the frames are there
    source = VideoSource(tmp_path/'half.mp4')
    frames = list(source)
    assert 10 <= len(frames) == source.frame_count <= 30 and 'half.mp4' in caplog.text
    whole = list(VideoSource(tmp_path/'whole.mp4'))
    assert all((a.image == b.image).all() for a, b in zip(frames[:8], whole))
    make_video(tmp_path/'tail.mp4', 40, make=noisy)            # the index lies behind, so nothing can be had
    (tmp_path/'head.mp4').write_bytes((tmp_path/'tail.mp4').read_bytes()[:20000])
    with pytest.raises(MediaError, match='head.mp4 .*cut off'): VideoSource(tmp_path/'head.mp4')
    (tmp_path/'none.mp4').write_bytes(data[:data.find(b'mdat') + 8])
    with pytest.raises(MediaError, match='none.mp4'): VideoSource(tmp_path/'none.mp4')

def test_damaged_middle(tmp_path, caplog):
    noisy = lambda i, w, h: np.random.default_rng(i).integers(0, 255, (h, w, 3)).astype(np.uint8)
    path = make_video(tmp_path/'hurt.mkv', 40, make=noisy, options={'g':'5'})
    data = bytearray(path.read_bytes())
    data[len(data)//2:len(data)//2 + 3000] = bytes(3000)
    path.write_bytes(data)
    source = VideoSource(path)
    assert len(list(source)) == source.frame_count >= 30

@pytest.mark.parametrize('limit', [3000, 30000, 80000])
def test_disk_full(tmp_path, limit):
    sound = write_wav(tmp_path/'a.wav', tone(4, 16000)[None], 16000)
    noise = np.random.default_rng(0).integers(0, 255, (64, 96, 3)).astype(np.uint8)
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, old[1]))
        with pytest.raises(MediaError, match='o.mp4'):
            with VideoWriter(tmp_path/'o.mp4', 25, 96, 64, audio=sound) as writer:
                for index in range(100): writer.write(np.roll(noise, 5*index, 0))
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert os.listdir(tmp_path) == ['a.wav']

@pytest.mark.skipif(hasattr(os, 'geteuid') and os.geteuid() == 0, reason='root may write anywhere')
def test_unwritable_folder(tmp_path):
    (tmp_path/'locked').mkdir(mode=0o500)
    with pytest.raises(MediaError, match='not writable'):
        with VideoWriter(tmp_path/'locked'/'o.mp4', 25, 96, 64) as writer: writer.write(numbered(0))

def test_unwritable_place(tmp_path):
    (tmp_path/'file').write_text('in the way')
    with pytest.raises(MediaError, match='o.mp4'):
        with VideoWriter(tmp_path/'file'/'o.mp4', 25, 96, 64) as writer: writer.write(numbered(0))

@pytest.mark.parametrize('error', [KeyboardInterrupt, RuntimeError])
def test_interruption_leaves_the_old_file(tmp_path, error):
    (tmp_path/'o.mp4').write_text('an older result')
    with pytest.raises(error):
        with VideoWriter(tmp_path/'o.mp4', 25, 96, 64, audio=write_wav(tmp_path/'a.wav', tone(2, 8000)[None], 8000)) as writer:
            for index in range(50):
                writer.write(numbered(index))
                if index == 30:
                    if error is KeyboardInterrupt: signal.raise_signal(signal.SIGINT)
                    raise error('stop')
    assert sorted(os.listdir(tmp_path)) == ['a.wav', 'o.mp4'] and (tmp_path/'o.mp4').read_text() == 'an older result'

def test_broken_promises(tmp_path):
    with pytest.raises(MediaError, match='2 frames came, 5 were expected'):
        with VideoWriter(tmp_path/'o.mp4', 25, 96, 64, duration=Fraction(1, 5)) as writer:
            for index in range(2): writer.write(numbered(index))
    with pytest.raises(MediaError, match='0 frames came'):
        with VideoWriter(tmp_path/'o.mp4', 25, 96, 64): pass
    with pytest.raises(ValueError, match='one more'):
        with VideoWriter(tmp_path/'o.mp4', 25, 96, 64, duration=Fraction(1, 25)) as writer:
            for index in range(2): writer.write(numbered(index))
    with pytest.raises(ValueError, match='uint8 images of shape'):
        with VideoWriter(tmp_path/'o.mp4', 25, 96, 64) as writer: writer.write(np.zeros((64, 97, 3), np.uint8))
    assert not os.listdir(tmp_path)

@pytest.mark.parametrize('name,fps', [('o.webm', 25), ('o', 25), ('o.avi', 25), ('o.mp4', 0), ('o.mp4', -5), ('o.mp4', 'fast')])
def test_refused_outputs(tmp_path, name, fps):
    with pytest.raises(MediaError, match='cannot be written|frame rate'): VideoWriter(tmp_path/name, fps, 96, 64)

def test_info_is_json(tmp_path):
    make_video(tmp_path/'v.mkv', 10, Fraction(30000, 1001), rotation=90, sound=(tone(.3, 8000), 0))
    info = json.loads(json.dumps(media_info(tmp_path/'v.mkv')))
    assert info['fps'] == '30000/1001' and info['frames'] == 10 and info['video_codec'] == 'h264' and info['channels'] == 1
    Image.fromarray(numbered(1)).save(tmp_path/'p.png')
    assert media_info(tmp_path/'p.png')['kind'] == 'image'
