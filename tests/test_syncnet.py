"SyncNet: the reference's figures reproduced, official files loaded or refused with a reason, windows right at every offset"
import json
import os
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from official import agree, recipe
from musetalk.core import BundleError, ConfigError, MediaError
from musetalk.parity import recipe_input
from musetalk.syncnet import (OFFICIAL_SYNCNET, SyncNet, cut_windows, first_columns, hear_windows, load_syncnet, pair_loss, sync_loss, sync_mel,
                              sync_scores)

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT/'tests'/'golden'
TINY = dict(audio_encoder=dict(in_channels=1, block_out_channels=[32, 32, 32, 64], downsample_factors=[[4, 2], [4, 2], 2, [2, 3]]),
            visual_encoder=dict(in_channels=15, block_out_channels=[32, 32, 32, 32, 64], downsample_factors=[2, 2, 2, 2, [2, 4]]),
            frames=5, region=(140, 236, 64, 192), size=(32, 64), sound_size=(80, 16))


def given(seed, name, shape, scale=1): return torch.from_numpy(recipe_input(seed, name, shape)*np.float32(scale))


def reproduces(name, **config):
    "Embeddings, cosine and both losses of a recorded network"
    golden = np.load(GOLDEN/f'{name}.npz')
    meta = json.loads(str(golden['meta']))
    seed = meta['weight_seed']
    with torch.device('meta'): model = SyncNet(**meta['config'], **config)
    weights = recipe(seed, {key: tuple(value.shape) for key, value in model.state_dict().items()})
    model.load_state_dict(weights, assign=True)
    model.eval().requires_grad_(False)
    assert (sum(p.numel() for p in model.parameters()), len(weights)) == (meta['parameters'], meta['tensors'])
    close = partial(agree, name)
    seen, real = (given(seed, key, meta['visual_shape']) for key in ('visual', 'gt'))
    sound = given(seed, 'audio', meta['audio_shape'], meta['audio_scale'])
    face, heard = model(seen, sound)
    close(face, golden['visual_embed'])
    close(heard, golden['audio_embed'])
    close(model.probability(face, heard), golden['cosine'])
    close(pair_loss(model.probability(face, heard), 1), golden['loss'])
    left, right = meta['partial_frames']
    mixed = real.clone()
    mixed[:, 3*left:3*right] = seen[:, 3*left:3*right]
    close(model.probability(model.see(mixed), heard), golden['cosine_partial'])
    if tuple(model.config.size) != (128, 256): return
    def crops(half): return torch.cat([torch.full((2, 16, 3, 128, 256), .3), half.unflatten(1, (16, 3))], 3)
    close(sync_loss(model, crops(seen), sound), golden['loss'])
    close(sync_loss(model, crops(seen)[:, left:right], sound, crops(real), left), golden['loss_partial'])


def test_a_small_network_equals_the_reference():
    reproduces('syncnet_small', frames=2, size=(32, 64), sound_size=(16, 12))


@pytest.mark.skipif(not os.environ.get('MUSETALK_SLOW_TESTS'), reason='needs 4 GB of memory; set MUSETALK_SLOW_TESTS=1')
def test_the_full_network_equals_the_reference():
    reproduces('syncnet_full')


def test_cosine_loss_equals_the_reference():
    "Negative cosines count as impossible, 100 each"
    golden = np.load(GOLDEN/'syncnet_small.npz')
    seed = json.loads(str(golden['meta']))['weight_seed']
    model = SyncNet(**TINY)
    cosine = model.probability(given(seed, 'ea', (4, 16)), given(seed, 'ev', (4, 16)))
    agree('syncnet_small', cosine, golden['direct_cosine'], 1e-5, relative=False)
    assert abs(pair_loss(cosine, 1).item() - golden['direct_loss']) < 1e-3


