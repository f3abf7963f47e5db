"The two-stage training of whole faces, in miniature: it learns, goes on exactly, runs in two processes, and says what is wrong"
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch
import numpy as np
import pytest
import torch
from musetalk.bundle import load_bundle
from musetalk.core import BundleError, ConfigError, MediaError, read_json
from musetalk.dataset import FaceClips, FaceLessons, talking_film
from musetalk.objective import Losses, LossWeights
from musetalk.recipes import complete, read_config, train, train_face_stage
from musetalk.syncnet import SyncNet, load_syncnet
from musetalk.train import Trainer
from musetalk.train_faces import FaceModel, FaceStep, StageLessons, SyncTerm
from musetalk.train_parts import train_vae
from musetalk.unet import LatentPainter
from musetalk.vae import FaceVAE, load_vae

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)


@pytest.fixture(scope='module')
def film(tmp_path_factory):
    "A preprocessed folder of three made-up people"
    from skimage.data import astronaut
    landmarks = np.float32(read_json(ROOT/'nbs'/'samples'/'astronaut_landmarks.json'))
    return talking_film(tmp_path_factory.mktemp('film'), astronaut(), landmarks, frames=16)


@pytest.fixture(scope='module')
def autoencoder(film, tmp_path_factory):
    "A very small autoencoder that has seen the film"
    output = tmp_path_factory.mktemp('autoencoder')
    train_vae(film, output, steps=60, batch=6, rate=6e-3, network=dict(encoder_channels=(16, 32), encoder_blocks=(0, 0), decoder_channels=(32, 16, 8), decoder_blocks=(0, 0, 0)), show_progress=False)
    return output/'vae'


@pytest.fixture(scope='module')
def lip_reader(tmp_path_factory):
    "A SyncNet of three frames with random weights: what it asks for is nonsense, but it asks"
    torch.manual_seed(0)
    encoders = dict(audio_encoder=dict(in_channels=384, block_out_channels=[32, 64], downsample_factors=[[1, 2], [1, 5]]),
                    visual_encoder=dict(in_channels=3, block_out_channels=[32, 64], downsample_factors=[4, 4]))
    reader = SyncNet(**encoders, frames=3, region=(152, 232, 88, 168), size=(16, 16), colours=1, sound='features', sound_size=(1, 10), context=1, head='logistic')
    reader.save_pretrained(folder := tmp_path_factory.mktemp('lip_reader'))
    return folder


def settings(kind, autoencoder, lip_reader, output_dir, **keys):
    "The tiny configuration of a stage, with parts that are smaller still"
    whole = read_config(ROOT/'configs'/'training'/f'tiny_{kind}.yaml') | dict(vae=str(autoencoder), output_dir=str(output_dir))
    if kind == 'stage2': whole |= dict(syncnet=str(lip_reader), data=whole['data'] | dict(n_sample_frames=3))
    return whole | keys


