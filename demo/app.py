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

from common.errors import Parser, UserError, one_line_errors
from engine.recipe import add_model_options


def parse_arguments() -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    for name in ("height", "width", "frames"):
        parser.add_argument(f"--{name}", type=int, help="of the videos (default: the checkpoint's)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
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
