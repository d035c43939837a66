"""What is answered for an image: a set of classes that holds its own as often as promised, and
whether it shows none of them; and when an adapter's held-out images are too few to say so."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from clip_adapter.adapters.decisions import Decisions, images_for, unlucky_coverage
from clip_adapter.errors import UserError
from clip_adapter.pipelines.saved.adapter_file import SavedAdapter
from clip_adapter.words import counted

NONE = "none of these"
FEW = 20  # images, below which a temperature is mostly its prior


@dataclass(frozen=True)
class Answer:
    """classes: (name, probability) of the set, most probable first; empty where no coverage was
    asked for. known: None where nothing is to be rejected. is_none: whether it is."""

    classes: tuple[tuple[str, float], ...] = ()
    known: float | None = None
    is_none: bool = False


@dataclass(frozen=True)
class Answers:
    """Makes them, of an adapter whose images suffice for `coverage` and `reject`."""

    adapter: SavedAdapter
    decisions: Decisions
    coverage: float | None
    reject: float | None

    def of(self, shares: npt.NDArray[np.float64], encoded: npt.NDArray[np.float32]) -> list[Answer]:
        """shares: (N, C) probabilities. encoded: (N, D) image features."""
        sets = np.zeros(shares.shape, np.bool_) if self.coverage is None else self.sets(shares)
        known = None if self.reject is None else self.known(shares, encoded)
        none = np.zeros(len(shares), np.bool_) if known is None else self.is_none(known)
        names, order = self.adapter.info.class_names, np.argsort(-shares, axis=1, kind="stable")
        answers = []
        for row, best in enumerate(order):
            classes = tuple((names[c], float(shares[row, c])) for c in best[sets[row, best]])
            own = None if known is None else float(known[row])
            answers.append(Answer(classes, own, bool(none[row])))
        return answers

    def columns(self) -> dict[str, type]:
        """Those that stand before the most probable classes, with the types of their values."""
        sets: dict[str, type] = {} if self.coverage is None else {"classes": list}
        known: dict[str, type] = {} if self.reject is None else {"known": float}
        return {"answer": str, **sets, **known}

    def sets(self, shares: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """(N, C)."""
        assert self.coverage is not None
        return self.decisions.sets(shares, self.coverage)

    def known(
        self, shares: npt.NDArray[np.float64], encoded: npt.NDArray[np.float32]
    ) -> npt.NDArray[np.float64]:
        """(N,)."""
        return self.decisions.known_of(shares, encoded, self.adapter.weights)

    def is_none(self, known: npt.NDArray[np.float64]) -> npt.NDArray[np.bool_]:
        """(N,)."""
        assert self.reject is not None
        return known <= self.reject

    def sentences(self) -> list[str]:
        """What is promised, by what, and what is not."""
        said = []
        if self.coverage is not None:
            unlucky = unlucky_coverage(self.decisions.images, self.coverage)
            said.append(
                f"coverage {percent(self.coverage)}: by {_by(self.decisions)}; on average so, one "
                f"time in ten below {_floor(unlucky)} %. Holds for images like those, over all "
                "classes together, not for each class"
            )
        if self.reject is not None:
            said.append(
                f"reject {percent(self.reject)}: about so many images of the adapter's own classes "
                f"are called {NONE}; of others that resemble them two in three may pass "
                "(`clip-adapter evaluate --unknown` says how many)"
            )
        return said


def answers_of(
    adapter: SavedAdapter, coverage: float | None, reject: float | None
) -> Answers | None:
    """None where neither is asked for.

    Raises UserError for shares that are none, and where the adapter's held-out images are too few
    to promise that.
    """
    asked = {"--coverage": coverage, "--reject": reject}
    for (flag, share), usual in zip(asked.items(), (0.95, 0.05), strict=True):
        if share is not None and not 0 < share < 1:
            raise UserError(f"{flag} is a share between 0 and 1, such as {usual}, not {share:g}.")
    if coverage is None and reject is None:
        return None
    decisions = adapter.decisions
    if decisions is None:
        given = next(flag for flag, share in asked.items() if share is not None)
        raise UserError(
            f"{given} needs images that were held out when the adapter was fitted, and its file "
            "has none: `fit` keeps them with the adapter at the top of a run folder; fit it again."
        )
    if coverage is not None:
        _check_enough(decisions.images, coverage, "--coverage", coverage)
    if reject is not None:
        _check_enough(decisions.images, 1 - reject, "--reject", reject)
    return Answers(adapter, decisions, coverage, reject)


def _check_enough(images: int, share: float, flag: str, given: float) -> None:
    missing = images_for(share) - images
    if missing <= 0:
        return
    most = _floor(images / (images + 1))
    if not most:
        raise UserError(
            f"No image was held out when the adapter was fitted, so {flag} {given:g} has nothing "
            f"to go by; label {missing} more, with two or more of a class."
        )
    promise, other = f"reject no less than {100 - most} %", 100 - most
    if flag == "--coverage":
        promise, other = f"promise at most {most} %", most
    raise UserError(
        f"{counted(images, 'image')} can {promise}; label {missing} more, or ask for {flag} "
        f"{other / 100:g}."
    )


def calibrated_by(decisions: Decisions | None) -> str:
    """A sentence where probabilities rest on little, else ""."""
    if decisions is None or decisions.images >= FEW:
        return ""
    if not decisions.images:
        return (
            "no image was held out to calibrate by: probabilities have the spread of zero-shot's, "
            "and --coverage and --reject nothing to go by"
        )
    return f"probabilities are calibrated by {_by(decisions)}: too few to trust them"


def _by(decisions: Decisions) -> str:
    images, chose = counted(decisions.images, "image"), decisions.chose
    which = "all of them" if chose == decisions.images else f"{chose:,}"
    also = f" ({which} chose the setting)" if chose else ""
    return f"{images}, each unseen by the fit that judged it{also}"


def percent(share: float) -> str:
    """`95 %`, `99.5 %`."""
    return f"{100 * share:g} %"


def _floor(share: float) -> int:
    return math.floor(100 * share)


def class_words(names: Sequence[str]) -> str:
    """The names of a set, in one cell."""
    return " | ".join(names)
