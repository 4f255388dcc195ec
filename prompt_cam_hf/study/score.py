# SPDX-License-Identifier: MIT
"""`score_study`: the share of traits that raters recognised in each model's maps, and how far the raters agree."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.metrics import cohen_kappa_score

from prompt_cam_hf.explanations.results import format_table
from prompt_cam_hf.study.make import KEY, KEY_COLUMNS

ANSWER_COLUMNS = ("study", "rater", "picture", "trait", "recognised")
_RESAMPLES, _CONFIDENCE = 2000, 0.95
_QUESTION = ["picture", "trait"]


@dataclass(frozen=True)
class ModelScore:
    """What raters made of one model's maps.

    Attributes:
        model: Its number in the study and its name.
        share: The share of the questions about a trait that were answered with yes, 0 to 1.
        low, high: The 95 % interval of the share; NaN where there is one rater with one image.
        num_answers: Answers of all raters.
        kappa: The raters' agreement, from `agreement`; NaN where there is none to measure.
    """

    model: str
    share: float
    low: float
    high: float
    num_answers: int
    kappa: float


@dataclass(frozen=True)
class StudyScore:
    """The scores of a study.

    Attributes:
        models: In the order of the study.
        num_raters: How many people answered.
        kappa: The agreement over all pictures.
        missing: Answers that are lacking for every rater to have answered every question.
    """

    models: list[ModelScore]
    num_raters: int
    kappa: float
    missing: int

    def __str__(self) -> str:
        """A table of the models, and a line on the agreement."""
        rows = [
            (one.model, f"{one.share:.1%} [{one.low:.1%}, {one.high:.1%}]", str(one.num_answers), f"{one.kappa:.2f}")
            for one in self.models
        ]
        name = "Cohen's" if self.num_raters == 2 else "Fleiss'"
        table = format_table(("model", "traits recognised [95 % interval]", "answers", f"{name} kappa"), rows)
        lines = [f"{self.num_raters} raters, agreement over all pictures: {name} kappa {self.kappa:.2f}", table]
        if self.missing:
            lines.append(
                f"{self.missing} answers are missing; kappa is that of the questions which everyone answered."
            )
        return "\n".join(lines)


def score_study(folder: str | os.PathLike, answers: Sequence[str | os.PathLike], seed: int = 0) -> StudyScore:
    """Score the answers that raters saved from the form of a study.

    The interval is the pigeonhole bootstrap's, which draws raters and images anew at once (Owen, The pigeonhole
    bootstrap, Annals of Applied Statistics 2007, section 3): it covers other raters and other images alike, and is
    rather too wide than too narrow.

    Args:
        folder: The folder that `make_study` made.
        answers: CSV files of the answers, of one rater or more each.
        seed: Of the bootstrap.

    Raises:
        FileNotFoundError: the key or a file of answers is not there.
        ValueError: there are no answers, a file has another form or is of another study, or a rater answered a
            question twice.
    """
    key = _read(Path(folder) / KEY, KEY_COLUMNS)
    given = [_read(Path(file), ANSWER_COLUMNS) for file in answers]
    for file, table in zip(answers, given, strict=True):
        _check_answers(table, key, file)
    if not given or not sum(map(len, given)):
        raise ValueError("There are no answers; give the CSV files that the raters saved.")
    told = pd.concat(given).merge(key.drop(columns="study"), on=_QUESTION)
    twice = told.duplicated(["rater", *_QUESTION])
    if twice.any():
        first = told[twice].iloc[0]
        raise ValueError(f"The rater {first.rater!r} answered for {first.picture} twice; leave out one of the files.")
    told["yes"] = (told["recognised"] == "yes").astype(float)
    raters = told["rater"].nunique()
    models = []
    for number, (model, own) in enumerate(told.groupby("model", sort=False)):
        low, high = _interval(own, np.random.default_rng((seed, number)))
        models.append(
            ModelScore(str(model), float(own["yes"].mean()), low, high, len(own), agreement(_matrix(own, raters)))
        )
    models.sort(key=lambda one: int(one.model.partition(":")[0]))
    return StudyScore(models, raters, agreement(_matrix(told, raters)), raters * len(key) - len(told))


def agreement(answers: np.ndarray) -> float:
    """Measure how far raters agree beyond chance: 1 is full agreement, 0 what chance brings.

    Of two raters it is Cohen's kappa; of more, Fleiss' (Psychological Bulletin 1971): with p_i the share of pairs of
    raters who agree on question i, P its mean, and Q the sum over answers of the square of their share in all,
    kappa = (P - Q) / (1 - Q).

    Args:
        answers: (questions, raters), 0 or 1.

    Returns:
        Kappa; NaN with one rater, no question, or where all answers are the same.
    """
    num_questions, num_raters = answers.shape
    if num_raters < 2 or not num_questions or answers.min() == answers.max():
        return float("nan")
    if num_raters == 2:
        return float(cohen_kappa_score(answers[:, 0], answers[:, 1]))
    counts = np.stack([(answers == value).sum(axis=1) for value in (0, 1)], axis=1)
    agreeing = (counts * (counts - 1)).sum(axis=1) / (num_raters * (num_raters - 1))
    by_chance = float(((counts.sum(axis=0) / answers.size) ** 2).sum())
    return float((agreeing.mean() - by_chance) / (1 - by_chance))


def _matrix(told: pd.DataFrame, num_raters: int) -> np.ndarray:
    """The answers to the questions that all raters answered, (questions, raters)."""
    table = told.pivot(index=_QUESTION, columns="rater", values="yes")
    return table.dropna().to_numpy() if table.shape[1] == num_raters else np.zeros((0, num_raters))


def _interval(told: pd.DataFrame, random: np.random.Generator) -> tuple[float, float]:
    """The 95 % interval of the share, by drawing raters and images with replacement at once."""
    yes, number = (
        told.pivot_table(index="rater", columns="image", values="yes", aggfunc=how, fill_value=0).to_numpy(float)
        for how in ("sum", "count")
    )
    if yes.size < 2:
        return float("nan"), float("nan")
    rows, columns = (random.multinomial(n, np.full(n, 1 / n), size=_RESAMPLES) for n in yes.shape)
    drawn = [np.einsum("br,ri,bi->b", rows, table, columns) for table in (yes, number)]
    shares = drawn[0][drawn[1] > 0] / drawn[1][drawn[1] > 0]
    low, high = np.quantile(shares, ((1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2))
    return float(low), float(high)


def _read(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    if not path.is_file():
        raise FileNotFoundError(f"There is no file {path}.")
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except ValueError as error:
        raise ValueError(f"{path} is not a CSV file in UTF-8: {error}.") from error
    if list(table.columns) != list(columns):
        raise ValueError(f"{path} has the columns {', '.join(table.columns)}; they have to be {', '.join(columns)}.")
    return table


def _check_answers(table: pd.DataFrame, key: pd.DataFrame, file: str | os.PathLike) -> None:
    if foreign := set(table["study"]) - set(key["study"]):
        raise ValueError(
            f"{file} has answers to another study, {min(foreign)!r}; the key is of {key['study'].iloc[0]!r}."
        )
    asked = set(map(tuple, key[_QUESTION].to_numpy()))
    if unknown := set(map(tuple, table[_QUESTION].to_numpy())) - asked:
        raise ValueError(f"{file} answers a question that the study does not have: {', '.join(min(unknown))}.")
    if wrong := set(table["recognised"]) - {"yes", "no"}:
        raise ValueError(f"{file} has the answer {min(wrong)!r}; an answer is yes or no.")
    if "" in set(table["rater"]):
        raise ValueError(f"{file} has answers without the name of a rater.")
