"What `13_mask` and `14_blend` promise, away from the notebooks: random faces, moving faces, noise, speed"
import json
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from musetalk.blend import composite, match_color
from musetalk.core import ConfigError
from musetalk.crop import CropRule, crop_face
from musetalk.mask import jaw_mask

SAMPLE = Path(__file__).parents[1]/'nbs'/'samples'/'astronaut_landmarks.json'


@pytest.fixture(scope='module')
def portrait():
    data = pytest.importorskip('skimage.data')
    return data.astronaut(), np.array(json.loads(SAMPLE.read_text()), np.float32)


def prepared(portrait, rule='rigid'):
    frame, landmarks = portrait
    box = CropRule(rule).box(landmarks, frame.shape[1], frame.shape[0])
    return frame, landmarks, box, jaw_mask(landmarks, box)


@pytest.mark.parametrize('rule', ['rigid', 'half_face'])
def test_mask_covers_the_mouth_and_spares_the_eyes(portrait, rule):
    _, landmarks, (x1, y1, x2, y2), mask = prepared(portrait, rule)
    x, y = np.round(landmarks - [x1, y1]).astype(int).T
    assert mask[y[48:], x[48:]].min() > .9
    assert mask[y[36:48], x[36:48]].max() == 0
    assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()


@pytest.mark.parametrize('seed', range(8))
def test_mask_survives_any_landmarks(seed):
    rng = np.random.default_rng(seed)
    landmarks = rng.normal(50, 10**(seed/2), (68, 2)).astype(np.float32)
    mask = jaw_mask(landmarks, (0, 0, 101, 83), feather=rng.uniform(0, .25))
    assert mask.shape == (83, 101) and np.isfinite(mask).all() and 0 <= mask.min() and mask.max() <= 1
    assert not mask[[0, -1]].any() and not mask[:, [0, -1]].any()


def test_collapsed_landmarks_give_a_mask():
    assert np.isfinite(jaw_mask(np.full((68, 2), 20, np.float32), (0, 0, 40, 40))).all()


def test_mask_does_not_shimmer(portrait):
    _, landmarks, box, first = prepared(portrait)
    previous, largest = first, 0
    for step in range(1, 21):
        mask = jaw_mask(landmarks + np.float32([step*.05, step*.03]), box)
        largest, previous = max(largest, np.abs(mask - previous).max()), mask
    assert largest < .06


@pytest.mark.parametrize('option', [dict(upper_boundary_ratio=1.5), dict(feather=-.1), dict(chin_drop=2), dict(right_cheek_width=300)])
def test_options_out_of_range(portrait, option):
    frame, landmarks, box, _ = prepared(portrait)
    with pytest.raises(ConfigError, match=next(iter(option))): jaw_mask(landmarks, box, **option)


@pytest.mark.parametrize('box_shift', [(0, 0), (-180, -70), (300, 0), (0, 400), (-1000, 0)])
@pytest.mark.parametrize('options', [{}, dict(match=False, sharpen=0), dict(grain=1.)])
def test_bytes_outside_the_mask_are_the_same(portrait, box_shift, options):
    frame, landmarks, box, mask = prepared(portrait)
    frame = np.random.default_rng(0).integers(0, 256, frame.shape, np.uint8)
    generated = np.random.default_rng(1).integers(0, 256, (256, 256, 3), np.uint8)
    x1, y1, x2, y2 = (value + move for value, move in zip(box, box_shift*2))
    result = composite(frame, generated, (x1, y1, x2, y2), mask, **options)
    alpha = np.zeros((2000, 3000), np.float32)
    alpha[y1+1000:y2+1000, x1+1000:x2+1000] = mask
    outside = alpha[1000:1512, 1000:1512] == 0
    assert np.array_equal(result[outside], frame[outside])


@pytest.mark.parametrize('cast', [(12, 12, 12), (-12, 0, 12), (20, -15, 5)])
def test_a_plain_cast_is_removed(portrait, cast):
    frame, _, (x1, y1, x2, y2), mask = prepared(portrait)
    source = frame[y1:y2, x1:x2].clip(30, 220)
    fixed = match_color((source + np.array(cast)).astype(np.uint8), source, mask)
    assert np.abs(fixed.astype(int) - source)[mask > .02].mean() < .5


def test_a_new_mouth_keeps_its_colour(portrait):
    frame, landmarks, (x1, y1, x2, y2), mask = prepared(portrait)
    source = np.ascontiguousarray(frame[y1:y2, x1:x2])
    generated = source.copy()
    centre = tuple(int(v) for v in landmarks[60:68].mean(0) - [x1, y1])
    cv2.ellipse(generated, centre, (16, 12), 0, 0, 360, (20, 0, 0), -1)
    assert np.abs(match_color(generated, source, mask).astype(int) - generated).max() <= 1


def test_correction_is_bounded(portrait):
    frame, _, (x1, y1, x2, y2), mask = prepared(portrait)
    source = frame[y1:y2, x1:x2]
    change = match_color(np.zeros_like(source), source, mask, limit=10)
    assert change.max() <= 10


def test_a_perfect_crop_leaves_the_frame(portrait):
    frame, _, box, mask = prepared(portrait)
    x1, y1, x2, y2 = box
    crop = frame[y1:y2, x1:x2]
    once = composite(frame, crop, box, mask)
    assert np.array_equal(once, frame)
    again = composite(once, crop_face(once, box), box, mask)
    assert np.abs(again.astype(int) - frame).mean() < .1


def test_noise_in_the_footage_does_not_make_the_colour_flicker(portrait):
    frame, _, box, mask = prepared(portrait)
    x1, y1, x2, y2 = box
    generated = (crop_face(frame, box)*.95 + 4).astype(np.uint8)
    means = []
    for seed in range(6):
        noisy = (frame + np.random.default_rng(seed).normal(0, 3, frame.shape)).clip(0, 255).astype(np.uint8)
        means.append(composite(noisy, generated, box, mask)[y1:y2, x1:x2][mask > .99].mean(0))
    assert np.std(means, axis=0).max() < .3


def test_it_keeps_up_with_video(portrait):
    frame, landmarks, (x1, y1, x2, y2), _ = prepared(portrait)
    big = cv2.resize(frame, None, fx=2.2, fy=2.2)
    points = landmarks*np.float32(2.2)
    box = CropRule().box(points, big.shape[1], big.shape[0])
    mask, generated, out = jaw_mask(points, box), crop_face(big, box), big.copy()
    def best(work):
        times = []
        for _ in range(15):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return 1000*min(times)
    assert best(lambda: jaw_mask(points, box)) < 10
    assert best(lambda: composite(big, generated, box, mask, out=out)) < 60
