"Discriminator and losses: parity with recorded figures of the reference, and terms that stand alone"
import json
from functools import partial
from pathlib import Path
import numpy as np
import pytest
import torch
from official import agree, recipe, with_singular_vectors
from musetalk.core import BundleError, ConfigError
from musetalk.discriminator import (MultiScaleDiscriminator, adversarial_loss, discriminator_from_config, discriminator_loss, downsample,
                                    feature_matching_loss, gaussian_kernel)
from musetalk.losses import VGG19Features, load_vgg19, perceptual_differences, perceptual_loss, silence_loss
from musetalk.objective import TERMS, Discriminators, Losses, LossWeights, pull_on_picture
from musetalk.parity import recipe_input
from musetalk.regions import mask_rectangles, mouth_crops, mouth_rectangles, rectangle_mask, reference_mouth_rectangle

GOLDEN = Path(__file__).resolve().parent/'golden'


def golden(name):
    stored = np.load(GOLDEN/f'{name}.npz')
    return stored, json.loads(str(stored['meta']))


def noise(seed, name, shape): return torch.from_numpy(recipe_input(seed, name, shape))


@pytest.fixture
def judge():
    "The reference's discriminator with recorded weights under their classic names"
    _, meta = golden('discriminator')
    network = discriminator_from_config(meta['params'])
    present = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    new = {'weight_orig': 'parametrizations.weight.original', 'weight_u': 'parametrizations.weight.0._u', 'weight_v': 'parametrizations.weight.0._v'}
    names = {key: '.'.join([key.rpartition('.')[0], new.get(key.rpartition('.')[2], key.rpartition('.')[2])]) for key in meta['state_keys']}
    state = with_singular_vectors(recipe(meta['weight_seed'], {key: present[name] for key, name in names.items()}))
    network.load_state_dict(state)
    return network


