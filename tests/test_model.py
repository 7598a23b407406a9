import shutil

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

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


def test_parameter_counts_are_those_of_the_release():
    light, heavy = LEDNet(20, "d20"), LEDNet(20, "d128")
    assert count_parameters(light) == 925_663
    assert count_parameters(light.encoder) == 911_436
    assert count_parameters(light.encoder_head) == 2_580
    assert count_parameters(light.decoder) == 11_647
    assert count_parameters(heavy) == 2_288_140
    assert count_parameters(heavy.decoder) == 1_374_124


def test_parameter_count_of_a_pyramid_that_is_20_channels_wide():
    assert count_parameters(LEDNet(20, "d128", pyramid_channels=20)) == 1_059_856


@pytest.mark.parametrize(("variant", "gmac"), [("d20", 11.21), ("d128", 13.08)])
def test_operations_at_512x1024(variant, gmac):
    with torch.device("meta"):
        net, x = LEDNet(20, variant).eval(), torch.empty(1, 3, 512, 1024)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        net(x)
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmac, abs=0.005)


@pytest.mark.parametrize("size", [(16, 16), (17, 16), (97, 131), (360, 480), (64, 200)])
def test_any_size_is_answered_at_its_own(net, size):
    net.eval()
    with torch.no_grad():
        x = torch.rand(1, 3, *size)
        assert net(x).shape == (1, 20, *size)
        assert net.encoder_stage()(x).shape == (1, 20, -(-size[0] // 8), -(-size[1] // 8))


@pytest.mark.parametrize("size", [(720, 1280), (1080, 1920)])
def test_camera_sizes_are_answered_at_their_own(size):
    with torch.device("meta"):
        assert LEDNet().eval()(torch.empty(1, 3, *size)).shape == (1, 20, *size)


@pytest.mark.parametrize("variant", ["d20", "d128"])
def test_number_of_classes_is_obeyed_everywhere(variant):
    net = LEDNet(7, variant).eval()
    x = torch.rand(1, 3, 32, 40)
    assert net(x).shape == (1, 7, 32, 40)
    assert net.encoder_stage()(x).shape == (1, 7, 4, 5)
    assert 20 not in {s for p in net.parameters() for s in p.shape}


def test_unknown_variants_are_refused():
    with pytest.raises(ValueError, match="d21"):
        LEDNet(20, "d21")
    with pytest.raises(ValueError, match="d128"):
        LEDNet(20, "d20", pyramid_channels=20)


def test_channel_shuffle_interleaves_the_halves_in_both_memory_formats():
    x = torch.arange(6.0).view(1, 6, 1, 1).expand(2, 6, 3, 5).contiguous()
    for memory_format in (torch.contiguous_format, torch.channels_last):
        shuffled = channel_shuffle(x.contiguous(memory_format=memory_format), 2)
        assert shuffled[0, :, 0, 0].tolist() == [0, 3, 1, 4, 2, 5]
        assert shuffled.is_contiguous(memory_format=memory_format)


def test_downsampler_puts_the_convolution_before_the_pool():
    block = Downsampler(3, 8).eval()
    torch.nn.init.zeros_(block.conv.weight)
    torch.nn.init.constant_(block.conv.bias, 7.0)
    out = block(torch.ones(1, 3, 5, 4))
    scale = (1 + 1e-3) ** -0.5
    assert out.shape == (1, 8, 3, 2)
    assert out[0, :5].mean().item() == pytest.approx(7 * scale)
    assert out[0, 5:].mean().item() == pytest.approx(scale)


def test_block_sees_as_far_as_its_dilation():
    """Change one pixel: the answer changes along row and column to 1 + 9 pixels, no further."""
    torch.manual_seed(0)
    block = SSnbt(16, dropout=0.0, dilation=9).eval()
    x = torch.rand(1, 16, 41, 41)
    y = x.clone()
    y[..., 20, 20] += 1
    changed = (block(x) != block(y)).any(1)[0].nonzero()
    assert changed.min(0).values.tolist() == [10, 10]
    assert changed.max(0).values.tolist() == [30, 30]


def test_channels_last_reaches_the_output_and_changes_nothing(net):
    net.eval()
    x = torch.rand(2, 3, 64, 96)
    with torch.no_grad():
        expected = net(x)
        answer = net.to(memory_format=torch.channels_last)(
            x.contiguous(memory_format=torch.channels_last)
        )
    assert answer.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-5)


def test_every_parameter_receives_a_gradient(net):
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


def test_logits_are_not_negative(net):
    with torch.no_grad():
        assert net.eval()(torch.randn(1, 3, 64, 64)).min() >= 0


def test_a_batch_of_one_trains(net):
    net.train()
    before = net.decoder.pooled[1].running_var.clone()
    net(torch.rand(1, 3, 64, 64)).sum().backward()
    assert net.decoder.pooled[0].weight.grad.isfinite().all()
    # One value a channel has no variance to learn from.
    assert torch.equal(net.decoder.pooled[1].running_var, before)


def test_double_precision_agrees_with_single(net):
    net.eval()
    x = torch.rand(1, 3, 48, 80)
    with torch.no_grad():
        single = net(x)
        double = net.double()(x.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), single, atol=1e-4, rtol=1e-4)


