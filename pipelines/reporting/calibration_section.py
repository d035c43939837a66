"""Whether a probability of 0.9 is right nine times in ten."""

from __future__ import annotations

import numpy as np

from clip_adapter.pipelines.reporting.class_section import Pair
from clip_adapter.pipelines.reporting.figures import MUTED, SERIES, Numbers, drawing, picture
from clip_adapter.pipelines.reporting.section import Section
from clip_adapter.pipelines.reporting.significance import BINS, reliability


def calibration_section(pair: Pair) -> Section:
    """Reliability diagrams before and after, over the test images of all seeds."""
    pictures, errors = [], []
    sides = (("before", pair.before_name, pair.before), ("after", pair.after_name, pair.after))
    for number, (when, name, some) in enumerate(sides):
        found = reliability(
            np.concatenate([p.confidence for p in some]), np.concatenate([p.right for p in some])
        )
        errors.append(found.error)
        with drawing((3.5, 3.2)) as (figure, axes):
            axes.plot([0, 1], [0, 1], color=MUTED, linestyle=":", linewidth=1)
            axes.vlines(
                found.confidence,
                np.minimum(found.confidence, found.accuracy),
                np.maximum(found.confidence, found.accuracy),
                color=SERIES[1 - number],
                linewidth=2,
                alpha=0.5,
            )
            sizes = 12 + 130 * found.images / found.images.max()
            axes.scatter(found.confidence, found.accuracy, sizes, color=SERIES[1 - number])
            axes.set(
                xlim=(-0.03, 1.03),
                ylim=(-0.03, 1.03),
                xlabel="probability of the predicted class",
                ylabel="how often it is right",
            )
            axes.set_title(f"{name}: ECE {100 * found.error:.1f} %")
            rows = zip(found.confidence, found.accuracy, found.images, strict=True)
            pictures.append(
                picture(
                    f"reliability-{when}",
                    f"Reliability {when} adapting ({name}): above the dotted line it is right more "
                    f"often than it says, below less often. "
                    "A larger disc stands for more images, but not in proportion.",
                    f"Reliability diagram of {name}: expected calibration error "
                    f"{100 * found.error:.1f} % in {BINS} bins.",
                    figure,
                    Numbers(
                        ["mean probability", "right", "images"],
                        [[f"{c:.3f}", f"{a:.3f}", f"{n}"] for c, a, n in rows],
                        "bins of equal width, images of all seeds",
                    ),
                )
            )
    text = (
        f"Expected calibration error, {BINS} bins: {100 * errors[0]:.1f} % before, "
        f"{100 * errors[1]:.1f} % after."
    )
    return Section("Calibration", [text], pictures)
