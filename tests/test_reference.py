"Files and commands of the original MuseTalk"
import inspect
import re
from pathlib import Path

import numpy as np
import pytest

from musetalk.bundle import load_bundle
from musetalk.cli import build_parser, main
from musetalk.core import ConfigError, save_image
from musetalk.media import VideoSource
from musetalk.reference import BOTH_SCRIPTS, INFERENCE, REALTIME, as_table, parsing_counterpart, read_avatars, translate
from musetalk.sound import write_audio
from musetalk.tasks import read_tasks

TASKS = '''task_0:
 video_path: "data/video/yongen.png"
 audio_path: "data/audio/yongen.wav"

task_1:
 video_path: "data/video/yongen.png"
 audio_path: "data/audio/eng.wav"
 bbox_shift: -7
'''
# options of both scripts as `musetalk.md`, the description of the original, lists them
INFERENCE_FLAGS = '''ffmpeg_path gpu_id vae_type unet_config unet_model_path whisper_dir inference_config bbox_shift result_dir extra_margin fps audio_padding_length_left audio_padding_length_right
batch_size output_vid_name use_saved_coord saved_coord use_float16 parsing_mode left_cheek_width right_cheek_width version'''.split()
REALTIME_FLAGS = [flag for flag in INFERENCE_FLAGS if flag != 'use_float16'] + ['skip_save_images']


@pytest.fixture
def checkout(tmp_path, portrait, voice):
    "As the original lays out its samples"
    for place in ('data/video', 'data/audio', 'configs/inference'): (tmp_path/place).mkdir(parents=True)
    save_image(tmp_path/'data/video/yongen.png', portrait)
    for name in ('yongen', 'eng'): write_audio(tmp_path/f'data/audio/{name}.wav', voice)
    (tmp_path/'configs/inference/test.yaml').write_text(TASKS)
    return tmp_path


@pytest.mark.parametrize('flags,rows', [(INFERENCE_FLAGS, INFERENCE), (REALTIME_FLAGS, REALTIME)])
def test_every_option_has_its_row(flags, rows):
    assert {row.name for row in (*BOTH_SCRIPTS, parsing_counterpart(()), *rows)} == {f'--{flag}' for flag in flags}
    table = as_table([*BOTH_SCRIPTS, *rows])
    assert table.count('\n') == 1 + len(BOTH_SCRIPTS) + len(rows) and all(line.count('|') == 5 for line in table.split('\n'))


VALUES = dict(gpu_id='1', version='v1', bbox_shift='-3', batch_size='4', fps='25', extra_margin='12', left_cheek_width='60', right_cheek_width='70', audio_padding_length_left='2',
              audio_padding_length_right='2', unet_config='models/musetalk/musetalk.json', unet_model_path='models/musetalk/pytorch_model.bin', parsing_mode='raw')


def test_every_option_is_understood_and_lost_by_none():
    words = ['python', '-m', 'scripts.inference']
    for flag in INFERENCE_FLAGS: words += [f'--{flag}'] + ([] if flag in ('use_saved_coord', 'saved_coord', 'use_float16') else [VALUES.get(flag, f'some_{flag}')])
    translation = translate(words)
    args = build_parser().parse_args(translation.words)
    assert (args.tasks, args.bundle, args.device, args.dtype) == ('some_inference_config', 'v1.0', 'cuda:1', 'fp16')
    assert (args.bbox_shift, args.batch_size, args.extra_margin, args.left_cheek_width, args.right_cheek_width) == (-3, 4, 12, 60, 70)
    noted = ' '.join(translation.notes)
    for flag in ('whisper_dir', 'vae_type', 'output_vid_name', 'audio_padding_length_left', 'use_saved_coord', 'saved_coord', 'parsing_mode'): assert f'--{flag}' in noted


def test_wrapper_script_of_version_1():
    translation = translate('python3 -m scripts.inference --inference_config ./configs/inference/test.yaml --result_dir ./results/test --unet_model_path ./models/musetalk/pytorch_model.bin '
                            '--unet_config ./models/musetalk/musetalk.json --version v1')
    assert translation.words == 'dub --config ./configs/inference/test.yaml --bundle v1.0 --result-dir ./results/test'.split() and not translation.notes