@torch.no_grad()
def test_discriminator_judges_like_the_reference(judge):
    stored, meta = golden('discriminator')
    seed = meta['weight_seed']
    assert sum(p.numel() for p in judge.parameters()) == meta['parameters']
    judge.eval()
    for side in (224, 256):
        (scores, features), = judge(noise(seed, f'x{side}', (1, 3, side, side)))
        agree('discriminator', scores, stored[f'pred_{side}'])
        for index, found in enumerate(features):
            step = max(1, found.shape[-1]//12)
            agree('discriminator', found[:, ::8, ::step, ::step][:, ::4], stored[f'feat{index}_{side}'])


@torch.no_grad()
def test_adversarial_losses_equal_the_reference(judge):
    stored, meta = golden('discriminator')
    picture = lambda name, count, side: noise(meta['weight_seed'], name, (count, 3, side, side))
    judge.eval()
    found, wanted = judge(picture('y224', 1, 224)), judge(picture('x224', 1, 224))
    agree('discriminator', adversarial_loss(found), stored['g_lsgan_y224'])
    for block in range(4):
        agree('discriminator', feature_matching_loss(wanted, found, [float(block == other) for other in range(4)]), stored['fm_x224_y224'][block])
    agree('discriminator', feature_matching_loss(wanted, found), stored['fm_x224_y224'].sum())
    agree('discriminator', discriminator_loss(judge(picture('real', 2, 256)), judge(picture('fake', 2, 256))), stored['d_loss_eval'])


@torch.no_grad()
def test_power_iteration_goes_the_classic_way(judge):
    stored, meta = golden('discriminator')
    picture = lambda name, count, side: noise(meta['weight_seed'], name, (count, 3, side, side))
    judge.train()
    (scores, _), = judge(picture('x224', 1, 224))
    agree('discriminator', scores, stored['train_pred_224'])
    state = judge.state_dict()
    for key in [key for key in stored.files if key.startswith('after1__')]:
        name = key.removeprefix('after1__').replace('__', '.').replace('.weight_', '.parametrizations.weight.0._')
        agree('discriminator', state[name], stored[key], 1e-5, relative=False)
    fake = judge(picture('fake', 2, 256))
    real = judge(picture('real', 2, 256))
    agree('discriminator', discriminator_loss(real, fake), stored['d_loss_train_next'])


def test_pyramid_equals_the_reference():
    stored, meta = golden('pyramid')
    images = noise(meta['input_seed'], 'x', meta['shape'])
    for scale, name, step in ((.5, '0_5', 4), (.25, '0_25', 2), (.125, '0_125', 1)):
        agree('pyramid', downsample(images, scale)[:, :, ::step, ::step], stored[f'level_{name}'], 1e-5, relative=False)
        kernel = gaussian_kernel(scale)
        agree('pyramid', torch.outer(kernel, kernel), stored[f'kernel_{name}'], 1e-6, relative=False)
    assert downsample(images, 1) is images


@pytest.fixture(scope='module')
def vgg():
    _, meta = golden('vgg_perceptual')
    network = VGG19Features(reference_range=True)
    state = recipe(meta['weight_seed'], {key: tuple(value.shape) for key, value in network.state_dict().items()})
    network.load_state_dict({key: value*2**.5 if key.endswith('weight') else value for key, value in state.items()})
    return network


def test_vgg_perceptual_equals_the_reference(vgg):
    stored, meta = golden('vgg_perceptual')
    real, painted = (noise(meta['weight_seed'], name, (1, 3, 256, 256)) for name in ('real', 'pred'))
    scales = (1, .5, .25, .125)
    with torch.no_grad():
        agree('vgg_perceptual', np.array([[float(value) for value in layers] for layers in perceptual_differences(vgg, painted, real, scales, 224)]), stored['per_scale_layer'])
        small = torch.nn.functional.interpolate(real, (224, 224), mode='bilinear')
        for index, found in enumerate(vgg(downsample(small, .25))): agree('vgg_perceptual', found[:, ::16, ::2, ::2], stored[f'feat{index}_quarter'])
    with torch.no_grad(): agree('vgg_perceptual', perceptual_loss(vgg, painted, real, scales, size=224), stored['loss'])


def test_vgg_file(vgg, tmp_path):
    with pytest.raises(BundleError, match='No vgg19'): load_vgg19(tmp_path)
    torch.save(vgg.state_dict() | {'classifier.0.weight': torch.zeros(3)}, tmp_path/'vgg19-dcbb9e9d.pth')
    for reference_range in (False, True):
        loaded = load_vgg19(tmp_path, reference_range)
        assert torch.equal(loaded.features[28].weight, vgg.features[28].weight) and loaded.reference_range == reference_range
        assert not any(p.requires_grad for p in loaded.parameters())
    images = noise(0, 'x', (1, 3, 32, 32))
    assert torch.allclose(load_vgg19(tmp_path)(images)[0], vgg((images + 1)/2)[0])
    (tmp_path/'vgg19-dcbb9e9d.pth').write_bytes(b'not weights')
    with pytest.raises(BundleError, match='not a VGG-19'): load_vgg19(tmp_path)
    torch.save({'features.0.weight': torch.zeros(2)}, tmp_path/'vgg19-dcbb9e9d.pth')
    with pytest.raises(BundleError, match='not a VGG-19'): load_vgg19(tmp_path)


def test_mouth_crops_equal_the_reference():
    stored, meta = golden('training_extras')
    rectangles = torch.tensor(meta['rects'])
    for name, key in (('frames', 'mouth_real_sample'), ('pred', 'mouth_pred_sample')):
        crops = mouth_crops(noise(meta['input_seed'], name, (3, 3, 256, 256)), rectangles, reference=True)
        agree('training_extras', crops[:, :, ::8, ::8], stored[key], 1e-5, relative=False)


def test_mouth_rectangle_equals_the_reference():
    stored, meta = golden('mouth_mask')
    assert len(stored['cases']) == 48
    for (kind, face, margin), wanted, count in zip(stored['cases'], stored['mask_rect'], stored['mask_count']):
        box = stored['union_boxes'][int(face)]
        landmarks = stored['landmarks_shifted'][int(face)] + box[:2]
        found = reference_mouth_rectangle(landmarks, tuple(box.tolist()), int(stored['image_rgb'][1]), margin, kind == 1, meta['padding_pixel_mouth'])
        agree('mouth_mask', found, wanted, 0)
        agree('mouth_mask', rectangle_mask(torch.tensor([found])).sum(), count, 0)


def test_mended_mouth_rectangle_holds_the_lips():
    "In every case of the record, also where the reference's rectangle is empty or off"
    stored, _ = golden('mouth_mask')
    missed = 0
    for (_, face, _), crop, theirs in zip(stored['cases'], stored['crop_box'], stored['mask_rect']):
        x1, y1, x2, y2 = crop
        landmarks = stored['landmarks_shifted'][int(face)] + stored['union_boxes'][int(face)][:2]
        lips = ((landmarks - [x1, y1])*256/[x2 - x1, y2 - y1])
        left, top, right, bottom = mouth_rectangles(lips[None])[0].tolist()
        middle = (lips[48:68].min(0) + lips[48:68].max(0))/2
        assert left <= middle[0] <= right and top <= middle[1] <= bottom
        missed += not (theirs[0] <= middle[0] <= theirs[2] and theirs[1] <= middle[1] <= theirs[3])
    assert missed > 0


def test_masks_and_rectangles_are_inverse():
    rectangles = torch.tensor([[3, 5, 20, 11], [0, 0, 32, 24], [31, 23, 32, 24]])
    assert torch.equal(mask_rectangles(rectangle_mask(rectangles, 24, 32)), rectangles)
    with pytest.raises(ConfigError, match='Sample 1'): mouth_crops(torch.zeros(2, 3, 8, 8), torch.tensor([[0, 0, 4, 4], [2, 2, 3, 3]]), reference=True)


def tiny(): return MultiScaleDiscriminator((4, 8), scales=(1, .5))


def test_two_halves_of_a_batch_have_the_gradient_of_the_whole():
    "Every term is a mean over samples, whatever else is in the batch"
    torch.manual_seed(0)
    everything = {name: 1. for name in TERMS if name not in ('sync', 'silence')}
    losses = Losses(LossWeights(**everything, lower=2.), lambda p, t: perceptual_loss(lambda x: [x.diff(dim=-1)**2], p, t), Discriminators(face=tiny(), mouth=tiny()), mouth_size=(32, 40))
    predicted, target = torch.rand(4, 3, 64, 64, requires_grad=True), torch.rand(4, 3, 64, 64)
    rectangles = torch.tensor([[10, 30, 40, 50], [12, 20, 30, 28], [0, 0, 64, 64], [50, 50, 64, 64]])
    def gradient(rows):
        total, _, _ = losses(0, predicted=predicted[rows], target=target[rows], rectangles=rectangles[rows])
        return torch.autograd.grad(total, predicted)[0]
    whole, halves = gradient(slice(None)), (gradient(slice(0, 2)) + gradient(slice(2, 4)))/2
    assert (whole - halves).abs().max() <= 1e-5*whole.abs().max()
    silent, c = torch.tensor([[0, 0, 1, 1], [0, 0, 0, 0.]]), torch.randn(2, 4, 3)
    assert torch.allclose(silence_loss(c, silent), (silence_loss(c[:1], silent[:1]) + silence_loss(c[1:], silent[1:]))/2)


def test_painter_and_judge_see_the_same_pictures():
    seen = []
    class Witness(torch.nn.Module):
        def forward(self, images): seen.append(images); return [(images.mean((1, 2, 3)), [images])]
    losses = Losses(LossWeights(mouth_adversarial=1.), discriminators=Discriminators(mouth=Witness()), mouth_size=48)
    predicted, target = torch.rand(1, 3, 64, 64, requires_grad=True), torch.rand(1, 3, 64, 64)
    _, _, judged = losses(0, predicted=predicted, target=target, rectangles=torch.tensor([[10, 30, 40, 50]]))
    losses.discriminators(judged)
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[2], judged['mouth_real'])
    assert seen[0].requires_grad and not seen[1].requires_grad and seen[0].shape[-1] == 48