def test_mel_and_its_windows_equal_the_reference():
    golden = np.load(GOLDEN/'syncnet_mel.npz')
    meta = json.loads(str(golden['meta']))
    mel = sync_mel(golden['waveform'].astype(np.float32)/32768)
    assert mel.shape == (meta['columns'], 80)
    agree('syncnet_mel', mel[::meta['stride']], golden['mel_sample'], relative=False)
    assert first_columns(meta['offsets']).tolist() == meta['start_column']
    for offset, accepted in zip(meta['offsets'], meta['accepted']):
        try: cut_windows(mel, first_columns([offset]), 52, 'refuse')
        except MediaError: assert not accepted
        else: assert accepted
    ours = cut_windows(mel, first_columns([0, 7, 64]), 52).transpose(0, 2, 1)
    agree('syncnet_mel', ours[:2], golden['windows'], relative=False)
    assert np.array_equal(ours[2, :, -1], mel[255])


@pytest.mark.parametrize('frame', [0, 1, 699, 700, 701, 745])
def test_windows_fit_the_sound_at_every_offset(frame):
    "The reference is four seconds off from frame 700 on"
    rng, model = np.random.default_rng(frame), SyncNet(**TINY)
    sound = rng.normal(size=16000*31).astype(np.float32)/10
    begin = frame*640
    window = hear_windows(model, sync_mel(sound), [frame])[0, 0]
    alone = sync_mel(sound[begin - begin % 200:begin + 16000])
    assert np.abs(window.numpy().T[3:] - alone[3:16]).max() < 1e-4


def test_the_shift_of_a_clip_is_kept():
    model, mel = SyncNet(**TINY), sync_mel(np.random.default_rng(0).normal(size=16000*4).astype(np.float32)/10)
    assert torch.equal(hear_windows(model, mel, [3], shift=2.), hear_windows(model, mel, [53]))
    late = hear_windows(model, mel, [3], shift=.08)
    assert torch.equal(late, hear_windows(model, mel, [5]))


@pytest.fixture
def tiny():
    torch.manual_seed(0)
    return SyncNet(**TINY).eval()


def test_an_official_file_loads(tiny, tmp_path):
    torch.save(dict(state_dict=tiny.state_dict(), global_step=torch.tensor(7)), tmp_path/'net.pt')
    loaded, sound = load_syncnet(tmp_path/'net.pt', TINY), torch.randn(2, 1, 80, 16)
    assert torch.equal(loaded.hear(sound), tiny.hear(sound)) and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())


@pytest.mark.parametrize('damage, words', [
    (lambda path, net: path.write_bytes(path.read_bytes()[:3000]), 'damaged'),
    (lambda path, net: path.write_bytes(b''), 'damaged'),
    (lambda path, net: path.write_text('not weights'), 'damaged'),
    (lambda path, net: path.unlink(), 'fetch'),
    (lambda path, net: torch.save(net.state_dict(), path), "no 'state_dict'"),
    (lambda path, net: torch.save([1, 2], path), "no 'state_dict'"),
    (lambda path, net: torch.save(dict(state_dict={k: v for k, v in net.state_dict().items() if 'norm_out' not in k}), path), "lacks 'audio_encoder.norm_out"),
    (lambda path, net: torch.save(dict(state_dict=net.state_dict() | {'extra': torch.zeros(1)}), path), "has 'extra'"),
    (lambda path, net: torch.save(dict(state_dict=net.state_dict() | {'visual_encoder.conv_in.weight': torch.zeros(32, 48, 3, 3)}), path), '[32, 48, 3, 3]'),
    (lambda path, net: torch.save(dict(state_dict=print), path), 'damaged'),
])
def test_wrong_checkpoints_are_named(tiny, tmp_path, damage, words):
    path = tmp_path/'net.pt'
    torch.save(dict(state_dict=tiny.state_dict()), path)
    damage(path, tiny)
    with pytest.raises(BundleError) as error: load_syncnet(path, TINY)
    assert words in str(error.value) and str(path) in str(error.value) and '\n' not in str(error.value)


def test_the_published_keys_are_the_ones_wanted():
    with torch.device('meta'): keys = SyncNet(**OFFICIAL_SYNCNET).state_dict()
    assert {key.split('.')[0] for key in keys} == {'audio_encoder', 'visual_encoder'}
    leaves = {key.split('.')[3] if 'down_blocks' in key else key.split('.')[1] for key in keys}
    assert leaves == {'conv_in', 'norm_out', 'norm1', 'conv1', 'norm2', 'conv2', 'conv_shortcut', 'downsample_conv'}


