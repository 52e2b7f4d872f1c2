"""A page to play with: a photo and a prompt, the two scales of Eq. 13, the placements of Sec. 3.2.

    python demo/app.py                                   # the tiny model in assets/, at http://127.0.0.1:7860
    python demo/app.py --ckpt ltx-2.3-22b-dev.safetensors --lora st-drc.safetensors       # the real one

One video is made at a time; further visitors wait in a queue that they see. Only this machine reaches the page, unless
--host says otherwise. Photos are deleted after the answer, videos are never on the disk, nothing is sent anywhere.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import common  # isort: skip  # noqa: F401 (before torch: sets the wait policy of its threads)

import argparse
import os
import signal
from tempfile import TemporaryDirectory

import torch

from common.device import DTYPES
from common.errors import Parser, UserError, one_line_errors
from engine.recipe import PRESETS


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="an LTX-2.3 checkpoint (default: the tiny one in assets/)")
    parser.add_argument("--base", help="a whole LTX-2.3 file; it completes a --ckpt that is a transformer alone")
    parser.add_argument(
        "--gemma", help="folder or hub name of Gemma 3 (default: the one that belongs to the checkpoint)"
    )
    parser.add_argument("--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="LoRA; may be repeated")
    parser.add_argument("--lora-ignore-unknown", action="store_true", help="skip LoRA tensors without a place")
    parser.add_argument("--preset", choices=list(PRESETS), help="settings of a LoRA without nano-ST-DRC metadata")
    parser.add_argument("--faces", help="face pack that measures likeness (default: as sample.py)")
    for name in ("height", "width", "frames"):
        parser.add_argument(f"--{name}", type=int, help="of the videos (default: the checkpoint's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--fp8", action="store_true", help="DiT weights in 8 bits: half the memory")
    parser.add_argument("--offload", action="store_true", help="DiT weights in host memory, streamed block by block")
    parser.add_argument("--text-on-cpu", action="store_true", help="Gemma in host memory: slower, no GPU memory")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at; 0.0.0.0: all (%(default)s)")
    parser.add_argument("--port", type=int, help="default: the first free one from 7860 on")
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl+C: the folder of uploads is removed
    with TemporaryDirectory(prefix="st-drc-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads  # read when gradio is imported
        try:
            from demo.page import LAUNCH, build
        except ModuleNotFoundError as error:
            raise UserError(f'the page needs {error.name}: pip install "nano-st-drc[demo]", or make setup') from None
        from demo.studio import Studio

        page = build(Studio(options))
        _, url, _ = page.launch(server_name=options.host, server_port=options.port, prevent_thread_lock=True, **LAUNCH)
        print(f"the page is at {url} (Ctrl+C ends it)", flush=True)
        page.block_thread()


if __name__ == "__main__":
    with one_line_errors():
        main()
