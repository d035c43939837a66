"""`fit`'s options as they come from the methods that a line names."""

import hashlib
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from clip_adapter.adapters.registry import METHODS
from clip_adapter.errors import UserError
from clip_adapter.pipelines.commands.fit import fit, main
from clip_adapter.pipelines.fitting.config import FitConfig
from clip_adapter.pipelines.fitting.console_report import print_run
from clip_adapter.pipelines.fitting.options import parse
from clip_adapter.pipelines.fitting.plan import Plan
from clip_adapter.pipelines.fitting.run import FitResult
from clip_adapter.pipelines.saved.adapter_file import load_adapter
from tests import processes
from tests.pipelines import toy_methods
from tests.pipelines.run_files import grid_rows, results, same_fit, selected
from tests.pipelines.tiny_cache import short, tiny_data, write_cache

TOYS = "tests.pipelines.toy_methods"
DATA = tiny_data()


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_cache(tmp_path_factory.mktemp("cache") / "features.h5", DATA)


@pytest.fixture
def toys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both methods, known by their names."""
    for method in (toy_methods.WEIGHTED, toy_methods.WORSE):
        monkeypatch.setitem(METHODS, method.name, method)


def refusal(line: str) -> str:
    with pytest.raises(UserError) as refused:
        parse(line.split())
    return str(refused.value)


HELP = """
import sys
from clip_adapter.pipelines.console.entry import fit
sys.argv = ["fit", *sys.argv[1:]]
try:
    fit()
except SystemExit as ended:
    heavy = {"numpy", "jax", "flax", "optax", "h5py", "torch", "scipy", "sklearn", "matplotlib"}
    loaded = {name.partition(".")[0] for name in sys.modules}
    print("exit", ended.code, *sorted(heavy & loaded))
"""


@pytest.mark.parametrize(
    "line", ["--help", "--method all --help", "--version", "--alpha much", "--method svm"]
)
def test_help_and_refusals_load_no_array_library(line: str):
    done = subprocess.run(
        [sys.executable, "-c", HELP, *line.split()], capture_output=True, text=True
    )
    code = 0 if "help" in line or "version" in line else 2
    assert done.stdout.splitlines()[-1] == f"exit {code}", done.stderr
    if "help" in line:
        alpha = "--clip-adapter.alpha" if "all" in line else "--alpha"
        assert ("--clip-adapter.lr" in done.stdout) == ("all" in line)
        for flag in (alpha, "--lr", "--weight-decay", "--epochs", "--shots", "--select"):
            assert flag in done.stdout


def test_options_go_to_the_hyper_parameters_of_the_methods():
    config = parse(["--alpha", "0.2", "learned", "--lr", "0.1", "--drop-last", "true"])
    assert config.hyper == {
        "alpha": (0.2, "learned"),
        "learning_rate": (0.1,),
        "drop_last": (True,),
    }
    config = parse(["--method", "linear-probe", "--C", "1", "10"])
    assert (config.method, config.hyper) == (("linear-probe",), {"C": (1.0, 10.0)})
    assert parse([]).hyper == {}


@pytest.mark.usefixtures("toys")
def test_an_option_that_several_methods_have():
    """It needs a method's name before it, unless it means the same to all."""
    both = "--method clip-adapter weighted"
    said = refusal(f"{both} --alpha 0.3")
    assert "--alpha means something else to each method" in said
    assert "--clip-adapter.alpha or --weighted.alpha" in said
    config = parse([*both.split(), "--weighted.alpha", "9", "--clip-adapter.alpha", "0.5"])
    assert config.hyper == {"weighted.alpha": (9.0,), "clip-adapter.alpha": (0.5,)}
    # One of them alone may have it, too, which `--help` need not say.
    one = parse(["--weighted.alpha", "9", "--method", "weighted"])
    assert one.hyper == {"weighted.alpha": (9.0,)}
    # One of them alone means what it says.
    assert parse(["--method", "weighted", "--alpha", "9"]).hyper == {"alpha": (9.0,)}
    said = refusal(f"{both} --clip-adapter.alpha 9 --weighted.alpha much")
    assert "'much' is no number" in said


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--C 1", "clip-adapter has no --C; it belongs to linear-probe"),
        ("--method linear-probe --alpha 1", "linear-probe has no --alpha; it belongs to clip-ad"),
        ("--method zero-shot linear-probe --lr 1", "zero-shot and linear-probe has no --lr"),
        ("--zero-shot.alpha 0.3", "Unknown option --zero-shot.alpha"),
        ("--colour red", "Unknown option --colour"),
        ("--alpa 0.3", "perhaps you meant --alpha"),
        ("--method SVM", "There is no method 'SVM'; the methods are"),
        ("--method Nowhere_At_All:METHOD", "The method 'Nowhere_At_All:METHOD' cannot be imported"),
        ("--method ..up:METHOD", "cannot be imported"),
        (f"--method {TOYS}:nothing", "cannot be imported"),
        (f"--method {TOYS}:fit", "is no Method"),
        ("--shots many", "'many' is no number and not all"),
        ("--seeds 1.5", "'1.5' is no whole number"),
        ("--branch both --drop-last yes", "'yes' is neither true nor false"),
        ("--branch side", "invalid choice: 'side'"),
    ],
)
def test_lines_that_mean_nothing(line: str, words: str):
    said = refusal(line)
    assert words in said
    assert "\n" not in said and len(said) < 500


