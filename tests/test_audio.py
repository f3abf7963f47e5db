"Audio: parity with recorded figures of the reference, and streams that cannot be told from files"
import json
from fractions import Fraction
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from official import agree, recipe
from musetalk.audio import OFFICIAL_BLOCK, WhisperEncoder, log_mel
from musetalk.core import BundleError, ConfigError, MediaError
from musetalk.features import AudioEncoder, StreamingFeatures, encode_audio
from musetalk.parity import recipe_input
from musetalk.windows import SpeechWindows, frame_windows, positional_encoding, tokens, window_starts, windows_at

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT/'tests'/'golden'
ENCODER = ROOT/'models'/'mini'/'audio_encoder'
RATES = [15, Fraction(24000, 1001), 25, Fraction(30000, 1001), 50, 60]


class Loudness(AudioEncoder):
    "An encoder that costs nothing"
    def __init__(self, left=.04, hop=.06, lookahead=.02): super().__init__(1, (0,), left, hop, lookahead)
    def block(self, samples):
        steps = torch.as_tensor(samples).unflatten(0, (-1, 320)).abs().mean(1)
        first = int(self.left * 50)
        return steps[first:first + int(self.hop * 50), None, None]


def pieces(samples, count, seed=0):
    return np.split(samples, np.sort(np.random.default_rng(seed).integers(0, len(samples) + 1, count)))


def noise(length, seed=0): return np.random.default_rng(seed).normal(size=length).astype(np.float32) / 10


def test_tokens_equal_the_reference():
    "Waveform to tokens through a Whisper of the official shape, 30 s segments and five states"
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Network
    golden = np.load(GOLDEN/'audio_tokens.npz')
    seed = json.loads(str(golden['meta']))['weight_seed']
    network = Network(WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536))
    network.load_state_dict(recipe(seed, {key: tuple(value.shape) for key, value in network.state_dict().items()}))
    samples = golden['waveform'].astype(np.float32) / 32768
    mel = log_mel(np.pad(samples, (0, 480000 - len(samples))))
    agree('audio_tokens_short', mel[None, ::8, ::25], golden['mel_sample'], relative=False)
    features = WhisperEncoder(network, **OFFICIAL_BLOCK).features(samples)
    close = partial(agree, 'audio_tokens_short')
    states = golden['states_first_segment_sample']
    close(features[::50, :, ::24], states[:len(features[::50])])
    for fps, count in ((25, 80), (30, 96)):
        ours = tokens(frame_windows(features, fps, count))
        assert ours.shape == (count, 50, 384)
        close(ours[golden[f'frames_{fps}'].tolist()][:, :, ::16], golden[f'tokens_{fps}'])
        if fps == 25: close(ours.mean((1, 2)), golden['frame_mean_25'])


def test_windows_equal_the_reference():
    golden = np.load(GOLDEN/'audio_windows.npz')
    for case in json.loads(str(golden['meta']))['cases']:
        fps, name = case['fps'], f"{case['seconds']}s_{case['fps']}".replace('.', '_')
        if fps != int(fps) or not 25 <= fps <= 49: continue
        agree('audio_windows', window_starts(fps, case['frames']), golden[f'start_{name}'], 0)
        features = torch.ones(int(case['samples'] / 16000 * 50), 1, 1)   # the reference's double arithmetic
        agree('audio_windows', frame_windows(features, fps, case['frames']).sum((1, 2, 3)), golden[f'real_{name}'], 0)


def test_positional_encoding_equals_the_reference():
    golden = np.load(GOLDEN/'positional_encoding.npz')
    table = positional_encoding(50, 384)
    agree('positional_encoding', table[::7], golden['table'], 1e-5, relative=False)
    shape = (2, 50, 384)
    x = recipe_input(1021, 'x', shape)
    agree('positional_encoding', (torch.from_numpy(x) + table)[:, ::7, ::8], golden['x_plus_pe_sample'], 1e-5, relative=False)


def test_mini_encoder_streams_exactly():
    encoder = WhisperEncoder.from_folder(ENCODER)
    samples = noise(23456)
    whole = encoder.features(samples)
    assert whole.shape == (73, 1, 384)
    assert torch.equal(encode_audio(encoder, pieces(samples, 9)), whole)
    moved = encoder.features(np.pad(samples, (3 * encoder.hop_samples, 0)))
    assert torch.equal(moved[24:], whole), 'features depend on where in the file a sound is'
    later = samples.copy(); later[encoder.hop_samples + 2 * 2560:] = 0   # what comes after a block's horizon
    assert torch.equal(encoder.features(later)[:8 * 2], whole[:8 * 2])
    assert not whole.is_inference()


