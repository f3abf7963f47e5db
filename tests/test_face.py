"Faces that hide, leave, return, cross, tilt and keep still: one record per frame, and of the right person"
from fractions import Fraction
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from skimage import data

from musetalk.core import FaceError
from musetalk.face import DlibBackend, FaceAlignmentBackend, FaceBackend, face_backend, face_square, model_file
from musetalk.smooth import RADIUS, smooth_landmarks
from musetalk.track import FaceTracker, track_faces

BACKEND = DlibBackend()
PORTRAIT = data.astronaut()
FIRST = PORTRAIT[0:230, 110:330]
SECOND = np.pad(cv2.resize(FIRST[:, ::-1], (260, 220))[:, 20:240], ((0, 10), (0, 0), (0, 0)), 'edge')[..., ::-1]*.8
_y, _x = np.mgrid[:230, :220]
OVAL = np.clip((1 - ((_x - 110)/92)**2 - ((_y - 110)/115)**2)*8, 0, 1)[..., None]
BACKGROUND = cv2.resize(np.random.default_rng(3).integers(90, 140, (6, 12, 3)).astype(np.uint8), (560, 250), interpolation=cv2.INTER_CUBIC)

def noisy(image, seed, sigma=2.):
    return np.clip(image + np.random.default_rng(seed).normal(0, sigma, image.shape), 0, 255).astype(np.uint8)

def scene(*heads, seed=0):
    "Heads `(picture, x)` or `(picture, x, zoom)` on a soft background, the last in front"
    image = BACKGROUND.astype(np.float64)
    for head, x, *zoom in heads:
        size = [round(side*(zoom[0] if zoom else 1)) for side in (220, 230)]
        head, oval = (cv2.resize(np.asarray(part, np.float64), size, interpolation=cv2.INTER_AREA) for part in (head, OVAL[..., 0]))
        left, right = max(0, x), min(image.shape[1], x + size[0])
        if right <= left: continue
        part, window = slice(left - x, right - x), image[10:10 + size[1], left:right]
        window += (head[:, part] - window)*oval[:, part, None]
    return noisy(image, seed)

def film(*moments): return [scene(*heads, seed=seed) for seed, heads in enumerate(moments)]
def centres(records): return [float(face_square(record.landmarks)[0]) if record.found else None for record in records]
def track(frames, **options):
    records = track_faces(frames, backend=BACKEND, **options)
    assert len(records) == len(frames)
    for record in records:
        if record.found: assert record.landmarks.shape == (68, 2) and record.landmarks.dtype == np.float32 and len(record.bbox) == 4
        else: assert record.landmarks is None and record.bbox is None
    return records

HOME = float(face_square(BACKEND.landmarks(scene((FIRST, 0)), BACKEND.detect(scene((FIRST, 0)))[0][0]))[0]) # centre of FIRST's face in its picture

def test_no_face_at_all():
    assert [record.found for record in track(film(*[()]*12))] == [False]*12
    assert [record.found for record in track([np.zeros((90, 120, 3), np.uint8)]*5)] == [False]*5

def test_empty_and_single():
    assert track([]) == []
    assert [record.found for record in track([PORTRAIT])] == [True]

def test_as_many_records_as_frames():
    for count in (2, RADIUS, RADIUS + 1, 2*RADIUS, 2*RADIUS + 1, 2*RADIUS + 2): assert all(record.found for record in track([PORTRAIT]*count))

def test_one_frame_without_a_face_in_the_middle():
    records = track(film(*[((FIRST, 150),) if i != 6 else () for i in range(13)]))
    assert [i for i, record in enumerate(records) if not record.found] == [6]
    assert records[5].segment != records[7].segment
    assert np.allclose(centres(records)[5], centres(records)[7], atol=1)

def test_black_start_is_followed_by_the_face_at_once():
    records = track([np.zeros((250, 560, 3), np.uint8)]*9 + film(*[((FIRST, 150),)]*5))
    assert [record.found for record in records] == [False]*9 + [True]*5