def test_the_training_configuration_is_the_official_network():
    import yaml
    config = yaml.safe_load((ROOT/'configs'/'training'/'syncnet.yaml').read_text())
    with torch.device('meta'): model = SyncNet(**config['model'])
    assert sum(p.numel() for p in model.parameters()) == 371_766_496
    assert config['ckpt']['inference_ckpt_path'].endswith('latentsync_syncnet.pt') and config['ckpt']['save_ckpt_steps'] == 2500


def test_bad_input_is_answered_in_a_sentence(tiny):
    faces, sound = np.zeros((20, 256, 256, 3), np.uint8), np.random.default_rng(0).normal(size=32000).astype(np.float32)/10
    for problem, words in ((lambda: sync_scores(tiny, faces[:4], sound), '4 frames are too short'),
                           (lambda: sync_scores(tiny, faces, sound[:0]), 'empty'),
                           (lambda: sync_scores(tiny, faces, sound*0), 'silence'),
                           (lambda: sync_scores(tiny, faces, sound[:2000]), 'too short'),
                           (lambda: sync_mel(np.zeros(100, np.int16)), 'floating-point')):
        with pytest.raises(MediaError, match=words): problem()
    with pytest.raises(ConfigError, match='5 frames at a time'): sync_loss(tiny, torch.zeros(1, 4, 3, 256, 256), torch.zeros(1, 1, 80, 16))
    with pytest.raises(ConfigError, match='speech encoder'):
        sync_scores(SyncNet(**TINY | dict(sound='features', sound_size=(1, 10), audio_encoder=dict(
            in_channels=384, block_out_channels=[32, 32, 64], downsample_factors=[[1, 2], [1, 2], [1, 2]]))), faces, sound)


TOY = dict(audio_encoder=dict(in_channels=1, block_out_channels=[32, 32, 128], downsample_factors=[[5, 2], [4, 2], [4, 4]]),
           visual_encoder=dict(in_channels=5, block_out_channels=[32, 32, 128], downsample_factors=[2, 2, [4, 6]]),
           frames=5, region=(156, 220, 80, 176), size=(16, 24), colours=1, standardize=True, sound_size=(80, 16), head='logistic')


@pytest.fixture(scope='module')
def collection(tmp_path_factory):
    "A preprocessed folder of four synthetic speakers whose mouths follow the loudness; the file of one has half a second before its clip"
    import cv2
    from musetalk.core import write_json
    from musetalk.dataset import encode_crop, save_clip, save_sound
    folder, rows = tmp_path_factory.mktemp('data'), []
    for number in range(4):
        rng = np.random.default_rng(number)
        start, time = 12 if number == 1 else 0, np.arange(16000*4)/16000
        loud = np.interp(time, np.arange(0, 4.2, .12), rng.uniform(0, 1, 35)**2)
        crops = []
        for frame in range(75):
            crop = np.full((288, 288, 3), 150 + 10*number, np.uint8)
            cv2.ellipse(crop, (144, 200), (30, 4 + int(20*np.interp((frame + start)/25 + .02, time, loud))), 0, 0, 360, (60, 30, 30), -1)
            crops.append(encode_crop(crop))
        save_clip(folder/f'c{number}.npz', crops, np.zeros((75, 68, 2)), np.zeros((75, 4)), voice=np.arange(75) > 10)
        save_sound(folder/f'c{number}.speech.npz', .3*loud*rng.normal(size=len(time)).clip(-2, 2), np.zeros((200, 1, 384)))
        rows.append(dict(name=f'c{number}', identity=f'p{number}', split='val' if number == 3 else 'train', frames=75, start=start, sound=True, lag_ms=0))
    rows.append(dict(name='mute', identity='p9', split='train', frames=75, start=0, sound=False))
    write_json(folder/'clips.json', rows)
    return folder


