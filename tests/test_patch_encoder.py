"""What an encoder is: checks around any module, sizes, resampling by formulas, encoders around encoders."""
import ast
import copy
import pickle
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from toy_vits import assert_close, of_timm, of_transformers

import rasa_nb
from rasa_nb.baselines import ShiftAverage
from rasa_nb.reading import Reading
from rasa_nb.encoders import from_timm, load_encoder
from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.patch_encoder import FitSize, PatchEncoder, ViTEncoder, WrappedEncoder, block_tokens
from rasa_nb.patch_encoder import check_image_size, hub_parts, one_side, probe, probe_text, probes_agree, resample
from rasa_nb.patch_encoder import timm_parts, transformers_parts
from rasa_nb.scenes import Scenes
from rasa_nb.store import SharedTokens, encoder_hash


def rows_first(model, images): return model(images).permute(0, 2, 3, 1)


def mean_color(**options):
    options = dict(embed_dim=3, patch_size=8, image_size=96) | options
    return PatchEncoder(nn.AvgPool2d(8), rows_first, **options)


@pytest.fixture(scope="module")
def encoder(): return from_timm(of_timm("vit_small_patch14_dinov2", img_size=70))


def packages_of(module):
    "What a module of rasa_nb imports, by itself and by way of other modules of rasa_nb."
    found = set()
    for node in ast.walk(ast.parse((Path(rasa_nb.__file__).parent / f"{module}.py").read_text())):
        if isinstance(node, ast.Import): found |= {a.name.split(".")[0] for a in node.names}
        if isinstance(node, ast.ImportFrom) and node.level: found |= packages_of(node.module)
        elif isinstance(node, ast.ImportFrom): found.add(node.module.split(".")[0])
    return found


def test_what_an_encoder_is_needs_neither_timm_nor_transformers():
    assert "torch" in packages_of("patch_encoder")
    assert not packages_of("patch_encoder") & {"timm", "transformers", "pandas", "matplotlib"}


# One pass

def test_a_two_to_one_image_gives_rows_first(encoder):
    "One bright patch in a black image moves the token of its own cell most."
    black = torch.zeros(1, 3, 4 * 14, 8 * 14)
    for row, column in ((0, 7), (3, 0), (2, 5)):
        image = black.clone()
        image[..., row * 14:(row + 1) * 14, column * 14:(column + 1) * 14] = 1
        change = (encoder.at(0)(image) - encoder.at(0)(black)).norm(dim=-1)[0]
        assert change.shape == (4, 8) and divmod(int(change.argmax()), 8) == (row, column)


@given(batch_size=st.integers(1, 8))
@settings(max_examples=6, deadline=None)
def test_any_batch_size_gives_the_same_tokens(encoder, batch_size):
    def tokens(b):
        return torch.cat([z for z, _ in encoder.encode(Scenes("val", 6), Reading(batch_size=b))])
    assert_close(tokens(batch_size), tokens(6), 1e-5)


def test_half_precision_stays_near(encoder):
    half, images = load_encoder(encoder.model, dtype="bf16", device="cpu"), torch.rand(2, 3, 70, 70)
    assert half(images).dtype == torch.float32
    assert 0 < (half(images) - encoder(images)).abs().mean() < .05


def test_an_encoder_is_frozen(encoder):
    assert not encoder.training and not encoder.train().training and not encoder.model.training
    assert not any(p.requires_grad for p in encoder.parameters())
    assert not encoder(torch.rand(1, 3, 70, 70)).requires_grad


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_other_devices_give_the_same_tokens(device):
    there = torch.cuda.is_available() if device == "cuda" else torch.backends.mps.is_available()
    if not there: pytest.skip(f"no {device} here")
    images = torch.rand(1, 3, 64, 96)
    there, here = (load_encoder("tiny", device=d)(images) for d in (device, "cpu"))
    assert_close(there.cpu(), here, 1e-3)


def test_images_out_of_range_are_warned_of_once():
    encoder = mean_color()
    with pytest.warns(UserWarning, match="range from -.* to .*, expected .0, 1.; .* Normalized twice"):
        encoder(torch.randn(1, 3, 96, 96))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(torch.randn(1, 3, 96, 96))