def test_selected_states_are_the_same_numbers():
    all_states = WhisperEncoder.from_folder(ENCODER, layers=[0, 1, 2, 3, 4]).features(noise(9000))
    assert all_states.shape == (28, 5, 384)
    for layers in ([4], [2], [0, 3]):
        some = WhisperEncoder.from_folder(ENCODER, layers=layers).features(noise(9000))
        assert torch.allclose(some, all_states[:, layers], atol=1e-4)


@pytest.mark.parametrize('fps', RATES)
@pytest.mark.parametrize('left,right', [(2, 2), (5, 2), (0, 0)])
def test_live_windows_equal_the_file(fps, left, right):
    encoder = Loudness()
    for seed, length in enumerate((0, 100, 320, 5000, 31999, 48000)):
        samples = noise(length, seed)
        count = round(Fraction(length, 16000) * fps)
        whole = frame_windows(encoder.features(samples), fps, count, left, right)
        drawn = SpeechWindows(encoder, fps, left, right, pieces(samples, 30, seed))
        parts = [drawn.take(first, min(7, count - first)) for first in range(0, count, 7)]
        assert torch.equal(torch.cat(parts) if parts else whole, whole)
        fed, got = SpeechWindows(encoder, fps, left, right), []
        for piece in [*pieces(samples, 30, seed), None]:
            fed.hear(piece)
            stop = count if piece is None else min(fed.ready, count)
            if stop > len(got): got.extend(fed.take(len(got), stop - len(got)))
        assert len(got) == count and (not count or torch.equal(torch.stack(got), whole))
        assert torch.equal(windows_at(encoder.features(samples), [float(i / fps) for i in range(count)], left, right), whole)


@pytest.mark.parametrize('fps', RATES)
def test_latency_is_kept(fps):
    live, step = SpeechWindows(Loudness(), fps), 80
    for heard in range(step, 32000, step):
        before = live.ready
        live.hear(np.zeros(step, np.float32))
        for i in range(before, live.ready): assert Fraction(heard - step, 16000) - i / Fraction(fps) <= live.latency


def test_what_has_not_been_heard():
    live = SpeechWindows(Loudness(), 25)
    live.hear(noise(16000))
    with pytest.raises(MediaError, match='not been heard'): live.take(live.ready, 1)
    live.hear(None)
    assert live.take(0, 31).shape == (31, 10, 1, 1) and not live.take(40, 2).any()


@pytest.mark.parametrize('fps', RATES)
def test_windows_never_drift(fps):
    starts = window_starts(fps, 1, first=round(36000 * Fraction(fps)))   # after ten hours
    assert abs(int(starts[0]) + 4 - 50 * 36000) <= 50 / fps + 1


def test_counts_after_finish():
    for length in (0, 1, 319, 320, 2879, 2880, 2881):
        stream = StreamingFeatures(Loudness())
        ready = len(stream.push(noise(length))) + len(stream.finish())
        assert ready == length // 320 == stream.feature_count


@pytest.mark.parametrize('samples', [np.zeros(9, np.int16), np.zeros((2, 9), np.float32), np.full(9, np.nan, np.float32)])
def test_broken_samples(samples):
    with pytest.raises(MediaError): StreamingFeatures(Loudness()).push(samples)


def test_bad_folders(tmp_path):
    with pytest.raises(BundleError, match='config.json'): WhisperEncoder.from_folder(tmp_path)
    (tmp_path/'config.json').write_bytes((ENCODER/'config.json').read_bytes())
    with pytest.raises(BundleError, match='model.safetensors'): WhisperEncoder.from_folder(tmp_path)
    (tmp_path/'model.safetensors').write_bytes((ENCODER/'model.safetensors').read_bytes()[:5000])
    with pytest.raises(BundleError, match='damaged'): WhisperEncoder.from_folder(tmp_path)
    with pytest.raises(ConfigError): WhisperEncoder.from_folder(ENCODER, layers=[5])
    with pytest.raises(ConfigError): WhisperEncoder.from_folder(ENCODER, hop=.155)
    with pytest.raises(ConfigError): WhisperEncoder.from_folder(ENCODER, left=60)
