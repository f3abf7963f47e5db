"""What the original program computed, number by number: all recorded vectors that no test of a single part compares.

`PARITY_RECORD=benchmarks/parity.json pytest tests` writes down how far off each of them was; 38_parity.ipynb shows it.
"""
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from official import agree, filled, golden, recipe, with_singular_vectors

from musetalk.audio import OFFICIAL_BLOCK, WhisperEncoder, log_mel
from musetalk.blend import composite
from musetalk.crop import crop_face, half_face_box, suggested_shift_range
from musetalk.official import PlainVAE
from musetalk.parity import recipe_input
from musetalk.parsing import class_mask, parser_picture, parser_square, soft_mask
from musetalk.unet import LatentPainter
from musetalk.vae import mask_lower_half, to_images, to_network
from musetalk.windows import frame_windows, positional_encoding, tokens, window_starts

slow = pytest.mark.skipif(not os.environ.get('RUN_SLOW'), reason='takes 4 GB and a minute or more; set RUN_SLOW=1')


def test_recipe():
    "The weights themselves, to the last bit"
    stored, meta = golden('recipe_check')
    shapes = {key: tuple(shape) for key, shape in meta['keys'].items()} | {'c.weight_orig': (6, 3, 4, 4), 'c.weight_u': (6,), 'c.weight_v': (48,)}
    for key, made in with_singular_vectors(recipe(meta['seed'], shapes)).items(): agree('recipe_check', made, stored[key.replace('.', '__')], np.finfo(np.float32).eps)
    agree('recipe_check', recipe_input(meta['seed'], 'x', (2, 5)), stored['input__x'], 0)


# Boxes

def printed_range(landmarks):
    "As the original prints the two numbers: with their signs exchanged, so that its lower end is our upper one"
    low, high = suggested_shift_range(landmarks)
    return high, -low


def test_crop_boxes():
    "Forty faces: versions 1.0 and 1.5, with shifts, margins, small frames, and landmarks of which no box can be made"
    stored, meta = golden('crop_boxes')
    faces = np.flatnonzero(stored['has_face'])
    assert len(faces) == 38 and stored['fallback'].sum() > 2
    for i in faces:
        (height, width), shift, margin, detected = stored['frame_size_hw'][i], int(stored['shift'][i]), int(stored['margin'][i]), tuple(stored['detector_box'][i])
        for landmarks in (stored['landmarks_float'][i], stored['landmarks_int'][i]):
            agree('crop_boxes', half_face_box(landmarks, width, height, shift, None, detected), stored['box_v1'][i], 0)
            agree('crop_boxes', half_face_box(landmarks, width, height, shift, margin, detected), stored['box_v15'][i], 0)
        try: half_face_box(stored['landmarks_int'][i], width, height, shift)
        except ValueError: assert stored['fallback'][i]
        else: assert not stored['fallback'][i]
        agree('crop_boxes', printed_range(stored['landmarks_int'][i]), stored['range_single'][i], 0)
    multi = [i for i in meta['multi']['indices'] if stored['has_face'][i]]
    agree('crop_boxes', printed_range(stored['landmarks_int'][multi]), meta['multi']['range_message'], 0)
    for i, wanted in zip(meta['multi']['indices'], stored['box_multi']):
        if not stored['has_face'][i]: assert not wanted.any()
        else: agree('crop_boxes', half_face_box(stored['landmarks_int'][i], *stored['frame_size_hw'][i][::-1], meta['multi']['shift'], None, tuple(stored['detector_box'][i])), wanted, 0)


# Masks and blending

def test_masks_of_a_parsed_face():
    "The three modes on a class map that a network made, full of specks"
    stored, meta = golden('bisenet_masks')
    for mode in ('raw', 'jaw', 'neck'):
        agree('bisenet', class_mask(stored['argmax'], mode, *meta['cheeks_for_jaw']), np.unpackbits(stored[f'mask_{mode}']).reshape(512, 512)*255, 0)


def spread(samples, shape, start):
    "Samples of every fourth pixel at their places in a picture that is black elsewhere"
    picture = np.zeros((*shape, 3), np.uint8)
    picture[start[0]::4, start[1]::4] = samples
    return picture


