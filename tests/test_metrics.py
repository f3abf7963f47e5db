"What an evaluation must survive, and that its numbers mean what they say"
import json

import cv2
import numpy as np
import pytest
import torch

from musetalk.compare import Workshop, compare_faces, talking_clips
from musetalk.core import ConfigError, FaceError, MediaError, MuseTalkError, save_image
from musetalk.evaluate import evaluate, read_evaluation
from musetalk.metrics import lag_correlation, opening_range, rest_opening, shifted_curve, silence_motion, sync_scores, track_video
from musetalk.picture_metrics import frechet_distance, frechet_features, lip_patch, sharpness_ratio
from musetalk.sound import load_audio, write_audio
from musetalk.writer import VideoWriter


def write_talk(path, images, samples=None):
    "A video of these images, with sound"
    if samples is not None: write_audio(path.with_suffix('.wav'), samples)
    with VideoWriter(path, 25, *images[0].shape[1::-1], None if samples is None else path.with_suffix('.wav'), crf=10) as writer:
        for image in images: writer.write(image)
    return path


@pytest.fixture(scope='module', autouse=True)
def few_frames():
    "Look at three pictures a clip, for speed"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('musetalk.compare.PICTURES', 3)
        patch.setattr('musetalk.compare.PORTRAITS', 2)
        yield


@pytest.fixture(scope='module')
def talkers(tmp_path_factory, portrait):
    "Two people who nod and hum for 1.2 seconds"
    folder = tmp_path_factory.mktemp('talkers')
    time = np.arange(19200)/16000
    for pitch, (name, image) in enumerate((('ann', portrait), ('zoe', np.ascontiguousarray(portrait[:, ::-1])))):
        hum = np.float32(.3*np.sin(2*np.pi*(140 + 60*pitch)*time)*(1 + np.sin(2*np.pi*(3 + pitch)*time))/2)
        write_talk(folder/f'{name}.mp4', [np.roll(image, int(2*np.sin(step/4)), 0) for step in range(30)], hum)
    return folder


@pytest.fixture(scope='module')
def evaluated(talkers, toy, tmp_path_factory):
    "A report, and the folder with what was made on the way"
    folder = tmp_path_factory.mktemp('work')
    return evaluate(talkers, toy, folder/'report.json', folder/'kept'), folder


def test_numbers_at_their_fixed_points(talkers, toy, tmp_path):
    clip = talking_clips(talkers)[0]
    numbers, real, same = compare_faces(Workshop(tmp_path, toy), clip, clip.path, True)
    assert numbers['psnr'] == 100 and numbers['landmark_distance'] == 0
    assert numbers['ssim'] == pytest.approx(1) and numbers['sharpness'] == pytest.approx(1) and numbers['jitter'] == pytest.approx(1)
    np.testing.assert_array_equal(real, same)


def test_report_is_whole_and_the_rows_mean_what_they_say(evaluated):
    report, folder = evaluated
    assert list(report.cross_driven) == ['dubbed', 'real', 'static mouth', 'shuffled speech', 'undubbed', 'another person']
    assert report.self_driven['real']['psnr'] > 35 and report.self_driven['real']['landmark_distance'] < .02
    assert report.cross_driven['real']['sharpness'] == pytest.approx(1, abs=.15)
    assert report.cross_driven['dubbed']['sharpness'] != report.cross_driven['real']['sharpness']
    assert report.self_driven['dubbed']['psnr'] < report.self_driven['real']['psnr'], 'a network that paints noise'
    assert report.self_driven['dubbed']['feature_distance'] > report.self_driven['real']['feature_distance']
    assert {clip['words'] for clip in report.clips} == {'ann', 'zoe'} and all(clip['words'] != clip['name'] for clip in report.clips)
    assert read_evaluation(folder/'report.json') == report
    text = (folder/'report.md').read_text()
    assert '| **dubbed** |' in text and 'FVD: not available' in text and 'nan' not in text.lower()
    assert (folder/'report.png').stat().st_size > 5000


def test_same_inputs_give_the_same_report(evaluated, talkers, toy, tmp_path):
    evaluate(talkers, toy, tmp_path/'again.json')
    for suffix in ('.json', '.md', '.png'): assert (tmp_path/'again').with_suffix(suffix).read_bytes() == (evaluated[1]/'report').with_suffix(suffix).read_bytes()