@pytest.mark.usefixtures("toys")
def test_several_methods_in_one_run(cache: Path, tmp_path: Path):
    """Each tries its own grid; on top stands the one that validation prefers, not the first one."""
    names = ("worse", "clip-adapter", "weighted")
    result = fit(
        short(
            cache,
            tmp_path / "run",
            method=names,
            baselines=("zero-shot", "weighted"),
            hyper={"clip-adapter.alpha": 0.0, "weighted.alpha": (0.0, 2.0, 4.0)},
        )
    )
    assert [row.method for row in result.results] == ["zero-shot", *names]
    rows_of = [*results(result.run), *grid_rows(result.run)]
    tried = [(row["method"], row["alpha"]) for row in rows_of if "alpha" in row]
    assert [alpha for method, alpha in tried if method == "weighted"] == ["0.0", "2.0", "4.0"]
    assert [alpha for method, alpha in tried if method == "clip-adapter"] == ["0.0"]
    rows = [row for row in result.results if row.method in names]
    best = max(rows, key=lambda row: (row.val_accuracy, -(row.val_nll or 0.0)))
    assert result.kept == best and best.method != "worse"
    for name in names:
        assert (result.run / "adapters" / name / "shots-4-seed-1" / "adapter.json").exists()
    assert same_fit(result.run, result.run / "adapters" / best.method / "shots-4-seed-1")


@pytest.mark.usefixtures("toys")
@pytest.mark.parametrize(("select", "shots"), [("none", (1, 2)), ("cv", (1,))])
def test_where_nothing_chose_none_is_kept(cache: Path, tmp_path: Path, capsys, select, shots):
    """And the command that is printed keeps one, as it was fitted."""
    names = ("zero-shot", "worse", "weighted")
    asked = FitConfig(cache, tmp_path / "run", names, (), shots, (1, 2), select)
    result = fit(asked)
    assert result.kept is None and not result.problem
    with pytest.raises(
        UserError, match=r"no adapter at .*run.*; name one of those in .*adapters\.$"
    ):
        load_adapter(result.run)
    *_, said, _, command = printed(result, capsys)
    assert f"no adapter is kept at the top, as nothing chose between {', '.join(names)}" in said
    again = fit(parse([*shlex.split(command)[1:], "--out", str(tmp_path / "again")]))
    assert again.kept and again.kept.key == ("worse", shots[-1], 1)
    assert same_fit(again.run, result.run / f"adapters/worse/shots-{shots[-1]}-seed-1")