def test_mean_and_std_are_one_number_or_three():
    encoder, images = mean_color(mean=.5, std=torch.tensor([.1, .2, .3])), torch.rand(1, 3, 96, 96)
    assert_close(encoder.normalize(images)[:, 1], (images[:, 1] - .5) / .2, 1e-6)
    for name, wrong in (("std", 0), ("std", (.1, .2)), ("mean", float("nan"))):
        with pytest.raises(ValueError, match=f"{name}=.*: expected a number, or one for each of 3 channels"):
            mean_color(**{name: wrong})


def no_norm(model):
    parts = timm_parts(model)
    parts.norm = None
    return parts


def cubic_where_position_is_rotary(e): from_timm(of_timm("vit_small_patch16_dinov3"), resampling="cubic")
def beit_at_another_size(e): from_timm(of_timm("beit_base_patch16_224"))(torch.zeros(1, 3, 64, 64))


REFUSED = {
    "images without a batch": (lambda e: e(torch.zeros(3, 70, 70)), ValueError, r"expected \[B, 3, H, W\]"),
    "less than a patch": (lambda e: check_image_size((5, 70), 14), ValueError, "nearest to 5: 14. Resize"),
    "no last norm": (lambda e: block_tokens(no_norm(e.model), torch.zeros(1, 3, 70, 70), [1]), ValueError,
                     "norm=False gives them as they are"),
    "no mean and std": (lambda e: ViTEncoder(e.model, timm_parts, name="mine"), ValueError,
                        "mine: mean and std of its training images are not known"),
    "an unknown way of resampling": (lambda e: from_timm(e.model, resampling="cubic"), ValueError,
                                     "resampling='cubic': expected one of .'offset'"),
    "the same without a learned position": (cubic_where_position_is_rotary, ValueError, "resampling='cubic'"),
    "no block at all": (lambda e: e.at([]), ValueError, "expected block numbers between -3 and 2"),
    "no ViT of timm": (lambda e: timm_parts(nn.Conv2d(3, 8, 3)), TypeError, "no blocks or patch_embed"),
    "patches that are no squares": (lambda e: one_side((16, 8), "patches"), ValueError, "patches of 16 x 8 pixels"),
    "no ViT of DINO": (lambda e: hub_parts(nn.Conv2d(3, 8, 3)), TypeError, "no blocks, norm, patch_embed"),
    "a model of one size": (beit_at_another_size, ValueError, r"images of \(224, 224\) only, got \(64, 64\)"),
    "an unknown way to fit": (lambda e: FitSize("stretch", 14), ValueError, "expected 'resize', 'crop' or"),
    "a crop to nothing": (lambda e: FitSize("crop", 14)(torch.zeros(3, 9, 70)), ValueError, "hold no patch"),
    "a wrapper around a model": (lambda e: WrappedEncoder(e.model), TypeError, "base is a VisionTransformer"),
    "blocks where there are none": (lambda e: WrappedEncoder(mean_color(), "mine").at(1), TypeError,
                                    "mine is around encoder, which has no blocks to choose from"),
}

@pytest.mark.parametrize("what", REFUSED)
def test_refused(encoder, what):
    call, error, match = REFUSED[what]
    with pytest.raises(error, match=match): call(encoder)


def test_a_text_model_is_no_vit():
    transformers = pytest.importorskip("transformers")
    small = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    with pytest.raises(TypeError, match=r"BertModel \(bert\) holds none of beit, clip_vision_model"):
        transformers_parts(transformers.BertModel(transformers.BertConfig(**small)))


# Sizes

@given(st.integers(14, 80), st.integers(14, 80), st.sampled_from(["resize", "crop", "pad"]))
@settings(max_examples=30, deadline=None)
def test_fit_size_gives_whole_patches(height, width, how):
    image = torch.randint(256, (3, height, width), dtype=torch.uint8)
    fitted, mask = FitSize(how, 14)(image, torch.randint(12, (height, width), dtype=torch.uint8))
    check_image_size(fitted.shape[-2:], 14)
    assert fitted.shape[-2:] == mask.shape and 0 <= fitted.min() and fitted.max() <= 1
    assert set(mask.unique().tolist()) <= {*range(12), 255}
    if height % 14 == width % 14 == 0: assert torch.allclose(fitted, image / 255)


def test_padding_repeats_the_edge_and_counts_nowhere():
    image, mask = torch.rand(3, 100, 60), torch.randint(12, (100, 60))
    fitted, fitted_mask = FitSize("pad", 16)(image, mask)
    assert fitted.shape[1:] == fitted_mask.shape == (112, 64)
    assert torch.equal(fitted[:, :100, :60], image) and torch.equal(fitted_mask[:100, :60], mask)
    assert torch.equal(fitted[:, 100:, :60], image[:, 99:].expand(3, 12, 60))
    assert (fitted_mask[100:] == 255).all() and (fitted_mask[:, 60:] == 255).all()


