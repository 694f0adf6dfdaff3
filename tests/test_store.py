"""What is kept: encoders told apart, files whole or not at all, tokens made once whatever befalls a folder."""
import copy
import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import threading
import time
import warnings
from collections import namedtuple
from functools import partial

import numpy as np
import pytest
import torch
from conftest import change_pixels, color_encoder, encoder_of, no_file_beyond
from safetensors import SafetensorError
from test_report import record

from rasa_nb import store
from rasa_nb.data import ImageMaskFolder
from rasa_nb.reading import Reading, Transformed
from rasa_nb.encoders import load_encoder
from rasa_nb.head import DebiasedEncoder, RASAHead
from rasa_nb.moments import Moments, collect_moments
from rasa_nb.rasa import PositionMean
from rasa_nb.report import Report, Setting, keep_record
from rasa_nb.scenes import Scenes
from rasa_nb.segmentation import Run, overcluster, write_run
from rasa_nb.store import (SharedTokens, atomic, check_file, check_folder, collect_tokens, data_source,
                           encoder_changes, encoder_hash, fingerprint, fitted_on,
                           read_safetensors, reserve, token_store, write_safetensors, write_whole)
from rasa_nb.trained import TrainedRASA
from rasa_nb.yardstick import Counts


def random_head(random, d=192): return RASAHead(torch.randn(d, d, generator=random))
def head(seed): return random_head(torch.Generator().manual_seed(seed))


# Which encoder is this?

def test_the_hash_is_the_one_that_heads_of_earlier_versions_carry(tiny):
    random = torch.Generator().manual_seed(0)
    projector, offset = torch.randn(192, 192, generator=random), torch.randn(12, 12, 192, generator=random)
    one = DebiasedEncoder(tiny, RASAHead(projector, offset))
    two = DebiasedEncoder(one, random_head(random))
    assert encoder_hash(tiny) == "4ca3363731184f7f"
    assert [encoder_hash(one), encoder_hash(two)] == ["5dc27e1a3ba0b045", "522395de5eb97b0d"]


@pytest.mark.parametrize("change", [
    lambda e: e.model.blocks[0].mlp.fc1.weight[0, 0].add_(1e-6),
    lambda e: e.model.blocks[0].mlp.fc1.weight.data[0, 0].add_(1e-6),   # torch does not count this as writing
    lambda e: e.model.blocks[0].mlp.fc1.weight.numpy().__setitem__((0, 0), 1),
    lambda e: e.model.pos_embed.copy_(e.model.pos_embed.flip(1)),       # the same numbers in another order
    lambda e: setattr(e, "std", e.std * 1.1),
    lambda e: e.half()])
def test_the_hash_is_kept_until_a_weight_changes(tiny, change):
    twin = copy.deepcopy(tiny)
    before = encoder_hash(twin)
    assert before == encoder_hash(twin) == encoder_hash(tiny)
    with torch.no_grad(): change(twin)
    assert encoder_hash(twin) != before


def test_weights_are_hashed_once(tiny, monkeypatch):
    hashed, digest = [], store._digest
    def noted(tensors):
        hashed.append(len(tensors))
        return digest(tensors)
    monkeypatch.setattr(store, "_digest", noted)
    twin = copy.deepcopy(tiny)
    for encoder in (twin.at(2), twin, twin.at(3, norm=False)): encoder_hash(encoder)
    assert len(hashed) == 1


def test_weights_of_any_kind_are_hashed():
    "Halves in odd numbers, flags, a slice at no multiple of eight bytes, weights loaded for inference only."
    encoder = color_encoder()
    with torch.inference_mode(): encoder.model.register_buffer("a", torch.ones(3).half())
    encoder.model.register_buffer("b", torch.tensor([True, False]))
    encoder.model.register_buffer("c", torch.arange(6.)[1:4])
    encoder.model.register_buffer("d", torch.ones(()))
    assert encoder_hash(encoder) == encoder_hash(copy.deepcopy(encoder))


# What was computed with it?

