# SPDX-License-Identifier: MIT
"""`prompt-cam app`: a page in the browser that asks a model about images."""

import os
import signal
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Literal

import typer

from prompt_cam_hf.cli import common


def app(
    model: common.ModelArgument,
    examples: Annotated[
        Path | None, typer.Option(help="Folder of images to choose from, best in folders named after their classes.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to serve at; 0.0.0.0 lets other machines of the network in.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to serve at; 0 for any that is free.")] = 7860,
    share: Annotated[
        Literal["no", "yes"], typer.Option(help="Also make a public link, for a week, through Gradio's servers.")
    ] = "no",
    device: common.DeviceOption = None,
) -> None:
    """Open a page in the browser that asks the model about an image.

    The page runs until Ctrl-C. Images that visitors upload lie in a temporary folder, which is removed at the end.
    """
    from prompt_cam_hf.app import build_app

    with TemporaryDirectory(prefix="prompt_cam_app_", ignore_cleanup_errors=True) as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        try:
            page = build_app(model, examples=examples, device=device)
            page.launch(
                server_name=host, server_port=port or None, share=share == "yes", quiet=True, prevent_thread_lock=True
            )
        except ModuleNotFoundError as error:
            raise ValueError(str(error)) from error
        except OSError as error:
            if "empty port" in str(error):
                raise OSError(
                    f"The page cannot be served at {host}, port {port}; if the port is taken, choose another --port, "
                    "or 0 for any that is free."
                ) from error
            raise
        common.say(f"The page is at {page.local_url}; Ctrl-C stops it.")
        # Stopped by its system, the server tidies up as after Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        page.block_thread()
