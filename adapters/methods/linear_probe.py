"""CLIP's linear probe: multinomial logistic regression on image features.

Radford et al. (arXiv 2103.00020, appendix A.3): the inverse regularisation strength C is chosen on
validation among 97 values from 1e-6 to 1e6, eight per decade, by a coarse grid that is refined
around its peak. They end L-BFGS after 1,000 iterations; here the minimum is certified.

    minimise  C · Σ_i CE(f_i K + b, y_i) + ½‖K‖²        logits = f K + b
"""

from clip_adapter.adapters.hyper import Hyper
from clip_adapter.adapters.method import Method

STEPS_PER_DECADE = 8
COARSE_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)


def logits(xp, arrays, setting, features, head):
    """f K + b, on un-normalised features; the text features take no part."""
    return features @ arrays["kernel"] + arrays["bias"]


def solver(task):
    """For one support set, view 0. What is not certified to be the minimum comes out as NaN, like
    a run that diverged, and so is never chosen."""
    import numpy as np

    from clip_adapter.adapters.methods.logistic.path import LogisticRegressionPath

    path = LogisticRegressionPath(task.features[0], task.labels, len(task.head.weights))

    def solve(setting):
        solution = path.solve(setting["C"])
        sound = 1.0 if solution.solved else np.nan
        return {"kernel": sound * solution.kernel, "bias": sound * solution.bias}

    return solve


def note(task):
    """A warning where the sweep takes minutes."""
    _, rows, dim = task.features.shape
    work = rows * min(rows, dim) * len(task.head.weights)
    minutes = len(COARSE) * 2 * work / WORK_PER_SECOND / 60
    if minutes < 1:
        return ""
    return f"The linear probe's search for C takes about {minutes:.0f} minutes for each task."


def coarse_to_fine(values):
    """CLIP's search for C on a logarithmic scale, unless the user named the values to try.

    Seven exponents two decades apart, then around the best so far both neighbours at half the
    distance, down to eight steps per decade; ties go to the stronger regularisation.
    """
    if tuple(values["C"]) != COARSE:
        for value in values["C"]:
            yield {"C": value}
        return
    scores = {}
    waiting = list(COARSE_EXPONENTS)
    distance = COARSE_EXPONENTS[1] - COARSE_EXPONENTS[0]
    while distance >= 1 / STEPS_PER_DECADE:
        for exponent in waiting:
            scores[exponent] = yield {"C": 10.0**exponent}
        distance /= 2
        centre = max(scores, key=lambda exponent: (scores[exponent], -exponent))
        around = (centre - distance, centre + distance)
        waiting = [e for e in around if COARSE_EXPONENTS[0] <= e <= COARSE_EXPONENTS[-1]]


# N · D · C that a value of C deals with in a second: 16,000 images of 1,000 classes at D = 512 took
# 244 s for 15 values, on one core.
WORK_PER_SECOND = 5e8
COARSE = tuple(10.0**exponent for exponent in COARSE_EXPONENTS)
LINEAR_PROBE = Method(
    name="linear-probe",
    source="arXiv 2103.00020",
    hyper={
        "C": Hyper(
            0.316,  # published with CLIP, where nothing chooses
            "Inverse regularisation strength; by default searched from coarse to fine.",
            COARSE,
            above=0,
        )
    },
    logits=logits,
    shapes={"kernel": "D C", "bias": "C"},
    solver=solver,
    propose=coarse_to_fine,
    note=note,
)