def test_export_agrees(net):
    net.eval()
    x = torch.rand(1, 3, 64, 96)
    exported = torch.export.export(net, (x,)).module()
    with torch.no_grad():
        torch.testing.assert_close(exported(x), net(x))


def test_classifier_has_the_parameters_of_the_release():
    assert count_parameters(EncoderClassifier(1000)) == 1_040_436
    with pytest.raises(ValueError, match="positive"):
        EncoderClassifier(0)


def test_classifier_pools_as_the_release_at_its_size(monkeypatch):
    monkeypatch.setattr(lednet.model, "ENCODER_STAGES", THREE_DOWN)
    net = EncoderClassifier(7).eval()
    pools = torch.nn.MaxPool2d(2, stride=2), torch.nn.AvgPool2d(14, 1)
    released = torch.nn.Sequential(net.encoder, *pools, torch.nn.Flatten(), net.classifier)
    x = torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(net(x), released(x))


@pytest.mark.parametrize("size", [(1, 1), (3, 9), (37, 71), (96, 64)])
def test_classifier_answers_any_size_and_trains_every_parameter(size):
    torch.manual_seed(0)
    net = EncoderClassifier(7)
    logits = net(torch.rand(4, 3, *size))
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile on a CPU needs g++")
def test_compiled_forward_and_backward_agree(monkeypatch):
    """One block of each kind, at a size whose pyramid shrinks to a single cell."""
    monkeypatch.setattr(lednet.model, "ENCODER_STAGES", SHORT_ENCODER)
    check_compiled("inductor", (2, 3, 32, 32))


def test_whole_network_is_one_graph():
    check_compiled("aot_eager", (2, 3, 64, 96))


THREE_DOWN = (Down(32), Down(64), Down(128))
SHORT_ENCODER = (Down(32), Block(0.03, 1), Down(128), Block(0.3, 2))


def check_compiled(backend: str, shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    torch._dynamo.reset()
    net = LEDNet(5).eval()
    x = torch.rand(shape)
    expected = net(x)
    expected.square().mean().backward()
    gradients = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    answer = torch.compile(net, fullgraph=True, backend=backend)(x)
    answer.square().mean().backward()
    torch.testing.assert_close(answer, expected, atol=1e-5, rtol=1e-4)
    compiled = dict(net.named_parameters())
    for name, gradient in gradients.items():
        torch.testing.assert_close(compiled[name].grad, gradient, atol=1e-5, rtol=1e-3)


def test_a_feature_sees_499_pixels_to_each_side():
    """As docs/architecture.md says."""
    torch.manual_seed(0)
    x = torch.rand(1, 3, 16, 1600, dtype=torch.float64, requires_grad=True)
    Encoder().double().eval()(x)[0, :, 1, 100].sum().backward()
    seen = x.grad.abs().sum(dim=(0, 1, 2)).nonzero()
    assert (seen.min().item(), seen.max().item()) == (8 * 100 - 499, 8 * 100 + 499)