def variants(tiny):
    "Encoders that all give other tokens."
    moved = copy.deepcopy(tiny)
    moved.model.pos_embed.data.add_(1e-3)
    yield from (tiny, moved, tiny.at(2), tiny.at([2, -1]), tiny.at(norm=False))
    yield from (DebiasedEncoder(tiny, head(1)), DebiasedEncoder(tiny, head(2)))
    yield DebiasedEncoder(DebiasedEncoder(tiny, head(1)), head(2))
    for options in (dict(dtype="bf16"), dict(resampling="bicubic"), dict(resampling="antialias")):
        yield load_encoder("tiny", device="cpu", **options)


def functions():
    "Encoders that differ in the function that finds their tokens, though its name is the same."
    color = color_encoder()
    def scaled(by): return lambda images: color(images) * by
    for tokens in (lambda images: color(images), lambda images: -color(images), scaled(2), scaled(3)):
        yield encoder_of(tokens, 3)
    for by in (torch.ones(3), 2 * torch.ones(3)): yield encoder_of(scaled(by), 3)
    for value in (1., 2.): yield encoder_of(partial(torch.full_like, fill_value=value), 3)
    yield from of_one_source()


class Steps:
    "Does to tokens what a list says, which is no setting."
    def __init__(self, *steps): self.steps = list(steps)
    def __call__(self, model, images):
        tokens = color_encoder()(images)
        for step in self.steps: tokens = step(tokens)
        return tokens


def of_one_source():
    "Encoders whose functions are the same letter by letter, and do something else."
    for shift in (0, 1):   # a column off: what is called has one name and two meanings
        known = dict(color=color_encoder(), moved=lambda tokens, shift=shift: tokens.roll(shift, 2))
        exec("def tokens(images): return moved(color(images))", known)
        yield encoder_of(known["tokens"], 3)
    for steps in ((), (torch.square,)):
        encoder = encoder_of(None, 3)
        encoder.tokens = Steps(*steps)
        yield encoder


def test_encoders_that_give_other_tokens_have_other_fingerprints(tiny):
    prints = [fingerprint(encoder) for encoder in (*variants(tiny), *functions())]
    assert len(set(prints)) == len(prints)


def test_the_same_encoder_has_the_same_fingerprint_whatever_it_is_called(tiny):
    again = load_encoder("tiny", device="cpu")
    for one, two in zip((*variants(tiny), *functions()), (*variants(again), *functions())):
        assert fingerprint(one) == fingerprint(two) == fingerprint(copy.deepcopy(one))
    again.name, again.license = "another", "unknown"
    again(torch.rand(1, 3, 64, 48))
    assert fingerprint(again) == fingerprint(tiny)
    one, two = DebiasedEncoder(again, head(1), "other"), DebiasedEncoder(tiny, head(1))
    assert fingerprint(one) == fingerprint(two)


def test_a_fingerprint_is_the_same_in_another_process():
    code = """
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.store import fingerprint
from torch import nn
def tokens(model, images): return model(images).permute(0, 2, 3, 1) if "a" in {"a", "b", "c", "d"} else None
found = fingerprint(PatchEncoder(nn.AvgPool2d(8), tokens, 3, 8))
print(found)"""
    here = {}
    exec(code, here)
    options = dict(env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True)
    there = subprocess.run([sys.executable, "-c", code], **options)
    assert there.stdout.strip() == here["found"], there.stderr


def test_what_a_head_remembers_tells_encoders_apart_that_differ_in_a_function_alone():
    encoders = list(of_one_source())
    told = [json.loads(json.dumps(fitted_on(encoder))) for encoder in encoders]
    for then, encoder in zip(told, encoders): assert encoder_changes(then, fitted_on(copy.deepcopy(encoder))) == {}
    assert encoder_changes(told[0], told[1]).keys() == encoder_changes(told[2], told[3]).keys() == {"tokens"}
    old = {name: value for name, value in told[1].items() if name != "probe"}   # of version 0.1.0
    assert encoder_changes(old, told[0]) == {} and encoder_changes(old | dict(layers=[3]), told[0])


# Which images are these?

