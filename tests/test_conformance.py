"""Outputs and gradients equal those of the original release, to rounding."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from make_golden import GOLDEN, formula_outputs
from PIL import Image

from lednet import LEDNet, load_weights
from lednet.checkpoint import _our_name
from lednet.model import load_model

VARIANTS = ("d20", "d128")


@pytest.mark.parametrize("variant", VARIANTS)
def test_lednet_outputs_and_gradients_equal_the_golden_file(variant):
    golden, now = np.load(GOLDEN / f"{variant}.npz"), formula_outputs(variant)
    assert golden["logits"].std() > 0.05
    for key in ("logits", "encoder_logits", "loss"):
        rounding = 1e-5 * np.abs(golden[key]).max()  # the order of summation depends on the CPU
        np.testing.assert_allclose(now[key], golden[key], rtol=0, atol=rounding)
    np.testing.assert_allclose(now["grad_norms"], golden["grad_norms"], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_lednet_outputs_and_gradients_equal_the_original_release(real_data, variant):
    folder = real_data / "golden"
    reference = np.load(folder / f"official_{variant}_outputs.npz")
    net = LEDNet(20, variant)
    report = load_weights(net, folder / f"official_{variant}_model_best.pth")
    assert report.complete and len(report.loaded) == 547
    net.eval()

    pixels = np.array(Image.open(folder / "input_512x1024.png").convert("RGB"))
    image = torch.from_numpy(pixels).permute(2, 0, 1)[None].float() / 255
    features = net.encoder(image)
    for output, key in (
        (net.encoder_head(features), "encoder_logits"),
        (net.decoder(features), "apn_logits"),
        ((logits := net(image))[:, :, ::4, ::4], "logits_4x4_stride"),
    ):
        np.testing.assert_allclose(output.detach().numpy(), reference[key], atol=1e-4)
    assert (logits.argmax(1).numpy() == reference["argmax"]).mean() >= 0.9999

    generator = torch.Generator().manual_seed(3)
    target = torch.randint(0, 20, (1, 512, 1024), generator=generator)
    loss = F.cross_entropy(logits, target)
    assert loss.item() == pytest.approx(reference["loss"].item(), abs=1e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    for name, norm in zip(reference["grad_names"], reference["grad_norms"], strict=True):
        ours = gradients[_our_name(str(name))].norm().item()
        assert ours == pytest.approx(norm, rel=1e-3, abs=1e-9), name


def test_load_model_original_checkpoint_is_rebuilt(real_data):
    net, meta = load_model(real_data / "golden" / "official_d20_checkpoint.pth.tar")
    assert (net.variant, net.num_classes, meta) == ("d20", 20, {})
