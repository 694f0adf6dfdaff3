"""Heads: behind an encoder, in files, on a hub."""
import copy
import pickle
import shutil
import warnings

import pytest
import torch

import rasa_nb.head
from rasa_nb.reading import Reading
from rasa_nb.head import DebiasedEncoder, RASAHead, encode_together, moments_after, unwrap
from rasa_nb.moments import Moments, collect_moments
from rasa_nb.patch_encoder import PatchEncoder
from rasa_nb.rasa import RASA, PositionMean
from rasa_nb.scenes import Scenes, planted_tokens


def test_an_attached_encoder_is_the_head_after_the_encoder_at_any_size(tiny):
    images, m = torch.rand(2, 3, 64, 96), collect_moments(tiny, Scenes("train", 20))
    for remover in (RASA(), PositionMean()):
        debiased = remover.fit_moments(m).attach(tiny)
        assert torch.equal(debiased(images), remover.transform(tiny(images)))
        assert debiased(images).shape == (2, 8, 12, 192)
        assert debiased.patch_size == 8 and debiased.license == tiny.license


def test_encoders_that_share_a_base_share_its_forward_pass():
    calls = []
    def tokens(model, images):
        calls.append(len(images))
        return model(images).permute(0, 2, 3, 1)
    base, head = PatchEncoder(torch.nn.AvgPool2d(8), tokens, 3, 8), RASAHead(2 * torch.eye(3))
    once = DebiasedEncoder(base, head)
    encoders = {"base": base, "once": once, "twice": DebiasedEncoder(once, head)}
    for z, _ in encode_together(encoders, [(torch.rand(3, 16, 16), None)] * 4, Reading(batch_size=2)):
        assert torch.equal(z["twice"], 4 * z["base"])
    assert calls == [2, 2] and unwrap(encoders["twice"])[0] is base and len(unwrap(encoders["twice"])[1]) == 2


def test_a_head_meets_its_own_encoder_without_a_word(tiny, recwarn):
    RASA(rank="all", targets="coords").fit(tiny, Scenes("train", 8)).attach(tiny)
    assert not [w for w in recwarn if "not the same encoder" in str(w.message)]


@pytest.mark.parametrize("offset", [None, torch.randn(3, 4, 5)], ids=["projector", "offset"])
def test_heads_come_back_as_they_were(tmp_path, offset):
    head, z = RASAHead(torch.randn(5, 5), offset, dict(method="RASA", note="ä")), torch.randn(2, 6, 7, 5)
    head.save(tmp_path / "h.safetensors")
    head.save_pretrained(tmp_path / "folder")
    for again in (RASAHead.load(tmp_path / "h.safetensors"), RASAHead.from_pretrained(tmp_path / "folder"),
                  copy.deepcopy(head), pickle.loads(pickle.dumps(head))):
        assert torch.equal(again(z), head(z)) and again.metadata == head.metadata
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder", "h.safetensors"]


class FolderHub:
    "Stands for huggingface_hub's client: repositories are folders."
    root = None
    def __init__(self, token=None): pass
    def create_repo(self, repo_id, private, exist_ok):
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)
        return type("Repo", (), dict(repo_id=repo_id))
    def upload_folder(self, repo_id, folder_path, **options):
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"hub/{repo_id}/commit/1"
    @classmethod
    def download(cls, repo_id, filename, **options): return str(cls.root / repo_id / filename)


def test_heads_go_to_a_hub_and_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(FolderHub, "root", tmp_path)
    monkeypatch.setattr("huggingface_hub.hub_mixin.HfApi", FolderHub)
    monkeypatch.setattr("huggingface_hub.hub_mixin.hf_hub_download", FolderHub.download)
    monkeypatch.setattr(rasa_nb.head, "hf_hub_download", FolderHub.download)
    head = PositionMean().fit_moments(Moments.of(planted_tokens()[0])).head_
    assert head.push_to_hub("me/head") == "hub/me/head/commit/1"
    back = RASAHead.from_pretrained("me/head", revision="main")
    assert torch.equal(back.offset, head.offset) and back.metadata == head.metadata
    files = sorted(p.name for p in (tmp_path / "me/head").iterdir())
    assert files == ["README.md", "config.json", "head.safetensors"]
    card = (tmp_path / "me/head/README.md").read_text("utf-8")
    assert 'from_pretrained("me/head")' in card and "library_name: rasa_nb" in card
    assert "PositionMean for an unnamed encoder" in card and "grid of 6 x 8" in card


@pytest.mark.parametrize("offset", [None, torch.randn(6, 8, 16)], ids=["projector", "offset"])
def test_moments_behind_a_head_are_those_of_its_tokens(offset):
    z, head = planted_tokens(40)[0], RASAHead(torch.randn(16, 16), offset)
    derived, direct = moments_after(Moments.of(z), head, (6, 8)), Moments.of(head(z))
    assert torch.allclose(derived.cov, direct.cov, rtol=1e-4, atol=1e-4)
    assert torch.allclose(derived.cell_mean, direct.cell_mean, atol=1e-4)


def test_what_is_no_head(tmp_path, deit_file):
    RASAHead(torch.eye(5)).save(tmp_path / "h.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "h.safetensors").read_bytes()[:-20])
    torch.save({"pos_pred.weight": torch.randn(2, 5)}, tmp_path / "released.pth")
    refusals = [
        (lambda: RASAHead.load(tmp_path / "cut.safetensors"), "is it whole"),
        (lambda: RASAHead.load(deit_file), "is no rasa_nb.head.1 file"),
        (lambda: RASAHead.load(tmp_path / "released.pth"), "is read by load_released_head"),
        (lambda: RASAHead(torch.zeros(5, 4)), "projector is .5, 4., expected .D, D."),
        (lambda: RASAHead(torch.eye(5), torch.zeros(2, 2, 4)), "expected .gh, gw, 5.")]
    for call, message in refusals:
        with pytest.raises(ValueError, match=message): call()


def test_a_head_at_another_block_is_warned_of_and_at_several_refused(tiny):
    debiased = RASA().fit(tiny, Scenes("train", 20)).attach(tiny)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert debiased.at(-1).name == debiased.name   # the block it was fitted on
    with pytest.warns(UserWarning, match="not the same encoder"): debiased.at(2)
    with pytest.raises(ValueError, match="the head is for D=192"): debiased.at([2, 5])