def test_other_settings_are_other_dubs(talkers, toy, tmp_path):
    clip = talking_clips(talkers)[0]
    one, two = (Workshop(tmp_path, toy, sharpen=sharpen).dubbed(clip, clip) for sharpen in (0, 2.))
    assert one != two and one.exists() and two.exists()
    with pytest.raises(ConfigError, match='Unknown setting'): Workshop(tmp_path, toy, sharpness=1)


def bad_clips(folder, portrait):
    "Files that cannot be used, with what is said about them"
    hum = np.float32(.2*np.sin(np.arange(19200)/20))
    images = [portrait]*30
    save_image(folder/'picture.png', portrait)
    write_audio(folder/'voice.wav', hum)
    (folder/'broken.mp4').write_bytes(b'no video at all')
    return [(folder/'missing.mp4', MediaError, 'does not exist'), (folder/'picture.png', MediaError, 'is a picture'), (folder/'voice.wav', MediaError, 'holds no video'),
            (folder/'broken.mp4', MediaError, 'not a video'), (write_talk(folder/'mute.mp4', images), MediaError, 'has no sound'),
            (write_talk(folder/'faceless.mp4', [np.full_like(portrait, 90)]*30, hum), FaceError, 'shows a face in 0 of its 30 frames'),
            (write_talk(folder/'short.mp4', images[:12], hum[:7680]), MediaError, 'too short to measure'),
            (write_talk(folder/'silent.mp4', images, 0*hum), MediaError, 'nothing in it')]


def test_bad_input_is_one_sentence_and_nothing_is_dubbed(talkers, toy, tmp_path, portrait, monkeypatch):
    monkeypatch.setattr('musetalk.dub.dub', lambda *a, **k: pytest.fail('dubbed'))
    good = talkers/'ann.mp4'
    for path, error, words in bad_clips(tmp_path, portrait):
        with pytest.raises(error, match=words) as caught: evaluate([good, path], toy, tmp_path/'out.json')
        assert path.name in str(caught.value) and len(str(caught.value).splitlines()) == 1
    assert not (tmp_path/'out.json').exists()
    with pytest.raises(ConfigError, match='at least two'): evaluate([good], toy)
    (tmp_path/'nothing').mkdir()
    with pytest.raises(ConfigError, match='no talking videos'): talking_clips(tmp_path/'nothing')
    with pytest.raises(MuseTalkError): evaluate(tmp_path/'nowhere.json', toy)


def test_a_manifest_knows_people_lags_and_who_was_kept_apart(tmp_path):
    rows = [dict(file=f'train/{name}.mp4', identity=name[0], lag_ms=lag, dev=dev, sound=True) for name, lag, dev in (('a1', 0, True), ('b1', -40, True), ('c1', 0, False))]
    (tmp_path/'manifest.json').write_text(json.dumps([*rows, dict(file='mute.mp4', identity='m', dev=True, sound=False)]))
    clips = talking_clips(tmp_path/'manifest.json', dict(a1=.08))
    assert [(clip.name, clip.identity, clip.lag) for clip in clips] == [('a1', 'a', .08), ('b1', 'b', -.04)]
    (tmp_path/'train').mkdir()
    for name in ('a1', 'b1', 'c1'): (tmp_path/'train'/f'{name}.mp4').touch()
    assert [clip.name for clip in talking_clips(tmp_path/'train')] == ['a1', 'b1']


def test_late_sound_is_put_in_time_before_anything_is_measured(talkers, toy, tmp_path):
    clip = talking_clips(talkers, dict(ann=.2))[0]
    straight, moved = load_audio(talkers/'ann.mp4'), load_audio(Workshop(tmp_path, toy).speech(clip))
    assert len(straight) - len(moved) == 3200
    np.testing.assert_allclose(moved, straight[3200:], atol=1e-4)