def test_realtime_wrapper():
    translation = translate('python3 -m scripts.realtime_inference --inference_config ./configs/inference/realtime.yaml --result_dir ./results/realtime --unet_model_path ./models/musetalkV15/unet.pth '
                            '--unet_config ./models/musetalkV15/musetalk.json --version v15 --fps 25')
    assert translation.words == 'avatar --config ./configs/inference/realtime.yaml --bundle v1.5 --dtype fp16 --fps 25'.split() and not translation.notes


def test_weights_of_another_version_are_noted():
    translation = translate('python -m scripts.inference --inference_config a.yaml --unet_model_path models/musetalk/pytorch_model.bin')
    assert 'models/musetalk/pytorch_model.bin' in translation.words and 'another version' in translation.notes[0]


def test_task_file_is_found_its_footage_from_anywhere(checkout, tmp_path_factory, monkeypatch):
    monkeypatch.chdir(tmp_path_factory.mktemp('elsewhere'))
    for task in read_tasks(checkout/'configs/inference/test.yaml'): assert task.video.exists() and task.audio.exists()
    monkeypatch.chdir(checkout/'configs')
    for task in read_tasks('inference/test.yaml'): assert task.video.exists() and task.audio.exists()
    monkeypatch.chdir(checkout)
    assert read_tasks('configs/inference/test.yaml')[0].video == Path('data/video/yongen.png')


def test_task_file_runs_unchanged(checkout, toy_folder, monkeypatch, capsys):
    monkeypatch.chdir(checkout)
    monkeypatch.setenv('MUSETALK_MODELS', str(toy_folder.parent))
    assert main(['dub', '--config', 'configs/inference/test.yaml', '--bundle', 'toy', '--no-progress']) == 0
    assert {path.name for path in Path('results').glob('*.mp4')} == {'yongen_yongen.mp4', 'yongen_eng.mp4'}
    assert '2 of 2 tasks done' in capsys.readouterr().out


@pytest.mark.skipif('load_official' not in inspect.getsource(load_bundle), reason='load_bundle does not hand official names to load_official yet')
def test_task_file_runs_with_official_weights(checkout, tmp_path, monkeypatch, capsys):
    "Small weights in the official formats, found by the name v1.5"
    from official import write_official
    write_official(tmp_path/'models', versions=('v1.5',))
    monkeypatch.setenv('MUSETALK_MODELS', str(tmp_path/'models'))
    monkeypatch.chdir(checkout)
    assert main(['dub', '--config', 'configs/inference/test.yaml', '--bundle', 'v1.5', '--dtype', 'fp32', '--device', 'cpu', '--no-progress']) == 0, capsys.readouterr()
    assert VideoSource('results/yongen_eng.mp4').frame_count == 12


def test_avatar_file(checkout, monkeypatch):
    monkeypatch.chdir(checkout)
    Path('configs/inference/realtime.yaml').write_text('avator_1:\n preparation: True\n bbox_shift: 5\n video_path: "data/video/yongen.png"\n audio_clips:\n  audio_0: "data/audio/yongen.wav"\n  audio_1: "data/audio/eng.wav"\n')
    avatar, = read_avatars('configs/inference/realtime.yaml')
    assert (avatar.name, avatar.bbox_shift, avatar.preparation, avatar.video.exists()) == ('avator_1', 5, True, True)
    assert [path.exists() for path in avatar.audio_clips.values()] == [True, True]
    with pytest.raises(ConfigError, match='musetalk avatar --config'): read_tasks('configs/inference/realtime.yaml')


def test_tables_name_no_option_in_vain():
    help_text = build_parser()._subparsers._group_actions[0].choices['dub'].format_help()
    for row in (*BOTH_SCRIPTS, *INFERENCE):
        for name in re.findall(r'`(--[\w-]+)', row.here): assert f'{name} ' in help_text, name
    assert np.all([row.here for row in (*BOTH_SCRIPTS, *INFERENCE, *REALTIME)])
