"""The network: counts, shapes, gradients and compilation."""

import shutil

import pytest
import torch
import torch.nn.functional as F

import lednet.model
from lednet import LEDNet
from lednet.model import (
    Block,
    Down,
    Downsampler,
    Encoder,
    EncoderClassifier,
    SSnbt,
    channel_shuffle,
    count_parameters,
)


@pytest.fixture(params=["d20", "d128"])
def net(request) -> LEDNet:
    torch.manual_seed(0)
    return LEDNet(20, request.param)


@pytest.mark.parametrize(
    ("module", "count"),
    [
        (LEDNet(20, "d20"), 925_663),
        (LEDNet(20, "d20").encoder, 911_436),
        (LEDNet(20, "d20").encoder_head, 2_580),
        (LEDNet(20, "d20").decoder, 11_647),
        (LEDNet(20, "d128"), 2_288_140),
        (LEDNet(20, "d128").decoder, 1_374_124),
        (LEDNet(20, "d128", pyramid_channels=20), 1_059_856),
        (EncoderClassifier(1000), 1_040_436),
    ],
)
def test_parameter_counts_equal_the_release(module, count):
    assert count_parameters(module) == count


@pytest.mark.parametrize("variant", ["d20", "d128"])
@pytest.mark.parametrize("size", [(1, 1), (17, 16), (97, 131), (360, 480), (1080, 1920)])
def test_lednet_any_size_keeps_size_and_classes(variant, size):
    with torch.device("meta"):
        net, x = LEDNet(7, variant).eval(), torch.empty(2, 3, *size)
        assert net(x).shape == (2, 7, *size)
        assert net.encoder_stage()(x).shape == (2, 7, -(-size[0] // 8), -(-size[1] // 8))
    assert 20 not in {side for p in net.parameters() for side in p.shape}


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: LEDNet(20, "d21"), "d21"),
        (lambda: LEDNet(20, "d20", pyramid_channels=20), "d128"),
        (lambda: LEDNet(0), "positive"),
        (lambda: LEDNet(20, "d128", 0), "positive"),
        (lambda: EncoderClassifier(0), "positive"),
    ],
)
def test_network_invalid_arguments_are_refused(build, words):
    with pytest.raises(ValueError, match=words):
        build()


def test_channel_shuffle_interleaves_halves_in_both_memory_formats():
    x = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 3, 5).contiguous()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        shuffled = channel_shuffle(x.contiguous(memory_format=memory_format), 2)
        assert shuffled[0, :, 0, 0].tolist() == [0, 3, 1, 4, 2, 5]
        assert shuffled.is_contiguous(memory_format=memory_format)


def test_downsampler_concatenates_convolution_and_pool_in_order():
    block = Downsampler(3, 8).eval()
    torch.nn.init.zeros_(block.conv.weight)
    torch.nn.init.constant_(block.conv.bias, 7.0)
    out = block(torch.ones(1, 3, 5, 4))
    scale = (1 + 1e-3) ** -0.5
    assert out.shape == (1, 8, 3, 2)
    assert out[0, :5].mean().item() == pytest.approx(7 * scale)
    assert out[0, 5:].mean().item() == pytest.approx(scale)


def test_block_receptive_field_is_its_dilation():
    """A changed pixel changes the output up to 1 + 9 pixels away."""
    torch.manual_seed(0)
    block = SSnbt(16, dropout=0.0, dilation=9).eval()
    x = torch.rand(1, 16, 41, 41)
    y = x.clone()
    y[..., 20, 20] += 1
    changed = (block(x) != block(y)).any(1)[0].nonzero()
    assert changed.min(0).values.tolist() == [10, 10]
    assert changed.max(0).values.tolist() == [30, 30]


def test_lednet_channels_last_is_kept_and_equal(net):
    net.eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = net(x)
        output = net.to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last)
        )
    assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-5)


def test_lednet_every_parameter_receives_a_gradient(net):
    x = torch.rand(2, 3, 64, 96)
    target = torch.randint(0, 20, (2, 64, 96))
    F.cross_entropy(net(x), target).backward()
    # The 1x1 head belongs to stage 1.
    idle = {name for name, p in net.named_parameters() if p.grad is None}
    assert idle == {"encoder_head.weight", "encoder_head.bias"}
    stage = net.encoder_stage()
    stage.zero_grad()
    F.cross_entropy(stage(x), target[:, ::8, ::8]).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in stage.parameters())


def test_lednet_one_image_trains_without_updating_its_pooled_statistics(net):
    net.train()
    before = net.decoder.pooled[1].running_var.clone()
    net(torch.rand(1, 3, 64, 64)).sum().backward()
    assert net.decoder.pooled[0].weight.grad.isfinite().all()
    assert torch.equal(net.decoder.pooled[1].running_var, before)


def test_lednet_torch_export_is_equal(net):
    net.eval()
    x = torch.rand(1, 3, 64, 96)
    exported = torch.export.export(net, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), net(x))
        assert net(x).min() >= 0


def test_classifier_at_224_pools_as_the_release(monkeypatch):
    monkeypatch.setattr(lednet.model, "ENCODER_STAGES", THREE_DOWN)
    net = EncoderClassifier(7).eval()
    pools = torch.nn.MaxPool2d(2, stride=2), torch.nn.AvgPool2d(14, 1)
    released = torch.nn.Sequential(net.encoder, *pools, torch.nn.Flatten(), net.classifier)
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(net(x), released(x))


@pytest.mark.parametrize("size", [(1, 1), (37, 71)])
def test_classifier_any_size_trains_every_parameter(size):
    torch.manual_seed(0)
    net = EncoderClassifier(7)
    logits = net(torch.rand(4, 3, *size))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


THREE_DOWN = (Down(32), Down(64), Down(128))
SHORT_ENCODER = (Down(32), Block(0.03, 1), Down(128), Block(0.3, 2))


NETWORKS = {
    "aot_eager": lambda: LEDNet(5),
    "inductor": lambda: torch.nn.Sequential(Downsampler(3, 8), SSnbt(8, dropout=0.3, dilation=2)),
}
"""By the compiler: the whole graph is traced, and the parts are compiled, which takes long."""


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
@pytest.mark.parametrize("backend", NETWORKS)
def test_lednet_compiled_forward_and_backward_are_equal(backend, monkeypatch):
    """With one block of each kind, and a size at which the pyramid shrinks to one cell."""
    monkeypatch.setattr(lednet.model, "ENCODER_STAGES", SHORT_ENCODER)
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = NETWORKS[backend]().eval()
    x = torch.rand(2, 3, 32, 32)
    expected = net(x)
    expected.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    output = torch.compile(net, fullgraph=True, backend=backend)(x)
    output.square().mean().backward()
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=1e-4)
    compiled = dict(net.named_parameters())
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name].grad, gradient, atol=1e-5, rtol=1e-3)


def test_encoder_receptive_field_is_499_pixels_to_each_side():
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 1600, dtype=torch.float64, requires_grad=True)
    Encoder().double().eval()(x)[0, :, 1, 100].sum().backward()
    seen = x.grad.abs().sum(dim=(0, 1, 2)).nonzero()
    assert (seen.min().item(), seen.max().item()) == (8 * 100 - 499, 8 * 100 + 499)
