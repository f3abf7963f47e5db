"The fast layers of the full-size architecture, in a small size: same numbers, several threads, refusals"
import copy
import logging
from threading import Thread

import numpy as np
import pytest
import torch
from torch import nn

from musetalk import fast, small, winograd
from musetalk.bench import random_model
from musetalk.core import BundleError


def relative(found, wanted): return float((found.double() - wanted.double()).norm()/wanted.double().norm())


@pytest.fixture(scope='module')
def plain(): return random_model('small')


@pytest.fixture(scope='module')
def quick(plain): return fast.quick_bundle(copy.deepcopy(plain), True)


@pytest.fixture(scope='module')
def given(): # latents, tokens, crops
    numbers = np.random.default_rng(0)
    return torch.from_numpy(numbers.standard_normal((3, 8, 32, 32), np.float32)), torch.from_numpy(numbers.standard_normal((3, 50, 48), np.float32)), numbers.integers(0, 255, (2, 256, 256, 3), np.uint8)


def test_painter_agrees_far_below_bf16(plain, quick, given):
    latents, tokens, _ = given
    with torch.inference_mode(): assert relative(quick.painter(latents, tokens), plain.painter(latents, tokens)) < 1e-4


def test_autoencoder_agrees(plain, quick, given):
    crops = given[2]
    assert isinstance(quick.vae, fast.QuickVAE)
    latents = quick.encode_crops(crops)
    assert relative(latents, plain.encode_crops(crops)) < 1e-4
    with torch.inference_mode(): assert relative(quick.vae.decode(latents[:, :4]), plain.vae.decode(latents[:, :4])) < 5e-5


def test_a_batch_is_its_frames(quick, given):
    latents, tokens, _ = given
    with torch.inference_mode():
        together = quick.painter(latents, tokens)
        alone = torch.cat([quick.painter(latents[i:i + 1], tokens[i:i + 1]) for i in range(3)])
    assert relative(alone, together) < 1e-5


def test_two_lanes_at_once_do_not_disturb_each_other(quick, given):
    latents, tokens, _ = given
    with torch.inference_mode(): wanted = quick.vae.decode(latents[:1, :4]), quick.painter(latents, tokens)
    found, threads = {}, torch.get_num_threads()
    def lane(name, work):
        with torch.inference_mode(): found[name] = [work() for _ in range(4)]
    torch.set_num_threads(2)
    try:
        lanes = [Thread(target=lane, args=('decode', lambda: quick.vae.decode(latents[:1, :4]))), Thread(target=lane, args=('paint', lambda: quick.painter(latents, tokens)))]
        for thread in lanes: thread.start()
        for thread in lanes: thread.join()
    finally: torch.set_num_threads(threads)
    for made, expected in zip((found['decode'], found['paint']), wanted):
        assert all(relative(result, expected) < 1e-5 for result in made)


def test_results_that_are_held_are_not_overwritten():
    layer = winograd.WinogradConv2d(nn.Conv2d(8, 8, 3, padding=1), 4)
    with torch.inference_mode():
        first, images = layer(torch.ones(1, 8, 12, 12)), torch.randn(1, 8, 12, 12)
        kept = first.clone()
        for _ in range(3): layer(images)
    assert torch.equal(first, kept)


def test_other_bundles_stay_as_they_are(toy):
    assert fast.quick_bundle(toy, True) is toy and not isinstance(toy.vae, fast.QuickVAE)


def test_switched_off(plain, monkeypatch):
    monkeypatch.setenv('MUSETALK_QUICK', '0')
    assert not isinstance(fast.quick_bundle(plain).vae, fast.QuickVAE)


@pytest.mark.parametrize('broken', ['wrong', 'absent'])
def test_layers_that_do_not_work_here_are_refused(plain, monkeypatch, caplog, broken):
    def kernels(*_): raise RuntimeError('no LLVM for this machine')
    monkeypatch.setattr(fast, '_sound', None)
    if broken == 'absent': monkeypatch.setattr(winograd, '_kernels', kernels)
    else: monkeypatch.setattr(fast.PackedLinear, 'product', lambda self, lines: torch.zeros(len(lines), self.outputs))
    with caplog.at_level(logging.WARNING, 'musetalk'): assert not isinstance(fast.quick_bundle(plain, True).vae, fast.QuickVAE)
    assert 'PyTorch does them' in caplog.text


def test_fast_weights_cannot_be_saved_by_mistake(quick, tmp_path):
    with pytest.raises(BundleError, match='cannot be saved'): quick.painter.save_pretrained(tmp_path)


@pytest.mark.parametrize('part', ['encoder', 'decoder'])
def test_small_network_is_missing_or_wrong(tmp_path, monkeypatch, part):
    monkeypatch.setattr(small, 'find_models', lambda: [tmp_path])
    with pytest.raises(BundleError, match='models/taesd'): small.load_small(part)
    (tmp_path/'cut.safetensors').write_bytes(b'\x10')
    with pytest.raises(BundleError, match='damaged'): small.load_small(part, tmp_path/'cut.safetensors')
