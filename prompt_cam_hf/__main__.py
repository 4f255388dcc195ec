# SPDX-License-Identifier: MIT
"""`python -m prompt_cam_hf` is the command `prompt-cam`; `accelerate launch -m prompt_cam_hf` is it in processes."""

from prompt_cam_hf.cli import app

if __name__ == "__main__":
    app(prog_name="prompt-cam")