@pytest.mark.parametrize("what, learned, scored", [("masks", True, False), ("images", False, False)])
def test_what_was_learned_is_valid_while_images_stay_and_scores_while_masks_stay_too(
        image_folders, what, learned, scored):
    def sources():
        data = ImageMaskFolder(image_folders / "images", image_folders / "masks", 12)
        return data_source(data, masks=False), data_source(data, masks=True)
    before = sources()
    assert before == sources()
    change_pixels(image_folders / what / "a/1.png")
    assert [one == two for one, two in zip(before, sources())] == [learned, scored]


def folders(root): return ImageMaskFolder(root / "images", root / "masks", 12)


def change_mask(root): change_pixels(root / "masks/a/1.png")


def change_image(root): change_pixels(root / "images/a/1.png")


def runs_in(folder): return [path for path in folder.iterdir() if not path.name.startswith("cells-")]


@pytest.mark.parametrize("change", [change_mask, change_image])
def test_scores_that_were_kept_are_those_of_the_masks_and_images_of_now(image_folders, change):
    def score(folder):
        result = overcluster(color_encoder(), folders(image_folders), 12, seeds=0, reading=48, folder=folder)
        return result.frame.miou.tolist(), result.data["content"]
    kept = image_folders / "kept"
    before = score(kept)
    assert score(kept) == before and len(runs_in(kept)) == 1
    change(image_folders)
    after = score(kept)
    assert after == score(None) and after != before


def test_encoders_that_differ_in_a_function_alone_share_no_scores(image_folders):
    first, second = list(of_one_source())[2:]
    rest = dict(k=12, seeds=0, reading=48, folder=image_folders / "kept")
    for encoder in (first, second): overcluster(encoder, folders(image_folders), **rest)
    assert len(runs_in(image_folders / "kept")) == 2


def sums(root, encoder=None):
    return collect_moments(encoder or color_encoder(), folders(root), moments_file=root / "sums")


def test_sums_that_were_kept_are_refused_for_other_images_and_stay_where_a_mask_changes(image_folders):
    before = sums(image_folders)
    change_mask(image_folders)
    assert sums(image_folders).cov.equal(before.cov)
    change_image(image_folders)
    with pytest.raises(ValueError, match="sums holds moments of .*remove it, or name another file"): sums(image_folders)


def test_sums_that_were_kept_are_refused_for_an_encoder_that_does_something_else(image_folders):
    first, second = list(of_one_source())[2:]
    one = sums(image_folders, first)
    with pytest.raises(ValueError, match="sums holds moments of"): sums(image_folders, second)
    (image_folders / "sums").unlink()
    with pytest.raises(ValueError, match="do not add up: two encoders"): one + sums(image_folders, second)


def test_sums_of_an_earlier_version_are_made_anew_with_a_word(image_folders):
    before = sums(image_folders)
    del before.source["data"]["content"], before.source["probe"]
    before.save(image_folders / "sums")
    change_image(image_folders)
    with pytest.warns(UserWarning, match="does not say which images its sums are of: they are made anew"):
        after = sums(image_folders)
    assert not after.cov.equal(before.cov) and sums(image_folders).cov.equal(after.cov)


def test_a_head_warns_where_its_encoder_does_something_else(scenes):
    first, second = list(of_one_source())[2:]
    removed = PositionMean("all").fit(first, scenes.first(4), 48)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        removed.attach(copy.deepcopy(first))
    with pytest.warns(UserWarning, match="not the same encoder .*tokens 'of one picture' then, 'others' now"):
        removed.attach(second)


@pytest.mark.parametrize("work", [
    lambda encoder, data, place: overcluster(encoder, data, 12, folder=place),
    lambda encoder, data, place: TrainedRASA().fit(encoder, data, 48, folder=place),
    lambda encoder, data, place: collect_tokens(encoder, data, 48, "memmap", place),
    lambda encoder, data, place: collect_moments(encoder, data, 48, place / "sums")])
def test_a_place_that_cannot_be_written_to_is_noticed_before_images_are_read(scenes, closed_place, work):
    class Unread(Scenes):
        def load(self, i): pytest.fail("it began")
    with pytest.raises(OSError, match="no files can be made in .*name another folder"):
        work(color_encoder(), Unread("val", 12), closed_place)


# Files

def some_moments():
    moments = Moments((2, 2), 3)
    moments.update(torch.rand(4, 2, 2, 3))
    return moments


