"""Gemma 3, which reads the prompts: a folder or hub repository in, tokenizer and language model out.

Only safetensors are read, no code of the repository runs, and each fault of a file ends in one line.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from safetensors import safe_open
from torch import nn

from common.errors import UserError, blame, out_of_memory
from common.schema import foreign_record, parse_json

GEMMA = "google/gemma-3-12b-it-qat-q4_0-unquantized"
MAX_TOKENS = 1024  # slots of LTX-2.3; a tokenizer for shorter prompts (the tiny one) has a limit of its own


@foreign_record
class Sizes:  # checked before the layers are made; transformers checks all other fields
    hidden_size: Annotated[int, Field(gt=0, le=2**17)]
    num_hidden_layers: Annotated[int, Field(gt=0, le=1000)]


@foreign_record
class Kind:
    model_type: Literal["gemma3", "gemma3_text"]
    text_config: Sizes | None = None  # in a model with vision; else the sizes stand beside model_type


def load_gemma(
    name: str | Path, device: str | torch.device, dtype: torch.dtype, fits: tuple[int, int] | None = None
) -> tuple[Any, nn.Module]:
    """Tokenizer and language model, without the vision tower. `fits` is the (width, layers) that it must have.

    Missing, damaged and foreign files raise UserError.
    """
    folder = find_gemma(name)
    config, text = folder / "config.json", (folder / "config.json").read_bytes()
    kind = parse_json(Kind, text, config)
    sizes = kind.text_config or parse_json(Sizes, text, config)
    if fits and (sizes.hidden_size, sizes.num_hidden_layers) != fits:
        raise UserError(
            f"the Gemma in {folder} has {sizes.num_hidden_layers} layers of width {sizes.hidden_size} and the "
            f"checkpoint was trained with {fits[1]} of {fits[0]}: give --gemma its own ({GEMMA} for LTX-2.3)"
        )
    with blame(f"the Gemma in {folder} cannot be used", ": download it again"):
        try:
            return _load(folder, kind.model_type, device, dtype)
        except RuntimeError as error:
            if out_of_memory(error):
                advice = "on a GPU --text-on-cpu helps, and the sizes in its config.json may be wrong"
                raise UserError(f"the Gemma in {folder} needs more memory than there is: {advice}") from None
            if "ignore_mismatched_sizes" not in str(error):
                raise
            raise UserError(f"{folder}: its weights lack the shapes of its config.json: download it again") from None


def find_gemma(name: str | Path) -> Path:
    """The folder `name`, or that of the hub's repository of this name, downloaded if it is not there."""
    folder = Path(name)
    if not folder.exists():
        from huggingface_hub import snapshot_download

        files = ["*.json", "*.safetensors", "tokenizer.model"]
        licence = f"Its weights need a licence: accept it on https://huggingface.co/{GEMMA}, then run `hf auth login`"
        try:
            folder = Path(snapshot_download(str(name), allow_patterns=files))
        except (OSError, ValueError) as error:
            reason = f"the hub gives no such Gemma ({str(error).strip().splitlines()[0]})"
            raise UserError(f"no folder {name}, and {reason}. {licence} and `hf download {GEMMA}`") from None
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} holds no Gemma model: it has no config.json. Give --gemma the folder of {GEMMA}")
    if not any((folder / file).is_file() for file in ("tokenizer.json", "tokenizer.model")):
        raise UserError(f"{name} has no tokenizer.json: download it again")
    if (folder / "adapter_config.json").exists():  # transformers would load the adapter too
        raise UserError(f"{name} holds an adapter (adapter_config.json): give --gemma a folder without one")
    for file in folder.iterdir():
        if file.exists() and not (file.is_file() or file.is_dir()):
            raise UserError(f"{file} is a pipe or a device, not a file of Gemma's")
    return folder


def _load(folder: Path, kind: str, device: str | torch.device, dtype: torch.dtype) -> tuple[Any, nn.Module]:
    from transformers import AutoTokenizer, Gemma3Model, Gemma3TextModel
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    local = {"local_files_only": True, "trust_remote_code": False}
    tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    limit = min(MAX_TOKENS, tokenizer.model_max_length)
    if not isinstance(limit, int) or limit < 2:
        raise UserError(f"{folder / 'tokenizer_config.json'}: model_max_length = {limit} is no number of tokens")
    if tokenizer("")["input_ids"] != [tokenizer.bos_token_id]:
        advice = f"set add_bos_token to true in its tokenizer_config.json, or take {GEMMA}"
        raise UserError(f"the tokenizer in {folder} begins no prompt with <bos>, as LTX-2.3 needs it: {advice}")
    if set(tokenizer("a")["input_ids"]) <= {tokenizer.bos_token_id, tokenizer.unk_token_id}:
        raise UserError(f"the tokenizer in {folder} has no vocabulary: download its tokenizer.json again")
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            for tensor in tensors.keys():  # noqa: SIM118, it is no dict
                if (stored := tensors.get_slice(tensor).get_dtype()) not in ("BF16", "F16", "F32", "F64"):
                    raise UserError(f"{file} stores {tensor} as {stored}, which is not read here: take {GEMMA}")
    options = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True, "attn_implementation": "sdpa"}
    family = Gemma3Model if kind == "gemma3" else Gemma3TextModel
    model, report = family.from_pretrained(folder, output_loading_info=True, **options, **local)
    if missing := sorted(report["missing_keys"]):  # transformers fills them with random numbers
        raise UserError(f"the Gemma in {folder} lacks {len(missing)} tensors ({missing[0]}, ...): download it again")
    model = getattr(model, "language_model", model).eval().requires_grad_(False)
    for weight, tensor in model.named_parameters():
        if not torch.stack(tensor.aminmax()).isfinite().all():  # a tenth of the time that copying the tensor takes
            raise UserError(f"the Gemma in {folder} has NaN or infinity in {weight}: download it again")
    if len(tokenizer) > model.config.vocab_size:
        raise UserError(f"the tokenizer in {folder} has {len(tokenizer)} tokens, its Gemma {model.config.vocab_size}")
    # <bos> alone, once: some wrong values in the configs show only when a prompt is read.
    batch = tokenizer([""], padding=True, truncation=True, max_length=limit, return_tensors="pt").to(device)
    with torch.no_grad():
        output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    if not output.last_hidden_state.isfinite().all():
        advice = f"try another --dtype, or compare its config.json with that of {GEMMA}"
        raise UserError(f"the Gemma in {folder} returns NaN or infinity in {dtype}: {advice}")
    return tokenizer, model