def test_lessons_of_a_preprocessed_clip_are_what_the_network_will_see(collection):
    from musetalk.dataset import FaceClips, apply_view, random_view
    from musetalk.syncnet import look
    from musetalk.sync_lessons import read_sync_clips, window_view
    from musetalk.vae import to_network
    model = SyncNet(**TOY)
    clips = read_sync_clips(collection, 'train', model)
    assert [clip.name for clip in clips] == ['c0', 'c1', 'c2'] and clips[1].shift == .48
    assert clips[0].places(model).min() > 6 and clips[1].places(model).max() == 70
    stored = FaceClips(collection, 'train', lambda row: row['sound'])[1]
    crops = np.stack([apply_view(stored.crop(i), random_view(np.random.default_rng(0), 0))[0] for i in range(20, 25)])
    assert (window_view(model, clips[1].regions[20:25]) - look(model, to_network(crops))).abs().max() < .02
    assert torch.equal(hear_windows(model, clips[1].track, [20], clips[1].shift), hear_windows(model, sync_mel(stored.samples), [32]))


def test_training_resumes_exactly_and_learns_a_few_clips(collection, tmp_path):
    from musetalk.train_syncnet import diagnose, train_syncnet
    settings = dict(config=dict(model=TOY), steps=45, batch=2, windows=6, rate=3e-3, strength=.2, log_every=5, validate_every=15)
    whole, scores = train_syncnet(collection, tmp_path/'whole', **settings)
    train_syncnet(collection, tmp_path/'parts', stop_at=7, **settings)
    parts, _ = train_syncnet(collection, tmp_path/'parts', **settings)
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), parts.parameters()))
    rows = [json.loads(line) for line in (tmp_path/'whole'/'log.jsonl').read_text().splitlines()]
    steps = [row for row in rows if 'hits' in row]
    assert steps[-1]['loss'] < .85*steps[0]['loss'] and steps[-1]['hits'] > .4    # chance is one in six
    assert set(scores) >= {'pairs', 'retrieval', 'offsets'} and diagnose(rows).startswith('Learning')
    assert torch.equal(load_syncnet(tmp_path/'whole'/'syncnet').logit, whole.logit)


def test_training_refuses_what_it_cannot_use(collection, tmp_path):
    from musetalk.sync_lessons import read_sync_clip
    from musetalk.train_syncnet import train_syncnet
    with pytest.raises(ConfigError, match="Unknown setting 'learning_rate'"): train_syncnet(collection, tmp_path, dict(model=TOY), learning_rate=1)
    with pytest.raises(MediaError, match='No clip has 40 spoken windows'): train_syncnet(collection, tmp_path, dict(model=TOY), windows=40)
    with pytest.raises(MediaError, match='mute has no sound'):
        from types import SimpleNamespace
        read_sync_clip(SimpleNamespace(name='mute', row=dict(sound=False)), SyncNet(**TOY))
    with pytest.raises(ConfigError, match='holds no clip'): train_syncnet(collection, tmp_path, dict(model=TOY), keep=lambda row: False)


def test_the_mini_configuration_is_small():
    import yaml
    config = yaml.safe_load((ROOT/'configs'/'mini'/'syncnet.yaml').read_text())
    model = SyncNet(**config['model'])
    assert sum(p.numel() for p in model.parameters())*2 < 6e6, 'below 6 MB in fp16'
    from musetalk.train_syncnet import TRAINING
    assert set(config['train']) <= set(TRAINING)


def test_the_stored_weights_are_those_of_the_mini_configuration():
    import yaml
    from musetalk.core import find_models
    net = load_syncnet(next(folder/'syncnet-mini' for folder in find_models() if (folder/'syncnet-mini').exists()))
    config = yaml.safe_load((ROOT/'configs'/'mini'/'syncnet.yaml').read_text())['model']
    assert {key: json.loads(json.dumps(net.config[key])) for key in config} == config
    assert net.deviation.std() > 0 and all(torch.isfinite(p).all() for p in net.parameters())
    still = torch.full((1, 10, 3, 256, 256), .2).requires_grad_()    # nothing moves: no gradient may run away
    sync_loss(net, still, torch.zeros(1, 384, 1, 28)).backward()
    assert torch.isfinite(still.grad).all() and still.grad.norm() < 10