def some_scores(): return Run("a", 2, 0, Counts.of(np.ones((1, 2, 3))), np.ones((1, 4, 4)))


def some_report(): return Report([Setting([record({21: [10, 12]}, {21: [13, 17]})])])


def keep_some_record(folder):
    source = folder.parent / "a run"
    source.mkdir(exist_ok=True)
    (source / "run.json").write_text(json.dumps(record({21: [10]}, {21: [13]})))
    return lambda: keep_record(source, folder)


WRITERS = {   # each is given a folder and returns what writes there
    "text": lambda folder: lambda: write_whole(folder / "a.html", "<p>±</p>"),
    "tensors": lambda folder: lambda: write_safetensors(folder / "a", dict(x=torch.ones(9)), "demo.1", {}),
    "sums": lambda folder: partial(some_moments().save, folder / "sums"),
    "head": lambda folder: partial(head(1).save, folder / "head.safetensors"),
    "hub": lambda folder: partial(head(1).save_pretrained, folder),
    "scores": lambda folder: partial(write_run, some_scores(), folder / "a.npz"),
    "report": lambda folder: partial(some_report().save, folder),
    "record": keep_some_record,
    "tokens": lambda folder: partial(SharedTokens(color_encoder(), folder), torch.rand(1, 3, 8, 8)),
}


@pytest.mark.parametrize("writer, umask, mode", [
    *((writer, 0o027, 0o640) for writer in WRITERS), ("head", 0o077, 0o600), ("head", 0o002, 0o664)])
def test_every_file_has_the_mode_that_the_umask_says(tmp_path, umask, mode, writer):
    write, before = WRITERS[writer](tmp_path / "here"), os.umask(umask)
    try: write()
    finally: os.umask(before)
    files = [path for path in (tmp_path / "here").rglob("*") if path.is_file()]
    assert files and {path.stat().st_mode & 0o777 for path in files} == {mode}


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "tokens"])   # these are done without
def test_on_a_full_disk_no_half_of_a_file_is_left_and_the_error_says_how_much_is_needed(tmp_path, writer):
    write = WRITERS[writer](tmp_path / "here")
    with pytest.raises(OSError, match=r"[\d.]+ k?B are needed, [\d.]+ .B are free") as e:
        with no_file_beyond(0): write()
    assert e.value.errno == errno.ENOSPC
    assert not [path for path in (tmp_path / "here").rglob("*") if path.is_file()]


@pytest.mark.parametrize("writer", ["text", "head", "scores", "report"])
def test_where_no_files_can_be_made_is_named(closed_place, writer):
    with pytest.raises(OSError, match="no files can be made in .*name another folder"): WRITERS[writer](closed_place)()


def test_trying_a_place_leaves_nothing_there(tmp_path, closed_place):
    before = sorted(tmp_path.rglob("*"))
    check_folder(tmp_path / "a/b")
    check_file(tmp_path / "sums", "moments_file")
    with pytest.raises(OSError, match="^.Errno .*out_dir='.*runs': no files can be made"): check_folder(closed_place, "out_dir")
    with pytest.raises(OSError, match="folder of moments_file="): check_file(closed_place / "a", "moments_file")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="no files can be made"): check_folder(tmp_path / "gone" / "runs")
    with pytest.raises(OSError, match="File name too long"): check_folder(tmp_path / ("x" * 300))
    (tmp_path / "gone").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_is_whole_or_not_there(tmp_path):
    def write(fail):
        with atomic(tmp_path / "new/run") as part:
            part.mkdir()
            (part / "a.txt").write_text("a")
            if fail: raise ValueError("broken off")
    with pytest.raises(ValueError, match="broken off"): write(fail=True)
    assert not list((tmp_path / "new").iterdir())
    write(fail=False)
    assert [path.name for path in (tmp_path / "new").rglob("*")] == ["run", "a.txt"]
    with pytest.raises(OSError): write(fail=False)   # it is there, and is left as it is


