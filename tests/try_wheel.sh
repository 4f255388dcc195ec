#!/bin/sh
# Tries an installed package as a new user would, in the current folder: sh try_wheel.sh FOLDER_OF_PROGRAMS
set -eu
programs=$1
"$programs/prompt-cam" --version
"$programs/prompt-cam" --help | grep explain
"$programs/prompt-cam" train --list-recipes | grep own_photos
"$programs/prompt-cam" reproduce table2 --out out --birds-per-class 4 1 1 --num_train_epochs 2 --warmup_epochs 1
"$programs/python" -c "
import prompt_cam_hf
from prompt_cam_hf.birds import birds_dataset
assert 'site-packages' in prompt_cam_hf.__file__, prompt_cam_hf.__file__
birds_dataset('test', 1)[0]['image'].save('bird.png')
"
"$programs/prompt-cam" predict out/models/prompt_cam bird.png --top-k 2
"$programs/prompt-cam" explain out/models/prompt_cam bird.png --out traits
ls traits
