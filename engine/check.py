"""What `sample.py --check` says: the parts of a checkpoint, how they are stored, and what is missing."""

from collections import Counter

import torch

from checkpoint import FP8, Checkpoint, file_name
from common.errors import UserError
from model import LTXVideo
from text import TextConnector
from vae import VideoVAE


def check(checkpoint: Checkpoint) -> None:
    """Print tensors, parameters, bytes and stored formats of each part; no weight is read. UserError for what is
    missing."""
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
    print(f"{'part':32}{'tensors':>10}{'parameters':>16}{'bytes':>18}  stored as")
    problems, total, used = [], Counter(), set()
    for title, (module, prefixes) in parts.items():
        row, forms = Counter(), Counter()
        for name, slot in module.state_dict().items():
            source = file_name(name, prefixes)
            if problem := checkpoint.misfit(source, slot):
                problems.append(problem)
                continue
            start, end = checkpoint.tensors[source]["data_offsets"]
            row.update(tensors=1, parameters=slot.numel(), bytes=end - start)
            forms[stored_as(checkpoint, source)] += 1
            used |= {source, checkpoint.scale_name(source)}
        total += row
        words = ", ".join(f"{count:,} {form}" if len(forms) > 1 else form for form, count in forms.most_common())
        print(f"{title:32}{row['tensors']:>10,}{row['parameters']:>16,}{row['bytes']:>18,}  {words}")
    print(f"{'all that is needed':32}{total['tensors']:>10,}{total['parameters']:>16,}{total['bytes']:>18,}")
    print(f"{'ignored (audio and others)':32}{len(checkpoint.tensors.keys() - used) - len(problems):>10,}")
    if problems:
        rest = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"{checkpoint.path} does not fit: {'; '.join(problems[:3])}{rest}")
    print("nothing is missing")


def stored_as(checkpoint: Checkpoint, name: str) -> str:
    """The dtype of a tensor in the file, for an fp8 weight with the kind of its scale."""
    dtype = checkpoint.tensors[name]["dtype"]
    if dtype not in FP8:
        return dtype
    scale = checkpoint.scale_name(name)
    if scale is None:
        return f"{dtype} without scale"
    scales = torch.Size(checkpoint.tensors[scale]["shape"]).numel()
    return f"{dtype} with {'a scale' if scales == 1 else 'a scale for each row'}"


def require_bf16(checkpoint: Checkpoint) -> None:
    """UserError if the DiT is stored in fp8: trained weights and merged LoRAs are written in the base's own format."""
    for name in checkpoint.tensors:
        if name.startswith("model.diffusion_model.") and checkpoint.tensors[name]["dtype"] in FP8:
            raise UserError(
                f"{checkpoint.path} is in fp8 ({name}), and an export is written over the bf16 file: give that one, "
                "for instance ltx-2.3-22b-dev.safetensors"
            )
