# SPDX-License-Identifier: MIT
"""`prompt-cam demo`: how does a Prompt-CAM do on drawn birds, where the truth is known?"""

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from prompt_cam_hf.cli.common import say
from prompt_cam_hf.messages import own_command

if TYPE_CHECKING:
    from prompt_cam_hf.training.demo import DemoReport


def demo(
    deep: Annotated[bool, typer.Option("--deep", help="Train the paper's Deep; takes longer.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for the results; by default prompt_cam_demo, with _deep and _seed_N added."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of prompts, order and augmentation.")] = 0,
) -> None:
    """Train on drawn birds, offline, and check the trait maps.

    A second run uses again what the first one left: drawn birds, cached features, the trained model.
    """
    # Training brings a second of imports that no other command needs.
    from prompt_cam_hf.training.demo import MODEL_FOLDER, REPORT_FILE, run_demo

    folder = out or Path("prompt_cam_demo" + ("_deep" if deep else "") + (f"_seed_{seed}" if seed else ""))
    if (folder / REPORT_FILE).is_file():
        say(f"{folder} holds a finished run: its model is used again. To train a new one, remove the folder.")
    elif (folder / MODEL_FOLDER).is_dir():
        say(f"{folder} holds a run that was interrupted; it goes on where it stopped.")
    if deep:
        say("The paper's Deep: prompts in every layer.")
    else:
        say(
            "The reduced variant: class prompts at the last layer only, no class-agnostic prompts, so that the layers "
            "before are computed once. --deep trains the paper's Deep."
        )
    report = run_demo(folder, deep=deep, seed=seed)
    _print_report(report)


def _print_report(report: "DemoReport") -> None:
    numbers = report.numbers
    classes = round(1 / numbers["chance"])
    hits, mass = (numbers["localisation"][name] for name in ("pointing_game", "relevance_mass_accuracy"))
    left, flipped = numbers["accuracy_left"], numbers["predictions_flipped"]
    table = Table(title=f"{numbers['num_birds']['test']} test birds of {classes} classes", title_justify="left")
    table.add_column("Measured, and below it what to compare it with")
    table.add_column("share", justify="right")
    for question, measured, beside in (
        ("Birds read correctly", numbers["accuracy"], {"by chance": numbers["chance"]}),
        (
            "Of these: the first head's strongest patch is on the trait",
            hits["first_head"],
            {
                "the same head, asked by the other classes": hits["other_classes"],
                "any patch of the bird": hits["bird_patches"],
                "any patch": hits["any_patches"],
            },
        ),
        (
            "Of these: the first head's attention that is on the trait",
            mass["first_head"],
            {
                "the same head, asked by the other classes": mass["other_classes"],
                "spread evenly over the bird": mass["bird_patches"],
            },
        ),
        (
            "Of these: still right with the first head's 3 strongest patches blurred",
            left["strongest_patches"],
            {"with 3 random patches of the bird blurred": left["bird_patches"]},
        ),
        (
            "Of these: read as another class once the class's traits are gone",
            flipped["all_traits"],
            {
                "once one of its traits is gone": flipped["one_trait"],
                "once another part's colour is gone": flipped["other_part"],
            },
        ),
    ):
        table.add_row(question, f"{measured:.1%}", style="bold")
        for name, value in beside.items():
            table.add_row(f"  {name}", f"{value:.1%}", style="dim")
    console = Console()
    console.print(table)
    folder = report.folder
    lines = {
        "Model": folder / "model",
        "All numbers": folder / "report.json",
        "Images": ", ".join(str(path) for path in report.figures),
        "Birds to try": folder / "birds",
    }
    for name, what in lines.items():
        console.print(f"{name + ':':14}{what}", markup=False, highlight=False, soft_wrap=True)
    same = "gives the same answers" if numbers["same_after_loading"] else "gives OTHER answers, which is a fault"
    console.print(f"The saved model, loaded by pipeline(), {same}.", soft_wrap=True)
    model, birds = (shlex.quote(str(folder / name)) for name in ("model", "birds"))
    console.print(f"Next: {own_command()} predict {model} {birds}", markup=False, highlight=False, soft_wrap=True)
