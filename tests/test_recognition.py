"dlib's face network in torch: the same answers, gradients, any size of picture, and no trust in damaged files"
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data

from musetalk.core import BundleError
from musetalk.crop import crop_face, landmarks_in_crop, rigid_box
from musetalk.dlib_reader import CHIP_SIDE, read_recognition
from musetalk.face import DlibBackend, model_file
from musetalk.recognition import (SAME_PERSON, RecognitionNetwork, aligned_chips, face_chip, identity_distance, identity_similarity,
                                  load_recognition, map_distances, no_face)
from musetalk.vae import to_images, to_network

FILE = model_file('dlib_face_recognition_resnet_model_v1.dat')
PORTRAIT = data.astronaut()
LANDMARKS = np.float32(json.loads((Path(__file__).parent.parent/'nbs/samples/astronaut_landmarks.json').read_text()))
BOX = rigid_box(LANDMARKS)
CROP, POINTS = crop_face(PORTRAIT, BOX), landmarks_in_crop(LANDMARKS, BOX)
TURNED = np.rot90(PORTRAIT).copy(), np.stack([LANDMARKS[:, 1], 511 - LANDMARKS[:, 0]], 1)


def test_descriptors_are_dlibs():
    backend, random = DlibBackend(), np.random.default_rng(5)
    chip = face_chip(PORTRAIT, LANDMARKS)
    chips = [chip, np.ascontiguousarray(chip[:, ::-1]), np.zeros_like(chip), np.full_like(chip, 255), chip//3]
    chips += [random.integers(0, 256, chip.shape, dtype=np.uint8) for _ in range(3)]
    ours = load_recognition()(to_network(np.stack(chips))).numpy()
    assert np.abs(ours - [backend.identity(c) for c in chips]).max() < 1e-4


@pytest.mark.parametrize('image, landmarks', [(PORTRAIT, LANDMARKS), TURNED], ids=['upright', 'lying'])
def test_chips_are_dlibs(image, landmarks):
    ours = to_images(aligned_chips(to_network(image), landmarks.round()[None]))[0].astype(int)
    assert np.abs(ours - face_chip(image, landmarks)).max() <= 2


def test_a_squeezed_crop_gives_the_same_person():
    network, crop = load_recognition(), to_network(CROP)
    real = network(to_network(face_chip(PORTRAIT, LANDMARKS)))[0]
    right, wrong = (identity_distance(network(aligned_chips(crop, POINTS[None], aspect))[0], real) for aspect in (1.2, 1.))
    assert right < .12 < wrong
    shifted = aligned_chips(torch.cat([crop, crop.roll(6, 3)]), np.stack([POINTS, POINTS + np.float32([6, 0])]), 1.2)
    assert (shifted[0] - shifted[1])[:, 20:-20, 20:-20].abs().max() < .05, 'the chip follows the face'


def test_similarity_and_distance():
    network = load_recognition()
    person, nobody = network(aligned_chips(to_network(CROP), POINTS[None], 1.2))[0].detach(), no_face(network)
    noise = network(torch.rand(1, 3, CHIP_SIDE, CHIP_SIDE, generator=torch.Generator().manual_seed(0))*2 - 1)[0]
    assert identity_similarity(person, noise) > .8 > .6 > identity_similarity(person, noise, nobody)
    assert identity_distance(person, noise) > SAME_PERSON and identity_distance(person, person) == 0
    assert identity_similarity(person[None].expand(3, -1), noise).shape == (3,)


def test_frozen_but_differentiable():
    network = load_recognition()
    assert not network.training and not any(p.requires_grad for p in network.parameters()) and load_recognition() is network
    crop = to_network(CROP).requires_grad_()
    network(aligned_chips(crop, POINTS[None], 1.2)).square().sum().backward()
    assert crop.grad.isfinite().all() and crop.grad.abs().max() > 0 and all(p.grad is None for p in network.parameters())
    patch = to_network(CROP[128:192, 72:184]).requires_grad_()
    sum(map_distances(network, patch, torch.roll(patch.detach(), 1, 3))).backward()
    assert patch.grad.isfinite().all() and patch.grad.abs().max() > 0


@pytest.mark.parametrize('height, width', [(32, 32), (33, 47), (64, 112), (150, 150), (256, 40)])
def test_features_of_any_size(height, width):
    maps = load_recognition().features(torch.rand(2, 3, height, width)*2 - 1)
    assert [m.shape[1] for m in maps] == [32, 32, 64, 128, 256] and all(m.isfinite().all() and min(m.shape[2:]) >= 1 for m in maps)
    assert maps[0].shape[2:] == ((height - 5)//2, (width - 5)//2)


def test_wrong_pictures_are_refused():
    network = load_recognition()
    for images in (torch.zeros(1, 3, 31, 64), torch.zeros(3, 64, 64), torch.zeros(1, 1, 64, 64)):
        with pytest.raises(ValueError, match='at least 32'): network.features(images)
    with pytest.raises(ValueError, match='aligned to 150x150'): network(torch.zeros(1, 3, 149, 150))


def test_blur_costs_more_than_a_shift():
    network, patch = load_recognition(), to_network(CROP[120:200, 70:190])
    left, right = torch.roll(patch, 1, 3), torch.roll(patch, -1, 3)
    mean = (left + right)/2
    hedge = [float(a + b)/float(c) for a, b, c in zip(map_distances(network, mean, left), map_distances(network, mean, right), map_distances(network, left, right))]
    assert hedge[0] == pytest.approx(1, abs=.02) and min(hedge[2:]) > 1.1


@pytest.mark.parametrize('change', [lambda b: b'', lambda b: b[:-1], lambda b: b[:1000], lambda b: b + b'0', lambda b: b[:5] + b'\xff' + b[6:], lambda b: b[:400] + b'\xff'*8 + b[408:],
                                    lambda b: b.replace(b'affine_', b'bn_con_', 1), lambda b: b[:40] + b'\x01\x03' + b[42:], lambda b: b'\x80\x04' + b], ids=range(9))
def test_damaged_files(tmp_path, change):
    damaged = tmp_path/'face.dat'
    damaged.write_bytes(change(Path(FILE).read_bytes()))
    with pytest.raises(BundleError, match='face.dat'): read_recognition(damaged)


def test_missing_and_other_files(tmp_path):
    with pytest.raises(BundleError, match='pip install'): read_recognition(tmp_path/'none.dat')
    for other in ('mmod_human_face_detector.dat', 'shape_predictor_5_face_landmarks.dat'):
        with pytest.raises(BundleError, match='not the face network'): read_recognition(model_file(other))


def test_weights_fit_the_architecture():
    assert RecognitionNetwork().load_state_dict(read_recognition(FILE)).missing_keys == []
