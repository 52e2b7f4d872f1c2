"""`sample.py --check`: is a checkpoint complete, and what does it hold?"""

import torch

from checkpoint import Checkpoint, file_name
from common.errors import UserError
from model import LTXVideo
from text import TextConnector
from vae import VideoVAE


def check(checkpoint: Checkpoint) -> None:
    """Print tensors, parameters and bytes of each part, and what is missing. No tensor data is read."""
    with torch.device("meta"):
        vae = VideoVAE(checkpoint.config["vae"])
        parts = {
            "DiT": (LTXVideo(checkpoint.config["transformer"]), LTXVideo.PREFIXES),
            "text projection and connector": (TextConnector.for_checkpoint(checkpoint), TextConnector.PREFIXES),
            "VAE encoder": (vae.encoder, {"": "vae.encoder."}),
            "VAE decoder": (vae.decoder, {"": "vae.decoder."}),
            "VAE statistics": (vae.per_channel_statistics, {"": "vae.per_channel_statistics."}),
        }
    print(f"{checkpoint.path}: LTX {checkpoint.metadata.get('model_version')}")
    print(f"{'part':32}{'tensors':>10}{'parameters':>16}{'bytes':>18}")
    problems, total = [], [0, 0, 0]
    for title, (module, prefixes) in parts.items():
        row = [0, 0, 0]
        for name, slot in module.state_dict().items():
            source = file_name(name, prefixes)
            if problem := checkpoint.misfit(source, slot):
                problems.append(problem)
                continue
            start, end = checkpoint.tensors[source]["data_offsets"]
            row = [row[0] + 1, row[1] + slot.numel(), row[2] + end - start]
        total = [a + b for a, b in zip(total, row)]
        print(f"{title:32}{row[0]:>10,}{row[1]:>16,}{row[2]:>18,}")
    print(f"{'all that is needed':32}{total[0]:>10,}{total[1]:>16,}{total[2]:>18,}")
    print(f"{'ignored (audio and others)':32}{len(checkpoint.tensors) - total[0] - len(problems):>10,}")
    if problems:
        rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{checkpoint.path} is not whole: {'; '.join(problems[:3])}{rest}")
    print("nothing is missing")