def test_a_damaged_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    write_safetensors(path, dict(x=torch.ones(100)), "demo.1", {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="a.safetensors cannot be read as safetensors, is it whole"):
        read_safetensors(path, "demo.1")


# The tokens of a dataset

@pytest.mark.parametrize("kind, digits", [("float32", 0), ("float16", 1e-3), ("memmap", 1e-3)])
def test_a_store_holds_the_tokens_of_all_images_in_order(scenes, tmp_path, kind, digits):
    encoder = color_encoder()
    expected = torch.cat([tokens for tokens, _ in encoder.encode(scenes)])
    stored = collect_tokens(encoder, scenes, Reading(batch_size=7), kind, tmp_path)
    torch.testing.assert_close(stored.float(), expected, atol=digits, rtol=0)
    assert not list(tmp_path.iterdir())   # the file of a memory map has no name


def test_a_memory_map_that_does_not_fit_the_disk_is_refused_before_the_work(tmp_path, monkeypatch):
    full_disk(monkeypatch, 10**6)
    with pytest.raises(OSError, match="8.0 GB are needed, 1.0 MB are free. Free some, or name another folder"):
        token_store((1000, 40, 100, 1000), "memmap", tmp_path)


def unsupported(*args): raise OSError(errno.EOPNOTSUPP, "Operation not supported")


@pytest.mark.parametrize("allocate", [os.posix_fallocate, unsupported, None])
def test_the_space_of_a_memory_map_is_taken_before_it_is_written_to(tmp_path, monkeypatch, allocate):
    "By the system's call, by zeros where a file system has none, and where the system has none."
    if allocate: monkeypatch.setattr(os, "posix_fallocate", allocate)
    else: monkeypatch.delattr(os, "posix_fallocate")
    with open(tmp_path / "file", "w+b") as file:
        reserve(file.fileno(), 5 * 10**5)
        taken = os.fstat(file.fileno())
    assert taken.st_size == 5 * 10**5 and 512 * taken.st_blocks >= 5 * 10**5
    (tmp_path / "file").unlink()
    with no_file_beyond(10**5), pytest.raises(OSError, match="1.0 MB are needed, .* are free"):
        token_store((5, 10, 10, 1000), "memmap", tmp_path)
    assert not list(tmp_path.iterdir())
    token_store((5, 10, 10, 10), "memmap", tmp_path).fill_(1)


def test_an_unknown_kind_of_store_is_refused():
    with pytest.raises(ValueError, match="kind='float64': expected 'float32', 'float16' or 'memmap'"):
        token_store((1, 2, 2, 3), "float64")


# Tokens, made once

def full_disk(monkeypatch, free):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: namedtuple("Usage", "free")(free))


def counting(calls, wait=0.):
    "The mean color of each patch, by an encoder that notes when it is asked."
    color = color_encoder()
    def tokens(images):
        if len(images) > 1:   # else it is the picture that an encoder is told by
            calls.append(len(images))
            time.sleep(wait)
        return color(images)
    return encoder_of(tokens, 3)


IMAGES = torch.rand(4, 3, 16, 24, generator=torch.Generator().manual_seed(3))


def test_a_pass_that_was_broken_off_goes_on_where_it_was(tmp_path, scenes):
    class Breaks(Transformed):
        def __getitem__(self, i):
            if i == 13 and not vars(self).get("broken"):
                self.broken = True
                raise KeyboardInterrupt
            return super().__getitem__(i)
    applied = Reading(48).apply(scenes.first(20))
    data, calls = Breaks(applied.data, applied.transform), []
    shared = SharedTokens(counting(calls), tmp_path)
    with pytest.raises(KeyboardInterrupt): collect_tokens(shared, data, Reading(batch_size=4))
    assert calls == [4, 4, 4]
    tokens = collect_tokens(shared, data, Reading(batch_size=4))
    assert calls == [4] * 5 and tokens.equal(collect_tokens(color_encoder(), applied))


def test_encoders_of_one_name_keep_tokens_of_their_own(tmp_path, tiny):
    images = torch.rand(1, 3, 16, 16)
    for encoder in (*variants(tiny), *of_one_source()):
        encoder = copy.copy(encoder)
        encoder.name = "one"
        for _ in range(2): assert SharedTokens(encoder, tmp_path)(images).equal(encoder(images))