def test_cut_between_two_people():
    records = track(film(*[((FIRST, 20),)]*7, *[((SECOND, 300),)]*7))
    assert all(record.found for record in records)
    assert records[6].segment != records[7].segment
    assert np.ptp(centres(records)[:7]) < 1 and np.ptp(centres(records)[7:]) < 1 and centres(records)[7] - centres(records)[6] > 200

def test_cut_at_the_same_place_does_not_mix():
    records = track(film(*[((FIRST, 150),)]*7, *[((SECOND, 150, .8),)]*7))
    assert records[6].segment != records[7].segment
    sides = [face_square(record.landmarks)[2] for record in records]
    assert np.ptp(sides[:7]) < 2 and np.ptp(sides[7:]) < 2 and sides[6] - sides[7] > 8

@pytest.mark.parametrize('select, expected', [('largest', 380), (0, 30), (1, 380), (-1, 380), ((140, 120), 30), ((450, 100), 380)])
def test_choice_among_two(select, expected):
    records = track(film(*[((FIRST, 30, .7), (FIRST[:, ::-1], 320))]*3), select=select)
    assert all(abs(x - (30 + .7*HOME if expected == 30 else 320 + 220 - HOME)) < 15 for x in centres(records))

def test_index_that_does_not_exist():
    assert not any(record.found for record in track(film(*[((FIRST, 30),)]*4), select=1))

@pytest.mark.parametrize('select', [0, 1])
def test_crossing_does_not_swap(select):
    frames = film(*[((FIRST, 10 + 13*i), (SECOND, 335 - 13*i)) for i in range(26)]) # SECOND in front
    records = track(frames, select=select)
    found = centres(records)
    expected = [(10 + HOME + 13*i) if select == 0 else (found[0] - 13*i) for i in range(26)]
    assert all(x is None or abs(x - truth) < 12 for x, truth in zip(found, expected))
    assert found[0] is not None and found[-1] is not None
    if select == 1: assert None not in found

def test_face_that_leaves_and_returns():
    places = [150 + 40*i for i in range(12)] + [590]*3 + [590 - 40*i for i in range(12)]
    records = track(film(*[((FIRST, x),) for x in places]))
    found = centres(records)
    assert all(x is None or abs(x - place - HOME) < 8 for x, place in zip(found, places))
    assert all(found[i] is not None for i in (0, 5, -6, -1)) and not any(found[11:16])
    assert records[0].segment != records[-1].segment

def test_person_who_leaves_is_not_replaced_by_the_other():
    records = track(film(*[((FIRST, 10), (SECOND, 320))]*5, *[((FIRST, 10),)]*9, *[((FIRST, 10), (SECOND, 320))]*5), select=1)
    assert [record.found for record in records] == [True]*5 + [False]*9 + [True]*5

def test_tiny_face():
    frames = film(*[((FIRST, 100 + 3*i, .4),) for i in range(9)]) # about 38 pixels between the edges of its square
    found = centres(track(frames))
    assert all(abs(x - (100 + 3*i + .4*HOME)) < 3 for i, x in enumerate(found))

def test_fast_face():
    found = centres(track(film(*[((FIRST, 10 + 28*i),) for i in range(12)])))
    assert all(abs(x - (10 + 28*i + HOME)) < 4 for i, x in enumerate(found))

def test_still_face_with_noise():
    frames = [noisy(PORTRAIT, seed, 5) for seed in range(18)]
    smooth, raw = track(frames), track(frames, smoothing=0)
    rigid = lambda records: np.array([record.landmarks[27:48] for record in records]).std(0)
    assert rigid(smooth).max() < .15 and rigid(smooth).mean() < .6*rigid(raw).mean()
    assert len({tuple(round(v) for v in record.bbox) for record in smooth}) == 1

@pytest.mark.parametrize('degrees', [-45, -25, 25, 45])
def test_tilted_head(degrees):
    tilted = cv2.warpAffine(PORTRAIT, cv2.getRotationMatrix2D((224, 130), -degrees, 1), (512, 512), borderMode=cv2.BORDER_REPLICATE)
    [record] = track([tilted])
    assert abs(face_square(record.landmarks)[3] - 2 - degrees) < 7