@pytest.mark.parametrize("ignore_index, dtype", [(0, torch.uint8), (20, torch.uint8), (-1, torch.int64),
                                                 (65535, torch.int32)])
def test_padding_counts_nowhere_for_any_ignore_index(ignore_index, dtype):
    mask = torch.randint(1, 12, (100, 60)).to(dtype)
    fit = mean_color(patch_size=16).fit_size("pad", ignore_index)
    _, fitted = fit(torch.rand(3, 100, 60), mask)
    assert fitted.dtype == dtype and torch.equal(fitted[:100, :60], mask)
    assert (fitted[100:] == ignore_index).all() and (fitted[:, 60:] == ignore_index).all()


@pytest.mark.parametrize("ignore_index", [None, -1, 300])
def test_padding_that_a_mask_cannot_mark_is_refused(ignore_index):
    fit, mask = FitSize("pad", 16, ignore_index), torch.zeros(100, 60, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"ignore_index={ignore_index}: .* from 0 to 255 that no score counts"):
        fit(torch.rand(3, 100, 60), mask)
    assert fit(torch.rand(3, 100, 60)).shape == (3, 112, 64)   # an image alone needs none


# Resampling, against formulas written down anew

def cubic(t, a=-.75):
    t = np.abs(t)
    near, far = (a + 2) * t**3 - (a + 3) * t**2 + 1, a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a
    return np.where(t <= 1, near, np.where(t < 2, far, 0))


def offset_matrix(old, new):
    "Bicubic interpolation of `old` cells to `new`, the scale being (new + 0.1) / old, edges repeated."
    center = (np.arange(new) + .5) / ((new + .1) / old) - .5
    matrix = np.zeros((new, old))
    for i, c in enumerate(center):
        first = int(np.floor(c)) - 1
        for j in range(first, first + 4): matrix[i, min(max(j, 0), old - 1)] += cubic(c - j)
    return matrix


def official_dinov2(position, grid):
    rows, columns = (offset_matrix(old, new) for old, new in zip(position.shape[:2], grid))
    return np.einsum("ir,jc,rcd->ijd", rows, columns, position)