@pytest.mark.usefixtures("toys")
def test_the_command_that_keeps_a_better_baseline(cache: Path, tmp_path: Path, capsys):
    config = FitConfig(cache, tmp_path / "run", ("worse",), ("weighted",), (1, 4))
    result = fit(config)
    (best,) = (r for r in result.results if r.key == ("weighted", 4, 1))
    assert result.kept and result.kept.method == "worse"
    *_, said, command = printed(result, capsys)
    ours, theirs = (f"{100 * row.val_accuracy:.2f} %" for row in (result.kept, best))
    assert f"baseline weighted did better on validation ({theirs} against {ours})" in said
    again = fit(parse([*shlex.split(command)[1:], "--out", str(tmp_path / "again")]))
    assert again.kept == best
    assert "did better on validation" not in "".join(printed(again, capsys))


def printed(result: FitResult, capsys: pytest.CaptureFixture[str]) -> list[str]:
    print_run(result, verbose=True)
    return capsys.readouterr().out.splitlines()


@pytest.mark.usefixtures("thin_grids")
def test_all_methods_that_the_cache_can_serve(cache: Path, tmp_path: Path, capsys):
    arguments = ["--cache", cache, "--out", tmp_path / "run", "--method", "all", "--shots", 4]
    with pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--epochs", "10"])
    assert ended.value.code == 0, capsys.readouterr().err
    served = [name for name, method in METHODS.items() if set(method.needs) <= {"text"}]
    assert [row["method"] for row in selected(tmp_path / "run")] == served
    printed = capsys.readouterr().out
    assert all(name in printed for name in served)


def test_a_method_of_ones_own(cache: Path, tmp_path: Path):
    """By MODULE:NAME, from the folder one stands in; and the run goes on, and is reported, only if
    it is named, for which others need not be."""
    source = Path(toy_methods.__file__).read_text().replace('"weighted"', '"their-own"')
    (tmp_path / "theirs.py").write_text(source)

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        return processes.run(command, tmp_path)

    mine = ["--method", "theirs:WEIGHTED"]
    values = ["--their-own.alpha", 1, 2]
    done = run(
        "fit", "--cache", cache, "--out", "run", "--shots", 2, *mine, "gda", *values, "--verbose"
    )
    assert done.returncode == 0, done.stderr
    assert [row["method"] for row in selected(tmp_path / "run")][-2:] == ["their-own", "gda"]
    assert "chosen settings of their-own" in done.stdout
    for command in (
        ["fit", "--resume", "run", "--verbose"],
        ["clip-adapter", "report", "run", "--html", "none"],
    ):
        alone = run(*command)
        assert alone.returncode == 2
        assert "--method theirs:WEIGHTED" in alone.stderr and alone.stderr.count("\n") == 1
        assert "damaged" not in alone.stderr
        named = run(*command, *mine)
        assert named.returncode == 0, named.stderr
        if command[0] == "fit":
            assert named.stdout == done.stdout
        assert "their-own" in named.stdout


def test_a_run_file_imports_nothing(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A received run folder names a module that lies beside it."""
    run = fit(short(cache, tmp_path / "run", alpha=0.5, epochs=1)).run
    (tmp_path / "payload.py").write_text("raise SystemExit('ran')")
    monkeypatch.chdir(tmp_path)
    plan = (run / "run.json").read_text().replace('"clip-adapter"', '"payload:METHOD"')
    (run / "run.json").write_text(plan)
    going_on = FitConfig(resume=run)
    with pytest.raises(UserError, match="SHA-256 does not match"):
        fit(going_on)
    # Somebody who means it makes the checksum agree.
    document = json.loads(plan)
    del document["sha256"]
    content = json.dumps(document, sort_keys=True).encode()
    document["sha256"] = hashlib.sha256(content).hexdigest()
    (run / "run.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match="name it too: --method payload:METHOD"):
        fit(going_on)
    assert "payload" not in sys.modules


def test_one_method_named_twice(cache: Path, tmp_path: Path):
    """Also by two of its names."""
    where = "clip_adapter.adapters.methods.clip_adapter:CLIP_ADAPTER"
    for names in (("clip-adapter", "clip-adapter"), ("clip-adapter", where)):
        with pytest.raises(UserError, match="names a method twice"):
            fit(short(cache, tmp_path / "run", method=names))
    assert isinstance(fit(short(cache, tmp_path / "run", method=where, epochs=1)).plan, Plan)