@pytest.mark.parametrize('number', range(9))
def test_blending_of_all_cases(number):
    "Inside, odd, leaving the picture at each corner, elongated. Blending treats each pixel alone, so every fourth is enough"
    stored, meta = golden('blending_cases')
    case = meta['cases'][number]
    (x1, y1, x2, y2), (left, top, right, bottom) = case['box'], case['stored_region']
    frame = spread(stored['frame'], meta['frame'], (0, 0))
    face = spread(stored[f'face_{number}'], (y2 - y1, x2 - x1), (-y1 % 4, -x1 % 4))
    parsed = np.full((512, 512), 255, np.uint8) if case['parse'] == 'full' else np.unpackbits(stored['parse_mask'], axis=-1)*255
    square = parser_square(case['box'], case['expand'])
    for name, blur in (('offline', .05), ('realtime', .1)):
        mask = soft_mask(parsed, case['box'], case['upper_boundary_ratio'], blur, case['expand'])
        result = composite(frame, face, case['box'], mask, match=False, sharpen=0)
        assert (result[::4, ::4] != stored['frame']).any()
        agree('blending', result[top:bottom, left:right][-top % 4::4, -left % 4::4].astype(int), stored[f'{name}_{number}'].astype(int), 1, relative=False)
        outside = result.copy()
        outside[max(0, y1):y2, max(0, x1):x2] = frame[max(0, y1):y2, max(0, x1):x2]
        assert (outside == frame).all()
    assert list(square) == case['square']
    seen = parser_picture(frame[..., ::-1], square)[::5, ::5][-square[1] % 4::4, -square[0] % 4::4]
    agree('blending', seen, stored[f'expanded_{number}'], 0)


# Networks

@pytest.fixture(scope='module')
def small_vae():
    from diffusers import AutoencoderKL
    _, meta = golden('vae_conventions')
    with torch.device('meta'): model = AutoencoderKL(**meta['config'])
    assert (sum(tensor.numel() for tensor in model.state_dict().values()), len(model.state_dict())) == (meta['parameters'], meta['tensors'])
    return PlainVAE(filled(model, meta['weight_seed']))


@torch.no_grad()
def test_conventions_of_the_autoencoder(small_vae):
    "BGR to RGB, scaling, the black half, the mean of the posterior, the order of the eight channels, rounding on the way back"
    stored, meta = golden('vae_conventions')
    image = to_network(stored['image_bgr'][..., ::-1].copy())
    masked = mask_lower_half(image)
    agree('vae_conventions', image[:, :, ::16, ::16], stored['input_full_sample'], 1e-6)
    agree('vae_conventions', masked[:, :, ::16, ::16], stored['input_masked_sample'], 1e-6)
    assert ((masked[0] == -1).all(2).all(0).numpy() == stored['masked_rows']).all()
    latents = torch.cat(small_vae.encode(torch.cat([masked, image])).chunk(2), 1)
    agree('vae_conventions', latents, stored['latents_8ch'])
    posterior = small_vae.model.encode(image).latent_dist
    agree('vae_conventions', posterior.mean[:, :, ::4, ::4], stored['moments_mean_unscaled_sample'])
    agree('vae_conventions', posterior.std[:, :, ::4, ::4], stored['moments_std_sample'])
    assert small_vae.scaling == meta['scaling_factor']
    raw = small_vae.decode(torch.from_numpy(recipe_input(meta['weight_seed'], meta['latent_input_name'], (2, 4, 32, 32)))*meta['latent_input_scale'])
    agree('vae_conventions', raw[:, :, ::16, ::16], stored['decoded_random_float_sample'])
    pictures = [(to_images(raw)[:, ::4, ::4, ::-1], stored['decoded_random_bgr']), (to_images(small_vae.decode(latents[:, 4:]))[:, ::4, ::4, ::-1], stored['decoded_ref_bgr'])]
    for ours, theirs in pictures:
        agree('vae_conventions', ours.astype(int), theirs.astype(int), 1, relative=False)
        assert (ours != theirs).mean() < 1e-3


@torch.no_grad()
def test_from_crop_to_pasted_face(small_vae):
    "Crop, encode, speak, decode, stretch, mask and paste; and what leaving out the positions of the tokens would do"
    stored, meta = golden('end_to_end_pasted')
    crops, crop_meta = golden('end_to_end')
    with torch.device('meta'): painter = LatentPainter(meta['unet_config'])
    filled(painter.network, meta['unet_seed'])
    images = to_network(np.stack([crop_face(frame[..., ::-1], box) for frame, box in zip(crops['frames_bgr'], crop_meta['boxes'])]))
    latents = torch.cat(small_vae.encode(torch.cat([mask_lower_half(images), images])).chunk(2), 1)[[0, 1, 1]]
    speech = torch.from_numpy(recipe_input(meta['unet_seed'], 'audio', (3, 50, 384)))
    agree('end_to_end', painter(latents[:1], speech[:1]), stored['pred_without_pe_first'])
    painted = painter(latents, speech + positional_encoding(50, 384))
    agree('end_to_end', painted, crops['pred_latents'])
    faces = to_images(small_vae.decode(painted))
    parsed = np.unpackbits(stored['parse_mask'], axis=-1)*255
    for face, index, wanted in zip(faces, (0, 1, 1), stored['composited']):
        x1, y1, x2, y2 = box = meta['boxes'][index]
        face = cv2.resize(face, (x2 - x1, y2 - y1)) # bilinear, as the original; `composite` would average areas
        pasted = composite(spread(stored['frames'][index][..., ::-1], (200, 240), (0, 0)), face, box, soft_mask(parsed, box, .5, .05), match=False, sharpen=0)
        difference = np.abs(pasted[::4, ::4, ::-1].astype(int) - wanted)
        agree('end_to_end', pasted[::4, ::4, ::-1].astype(int), wanted.astype(int), 1, relative=False)
        assert (difference > 0).mean() < 1e-3