def test_slowly_turning_head_is_followed_past_what_the_detector_sees():
    turn = lambda degrees: cv2.warpAffine(PORTRAIT, cv2.getRotationMatrix2D((224, 130), -degrees, 1), (512, 512), borderMode=cv2.BORDER_REPLICATE)
    records = track([turn(4*i) for i in range(18)])
    assert abs(face_square(records[-1].landmarks)[3] - 2 - 68) < 7

def test_smoothing_keeps_the_mouth():
    landmarks = BACKEND.landmarks(PORTRAIT, BACKEND.detect(PORTRAIT)[0][0]).astype(np.float64)
    opening = 3*(1 - np.cos(2*np.pi*4*np.arange(50)/25))
    talking = np.repeat(landmarks[None], 50, 0)
    talking[:, 65:68, 1] += opening[:, None]
    talking[:, 55:60, 1] += .9*opening[:, None]
    talking += np.random.default_rng(0).normal(0, .2, talking.shape)
    smooth = np.array([smooth_landmarks(talking[max(0, i - RADIUS):i + RADIUS + 1], min(i, RADIUS)) for i in range(50)])
    lips = lambda points: points[:, 66, 1] - points[:, 62, 1]
    assert np.corrcoef(lips(smooth), opening)[0, 1] > .97 and lips(smooth).std() > .9*lips(talking).std()

def test_stream_is_lazy_bounded_and_takes_frames():
    alive = []
    def stream():
        for index in range(40):
            alive.append(index)
            yield SimpleNamespace(image=PORTRAIT, time=Fraction(index, 25), index=index)
    for count, record in enumerate(FaceTracker(BACKEND).track(stream()), 1):
        assert record.found and len(alive) - count <= RADIUS

def test_tracker_starts_afresh_and_repeats_itself():
    tracker, frames = FaceTracker(BACKEND), [noisy(PORTRAIT, seed) for seed in range(6)]
    first, again = list(tracker.track(frames)), list(tracker.track(frames))
    assert all(np.array_equal(a.landmarks, b.landmarks) and a.bbox == b.bbox for a, b in zip(first, again))

def test_mixed_sizes_and_grey_pictures():
    records = track([PORTRAIT, PORTRAIT[:400, :450], cv2.resize(PORTRAIT, (768, 768)), PORTRAIT])
    assert all(record.found for record in records) and len({record.segment for record in records}) == 4

def test_a_backend_needs_only_detect_and_locate():
    class Marked(FaceBackend): # a "face" is a white square
        def detect(self, image, roll=0., all_sizes=False, quick=False):
            rows, columns = np.nonzero(image[..., 0] > 250)
            return [((columns.min(), rows.min(), columns.max() + 1, rows.max() + 1), 1.)] if len(rows) else []
        def locate(self, image, bbox, roll=0.):
            found = self.detect(image)
            return np.float32(SHAPE*40 + [found[0][0][0] + 20, found[0][0][1] + 20] if found else SHAPE), float(bool(found))
    from musetalk.crop import MEAN_FACE as SHAPE
    frames = []
    for i in range(20):
        frames.append(np.random.default_rng(0).integers(0, 200, (120, 200, 3)).astype(np.uint8))
        if i not in (8, 9): frames[-1][30:70, 20 + 4*i:60 + 4*i] = 255
    records = track_faces(frames, backend=Marked())
    assert [i for i, record in enumerate(records) if not record.found] == [8, 9]

def test_errors_say_what_to_do(tmp_path):
    with pytest.raises(ValueError, match="use 'largest'"): FaceTracker(BACKEND, select='best')
    with pytest.raises(ValueError, match='at least 1'): FaceTracker(BACKEND, every=0)
    with pytest.raises(FaceError, match='no weights s3fd'): FaceAlignmentBackend(tmp_path)
    with pytest.raises(FaceError, match="use 'dlib' or 'face-alignment'"): face_backend('opencv')
    with pytest.raises(FaceError, match='pip install'): model_file('absent.dat')