def test_judge_warms_up_before_it_is_heard():
    losses = Losses(LossWeights(adversarial=.1, start=dict(adversarial=30), warm_up=10), discriminators=Discriminators(face=tiny()))
    pictures = dict(predicted=torch.rand(1, 3, 32, 32), target=torch.rand(1, 3, 32, 32))
    steps = {step: losses(step, **pictures) for step in (19, 20, 29, 30)}
    assert [bool(judged) for _, _, judged in steps.values()] == [False, True, True, True]
    assert ['adversarial' in numbers for _, numbers, _ in steps.values()] == [False, False, False, True]


def test_training_a_judge_lowers_its_loss_and_leaves_the_painter_alone():
    torch.manual_seed(0)
    discriminators = Discriminators(face=MultiScaleDiscriminator((8, 16)))
    optimizer = torch.optim.Adam(discriminators.parameters(), 1e-3)
    real, fake = torch.rand(4, 3, 32, 32), torch.rand(4, 3, 32, 32).mean(1, keepdim=True).expand(-1, 3, -1, -1).clone().requires_grad_()
    history = []
    for _ in range(40):
        loss, numbers = discriminators(dict(face_real=real, face_fake=fake))
        optimizer.zero_grad(); loss.backward(); optimizer.step()
        history.append(numbers['face_discriminator'].item())
    assert history[-1] < .5*history[0] and fake.grad is None


