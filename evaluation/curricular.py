"""IR-101, the recognizer behind FaceSim-Cur: crops (n, 3, 112, 112), RGB in [-1, 1] -> embeddings (n, 512).

The second opinion on identity. The training loss contains ArcFace (Eq. 8-10), and a model can learn to please it. This
network was trained apart, with CurricularFace's loss on Glint360K, and no loss contains it.

The modules carry the names of the published file, glint360k_curricular_face_r101_backbone.bin, which the evaluation of
ConsisID and OpenS2V loads (their backbone is TFace's recognition/torchkit/backbone/model_irse.py, IR_101).
"""

import pickle
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from common.errors import UserError

STAGES = ((64, 3), (128, 13), (256, 30), (512, 3))  # channels, blocks
FILE = "face_encoder/glint360k_curricular_face_r101_backbone.bin"
WHERE = f"hf download BestWishYsh/ConsisID-preview {FILE} --local-dir ."


class Block(nn.Module):
    def __init__(self, channels: int, out: int, stride: int):
        super().__init__()
        # Where the width stays, the shortcut takes every stride-th pixel: a max-pool over windows of one pixel.
        self.shortcut_layer: nn.Module = nn.MaxPool2d(1, stride)
        if channels != out:
            self.shortcut_layer = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))
        self.res_layer = nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(out),
            nn.PReLU(out),
            nn.Conv2d(out, out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(out),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.res_layer(x) + self.shortcut_layer(x)


class CurricularFace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.input_layer = nn.Sequential(nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        blocks, channels = [], 64
        for out, count in STAGES:
            blocks += [Block(channels, out, 2), *[Block(out, out, 1) for _ in range(count - 1)]]
            channels = out
        self.body = nn.Sequential(*blocks)
        last = nn.Linear(512 * 7 * 7, 512), nn.BatchNorm1d(512, affine=False)
        self.output_layer = nn.Sequential(nn.BatchNorm2d(512), nn.Dropout(0.4), nn.Flatten(), *last)

    def forward(self, crops: Tensor) -> Tensor:
        return self.output_layer(self.body(self.input_layer(crops)))  # (n, 64, 112, 112) -> (n, 512, 7, 7) -> (n, 512)

    @classmethod
    def from_file(cls, path: str | Path, device: str | torch.device = "cpu") -> "CurricularFace":
        """Frozen, in float32. `path`: the published .bin, or the same tensors as .safetensors.

        The .bin is a pickle, the only one that this repository reads: by torch's weights-only reader, which builds
        tensors and nothing else.
        """
        if not Path(path).is_file():
            raise UserError(f"no CurricularFace backbone at {path}: {WHERE}")
        try:
            with warnings.catch_warnings():  # torch comments on other kinds of its own files
                warnings.simplefilter("ignore")
                safe = Path(path).suffix == ".safetensors"
                weights = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged file raises almost any type in zipfile, pickle and torch
            code = isinstance(error, pickle.UnpicklingError)  # torch's own text advises to run it
            reason = "it holds more than tensors" if code else str(error).strip().split("\n")[0] or "it is cut short"
            raise UserError(f"{path} cannot be read as weights ({reason}): {WHERE}") from None
        with torch.device("meta"):
            model = cls()
        expected = {name: _layout(tensor) for name, tensor in model.state_dict().items()}
        stored = {str(name): _layout(value) for name, value in weights.items()} if isinstance(weights, dict) else {}
        if wrong := [name for name in expected | stored if expected.get(name) != stored.get(name)]:
            there, needed = stored.get(wrong[0], "missing"), expected.get(wrong[0], "no such tensor")
            what = f"{wrong[0]} is {there}, expected {needed} ({len(wrong)} differ)"
            raise UserError(f"{path} is not CurricularFace's IR-101: {what}: {WHERE}")
        require_finite(weights, path)
        model.load_state_dict(weights, assign=True)
        return model.float().to(device).eval().requires_grad_(False)


def _layout(value: object) -> str:
    """Kind and shape of a tensor, to compare two files by."""
    if not isinstance(value, Tensor):
        return f"a {type(value).__name__}"
    return f"{'float' if value.is_floating_point() else value.dtype} {tuple(value.shape)}"


def require_finite(weights: dict[str, Tensor], where: str | Path) -> None:
    """Raises UserError with the name of the first tensor that holds NaN or infinity."""
    for name, tensor in weights.items():
        if not torch.isfinite(tensor).all():
            raise UserError(f"{where}: {name} holds values that are not finite: take the file anew")
