"""What the header of an LTX file must look like, checked once when the file is opened.

        8 bytes | JSON header: {"__metadata__": {"config": ...}, name: {dtype, shape, data_offsets}, ...} | data
        length  |

`read_header` checks any safetensors file. `read_config` and `read_ours` check the two JSON texts in the metadata that
this project uses. `kind` names a file that is no LTX-2.3 checkpoint. Each fault is one line.
"""

import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from common.errors import UserError
from common.schema import Count, PositiveFloat, Text, foreign_record, parse_json, validate

DTYPES = {
    "BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
OUR_METADATA = "nano_st_drc"  # what only this project needs to know, as JSON, beside the model's own config
RELEASED = "take ltx-2.3-22b-dev.safetensors from https://huggingface.co/Lightricks/LTX-2.3"
LARGEST_HEADER = 100 * 10**6  # bytes, the format's own limit

FIRST_BYTES = {  # of files that are not safetensors
    b"GGUF": "a GGUF file, whose quantization is not read here: take the bf16 or fp8 safetensors file",
    b"PK\x03\x04": "a pickled PyTorch file, which could run code: take the safetensors file",
    b"\x80\x02": "a pickled Python file, which could run code: take the safetensors file",
    b"version https://git-lfs": "a Git LFS pointer instead of the file itself: run `git lfs pull`",
    b"<": "a web page instead of the file: take the link that downloads the file",
}


@foreign_record
class Entry:  # of a tensor in the header
    dtype: str
    shape: list[Count]
    data_offsets: tuple[Count, Count]


def read_header(path: Path) -> tuple[dict[str, str], dict[str, dict[str, Any]], int]:
    """Metadata, tensors by name, and the place of the first byte of data.

    UserError if the header contradicts itself or the length of the file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        first = file.read(32)
        length = int.from_bytes(first[:8], "little") if size >= 8 else 0
        if size > 8 and (length > LARGEST_HEADER or first[8:9] != b"{"):
            what = (f"but {what}" for sign, what in FIRST_BYTES.items() if first.startswith(sign))
            raise UserError(f"{path} is not a whole safetensors file {next(what, f'(first bytes {first[:16]!r})')}")
        if size < 8 + max(length, 2):
            whole = f"{path} is not a whole safetensors file: it ends after {size:,} bytes, inside its header"
            raise UserError(f"{whole}: download it again")
        file.seek(8)
        header = parse_json(dict[str, Any], file.read(length), f"{path}: header")
    metadata = validate(dict[str, str], header.pop("__metadata__", {}), f"{path}: metadata")
    validate(dict[str, Entry], header, f"{path}: header")
    end, damaged = 0, f"{path}: damaged header:"
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        (start, stop), dtype, shape = entry["data_offsets"], entry["dtype"], entry["shape"]
        if start != end or stop < start:
            raise UserError(f"{damaged} {name} has bytes {start:,} to {stop:,}, the tensor before it ends at {end:,}")
        if dtype in DTYPES and stop - start != math.prod(shape) * DTYPES[dtype].itemsize:
            raise UserError(f"{damaged} {name} has {stop - start:,} bytes for shape {shape} in {dtype}")
        end = stop
    if size != 8 + length + end:
        lengths = f"it has {size:,} bytes and its header describes {8 + length + end:,}"
        raise UserError(f"{path} is not a whole safetensors file: {lengths}: download it again")
    return metadata, header, 8 + length


# --- The model's config -----------------------------------------------------------------------------------------------

# What the code here takes for granted. Another value means another model, which would load and sample wrongly.
SUPPORTED = {
    "transformer": {
        "_class_name": "AVTransformer3DModel", "activation_fn": "gelu-approximate", "apply_gated_attention": True,
        "attention_bias": True, "caption_proj_before_connector": True, "causal_temporal_positioning": True,
        "connector_apply_gated_attention": True, "cross_attention_adaln": True, "frequencies_precision": "float64",
        "norm_elementwise_affine": False, "positional_embedding_type": "rope", "qk_norm": "rms_norm",
        "rope_type": "split", "text_encoder_norm_type": "per_token_rms", "timestep_scale_multiplier": 1000,
        "use_middle_indices_grid": True,
    },
    "vae": {
        "_class_name": "CausalVideoAutoencoder", "causal_decoder": False, "dims": 3, "in_channels": 3,
        "latent_log_var": "uniform", "norm_layer": "pixel_norm", "out_channels": 3, "spatial_padding_mode": "zeros",
        "timestep_conditioning": False,
    },
}  # fmt: skip

Size = Annotated[int, Field(gt=0, le=2**16)]
Few = Annotated[int, Field(gt=0, le=1024)]  # layers, heads, channels
Even = Annotated[int, Field(gt=0, le=1024, multiple_of=2)]


@foreign_record
class Transformer:
    num_layers: Few
    num_attention_heads: Few
    attention_head_dim: Even
    in_channels: Few
    out_channels: Few
    caption_channels: Size
    positional_embedding_theta: PositiveFloat
    positional_embedding_max_pos: tuple[Size, Size, Size]
    connector_num_layers: Few
    connector_num_attention_heads: Few
    connector_attention_head_dim: Even
    connector_positional_embedding_max_pos: tuple[Size]
    connector_num_learnable_registers: Size


@foreign_record
class Stage:  # the options of one block of the VAE
    num_layers: Few = 1
    multiplier: Annotated[int, Field(gt=0, le=16)] = 1


# As in vae.py. The encoder's names end in "_res", the decoder's do not.
EncoderStage = tuple[Literal["res_x", "compress_space_res", "compress_time_res", "compress_all_res"], Stage]
DecoderStage = tuple[Literal["res_x", "compress_space", "compress_time", "compress_all"], Stage]
EncoderStages = Annotated[list[EncoderStage], Field(max_length=32)]
DecoderStages = Annotated[list[DecoderStage], Field(max_length=32)]


@foreign_record
class VAE:
    latent_channels: Few
    patch_size: Annotated[int, Field(gt=0, le=64)]
    encoder_base_channels: Few
    decoder_base_channels: Few
    encoder_blocks: EncoderStages
    decoder_blocks: DecoderStages


@foreign_record
class Config:
    """The sizes from which the model is built."""

    transformer: Transformer
    vae: VAE

    @model_validator(mode="after")
    def _sizes_agree(self) -> "Config":
        channels = self.transformer.in_channels, self.transformer.out_channels, self.vae.latent_channels
        if len(set(channels)) > 1:
            raise ValueError(f"transformer.in_channels, out_channels and vae.latent_channels differ: {channels}")
        for part in ("encoder", "decoder"):
            width = getattr(self.vae, f"{part}_base_channels")
            width *= math.prod(stage.multiplier for _, stage in getattr(self.vae, f"{part}_blocks"))
            if width > 2**16:
                raise ValueError(f"vae.{part}_blocks multiply its channels to {width:,}, above {2**16:,}")
        return self


def read_config(metadata: dict[str, str], path: str | Path) -> dict[str, dict[str, Any]]:
    """The model's config by part, {} if the file has none."""
    where = f"{path}: its metadata lacks the config that belongs there as JSON"
    parts = parse_json(dict[str, Any], metadata.get("config", "{}"), where)
    return {part: value for part, value in parts.items() if isinstance(value, dict)}


def require_supported(config: dict[str, dict[str, Any]], path: str | Path) -> None:
    """UserError unless the config is one that the code here computes, with sizes in range."""
    for part, supported in SUPPORTED.items():
        for key, value in supported.items():
            stated = config.get(part, {}).get(key)
            if stated != value:
                expected = f"this code is written for {value!r}: it is another model than the released LTX-2.3"
                raise UserError(f"{path}: config {part}.{key} = {stated!r}, and {expected}")
    validate(Config, config, f"{path}: config")


@foreign_record
class Layers:
    """ComfyUI's entry in the metadata of a quantized file: the stored format of each layer."""

    layers: dict[str, dict[str, Any]] = Field(default_factory=dict)


# --- Our own entry in the metadata ------------------------------------------------------------------------------------


Scale = Annotated[float, Field(ge=-1e4, le=1e4)]


@foreign_record
class Defaults:
    """Sampling settings. A missing field stays missing in `read_ours`: the values here are never used."""

    height: Annotated[int, Field(gt=0, le=16384)] = 480
    width: Annotated[int, Field(gt=0, le=16384)] = 832
    frames: Size = 121
    fps: Annotated[float, Field(gt=0, le=1000)] = 24.0
    steps: Few = 30
    s_text: Scale = 5.0
    s_ref: Scale = 7.5


@foreign_record
class Ours:
    """This project's entry in the metadata of a checkpoint or LoRA. Every field may be missing."""

    defaults: Defaults = Field(default_factory=Defaults)
    placement: Text = "tass"  # rope.PLACEMENTS has the names; engine.recipe checks it
    source_id: Annotated[int, Field(ge=-1000, le=1000)] = 2
    phase_scale: Annotated[float, Field(ge=-1000, le=1000)] = 1.0
    fit: Literal["letterbox", "cover"] = "letterbox"
    ref_timestep: Literal["clean", "shared"] = "clean"
    weights: Text = ""
    distilled: Text = ""
    base: Text = ""
    gemma: Literal["embedded"] = "embedded"  # the text encoder, where it is not Gemma 3 12B
    training: dict[str, Any] = Field(default_factory=dict)
    lora: dict[str, Any] = Field(default_factory=dict)
    loras: list[Text] = Field(default_factory=list)


def read_ours(metadata: dict[str, str], path: str | Path) -> dict[str, Any]:
    """This project's entry, {} in other people's files. UserError if a field has a wrong type or range."""
    text = metadata.get(OUR_METADATA, "{}")
    parse_json(Ours, text, f"{path}: {OUR_METADATA} in its metadata")
    return json.loads(text)


# --- Other files ------------------------------------------------------------------------------------------------------

WHOLE = "an LTX-like model whose metadata lacks the config"
LORA = r"(^|[._])lora[._]|\.diff(_b)?$|\.dora_scale$"
ALONE = r"^(model\.)?(diffusion_model\.|transformer\.)?patchify_proj\."
# Patterns over the sorted names of the tensors, one name a line; the first row that fits counts.
KINDS = (
    (LORA, "a LoRA", "give it with --lora, and the model it was trained on with --ckpt"),
    (r"keyframes_abs_pos_embedding$", "LTX-2.5", RELEASED),
    (r"^model\.diffusion_model\.[\s\S]*^vae\.", WHOLE, "give the file that it was made from with --base"),
    (ALONE, "a transformer alone", "give a file that has the rest, such as ltx-2.3-22b-dev.safetensors, with --base"),
    (r"^transformer_blocks\.|\.resnets\.|^proj_in\.", "one part of a diffusers folder", RELEASED),
    (r"^(vae\.)?(encoder|decoder|per_channel_statistics)\.", "a VAE alone", RELEASED),
    (r"^(text_embedding_projection|model\.diffusion_model\.\w+_connector)\.", "a text projection alone", RELEASED),
    (r"^(audio_vae|vocoder)\.", "the audio VAE alone", RELEASED),
    (r"^([\w.]+\.)?embed_tokens\.", "a language model such as Gemma", "give its folder with --gemma"),
)


def kind(tensors: dict[str, Any], config: dict[str, dict], version: str) -> tuple[str, str] | None:
    """What a file is, with the sign, and what to take instead; None for a whole LTX-2.3 checkpoint."""
    names, transformer = "\n".join(sorted(tensors)), config.get("transformer")
    rows = ((re.search(pattern, names, re.MULTILINE), what, instead) for pattern, what, instead in KINDS)
    sign, what, instead = next((row for row in rows if row[0]), (None, "", ""))
    if transformer and what in ("", WHOLE):
        if version.startswith("2.3"):
            return None
        if version:
            what = f"LTX-{'.'.join(version.split('.')[:2])} (model_version {version})"
        elif transformer.get("_class_name") != "AVTransformer3DModel":
            what = f"LTX-Video 0.9 or another relative (transformer {transformer.get('_class_name')})"
        elif not transformer.get("cross_attention_adaln"):
            what = "LTX-2.0 (its config has no cross_attention_adaln)"
        else:
            what = "an LTX-2 model of unknown version (its metadata has no model_version)"
        return what, RELEASED
    if sign is None:
        first = next(iter(tensors), "nothing")
        return f"something unrelated ({len(tensors)} tensors, the first is {first}, and no config)", RELEASED
    name = names[names.rfind("\n", 0, sign.start()) + 1 :].split("\n")[0]
    return f"{what} (by the tensor {name})", instead