def test_a_lag_is_found_and_no_curve_is_rolled():
    curve = np.abs(np.sin(np.arange(80)/3.))*np.linspace(0, 1, 80)
    for lag in (-4, 0, 3):
        found = sync_scores(shifted_curve(curve, lag/25), curve)
        assert found['best_lag'] == lag and found['best_correlation'] == pytest.approx(1)
    assert np.isnan(shifted_curve(curve, .12)[:3]).all() and np.isnan(shifted_curve(curve, -.12)[-3:]).all()
    with pytest.raises(ValueError, match='too few'): lag_correlation(curve[:10], curve)


def test_a_still_face_is_still_whatever_the_camera_does(tmp_path, portrait):
    random, large = np.random.default_rng(0), cv2.resize(portrait, (256, 256))
    path = write_talk(tmp_path/'still.mp4', [np.clip(np.roll(large, int(3*np.sin(step/5)), 1) + random.normal(0, 4, large.shape), 0, 255).astype(np.uint8) for step in range(50)])
    curve = track_video(path).opening
    motion = silence_motion(curve, np.ones(50, bool), rest_opening(curve))
    assert motion['silence_motion'] == 0 and motion['silent_frames'] == 50
    assert opening_range(curve) < .02


def test_sharpness_falls_with_every_blur_and_does_not_ask_for_detail_that_no_pixel_holds(portrait):
    landmarks = track_video_of_one(portrait)
    real = lip_patch(portrait, landmarks)
    ratios = [sharpness_ratio([lip_patch(cv2.GaussianBlur(portrait, (0, 0), sigma), landmarks)], [real]) for sigma in (.3, .8, 1.5, 3.)]
    assert ratios == sorted(ratios, reverse=True) and ratios[0] > .9 and ratios[-1] < .3
    huge = cv2.resize(portrait, None, fx=6, fy=6, interpolation=cv2.INTER_LINEAR)
    assert lip_patch(huge, landmarks*6).shape[1] < 2*128*1.2, 'measured in the scale of the crop'


def track_video_of_one(image):
    from musetalk.track import track_faces
    return track_faces([image])[0].landmarks


def test_frechet_networks_are_used_where_their_files_lie(tmp_path, monkeypatch):
    class Pictures(torch.nn.Module):
        def forward(self, x, return_features: bool = False): return x.float().mean((2, 3))

    class Videos(torch.nn.Module):
        def forward(self, x, rescale: bool = True, resize: bool = True, return_features: bool = False): return x.mean((2, 3, 4))
    (tmp_path/'metrics').mkdir()
    for name, network in (('inception-2015-12-05.pt', Pictures()), ('i3d_torchscript.pt', Videos())): torch.jit.script(network).save(str(tmp_path/'metrics'/name))
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path))
    images = np.random.default_rng(0).integers(0, 255, (10, 16, 16, 3), np.uint8)
    features = frechet_features('fid')(images)
    np.testing.assert_allclose(features, images.mean((1, 2)), rtol=1e-5)
    assert frechet_distance(features, features + 2) == pytest.approx(12)
    np.testing.assert_allclose(frechet_features('fvd')(images[None, :5].repeat(2, 0)), (images[:5].mean((0, 1, 2))/127.5 - 1)[None].repeat(2, 0), atol=1e-3)
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'metrics'))
    assert frechet_features('fid') is None


def test_nothing_is_made_twice_and_a_syncnet_or_anything_like_it_judges_every_row(evaluated, talkers, toy, monkeypatch):
    def judge(crops, samples):
        assert crops.dtype == np.uint8 and crops.shape[1:] == (256, 256, 3) and abs(len(crops)/25 - len(samples)/16000) < .1
        return dict(confidence=1., distance=float(len(crops)))
    before, folder = evaluated
    kept = sorted(path.name for path in (folder/'kept').iterdir())
    monkeypatch.setattr('musetalk.dub.dub', lambda *a, **k: pytest.fail('dubbed again'))
    monkeypatch.setattr('musetalk.compare.track_video', lambda *a, **k: pytest.fail('tracked again'))
    report = evaluate(talkers, toy, syncnet=judge, folder=folder/'kept')
    assert sorted(path.name for path in (folder/'kept').iterdir()) == kept
    assert all(report.cross_driven[row]['sync_distance'] == 30 for row in ('dubbed', 'real', 'static mouth', 'shuffled speech', 'undubbed'))
    assert not any('SyncNet' in text for text in report.missing)
    assert report.self_driven == before.self_driven and report.curves == before.curves