def test_judge_in_full():
    "Singular vectors to begin with, and mean, deviation and extremes of whole feature maps"
    from musetalk.discriminator import discriminator_from_config
    stored, meta = golden('discriminator_whole')
    network = discriminator_from_config(meta['params'])
    new = dict(weight_orig='parametrizations.weight.original', weight_u='parametrizations.weight.0._u', weight_v='parametrizations.weight.0._v')
    present = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    names = {key: '.'.join([key.rpartition('.')[0], new.get(key.rpartition('.')[2], key.rpartition('.')[2])]) for key in meta['state_keys']}
    weights = with_singular_vectors(recipe(meta['weight_seed'], {key: present[name] for key, name in names.items()}))
    for key in stored:
        if key.startswith('init__'): agree('discriminator', weights[key.removeprefix('init__').replace('__', '.')], stored[key], 1e-6)
    network.load_state_dict(weights)
    with torch.no_grad(): (_, features), = network.eval()(torch.from_numpy(recipe_input(meta['weight_seed'], 'x224', (1, 3, 224, 224))))
    for number, found in enumerate(features):
        found = found.double()
        agree('discriminator', torch.stack([found.mean(), found.std(unbiased=False), found.min(), found.max()]), stored[f'feat{number}_224_stats'])


# Sound

@pytest.fixture(scope='module')
def whisper():
    from transformers import WhisperConfig
    from transformers.models.whisper.modeling_whisper import WhisperEncoder as Network
    with torch.device('meta'): network = Network(WhisperConfig(d_model=384, encoder_layers=4, encoder_attention_heads=6, encoder_ffn_dim=1536))
    return WhisperEncoder(filled(network, golden('audio_seam')[1]['weight_seed']), **OFFICIAL_BLOCK)


def test_second_segment_of_a_long_sound(whisper):
    "Beyond 30 s a segment begins that knows nothing of the first; tokens of frames at the seam are compared where they lie beyond it"
    stored, _ = golden('audio_seam')
    tail = stored['tail'].astype(np.float32)/32768
    mel = log_mel(np.pad(tail, (0, 480000 - len(tail))))
    agree('audio_tokens_long', mel[::8, ::25], stored['mel_sample'], relative=False)
    agree('audio_tokens_long', mel.mean(1), stored['mel_mean_per_bin'], relative=False)
    later = whisper.features(tail)
    features = torch.cat([torch.zeros(1500, *later.shape[1:]), later])
    for fps in (25, 30):
        count = len(tail)*fps//16000 + 30*fps
        windows = frame_windows(features, fps, count)
        known = frame_windows((torch.arange(len(features)) >= 1500)[:, None, None].expand(-1, 5, 1).float(), fps, count).flatten(1) > 0
        known |= frame_windows(torch.ones(len(features), 5, 1), fps, count).flatten(1) == 0 # padding
        ours, chosen = tokens(windows), stored[f'frames_{fps}'].tolist()
        kept = known[chosen][:, ::3]
        assert kept.any(1).sum() >= 9 and not kept.all() and kept[-1].all() and ours.shape[1:] == (50, 384)
        agree('audio_tokens_long', ours[chosen][:, ::3, ::16][kept], stored[f'tokens_{fps}'][kept])
        whole = known[30*fps:].all(1)
        agree('audio_tokens_long', ours[30*fps:][whole].mean((1, 2)), stored[f'frame_mean_{fps}'][whole])
        agree('audio_tokens_long', ours[30*fps:][whole].std((1, 2), correction=0), stored[f'frame_std_{fps}'][whole])


def test_last_state_with_and_without_norm(whisper):
    "What the program of version 1.0 gave to its UNet becomes, layer-normed, what the program of today gives to it"
    stored, _ = golden('audio_tokens')
    samples = np.pad(stored['waveform'].astype(np.float32)/32768, (0, 480000 - len(stored['waveform'])))
    bare = WhisperEncoder(whisper.network, **OFFICIAL_BLOCK, final_norm=False).features(samples)
    agree('audio_tokens_short', bare[::50, :4, ::24], stored['states_first_segment_sample'][:, :4])
    with torch.no_grad(): agree('audio_tokens_short', whisper.network.layer_norm(bare[::50, 4])[:, ::24], stored['states_first_segment_sample'][:, 4])


