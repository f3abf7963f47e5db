"Which frames may show the person: the reference's own sets, and what must hold for any footage"
from pathlib import Path

import numpy as np
import pytest
from official import agree

from musetalk.core import ConfigError, MediaError, write_json
from musetalk.dataset import (PUBLISHED_MOUTH, PUBLISHED_POSE, SAMPLING, FaceClips, FaceLessons, encode_crop, nearest, point_distances,
                              random_view, reference_candidates, save_clip, save_sound)

GOLDEN = Path(__file__).parent/'golden'/'reference_sampling.npz'


@pytest.fixture(scope='module')
def golden():
    with np.load(GOLDEN, allow_pickle=False) as stored: return {name: stored[name] for name in stored.files}


def test_published_sets(golden):
    "A: the K nearest in pose, without the frame itself; B: the K farthest in mouth; K = int(0.51 frames)"
    points = golden['landmarks']/golden['box_wh'][:, None]*256
    frames = len(points)
    pose, mouth = point_distances(points[:, PUBLISHED_POSE]), point_distances(points[:, PUBLISHED_MOUTH])
    np.fill_diagonal(pose, np.inf)
    near, other = nearest(pose, int(.51*frames)), nearest(-mouth, int(.51*frames))
    for found, wanted in ((near, golden['A']), (other, golden['B'])):
        agree('reference_sampling', found.astype(int), np.unpackbits(wanted, axis=1, count=frames), 0)
    allowed = reference_candidates(points[:, PUBLISHED_POSE], points[:, PUBLISHED_MOUTH], near=.51, other=.51)
    assert np.array_equal(allowed, near & other)


@pytest.mark.parametrize('method', SAMPLING)
@pytest.mark.parametrize('frames', [1, 2, 7, 40])
def test_there_is_always_a_candidate(method, frames):
    points = np.random.default_rng(frames).normal(100, 20, (frames, 68, 2))
    allowed = reference_candidates(points[:, PUBLISHED_POSE], points[:, 60:68], method, apart=5)
    assert allowed.shape == (frames, frames) and allowed.any(1).all()
    assert frames == 1 or not allowed.diagonal().any()


def clip_folder(folder, **row):
    rng = np.random.default_rng(0)
    crops = [encode_crop(rng.integers(0, 255, (288, 288, 3), np.uint8)) for _ in range(6)]
    save_clip(folder/'a.npz', crops, rng.normal(140, 20, (6, 68, 2)), np.zeros((6, 4)))
    save_sound(folder/'a.speech.npz', np.zeros(16000), np.zeros((50, 1, 4)))
    write_json(folder/'clips.json', [dict(name='a', identity='x', frames=6, split='train', face_px=100, sound=True, lag_ms=0) | row])
    return folder


def test_a_clip_that_is_too_short_or_silent(tmp_path):
    with pytest.raises(ConfigError, match='no clip of 9 frames'): FaceLessons(FaceClips(clip_folder(tmp_path)), frames=9)
    with pytest.raises(ConfigError, match='with sound'): FaceLessons(FaceClips(clip_folder(tmp_path, sound=False)))
    lesson = FaceLessons(FaceClips(clip_folder(tmp_path, sound=False)), frames=2, sound=False)(np.random.default_rng(0))
    assert lesson['image'].shape == (2, 256, 256, 3) and 'windows' not in lesson


def test_a_damaged_clip_names_its_file(tmp_path):
    clip_folder(tmp_path)
    whole = (tmp_path/'a.npz').read_bytes()
    for damaged in (b'PK broken', b'', whole[:len(whole)//2]):
        (tmp_path/'a.npz').write_bytes(damaged)
        with pytest.raises(MediaError, match=r'a\.npz'): FaceClips(tmp_path)[0]


def test_margin_stays_within_its_interval():
    margins = [random_view(np.random.default_rng(seed), 0, (10, 10))['margin'] for seed in range(200)]
    assert 0 <= min(margins) and max(margins) <= 20 and np.ptp(margins) > 15
