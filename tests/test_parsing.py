"The original's parser and masks: the same numbers"
import json
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from official import agree, recipe

from musetalk.blend import composite
from musetalk.core import ConfigError, save_image
from musetalk.dub import dub
from musetalk.parsing import FaceParser, class_mask, jaw_kernels, parse_faces, parsed_masks, parser_picture, parser_square, soft_mask
from musetalk.sound import write_audio
from musetalk.stages import DubSettings, dub_settings

GOLDEN = Path(__file__).parent/'golden'


@pytest.fixture(scope='module')
def network():
    network = FaceParser()
    golden = np.load(GOLDEN/'bisenet.npz')
    network.load_state_dict(recipe(json.loads(str(golden['meta']))['weight_seed'], {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}))
    return network.eval().requires_grad_(False)


def test_network_gives_the_same_logits_and_classes(network):
    golden, seen = np.load(GOLDEN/'bisenet.npz'), {}
    hook = network.register_forward_pre_hook(lambda module, inputs: seen.setdefault('x', inputs[0]))
    classes = parse_faces(network, [golden['image_rgb']])[0]
    hook.remove()
    agree('bisenet', seen['x'][0, :, ::64, ::64], golden['input_sample'], 1e-5, relative=False)
    with torch.no_grad(): heads = network(seen['x'], all_heads=True)
    for head, name in zip(heads, ('logits_sample', 'logits16_sample', 'logits32_sample')):
        agree('bisenet', head[0, :, ::64, ::64], golden[name])
    same, safe = classes[::2, ::2] == golden['argmax'], np.unpackbits(golden['argmax_safe']).reshape(256, 256) > 0
    assert same[safe].all() and same.mean() > .999


def test_kernels():
    golden = np.load(GOLDEN/'mask_modes.npz')
    grow, narrow = jaw_kernels()
    agree('mask_modes', grow, golden['dilate_kernel'], 0)
    agree('mask_modes', narrow, golden['erode_kernel'], 0)


@pytest.mark.parametrize('number', range(4))
def test_masks_of_all_modes_are_the_same(number):
    golden = np.load(GOLDEN/'mask_modes.npz')
    cheeks, classes = json.loads(str(golden['meta']))['cheeks'], golden['class_maps'][number]
    unpacked = lambda packed: np.unpackbits(packed, axis=-1)*255
    for mode in ('raw', 'neck'): agree('mask_modes', class_mask(classes, mode), unpacked(golden[mode][number]), 0)
    for pair, wanted in zip(cheeks, golden['jaw'][number]): agree('mask_modes', class_mask(classes, 'jaw', *pair), unpacked(wanted), 0)


@pytest.mark.parametrize('number', range(9))
def test_soft_masks_are_the_same(number):
    "All cases of the real-time path: odd sizes, squares and boxes that leave the picture, elongated boxes"
    golden = np.load(GOLDEN/'blending.npz')
    case = json.loads(str(golden['meta']))['cases'][number]
    square = parser_square(case['box'], case['expand'])
    assert list(square) == case['square']
    parsed = np.full((512, 512), 255, np.uint8) if case['parse'] == 'full' else np.unpackbits(golden['parse_mask'], axis=-1)*255
    mask = soft_mask(parsed, case['box'], case['upper_boundary_ratio'], .1, case['expand'])
    x1, y1, x2, y2 = np.array(case['box']) - np.array(square[:2]*2)
    agree('blending', mask, golden[f'rt_mask_{number}'][y1:y2, x1:x2], 0)


@pytest.mark.parametrize('name,blur', [('offline', .05), ('realtime', .1)])
def test_blending_is_the_same(name, blur):
    golden = np.load(GOLDEN/'blending.npz')
    case = json.loads(str(golden['meta']))['cases'][6]
    left, top = case['stored_region'][:2]
    box = tuple(np.array(case['box']) - [left, top, left, top])
    mask = soft_mask(np.unpackbits(golden['parse_mask'], axis=-1)*255, box, case['upper_boundary_ratio'], blur, case['expand'])
    result = composite(golden['region'], golden['face'], box, mask, match=False, sharpen=0)
    agree('blending', result.astype(int), golden[name], 1, relative=False)
    assert (parser_picture(golden['region'][..., ::-1], parser_square(box, case['expand']))[::5, ::5] == golden['expanded_rgb_sample']).all()


def test_frames_do_not_disturb_one_another(network):
    image = np.load(GOLDEN/'bisenet.npz')['image_rgb']
    boxes = [(60, 60, 180, 200), (-20, 90, 120, 240)]
    together = parsed_masks(network, [image, image], boxes)
    for box, mask in zip(boxes, together):
        assert mask.shape == (box[3] - box[1], box[2] - box[0])
        assert np.abs(mask.astype(int) - parsed_masks(network, [image], [box])[0]).mean() < .5


@pytest.mark.skipif('parsing_mode' not in {item.name for item in fields(DubSettings)}, reason='DubSettings has no parsing_mode yet')
def test_dub_with_parsed_masks(tmp_path, portrait, voice, toy, monkeypatch):
    "The mode reaches the mask, and the blur is `feather`"
    (tmp_path/'models/face-parse-bisent').mkdir(parents=True)
    torch.save(recipe(5, {name: tuple(tensor.shape) for name, tensor in FaceParser().state_dict().items()}), tmp_path/'models/face-parse-bisent/79999_iter.pth')
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'models'))
    save_image(tmp_path/'she.png', portrait)
    write_audio(tmp_path/'words.wav', voice)
    for mode in ('jaw', 'raw'): assert dub(tmp_path/'she.png', tmp_path/'words.wav', tmp_path/f'{mode}.mp4', toy, progress=False, parsing_mode=mode, feather=.1).frames == 12
    with pytest.raises(ConfigError, match="parsing mode 'chin'"): dub_settings(parsing_mode='chin')
