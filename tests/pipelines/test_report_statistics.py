"""The report's statistics against independent references."""

import shlex
from itertools import combinations
from math import comb
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from sklearn.metrics import confusion_matrix

from clip_adapter.cache.reader import FeatureCache
from clip_adapter.extract.datasets.catalogue import load_catalogue
from clip_adapter.pipelines.fitting.make_plan import make_plan
from clip_adapter.pipelines.fitting.options import command_line, parse
from clip_adapter.pipelines.fitting.predictions import Predictions
from clip_adapter.pipelines.reporting.figures import series
from clip_adapter.pipelines.reporting.published import published
from clip_adapter.pipelines.reporting.searches import Fit, best_by, of_every_seed, ordered
from clip_adapter.pipelines.reporting.sections.classes import Pair, changed_most
from clip_adapter.pipelines.reporting.sections.images import changed_sides, originals, small_jpeg
from clip_adapter.pipelines.reporting.sections.manifold import embedded, neighbour_agreement
from clip_adapter.pipelines.reporting.significance import (
    bootstrap,
    confusion,
    holm,
    mcnemar,
    over_seeds,
    reliability,
)

RNG = np.random.default_rng(7)


@pytest.mark.parametrize("shift", [0.0, 0.15])
def test_the_bootstrap_is_scipys(shift: float):
    differences = RNG.choice([-1, -1 / 3, 0, 1 / 3, 1], 300) + shift
    found = bootstrap(differences)
    reference = scipy.stats.bootstrap(
        (differences,), np.mean, n_resamples=10_000, method="percentile", rng=3
    ).confidence_interval
    assert found.mean == pytest.approx(differences.mean())
    # The ends of both vary by chance, with 10,000 draws by about a hundredth of the width.
    width = reference.high - reference.low
    assert found.low == pytest.approx(reference.low, abs=0.04 * width)
    assert found.high == pytest.approx(reference.high, abs=0.04 * width)


def test_pairing_is_what_makes_a_small_difference_sure():
    """Two classifiers that differ on a few images only, all in favour of one."""
    differences = np.zeros(1000)
    differences[:12] = 1
    assert bootstrap(differences).sign == 1
    assert bootstrap(-differences).sign == -1
    assert bootstrap(np.tile([1.0, -1.0], 50)).sign == 0
    assert bootstrap(np.zeros(5)).sign == 0


def test_over_seeds_it_is_the_paired_t_test():
    one, other = np.array([0.9, 0.93, 0.91]), np.array([0.88, 0.9, 0.9])
    found = over_seeds((one - other).tolist())
    reference = scipy.stats.ttest_rel(one, other).confidence_interval()
    assert found is not None
    assert (found.low, found.high) == pytest.approx((reference.low, reference.high))
    assert found.sign == (1 if reference.low > 0 else 0)
    assert over_seeds([0.1]) is None


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (7, 2), (2, 7), (30, 12), (5, 5)])
def test_mcnemar_counts_what_chance_makes_as_uneven(better: int, worse: int):
    tosses = better + worse
    as_uneven = (
        comb(tosses, k) for k in range(tosses + 1) if abs(2 * k - tosses) >= abs(better - worse)
    )
    assert mcnemar(better, worse) == pytest.approx(sum(as_uneven) / 2**tosses)


def test_holms_correction_is_the_closed_test_of_bonferroni():
    """A hypothesis falls where every intersection that it is part of does: of k with the smallest
    p-value times k."""
    values = [0.01, 0.04, 0.03, 0.005, 0.03]
    for place, found in enumerate(holm(values)):
        others = [v for other, v in enumerate(values) if other != place]
        parts = [(values[place], *some) for k in range(5) for some in combinations(others, k)]
        assert found == pytest.approx(max(min(1, len(part) * min(part)) for part in parts))
    assert holm([]) == []


def test_the_calibration_error_by_its_definition():
    confidence = np.append(RNG.uniform(0.2, 1, 500), [1.0, 1 / 15, 0.0])
    right = RNG.uniform(size=503) < confidence**2
    error = 0.0
    for i in range(15):
        inside = (confidence > i / 15) & (confidence <= (i + 1) / 15)
        inside |= (confidence == 0) & (i == 0)
        if inside.any():
            error += inside.mean() * abs(right[inside].mean() - confidence[inside].mean())
    found = reliability(confidence, right)
    assert found.error == pytest.approx(error)
    assert found.images.sum() == 503
    assert reliability([0.75] * 4, [True, True, True, False]).error == pytest.approx(0)


def test_confusions_are_scikit_learns():
    labels, predicted = RNG.integers(0, 5, 200), RNG.integers(0, 5, 200)
    expected = confusion_matrix(labels, predicted, labels=range(6))
    np.testing.assert_array_equal(confusion(labels, predicted, 6), expected)


def test_an_axis_has_numbers_by_size_and_words_behind_them():
    assert ordered({"learned", "10", "0.8", "1e-05", "hypernet"}) == [
        *("1e-05", "0.8", "10", "hypernet", "learned"),
    ]