def test_tokens_that_were_found_can_be_written_to(tmp_path):
    shared = SharedTokens(color_encoder(), tmp_path)
    expected = shared(IMAGES).clone()
    shared(IMAGES).zero_()
    assert shared(IMAGES).equal(expected)


def test_a_damaged_file_of_tokens_is_made_again(tmp_path):
    calls = []
    shared = SharedTokens(counting(calls), tmp_path)
    expected = shared(IMAGES)
    path, = tmp_path.iterdir()
    for damage in (path.read_bytes()[:50], b"", b"x" * 200):
        path.write_bytes(damage)
        assert shared(IMAGES).equal(expected) and shared(IMAGES).equal(expected)
    assert len(calls) == 4


@pytest.mark.parametrize("when", ["before", "while encoding"])
def test_a_folder_may_be_removed_at_any_time(tmp_path, when):
    folder = tmp_path / "tokens"
    def tokens(images):
        if when == "while encoding": shutil.rmtree(folder)
        return color_encoder()(images)
    shared = SharedTokens(encoder_of(tokens, 3), folder)
    for _ in range(2):
        assert shared(IMAGES).equal(color_encoder()(IMAGES))
        shutil.rmtree(folder, ignore_errors=True)


def test_on_a_full_disk_nothing_is_kept_and_the_work_goes_on(tmp_path, monkeypatch):
    def no_space(*args): raise SafetensorError("No space left on device")
    shared = SharedTokens(color_encoder(), tmp_path)
    full_disk(monkeypatch, 2**29)
    with pytest.warns(UserWarning, match="tokens are not kept in .*0.5 GB are free"): shared(IMAGES)
    full_disk(monkeypatch, 2**40)
    monkeypatch.setattr(store, "save_file", no_space)
    with pytest.warns(UserWarning, match="tokens are not kept in .*No space left"): tokens = shared(IMAGES)
    assert tokens.equal(color_encoder()(IMAGES)) and not list(tmp_path.iterdir())


def test_where_there_can_be_no_folder_the_work_goes_on(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    shared = SharedTokens(color_encoder(), tmp_path / "file")
    with pytest.warns(UserWarning, match="tokens are not kept"): tokens = shared(IMAGES)
    assert tokens.equal(color_encoder()(IMAGES))


def test_of_many_that_want_a_batch_one_encodes_it(tmp_path):
    calls, seen = [], []
    encoder = counting(calls, wait=.2)
    def work(): seen.append(SharedTokens(encoder, tmp_path)(IMAGES))
    threads = [threading.Thread(target=work) for _ in range(5)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(30)
    assert len(calls) == 1 and len(seen) == 5 and all(tokens.equal(seen[0]) for tokens in seen)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]   # no lock is left


def test_one_that_is_killed_at_work_holds_nobody_up(tmp_path):
    started = tmp_path / "started"
    parent = os.getpid()
    def tokens(images):
        if os.getpid() != parent:
            started.write_text("")
            time.sleep(60)
        return color_encoder()(images)
    shared = SharedTokens(encoder_of(tokens, 3), tmp_path / "tokens")
    process = multiprocessing.get_context("fork").Process(target=shared, args=(IMAGES,), daemon=True)
    process.start()
    until = time.monotonic() + 20
    while not started.exists() and time.monotonic() < until: time.sleep(.01)
    assert started.exists()
    process.kill()
    begun = time.monotonic()
    assert shared(IMAGES).equal(color_encoder()(IMAGES)) and time.monotonic() - begun < 10


def test_a_head_fitted_through_shared_tokens_belongs_to_the_plain_encoder(tmp_path, tiny, scenes):
    shared = SharedTokens(tiny, tmp_path)
    through, plain = (PositionMean("all").fit(encoder, scenes.first(20), 48).head_ for encoder in (shared, tiny))
    assert through.offset.equal(plain.offset) and through.metadata == plain.metadata
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        debiased, also = DebiasedEncoder(tiny, through), DebiasedEncoder(shared, plain)
    for one, two in ((debiased, also), (shared.at(2), tiny.at(2))):
        assert fitted_on(one) == fitted_on(two) and fingerprint(one) == fingerprint(two)
