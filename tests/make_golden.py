"""Write tests/golden/*.npz: outputs of networks with weights by formula, and of released weights.

    python tests/make_golden.py

Run it only on a network that has passed the conformance test with the original release's outputs
(tests/test_conformance.py, which needs real data): the files replace them elsewhere.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from lednet import LEDNet
from lednet.checkpoint import load_state
from lednet.hub import list_pretrained

GOLDEN = Path(__file__).parent / "golden"
SIZE = (64, 96)


def formula_values(shape: tuple[int, ...], salt: int) -> np.ndarray:
    """Pseudorandom values in [-1, 1), the same on every machine."""
    index = np.arange(int(np.prod(shape)), dtype=np.float64)
    return (np.modf(np.sin(index * 12.9898 + salt * 78.233) * 43758.5453)[0]).reshape(shape)


def formula_state(net: LEDNet) -> dict[str, torch.Tensor]:
    """A full state dict by formula, scaled so that activations neither vanish nor explode."""
    state = {}
    for salt, (name, value) in enumerate(net.state_dict().items()):
        noise = formula_values(tuple(value.shape), salt)
        if name.endswith("num_batches_tracked"):
            array = np.array(100)
        elif value.dim() == 4:
            array = noise * (3.0 / np.prod(value.shape[1:])) ** 0.5
        elif name.endswith("running_var"):
            array = 0.5 + 0.3 * noise
        elif name.endswith("weight"):
            array = 1.0 + 0.2 * noise
        else:
            array = 0.2 * noise
        state[name] = torch.from_numpy(np.asarray(array)).to(value.dtype)
    return state


def formula_image() -> torch.Tensor:
    """(1, 3, *SIZE) in [0, 1]."""
    return torch.from_numpy(formula_values((1, 3, *SIZE), 1)).float().abs()


def released_outputs(name: str) -> dict[str, np.ndarray]:
    """Logits of released weights for the image by formula."""
    with torch.inference_mode():
        return {"logits": LEDNet.from_pretrained(name)(formula_image()).numpy()[:, :, ::4, ::4]}


def formula_outputs(variant: str) -> dict[str, np.ndarray]:
    """Logits, loss and gradient norms of a variant for the image by formula."""
    net = LEDNet(20, variant).eval()
    load_state(net, formula_state(net), "formula")
    image = formula_image()
    target = torch.arange(SIZE[0] * SIZE[1]).view(1, *SIZE) * 7 % 20
    logits = net(image)
    loss = F.cross_entropy(logits, target)
    loss.backward()
    return {
        "logits": logits.detach().numpy()[:, :, ::4, ::4],
        "encoder_logits": net.encoder_stage()(image).detach().numpy(),
        "loss": np.array(loss.item()),
        "grad_norms": np.array(
            [p.grad.norm().item() for p in net.parameters() if p.grad is not None]
        ),
    }


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for variant in ("d20", "d128"):
        np.savez_compressed(GOLDEN / f"{variant}.npz", **formula_outputs(variant))
    for name in list_pretrained():
        np.savez_compressed(GOLDEN / f"{name}.npz", **released_outputs(name))