def test_no_two_series_look_alike():
    looks = [series(number) for number in range(28)]
    for told_by in (("color", "marker"), ("marker", "linestyle")):
        assert len({tuple(look[part] for part in told_by) for look in looks}) == 28


def test_a_point_is_the_best_over_everything_else():
    """By seed; a value at which all diverged is there and empty."""
    fits = [
        Fit(4, 1, {"alpha": "0.2", "rate": "1"}, 0.5),
        Fit(4, 1, {"alpha": "0.2", "rate": "2"}, 0.75),
        Fit(4, 2, {"alpha": "0.2", "rate": "1"}, 0.25),
        Fit(4, 2, {"alpha": "0.8", "rate": "1"}, None),
        Fit(4, 2, {"rate": "1"}, 1.0),
    ]
    assert best_by(fits, ["alpha"]) == {("0.2",): {1: 0.75, 2: 0.25}, ("0.8",): {}}


def predictions(labels: list[int], predicted: list[int], sure: list[float]) -> Predictions:
    arrays = np.array(labels, np.int32), np.array(predicted, np.int32)
    return Predictions(*arrays, np.array(sure, np.float32), (), ())


@pytest.fixture
def pair() -> Pair:
    """Six images, two seeds: image 0 and 1 are helped in both, 2 in one, 3 is hurt."""
    labels = [0, 0, 1, 1, 2, 2]
    zero = predictions(labels, [1, 2, 0, 1, 2, 2], [0.5, 0.9, 0.5, 0.8, 0.9, 0.9])
    one = predictions(labels, [0, 0, 1, 2, 2, 2], [0.9, 0.8, 0.9, 0.7, 0.9, 0.9])
    other = predictions(labels, [0, 0, 0, 0, 2, 2], [0.9, 0.8, 0.9, 0.7, 0.9, 0.9])
    return Pair([zero, zero], [one, other], "before", "after", ["a", "b", "c", "unseen"])


def test_images_that_changed_sides_in_every_seed(pair: Pair):
    helped, hurt = changed_sides(pair)
    assert helped.tolist() == [1, 0], "the surest first"
    assert hurt.tolist() == [3]


def test_classes_that_changed_most(pair: Pair):
    before, after = pair.recalls()
    np.testing.assert_allclose(before, [0, 0.5, 1, np.nan])
    np.testing.assert_allclose(after, [1, 0.25, 1, np.nan])
    assert changed_most(pair) == [0, 2, 1]
    assert changed_most(pair, 2) == [0, 1]


def test_neighbours_by_hand():
    rows = RNG.normal(size=(60, 5)).astype(np.float32)
    labels = RNG.integers(0, 3, 60).astype(np.int32)
    expected = []
    for i, row in enumerate(rows):
        cosines = [
            -np.inf if i == j else row @ x / np.linalg.norm(row) / np.linalg.norm(x)
            for j, x in enumerate(rows)
        ]
        votes = np.bincount(labels[np.argsort(cosines)[::-1][:10]], minlength=3)
        expected.append(votes.argmax() == labels[i])
    np.testing.assert_array_equal(neighbour_agreement(rows, labels), expected)


def test_the_map_is_the_same_every_time_and_keeps_clusters_apart():
    centres = 10 * np.eye(3, 8)
    rows = np.concatenate([c + RNG.normal(size=(20, 8)) for c in centres]).astype(np.float32)
    places = embedded(rows)
    np.testing.assert_array_equal(places, embedded(rows))
    labels = np.repeat(np.arange(3), 20).astype(np.int32)
    means = np.stack([places[labels == c].mean(axis=0) for c in range(3)])
    nearest = np.linalg.norm(places[:, None] - means, axis=2).argmin(axis=1)
    np.testing.assert_array_equal(nearest, labels)


def test_published_figures_are_those_of_the_log():
    """Averages over the eleven data sets, as Tip-Adapter's log has them."""

    def of(name: str, backbone: str = "RN50", pretrained: str = "openai"):
        about = {"name": backbone, "pretrained": pretrained}
        return published(SimpleNamespace(backbone=about, dataset={"name": name}))  # type: ignore[arg-type]

    names = "imagenet sun397 oxford_pets eurosat caltech101 dtd fgvc_aircraft food101 "
    names += "oxford_flowers ucf101 stanford_cars"
    found = [of(name) for name in names.split()]
    averages = {"zero-shot": 58.89, "clip-adapter": 74.44, "tip-adapter": 70.32}
    for method, average in (averages | {"tip-adapter-f": 75.83}).items():
        accuracies = [known.accuracies[method][16] for known in found if known]
        assert len(accuracies) == 11
        assert np.mean(accuracies) == pytest.approx(average, abs=0.02)
    assert of("oxford_pets").accuracies["clip-adapter"][1] == 85.99  # type: ignore[union-attr]
    assert of("digits") is of("dtd", "ViT-B-32") is of("dtd", "RN50", "yfcc15m") is None


