"""The miniature's VAE: one pass over a clip is diffusers' chunked pass, with WAN's statistics; it trains."""

import copy
import math

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import WanResample
from tiny import generator

from training.backbones import from_unit
from training.miniature import vae, world
from training.miniature.latents import decode_clips


def random_vae(seed=0):
    """A VAE whose every parameter matters (temporal resampling starts as a plain average)."""
    torch.manual_seed(seed)
    model = vae.build()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.03 * torch.randn_like(parameter))
    return model.eval()


def video(frames=17, side=16, batch=1, seed=0):
    return torch.rand(batch, 3, frames, side, side, generator=generator(seed)) * 2.0 - 1.0


@torch.no_grad()
@pytest.mark.parametrize("frames", [1, 5, 17])
def test_whole_clips_encode_and_decode_as_diffusers_does_in_groups(frames):
    model, clip = random_vae(), video(frames, batch=2)
    whole = vae.WholeClipVAE(copy.deepcopy(model))
    wanted = model.encode(clip).latent_dist.mean
    found = whole.encode(clip)
    assert found.shape == (2, 16, 1 + (frames - 1) // 4, 2, 2)
    assert torch.allclose(found, wanted, atol=1e-4) and wanted.std() > 0.01
    latent = torch.randn(wanted.shape, generator=generator(1))
    rebuilt, unclamped = model.decode(latent).sample, whole.decode(latent)
    assert unclamped.shape == clip.shape and rebuilt.std() > 0.01
    assert torch.allclose(unclamped.clamp(-1, 1), rebuilt, atol=1e-4)


@torch.no_grad()
def test_time_flows_forward_only():
    whole = vae.WholeClipVAE(random_vae())
    clip = video()
    changed = clip.clone()
    changed[:, :, 9:] = 0.0
    before, after = whole.encode(clip), whole.encode(changed)
    assert torch.allclose(before[:, :, :3], after[:, :, :3], atol=1e-5)  # frames 0, 1-4, 5-8
    assert not torch.allclose(before[:, :, 3:], after[:, :, 3:], atol=1e-3)


@torch.no_grad()
def test_training_looks_at_a_sampled_latent_and_its_divergence():
    torch.manual_seed(0)
    model = vae.build()
    whole, clip = vae.WholeClipVAE(model), video(5)
    mean, log_variance = model.quant_conv(model.encoder(clip)).chunk(2, 1)
    terms = [
        0.5 * (m * m + math.exp(v) - 1.0 - v)
        for m, v in zip(mean.flatten().tolist(), log_variance.clamp(-30, 20).flatten().tolist(), strict=True)
    ]
    torch.manual_seed(3)
    rebuilt, kl = whole(clip)
    assert kl.item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)
    torch.manual_seed(3)
    latent = mean + log_variance.clamp(-30, 20).mul(0.5).exp() * torch.randn(mean.shape)
    assert torch.allclose(rebuilt, whole.decode(latent), atol=1e-5)


def test_a_whole_clip_model_no_longer_takes_groups():
    model = vae.build()
    vae.WholeClipVAE(model)
    with pytest.raises(ValueError, match="without caches"):
        model.encode(video(5))


@torch.no_grad()
def test_folding_gives_latents_wans_statistics_and_leaves_the_pictures_alone():
    model, clips = random_vae(), video(9, batch=4)
    before, rebuilt = model.encode(clips).latent_dist, None
    rebuilt = model.decode(before.mean).sample
    vae.fold_statistics(model, clips)
    after = model.encode(clips).latent_dist
    mean, deviation = after.mean.mean(dim=(0, 2, 3, 4)), after.mean.std(dim=(0, 2, 3, 4))
    assert torch.allclose(mean, torch.tensor(model.config.latents_mean), atol=1e-3)
    assert torch.allclose(deviation, torch.tensor(model.config.latents_std), atol=1e-3)
    assert torch.allclose(model.decode(after.mean).sample, rebuilt, atol=1e-4)
    # the noise keeps its size beside the signal
    scale = after.mean.std(dim=(0, 2, 3, 4)) / before.mean.std(dim=(0, 2, 3, 4))
    ratio = (after.std / before.std).mean(dim=(0, 2, 3, 4))
    assert torch.allclose(ratio, scale, rtol=1e-3)


def test_clips_become_video_and_back():
    clips = np.random.default_rng(0).integers(0, 256, (2, 5, 8, 6, 3), np.uint8)
    x = vae.to_video(clips)
    assert (
        x.shape == (2, 3, 5, 8, 6) and x.dtype == torch.float32 and -1 <= x.min() < -0.9 < 0.9 < x.max() <= 1
    )
    assert x[1, 2, 3, 4, 5].item() == pytest.approx(clips[1, 3, 4, 5, 2] / 127.5 - 1.0)
    assert (vae.to_clips(x) == clips).all() and (vae.to_clips(3.0 * x) != clips).any()