@pytest.fixture(scope='module')
def begun(film, autoencoder, lip_reader, tmp_path_factory):
    "A first stage that has learned: its folder and its errors"
    config = settings('stage1', autoencoder, lip_reader, tmp_path_factory.mktemp('runs'))
    config['solver'] = config['solver'] | dict(max_train_steps=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        return run('stage1', complete('stage1', config), film, log_every=4)


@pytest.fixture
def config(tmp_path, autoencoder, lip_reader, begun, monkeypatch):
    "Makes the tiny configuration of a stage; the second stage finds the first beside it"
    monkeypatch.chdir(ROOT)
    shutil.copytree(begun, tmp_path/'runs'/'stage1')

    def make(kind, name=None, steps=None, **keys):
        whole = settings(kind, autoencoder, lip_reader, tmp_path/'runs', **keys)
        if name: whole['exp_name'] = name
        if steps: whole['solver'] = whole['solver'] | dict(max_train_steps=steps)
        return complete(kind, whole)
    return make


def run(kind, config, film, **options):
    output = Path(config['output_dir'])/config['exp_name']
    train_face_stage(kind, config, film, output, show_progress=False, **options)
    return output


def losses(output, name='loss'): return [line[name] for line in map(json.loads, open(output/'log.jsonl')) if name in line]


def state(output):
    from safetensors.torch import load_file
    return load_file(output/'checkpoint.safetensors')


def test_stages_learn(film, config, begun):
    "Both stages' errors fall clearly on a few clips; the bundle records what it was trained with"
    fall = losses(begun, 'l1')
    assert np.mean(fall[-2:]) < .75*fall[0]
    fresh = config('stage2', random_init_unet=True, start=str(run('stage1', config('stage1', 'fresh', 1), film)))
    fresh['solver'] |= dict(max_train_steps=16, learning_rate=4e-3)
    fresh['data'] |= dict(train_bs=2)
    fresh['loss_params'] |= dict(fm_loss=[.1, .1, .1])  # a judge of ten steps has no features worth matching
    second = run('stage2', fresh, film, log_every=2)
    fall = losses(second, 'l1')
    assert np.mean(fall[-2:]) < .85*fall[0] and {'sync', 'adversarial', 'mouth_adversarial'} <= set(json.loads(open(second/'log.jsonl').readlines()[-2]))
    made = load_bundle(second/'bundle', 'cpu', 'float32')
    assert (made.painter.config.layout, made.positional_encoding, made.left, made.right, made.crop_rule.name) == ('full', True, 2, 2, 'rigid')


def test_second_stage_begins_with_the_first(film, config, begun):
    "By itself: with the averaged weights of the run beside it"
    first = state(begun)
    still = config('stage2', solver=dict(max_train_steps=1, learning_rate=0., gradient_accumulation_steps=1))
    weights = state(run('stage2', still, film))
    for name in first:
        if name.startswith('model/average.'): assert torch.equal(weights[name.replace('average.', 'model.')], first[name])


@pytest.mark.parametrize('kind', ['stage1', 'stage2'])
def test_resumes_exactly(kind, film, config):
    "A run that was cut has the same weights, judges, moments and losses in the end"
    whole = run(kind, config(kind, 'whole', 3), film)
    run(kind, config(kind, 'cut', 3), film, stop_at=2)
    cut = run(kind, config(kind, 'cut', 3), film)
    a, b = state(whole), state(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert any('discriminator/' in name for name in a) == (kind == 'stage2')


PROGRAM = """
import sys, json
from pathlib import Path
import torch
from musetalk.recipes import train_face_stage
torch.set_num_threads(1)
config, film, output = sys.argv[1:]
train_face_stage('stage2', json.loads(config), film, Path(output), show_progress=False)
"""


def test_two_processes_are_one_with_twice_the_batch(film, config, tmp_path):
    "Gradients: Adam's first moments after two steps agree to float precision, judges' too"
    def of_batch(batch): return config('stage2', f'batch{batch}', data=config('stage2')['data'] | dict(train_bs=batch), solver=config('stage2')['solver'] | dict(max_train_steps=2, learning_rate=1e-4))
    one = state(run('stage2', of_batch(2), film))
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        meeting = dict(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE='2', OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    command = [sys.executable, '-c', PROGRAM, json.dumps(of_batch(1)), str(film), str(tmp_path/'runs'/'batch1')]
    both = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=os.environ | meeting | dict(RANK=str(rank), LOCAL_RANK=str(rank))) for rank in range(2)]
    complaints = [process.communicate()[1] for process in both]
    assert [process.returncode for process in both] == [0, 0], complaints[0][-2000:] + complaints[1][-2000:]
    two = state(tmp_path/'runs'/'batch1')
    moments = [name for name in one if '/exp_avg.' in name]
    assert len(moments) > 50 and any('discriminator/' in name for name in moments)
    for name in moments: assert (one[name] - two[name]).abs().max() <= 1e-6 + 1e-3*one[name].abs().max(), name


def test_sync_loss_pulls(film, autoencoder):
    "SyncNet changes the painter's gradients, and with wrong sound it changes them otherwise"
    syncnet, vae = load_syncnet(ROOT/'models'/'syncnet-mini'), load_vae(autoencoder)
    lessons = StageLessons(FaceLessons(FaceClips(film, 'train'), frames=10, strength=0), syncnet=syncnet)
    batch = torch.utils.data.default_collate([lessons(np.random.default_rng(0))]) | dict(spoken=torch.ones(1))
    torch.manual_seed(0)
    painter = LatentPainter(read_config(ROOT/'configs'/'training'/'tiny_stage1.yaml')['unet'], layout='full')
    model = FaceModel(painter, vae)

    def gradient(weight, batch=batch):
        model.zero_grad()
        step = FaceStep(vae, Losses(LossWeights(l1=1, sync=weight), sync=SyncTerm(syncnet)))
        step(model, batch, 0)[0].backward()
        return painter.network.conv_out.weight.grad.clone()
    plain, pulled, wrong = gradient(0), gradient(1), gradient(1, batch | dict(sound=batch['sound'].flip(-1)))
    assert (pulled - plain).norm() > .01*plain.norm() and (wrong - pulled).norm() > 1e-3*(pulled - plain).norm()


def test_full_disk_leaves_the_old_checkpoint(film, config):
    output = run('stage1', config('stage1', 'full', 2), film, stop_at=1)
    before = (output/'checkpoint.safetensors').read_bytes()

    def full(*args, **kwargs): raise OSError(28, 'No space left on device')
    with patch.dict(Trainer.save.__globals__, save_file=full), pytest.raises(MediaError, match='disk is full'): run('stage1', config('stage1', 'full', 2), film)
    assert (output/'checkpoint.safetensors').read_bytes() == before and not list(output.glob('.partial*'))
    run('stage1', config('stage1', 'full', 2), film)


def test_refusals(film, config, tmp_path):
    "One sentence each, before any step"
    wider = config('stage1')['unet'] | dict(block_out_channels=[16, 24])
    with pytest.raises(BundleError, match='is of another model'): run('stage1', config('stage1', unet=wider), film)
    with pytest.raises(BundleError, match='is of another model'): run('stage2', config('stage2', unet=wider), film)
    with pytest.raises(MediaError, match='musetalk preprocess'): train('stage1', config('stage1'), tmp_path/'empty')
    (tmp_path/'list.txt').write_text('portrait.json\ngone.json\n')
    with pytest.raises(ConfigError, match='holds no clip gone'): run('stage1', config('stage1', 'x', data=dict(train_list=str(tmp_path/'list.txt'), contorl_face_min_size=False, num_workers=0)), film)
    with pytest.raises(ConfigError, match="Unknown key 'solver.max_steps'"): complete('stage1', dict(solver=dict(max_steps=3)))
    with pytest.raises(ConfigError, match='n_sample_frames to 3'): run('stage2', config('stage2', 'x', data=dict(n_sample_frames=2, contorl_face_min_size=False, num_workers=0)), film)


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory'), MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_lack_of_memory_is_answered_with_advice(error, film, config):
    def greedy(self, *args): raise error
    with patch.object(FaceVAE, 'decode', greedy), pytest.raises(ConfigError, match='data.train_bs from 2 to 1 .*gradient_checkpointing to True'): run('stage1', config('stage1', 'greedy'), film)