@pytest.mark.parametrize(
    "line",
    [
        "--shots 1 2 --seeds 1 2 3",
        "--method clip-adapter tip-adapter --clip-adapter.alpha 0.2 --tip-adapter.alpha 1 2",
        "--method taskres --select none --lr 0.01 --drop-last false --epochs 7",
        "--preset paper --baselines --augment --repeat --shots all --alpha 0.2 hypernet",
        "--method tip-adapter clip-adapter --select cv --train-classes base --search halving "
        "--score balanced-accuracy",
        "--ablate alpha branch --alpha 0.2 0.4 --branch text both --refit",
        "--ablate learning_rate method --lr 0.1 0.2 --select none",
        "--ablate alpha reduction",
    ],
)
def test_the_command_makes_the_plan_again(line: str):
    def plan(words: list[str]):
        return make_plan(parse(words), "0" * 64, ("text",))

    stated = plan(shlex.split(line))
    program, *words = shlex.split(command_line(stated, Path()))
    assert program == "fit"
    assert plan(words) == stated


def picture(path: Path, shade: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (200, 100), (shade, 0, 0)).save(path)
    return path


def extracted(home: Path, **arguments: object) -> FeatureCache:
    name = arguments.pop("name", None)
    stated = SimpleNamespace(path=home / "features.h5", arguments=arguments, dataset={"name": name})
    return cast(FeatureCache, stated)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"dataset": "folder:HOME/photos"}, "test/b/2.png"),
        ({"dataset": "csv:HOME/photos/table.csv"}, "test/b/2.png"),
        ({"dataset": "csv:HOME/table.csv", "image_root": "HOME/photos/test"}, "b/2.png"),
        ({"dataset": "coop:HOME/pets", "name": "oxford_pets"}, "2.png"),
        ({"dataset": "oxford_pets", "data_root": "HOME"}, "2.png"),
    ],
)
def test_originals_come_from_the_folder_of_the_cache(
    tmp_path: Path, arguments: dict[str, str], name: str
) -> None:
    """And from nowhere else, whatever a received cache names."""
    home, private = tmp_path / "received", picture(tmp_path / "private" / "me.png", 99)
    entry = load_catalogue()["oxford_pets"]
    pets = home / ("pets" if "coop:" in arguments["dataset"] else entry.coop_dir)
    picture(home / "photos" / "test" / "b" / "2.png", 20)
    picture(pets / entry.coop_images / "2.png", 20)
    stated = {key: value.replace("HOME", str(home)) for key, value in arguments.items()}
    read = originals(extracted(home, **stated))
    assert read is not None
    assert read(name).getpixel((0, 0)) == (20, 0, 0)
    assert small_jpeg(read(name)).startswith("data:image/jpeg;base64,")
    (home / "photos" / "link.png").symlink_to(private)
    (pets / entry.coop_images / "link.png").symlink_to(private)
    above = "../" * (name.count("/") + 4)
    for other in (str(private), f"{above}private/me.png", "a/../../x.png", "\0", "link.png"):
        with pytest.raises((ValueError, OSError)):
            read(other)
    assert originals(extracted(tmp_path / "elsewhere", **stated)) is None


def test_originals_are_nowhere_else_unless_the_user_says_so(tmp_path: Path) -> None:
    picture(tmp_path / "photos" / "b" / "2.png", 20)
    home = tmp_path / "caches"
    outside = [f"folder:{tmp_path}/photos", "folder:/", "folder:..", f"csv:{tmp_path}/t.csv"]
    for dataset in (*outside, "folder:", "coop:.", "tfds:mnist", "dtd", "hf:a/b", 3, None):
        assert originals(extracted(home, dataset=dataset)) is None
        read = originals(extracted(home, dataset=dataset), tmp_path / "photos")
        assert read is not None and read("b/2.png").getpixel((0, 0)) == (20, 0, 0)
        for other in ("../photos/b/2.png", str(tmp_path / "photos" / "b" / "2.png")):
            with pytest.raises(ValueError, match="not below"):
                read(other)
    assert originals(extracted(Path("/"), dataset="folder:/")) is None
    digits = originals(extracted(home, dataset="digits"))
    assert digits is not None and digits("digits/0002").size == (8, 8)


def test_a_curve_has_only_values_that_every_seed_tried():
    """A search that goes its own way for each seed leaves one seed alone at many values."""
    fits = [
        Fit(4, seed, {"c": value}, accuracy)
        for value, own in {
            "1": {1: 0.5, 2: 0.9},
            "3": {1: 0.6},
            "4": {2: 0.95},
            "9": {1: 0.7, 2: None},
            "10": {1: 0.4, 2: 0.8},
        }.items()
        for seed, accuracy in own.items()
    ]
    kept = of_every_seed(best_by(fits, ["c"]))
    assert kept == {("1",): {1: 0.5, 2: 0.9}, ("10",): {1: 0.4, 2: 0.8}}
    alone = of_every_seed(best_by([fit for fit in fits if fit.seed == 1], ["c"]))
    assert len(alone) == 4, "of a single seed everything"