def test_the_reconstruction_loss_counts_moving_pixels_four_times():
    clip = video(4, 6)
    clip[:, :, 1:, :3] = clip[:, :, :1, :3]  # the upper half stands still
    clip[:, :, 1:, 0, 0] += 0.05  # below what counts as moving
    rebuilt = clip + 0.2 * torch.randn(clip.shape, generator=generator(2))
    total = 0.0
    for t, y, x in [(t, y, x) for t in range(4) for y in range(6) for x in range(6)]:
        pixel, course = clip[0, :, t, y, x], clip[0, :, :, y, x]
        moves = any(abs(pixel[c] - sum(course[c]) / 4) > 0.1 for c in range(3))
        for c in range(3):
            error = (rebuilt[0, c, t, y, x] - pixel[c]).item()
            total += (4.0 * error**2 + 0.25 * abs(error)) * (4.0 if moves else 1.0)
    found = vae.reconstruction_loss(rebuilt, clip).item()
    assert found == pytest.approx(total / clip.numel(), rel=1e-4)
    assert vae.reconstruction_loss(clip, clip) == 0.0


@torch.no_grad()
def test_unit_latents_become_clips_in_order():
    model = random_vae()
    latents = torch.randn(5, 16, 2, 2, 2, generator=generator(0))
    found = decode_clips(vae.WholeClipVAE(copy.deepcopy(model)), latents.half())
    wanted = vae.to_clips(model.decode(from_unit(latents.half().float(), model)).sample)
    assert found.shape == (5, 5, 16, 16, 3) and found.dtype == np.uint8
    assert np.abs(found.astype(int) - wanted).max() <= 1 and len({clip.tobytes() for clip in found}) == 5


def test_psnr_is_the_mean_over_clips_in_decibels():
    clip = video(2, 4, batch=2)
    noisy = clip + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1, 1) * torch.randn(
        clip.shape, generator=generator(5)
    )
    values = []
    for a, b in zip(noisy.clamp(-1, 1), clip, strict=True):
        error = (
            sum((x - y) ** 2 for x, y in zip(a.flatten().tolist(), b.flatten().tolist(), strict=True))
            / a.numel()
        )
        values.append(10 * math.log10(2.0**2 / error))
    assert vae.psnr(noisy, clip) == pytest.approx(sum(values) / 2, rel=1e-5)


@pytest.mark.parametrize(("frames", "batch"), [(1, 8), (5, 2), (17, 1)])
def test_cuts_are_runs_of_frames_of_drawn_clips(frames, batch):
    rng = np.random.default_rng(0)
    cuts = vae._random_cuts(world.all_actions(), batch, frames, rng)
    assert cuts.shape == (batch, frames, 64, 64, 3) and cuts.dtype == np.uint8
    assert len({cut.tobytes() for cut in cuts}) == batch


def train(tmp_path, monkeypatch, **settings):
    small = lambda actions, batch, frames, rng: rng.integers(0, 256, (batch, frames, 16, 16, 3), np.uint8)  # noqa: E731
    monkeypatch.setattr(vae, "_random_cuts", small)
    reports = []
    out = tmp_path / "vae.pt"
    settings = {"frames": 5, "batch": 1, "report": lambda step, figures: reports.append(step)} | settings
    return vae.train(world.all_actions(), 2, out, **settings), torch.load(out, weights_only=True), reports


def stayed(model, before):
    return {name for name, value in model.named_parameters() if torch.equal(value, before[name])}


def test_training_moves_every_parameter_and_writes_the_weights(tmp_path, monkeypatch):
    torch.save(random_vae().state_dict(), tmp_path / "start.pt")
    model, saved, reports = train(tmp_path, monkeypatch, start_from=tmp_path / "start.pt")
    assert stayed(model, random_vae().state_dict()) == set() and reports == [2]
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())


def test_single_frames_leave_time_alone_and_a_decoder_alone_leaves_the_latents(tmp_path, monkeypatch):
    torch.save(random_vae().state_dict(), tmp_path / "start.pt")
    before = random_vae().state_dict()
    timely = {
        f"{name}.{part}"
        for name, module in random_vae().named_modules()
        if name.endswith("time_conv")
        for part, _ in module.named_parameters()
    }
    model, *_ = train(tmp_path, monkeypatch, frames=1, batch=4, start_from=tmp_path / "start.pt")
    assert timely and stayed(model, before) == timely
    model, *_ = train(tmp_path, monkeypatch, decoder_only=True, start_from=tmp_path / "start.pt")
    assert {name.split(".")[0] for name in stayed(model, before)} == {"encoder", "quant_conv"}
    assert not any(name.split(".")[0] in ("decoder", "post_quant_conv") for name in stayed(model, before))


def test_an_untrained_vae_averages_in_time_and_says_little():
    torch.manual_seed(0)
    model = vae.build()
    resamplers = [m for m in model.modules() if isinstance(m, WanResample) and hasattr(m, "time_conv")]
    assert len(resamplers) == 4
    x = torch.ones(1, resamplers[0].dim, 3, 4, 4)
    y = torch.nn.Conv3d.forward(resamplers[0].time_conv, x)
    assert y.mean().item() == pytest.approx(1.0, abs=0.2)
    with torch.no_grad():
        spread = model.encode(video()).latent_dist.std
    assert spread.max() < 0.1