def test_half_precision_pictures():
    losses = Losses(LossWeights(gradient=1., lip=1.))
    pictures = dict(predicted=torch.rand(1, 3, 32, 32).bfloat16(), target=torch.rand(1, 3, 32, 32).bfloat16())
    total, _, _ = losses(0, **pictures, rectangles=torch.tensor([[4, 4, 20, 12]]))
    assert total.dtype == torch.float32
    pulls = pull_on_picture(losses, 0, pictures['predicted'].float(), target=pictures['target'], rectangles=torch.tensor([[4, 4, 20, 12]]))
    assert set(pulls) == {'l1', 'gradient', 'lip'} and min(pulls.values()) > 0


def test_judge_under_autocast():
    "The power iteration keeps its precision, and both sides get gradients"
    torch.manual_seed(0)
    discriminators = Discriminators(face=tiny())
    losses = Losses(LossWeights(adversarial=1., feature_matching=1.), discriminators=discriminators)
    predicted = torch.rand(1, 3, 48, 48, requires_grad=True)
    with torch.autocast('cpu', torch.bfloat16):
        total, numbers, judged = losses(0, predicted=predicted, target=torch.rand(1, 3, 48, 48))
        loss, _ = discriminators(judged)
    (total + loss).backward()
    assert predicted.grad.abs().sum() > 0 and all(p.grad is not None for p in discriminators.parameters() if p.requires_grad)
    for name, value in discriminators.state_dict().items():
        if name.endswith(('_u', '_v')): assert value.dtype == torch.float32 and abs(float(value.norm()) - 1) < 1e-5


def test_two_networks_can_share_one_function():
    "A perceptual term is any function"
    both = lambda p, t: perceptual_loss(lambda x: [x], p, t) + perceptual_loss(lambda x: [x**2, x**3], p, t, layer_weights=[1, 0])
    total, numbers, _ = Losses(LossWeights(l1=0., perceptual=2.), partial(both))(0, predicted=torch.ones(1, 3, 8, 8), target=torch.zeros(1, 3, 8, 8))
    assert float(total) == pytest.approx(2*(1 + .5)) and float(numbers['perceptual']) == pytest.approx(1.5)