@given(st.integers(2, 9), st.integers(1, 12), st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_ways_of_resampling_are_the_formulas(old, rows, columns):
    from scipy.ndimage import zoom
    position = torch.randn(old, old, 3)
    if (rows, columns) == (old, old):
        assert resample(position, (rows, columns), "offset") is position
        return
    expected = official_dinov2(position.double().numpy(), (rows, columns))
    assert np.allclose(resample(position, (rows, columns), "offset"), expected, atol=1e-4)
    if min(rows, columns) == 1: return
    expected = zoom(position.numpy(), (rows / old, columns / old, 1), order=1)
    assert np.allclose(resample(position, (rows, columns), "corners"), expected, atol=1e-4)


@pytest.mark.parametrize("size", [(224, 224), (448, 448), (140, 280)])
def test_dinov2_resamples_as_its_official_code(size):
    "A model that holds the resampled position embedding as its own gives the same tokens."
    model, grid = of_timm("vit_small_patch14_dinov2"), (size[0] // 14, size[1] // 14)
    position = model.pos_embed[0, 1:].unflatten(0, (37, 37)).detach()
    expected = torch.from_numpy(official_dinov2(position.double().numpy(), grid)).float()
    whole = torch.cat([model.pos_embed[:, :1], expected.flatten(0, 1)[None]], 1)
    fixed = of_timm("vit_small_patch14_dinov2", img_size=size)
    fixed.load_state_dict(model.state_dict() | {"pos_embed": whole})
    official, images = from_timm(model), torch.rand(1, 3, *size)
    assert official.resampling == "offset"
    assert_close(official(images), from_timm(fixed)(images), 1e-4)
    assert (official(images) - from_timm(model, resampling="library")(images)).abs().max() > 1e-2


def test_a_model_is_left_as_it_was():
    "Hooks, masking and methods are set for one pass."
    pytest.importorskip("transformers")
    dino, others = of_timm("vit_small_patch16_224.dino"), ("ViTMAE", "Dinov2", "SiglipVision")
    for model in (dino, *map(of_transformers, others)):
        encoder = load_encoder(model, device="cpu")
        before = {name: set(vars(m)) for name, m in model.named_modules()}
        encoder(torch.rand(1, 3, 48, 80))
        assert {name: set(vars(m)) for name, m in model.named_modules()} == before
        assert not any(m._forward_hooks for m in model.modules())
        assert getattr(getattr(model, "config", None), "mask_ratio", .75) == .75


# Around another encoder

def head_for(encoder):
    g, d = torch.Generator().manual_seed(0), encoder.embed_dim
    return RASAHead(torch.randn(d, d, generator=g) / d**.5, metadata=dict(method="test"))


WRAPPERS = dict(plain=lambda base, tmp: WrappedEncoder(base, "plain"),
                debiased=lambda base, tmp: DebiasedEncoder(base, head_for(base)),
                shifted=lambda base, tmp: ShiftAverage(base, 2),
                shared=lambda base, tmp: SharedTokens(base, tmp),
                nested=lambda base, tmp: ShiftAverage(DebiasedEncoder(base, head_for(base)), 2))

@pytest.fixture(params=WRAPPERS)
def wrap(request, tmp_path): return lambda base: WRAPPERS[request.param](base, tmp_path)


@pytest.mark.parametrize("kind", ["vit", "module"])
def test_no_attribute_of_a_base_is_lost(wrap, encoder, kind):
    base = encoder if kind == "vit" else mean_color(license="mine", num_prefix_tokens=2)
    wrapped, seen = wrap(base), 0
    own = {"name", "forward", "at", "around", "train", "head"}
    for name in dir(base):
        if name.startswith("_"): continue
        theirs, ours = getattr(base, name), getattr(wrapped, name)
        seen += 1
        if name in own or callable(theirs): continue
        assert ours is theirs or ours == theirs, name
    assert seen > 60 and {n for n in dir(base) if not n.startswith("_")} <= set(dir(wrapped))
    assert wrapped.fit_size("pad") == base.fit_size("pad")


def test_nothing_is_copied_from_a_base(wrap):
    base = mean_color()
    wrapped = wrap(base)
    base.license, base.image_size, base.mean = "changed", 48, torch.ones(3, 1, 1)
    assert (wrapped.license, wrapped.image_size) == ("changed", 48) and wrapped.mean is base.mean
    wrapped.license = "its own"
    assert base.license == "changed"


def test_wrappers_are_copied_pickled_and_moved(wrap, tiny):
    wrapped, images = wrap(copy.deepcopy(tiny)), torch.rand(1, 3, 48, 64)
    expected = wrapped(images)
    for twin in (copy.deepcopy(wrapped), pickle.loads(pickle.dumps(wrapped))):
        assert torch.equal(twin(images), expected) and twin.name == wrapped.name
        assert twin.model is not wrapped.model
        twin.to("meta")
        assert twin.device.type == "meta" and twin.mean.is_meta and wrapped.device.type == "cpu"
    assert not wrapped.training and not wrapped.train().training


def test_another_block_of_a_wrapper_is_the_wrapper_around_another_block(wrap, tiny):
    wrapped, images = wrap(tiny), torch.rand(1, 3, 48, 64)
    earlier = wrapped.at(2, norm=False)
    assert torch.equal(earlier(images), wrap(tiny.at(2, norm=False))(images))
    assert type(earlier) is type(wrapped) and (earlier.layers, earlier.norm) == ((2,), False)
    assert earlier.model is tiny.model and (wrapped.layers, tiny.layers) == ((5,), (5,))
    assert torch.equal(earlier.at()(images), wrapped(images))
    assert earlier.name == wrapped.name.replace("tiny", "tiny block 2, no norm")
    assert earlier.at().name == wrapped.name


def test_compiled_blocks_give_the_same_tokens_and_copies_are_free_of_them(tiny):
    "Of any block, at any size, and around an encoder; the compiler of choice has no part in it."
    encoder = copy.deepcopy(tiny)
    assert encoder.compile(backend="eager") is encoder
    for size in 96, 48:
        images = torch.rand(2, 3, size, size)
        for layer in -1, 2, [0, 4]:
            for _ in range(2): assert (encoder.at(layer)(images) - tiny.at(layer)(images)).abs().max() < 1e-5
    calls = []
    def counted(graph, inputs): return lambda *given: calls.append(1) or graph(*given)
    wrapped = WrappedEncoder(copy.deepcopy(encoder))
    assert wrapped.compile(backend=counted) is wrapped and not calls
    wrapped(images)
    assert len(calls) == tiny.num_layers
    other = copy.deepcopy(wrapped)
    with torch.no_grad(): other.model.blocks[0].mlp.fc1.weight.zero_()
    assert not torch.equal(other(images), wrapped(images)) and len(calls) == 2 * tiny.num_layers
    assert encoder_hash(encoder) == encoder_hash(tiny)


def test_an_encoder_without_blocks_is_compiled_whole_and_says_what_is_wrong_as_before():
    plain, calls, images = mean_color(), [], torch.rand(2, 3, 48, 48)
    def counted(graph, inputs): return lambda *given: calls.append(1) or graph(*given)
    encoder = mean_color().compile(backend=counted)
    assert torch.equal(encoder(images), plain(images)) and calls
    with pytest.raises(ValueError, match="image size 45 x 48 is no multiple"): encoder(images[:, :, :45])


def test_a_wrapper_says_what_is_around_what(tiny):
    wrapped = ShiftAverage(DebiasedEncoder(tiny, head_for(tiny)), 2)
    around = "tiny+test+ShiftAverage (ShiftAverage) around tiny+test (DebiasedEncoder) around "
    assert repr(wrapped) == around + repr(tiny)
    with pytest.raises(AttributeError, match=r"test\+ShiftAverage \(ShiftAverage\) has no"): wrapped._private
    half_built = WrappedEncoder.__new__(WrappedEncoder)   # as pickle makes them
    with pytest.raises(AttributeError, match="has no attribute 'mean'"): half_built.mean


# What an encoder does

def test_a_probe_tells_functions_apart_that_look_alike(encoder):
    class Shift:   # a callable whose settings are no text
        def __init__(self, by): self.by = by
        def __call__(self, model, images): return rows_first(model, images).roll(self.by, 2)
    none, one, two = (PatchEncoder(nn.AvgPool2d(8), Shift(by), 3, 8) for by in (0, 1, 2))
    assert probes_agree(probe(none), probe(PatchEncoder(nn.AvgPool2d(8), rows_first, 3, 8)))
    assert not probes_agree(probe(one), probe(two)) and probe_text(probe(one)) != probe_text(probe(two))
    for other in (encoder.at(0), encoder.at(norm=False), ShiftAverage(encoder, 2)):
        assert not probes_agree(probe(encoder), probe(other))


def test_a_probe_is_kept_until_weights_or_functions_change():
    calls = []
    def counted(model, images):
        calls.append(1)
        return rows_first(model[1], model[0](images))
    encoder = PatchEncoder(nn.Sequential(nn.Conv2d(3, 3, 1), nn.AvgPool2d(8)), counted, 3, 8)
    first, again = probe(encoder), probe(encoder)
    assert first is again and len(calls) == 1
    encoder.model[0].bias += 1
    changed = probe(encoder)
    assert not probes_agree(first, changed) and len(calls) == 2
    encoder.tokens = lambda model, images: counted(model, images) * 2
    assert not probes_agree(changed, probe(encoder)) and probe(encoder) == probe(copy.deepcopy(encoder))


def test_rounding_does_not_change_a_probe(encoder, tiny):
    for e in (encoder, tiny):
        half = load_encoder(e.model, dtype="bf16", device="cpu", mean=e.mean.flatten(), std=e.std.flatten())
        assert probes_agree(probe(e), probe(half), .1)
        noisy = [x * (1 + 1e-7 * (-1)**i) for i, x in enumerate(probe(e))]
        assert probe_text(probe(e)) == probe_text(noisy) and probes_agree(probe(e), noisy)
    threads = torch.get_num_threads()
    before = probe(copy.deepcopy(tiny))
    torch.set_num_threads(threads + 1)
    try: assert probe(copy.deepcopy(tiny)) == before and torch.get_num_threads() == threads + 1
    finally: torch.set_num_threads(threads)


def test_a_probe_takes_the_size_that_an_encoder_takes():
    beit = from_timm(of_timm("beit_base_patch16_224"))
    assert len(probe(beit)) == 32 and not probes_agree(probe(beit), probe(beit.at(1)))
    def never(model, images): raise RuntimeError("no size will do")
    assert probe(PatchEncoder(nn.Identity(), never, 3, 8)) == () and probe_text(()) == "none"
    assert probes_agree((), ()) and not probes_agree((), probe(beit))
