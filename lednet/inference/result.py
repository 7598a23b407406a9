"""The result of a prediction."""

import difflib
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lednet.data.image_io import write_label_map
from lednet.data.labels import IGNORE_INDEX, LabelScheme
from lednet.errors import UserError
from lednet.visualization import colorize, overlay, write_picture


class Segmentation(np.lib.mixins.NDArrayOperatorsMixin):
    """Label map of one image, with its classes.

    A result can be indexed, compared and passed to NumPy's functions like its label map.

    Attributes:
        labels: (H, W) uint8 class indices; the void output is the number of classes.
        image: (H, W, 3) uint8 RGB, the image that was segmented, upright.
        confidence: (H, W) float32, probability of the predicted class; None unless asked for.
    """

    def __init__(
        self,
        labels: np.ndarray,
        image: np.ndarray,
        scheme: LabelScheme,
        confidence: np.ndarray | None = None,
    ):
        self.labels, self.image, self.confidence = labels, image, confidence
        self._scheme = scheme

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their indices."""
        return self._scheme.classes

    @property
    def colors(self) -> tuple[tuple[int, int, int], ...]:
        """RGB color of each class."""
        return self._scheme.colors

    @property
    def shares(self) -> dict[str, float]:
        """Share of the pixels of each predicted class, largest first; void is left out."""
        counts = np.bincount(self.labels.ravel(), minlength=IGNORE_INDEX + 1) / self.labels.size
        order = np.argsort(-counts[: len(self.classes)], kind="stable")
        return {self.classes[i]: float(counts[i]) for i in order if counts[i]}

    def mask(self, name: str) -> np.ndarray:
        """(H, W) bool, the pixels of a class.

        Raises:
            UserError: there is no such class.
        """
        if name not in self.classes:
            near = difflib.get_close_matches(name, self.classes, n=1)
            hint = (
                f"did you mean {near[0]}?" if near else f"choose one of {', '.join(self.classes)}"
            )
            raise UserError(f"no class {name!r}: {hint}")
        return self.labels == self.classes.index(name)

    def color(self) -> Image.Image:
        """The label map in class colors; void is black."""
        return Image.fromarray(colorize(self.labels, self._scheme))

    def overlay(self, alpha: float = 0.5) -> Image.Image:
        """The image tinted with the class colors.

        Args:
            alpha: opacity of the colors, 0 to 1.
        """
        return Image.fromarray(overlay(self.image, self.labels, self._scheme, alpha))

    def save(self, path: str | os.PathLike, kind: str = "labels") -> None:
        """Write the result to a file, atomically.

        Args:
            path: a .png file; "color" and "overlay" can also be written to .jpg files.
            kind: "labels" (8-bit class indices), "color" or "overlay".

        Raises:
            UserError: the suffix does not fit, or the file cannot be written.
        """
        if kind not in ("labels", "color", "overlay"):
            raise ValueError(f"kind must be labels, color or overlay, not {kind!r}")
        suffix = Path(path).suffix.lower()
        if suffix not in (".png",) + (".jpg", ".jpeg") * (kind != "labels"):
            formats = "a .png file" if kind == "labels" else "a .png or .jpg file"
            raise UserError(f"cannot write {kind} to {path}: give {formats}")
        if kind == "labels":
            write_label_map(path, self.labels)
        else:
            write_picture(path, np.asarray(self.color() if kind == "color" else self.overlay()))

    def show(self) -> None:
        """Open the overlay in the system's image viewer."""
        self.overlay().show()

    @property
    def shape(self) -> tuple[int, ...]:
        """(H, W) of the label map."""
        return self.labels.shape

    @property
    def dtype(self) -> np.dtype:
        return self.labels.dtype

    def __getitem__(self, index: Any) -> Any:
        return self.labels[index]

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Any, **options: Any) -> Any:
        arrays = (value.labels if isinstance(value, Segmentation) else value for value in inputs)
        return getattr(ufunc, method)(*arrays, **options)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.labels, dtype=dtype, copy=copy)

    def _repr_png_(self) -> bytes:
        """The overlay, which notebooks display."""
        buffer = io.BytesIO()
        self.overlay().save(buffer, "PNG", compress_level=1)
        return buffer.getvalue()

    def __repr__(self) -> str:
        height, width = self.labels.shape
        top = ", ".join(f"{name} {share:.0%}" for name, share in [*self.shares.items()][:3])
        return f"Segmentation({width}x{height}: {top})"