@pytest.mark.skipif(not os.environ.get('GOLDEN_FOLDER'), reason='needs the uncut vectors, 1 MB of sound; set GOLDEN_FOLDER')
def test_whole_of_a_long_sound(whisper):
    "The same over 31.5 s, with a silent stretch"
    with np.load(Path(os.environ['GOLDEN_FOLDER'])/'audio_tokens_long.npz') as stored:
        samples = stored['waveform'].astype(np.float32)/32768
        features = whisper.features(samples)
        for segment in (0, 1):
            mel = log_mel(np.pad(samples[480000*segment:][:480000], (0, max(0, 480000*(segment + 1) - len(samples)))))
            agree('audio_tokens_long', mel[::8, ::25], stored['mel_sample'][segment], relative=False)
            agree('audio_tokens_long', mel.mean(1), stored['mel_mean_per_bin'][segment], relative=False)
        agree('audio_tokens_long', features[:1500:50, :, ::24], stored['states_first_segment_sample'])
        for fps in (25, 30):
            ours = tokens(frame_windows(features, fps, len(samples)*fps//16000))
            agree('audio_tokens_long', ours[stored[f'frames_{fps}'].tolist()][:, ::3, ::16], stored[f'tokens_{fps}'])
            agree('audio_tokens_long', ours.mean((1, 2)), stored[f'frame_mean_{fps}'])
            agree('audio_tokens_long', ours.std((1, 2), correction=0), stored[f'frame_std_{fps}'])
            agree('audio_tokens_long', ours.mean(2)[::5], stored[f'token_mean_{fps}'])


def test_windows_at_other_rates():
    "Below 25 frames per second the original begins every window 40 ms or more too early, and it cuts fractions off the rate; ours lie where the time says, and the difference is known"
    stored, meta = golden('audio_windows')
    early = 0
    for case in meta['cases']:
        name, rate = f"{case['seconds']}s_{case['fps']}".replace('.', '_'), int(case['fps'])
        if f'start_{name}' not in stored: continue
        starts = stored[f'start_{name}']
        padding, known = -(-50//rate), starts != meta['all_padding_value']
        ours = window_starts(rate, len(starts)).numpy() - 2*(padding - 2)
        rounded = np.floor(np.arange(len(starts))*(50/rate)).astype(int) - np.arange(len(starts))*50//rate # doubles fall short now and then
        agree('audio_windows', (ours + rounded)[known], starts[known], 0)
        early += padding > 2
    assert early


def test_windows_of_the_training_loop():
    "Sixteen frames from a place in a clip: the same windows as in use, also past frame 700"
    stored, meta = golden('training_extras_windows')
    features = (10000*torch.arange(5) + torch.arange(1500)[:, None] + 1)[..., None].float()
    for offset, wanted in zip(meta['audio_offsets'], stored['audio_steps']):
        agree('training_extras', frame_windows(features, 25, offset + meta['frames'])[offset:, ..., 0], wanted, 0)


# Large networks

@slow
@torch.no_grad()
def test_unet_of_full_size():
    "850 million parameters"
    stored, meta = golden('unet_full')
    with torch.device('meta'): painter = LatentPainter(meta['config'])
    assert (sum(parameter.numel() for parameter in painter.parameters()), len(painter.network.state_dict())) == (meta['parameters'], meta['tensors'])
    filled(painter.network, meta['weight_seed'])
    latents = torch.from_numpy(recipe_input(meta['weight_seed'], 'latents', (1, 8, 32, 32)))*meta['latents_scale']
    agree('unet_full', painter(latents, torch.from_numpy(recipe_input(meta['weight_seed'], 'audio', (1, 50, 384)))), stored['output'])


@torch.no_grad()
def test_face_detector():
    "S3FD as the package face-alignment builds it: the twelve maps"
    pytest.importorskip('face_alignment')
    from face_alignment.detection.sfd.net_s3fd import s3fd
    stored, meta = golden('s3fd')
    network = filled(s3fd(), meta['weight_seed'])
    assert (sum(tensor.numel() for tensor in network.state_dict().values()), len(network.state_dict())) == (meta['parameters'], meta['tensors'])
    maps = network(torch.from_numpy(recipe_input(meta['weight_seed'], 'x', meta['shape']))*meta['input_scale'])
    for number, found in enumerate(maps): agree('s3fd', found, stored[f'out{number}'])


# The table

def test_every_vector_is_compared():
    "Each file of recorded numbers is named by a test"
    names = {path.stem for path in (Path(__file__).parent/'golden').glob('*.npz')}
    written = ''.join(path.read_text() for path in Path(__file__).parent.glob('*.py'))
    assert len(names) > 20 and not [name for name in names if f"'{name}'" not in written and f"'{name}.npz'" not in written]
