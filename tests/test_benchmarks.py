"""The benchmarks run, save, refuse bad words, and print no time of a wrong result."""

from __future__ import annotations

import csv
from importlib.util import find_spec

import pytest
import torch

from benchmarks import bench_token_logprobs, hf_sampling, plot, report, targets
from benchmarks.__main__ import main
from pyllmtune import filter_logits

SMALL = ["--quick", "--threads", "1", "--repeat", "2"]


def saved(folder) -> list[dict[str, str]]:
    (path,) = folder.glob("*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(autouse=True)
def _as_a_user_runs_it():
    """Filling every new tensor with NaN is not what is to be timed; one thread waits for nobody."""
    torch.use_deterministic_algorithms(False)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("word", (*targets.SHAPES,))
def test_quick_run_saves_every_provider(word, tmp_path, capsys):
    assert main([word, *SMALL, "--save", "--output", str(tmp_path)]) == 0
    assert "WRONG" not in capsys.readouterr().out
    rows = saved(tmp_path)
    assert {row["provider"].split()[0] for row in rows} >= {"pyllmtune", "eager", "read", "clone"}
    assert all(row["op"] == word and float(row["median_ms"]) > 0 for row in rows)
    assert all(row["percent_of_floor"] for row in rows if row["verdict"] == "ok")

    (path,) = tmp_path.glob("*.csv")
    if find_spec("matplotlib") is None:
        assert plot.main([str(path)]) == 2
        assert "matplotlib is not installed" in capsys.readouterr().err
    else:
        assert plot.main([str(path)]) == 0
        assert path.with_name(f"{path.stem}_{word}.png").stat().st_size > 10_000


def test_a_saved_row_has_its_key_and_a_second_run_is_added(tmp_path):
    arguments = ["policy_loss", *SMALL, "--cases", "gspo", "--save", "--output", str(tmp_path)]
    assert main(arguments) == 0
    once = saved(tmp_path)
    assert main(arguments) == 0
    assert saved(tmp_path)[: len(once)] == once and len(saved(tmp_path)) == 2 * len(once)
    may_be_empty = {"trl", "commit"}  # not installed, or no git checkout
    for row in once:
        assert list(row) == [*report.KEY, *report.VALUES]
        assert all(row[name] for name in report.KEY if name not in may_be_empty)


def test_quick_runs_are_not_saved_unless_asked_and_leave_the_threads_as_they_were(tmp_path):
    arguments = ["policy_loss", "--quick", "--threads", "2", "--cases", "gspo"]
    assert main([*arguments, "--output", str(tmp_path)]) == 0
    assert not list(tmp_path.iterdir())
    assert torch.get_num_threads() == 1


def spoil(monkeypatch, name: str, spoiled) -> None:
    """Plant a provider whose results ``spoiled`` has touched."""
    right = bench_token_logprobs.scorers

    def planted(*arguments, **options):
        table = right(*arguments, **options)
        score = table[name]
        table[name] = lambda logits, tokens: spoiled(score(logits, tokens))
        return table

    monkeypatch.setattr(bench_token_logprobs, "scorers", planted)


def lines_of(out: str, name: str) -> list[str]:
    return [line.strip() for line in out.splitlines() if line.strip().startswith(name)]


def ours() -> str:
    (name,) = bench_token_logprobs.our_backends(torch.device("cpu"), torch.float32)
    return f"pyllmtune {name}"


def test_the_gate_stops_a_wrong_result_of_ours(monkeypatch, tmp_path, capsys):
    spoil(monkeypatch, ours(), lambda values: tuple(value * 1.0001 for value in values))
    arguments = ["token_logprobs", *SMALL, "--cases", "forward over V"]
    assert main([*arguments, "--save", "--output", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    lines = lines_of(out, ours())
    assert lines and all("WRONG: error 1.0e-04, 10 times what is allowed" in line for line in lines)
    rows = saved(tmp_path)
    assert all(row["median_ms"] == "" for row in rows if row["provider"] == ours())
    assert all(row["times_ours"] == "" for row in rows)  # no speed-up over a wrong result
    assert all(row["median_ms"] for row in rows if row["provider"] == "eager")


def test_the_gate_sees_the_small_entries_of_a_gradient(monkeypatch, capsys):
    """A value that is right and a gradient that is wrong where the probabilities are small."""

    class Truncate(torch.autograd.Function):
        @staticmethod
        def forward(ctx, logits):
            return logits.clone()

        @staticmethod
        def backward(ctx, grad):
            return torch.where(grad.abs() < 1e-5 * grad.abs().max(), 0, grad)

    right = bench_token_logprobs.scorers

    def planted(*arguments, **options):
        table = right(*arguments, **options)
        score = table["eager"]
        table["eager"] = lambda logits, tokens: score(Truncate.apply(logits), tokens)
        return table

    monkeypatch.setattr(bench_token_logprobs, "scorers", planted)
    assert main(["token_logprobs", *SMALL, "--cases", "backward"]) == 0  # a baseline, not ours
    lines = lines_of(capsys.readouterr().out, "eager")
    assert lines and all("WRONG" in line for line in lines)


def test_a_provider_that_raises_is_shown(monkeypatch, capsys):
    def broken(values):
        raise RuntimeError("no such thing")

    spoil(monkeypatch, ours(), broken)
    assert main(["token_logprobs", *SMALL, "--cases", "forward over V"]) == 1
    assert "FAILED: RuntimeError: no such thing" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments",
    (
        [],
        ["softmax"],
        ["policy_loss", "--dtype", "int8"],
        ["policy_loss", "--providers", "magic"],
        ["policy_loss", "--rows", "0"],
        ["policy_loss", "--threads", "0"],
        ["policy_loss", "--seconds", "-1"],
        ["policy_loss", "--repeat", "3", "--seconds", "3"],
    ),
    ids=" ".join,
)
def test_bad_words_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    assert "usage" in capsys.readouterr().err


def test_an_unknown_case_is_refused_with_the_names(capsys):
    assert main(["policy_loss", "--quick", "--cases", "dpo"]) == 2
    assert "there are: ppo token level, grpo" in capsys.readouterr().err


def test_targets_are_met_missed_or_not_judged():
    def row(provider: str, ms: float, case: str = "forward", threads: int = 2) -> report.Row:
        return {
            "op": "token_logprobs",
            "case": case,
            "provider": provider,
            "dtype": "float32",
            "shape": targets.SHAPES["token_logprobs"],
            "threads": threads,
            "verdict": "ok",
            "median_ms": ms,
        }

    rows = [
        *(row("pyllmtune cpp", 2.0), row("pyllmtune cpp", 3.0, threads=1)),
        *(row("eager", 14.2), row("torch.compile", 5.0)),
        row("pyllmtune cpp", 10.0, "backward"),
        row("pyllmtune cpp", 3.2, "backward, 70 % of the rows zero"),
    ]
    lines = {
        line.split("  ")[-1].strip(): line.split()[0]
        for line in targets.judge("token_logprobs", rows)
    }
    assert lines["forward, float32: times as fast as eager"] == "met"  # 7.1
    assert lines["forward, float32: times as fast as torch.compile"] == "MISSED"  # 2.5
    assert lines["forward, bfloat16: times as fast as trl"] == "not"
    assert lines["backward, 70 % of the rows zero: share of the dense backward"] == "met"
    assert lines["forward, float32: one thread over two"] == "MISSED"  # 1.5


def test_the_baseline_of_sampling_keeps_what_ours_keeps():
    """On rows whose cumulative sums are far from the threshold; of ties at rank k it keeps all."""
    z = torch.randn(20, 500) * 3
    for filters in ({"top_k": 7}, {"top_p": 0.9}, {"top_k": 50, "top_p": 0.8}):
        got, want = hf_sampling.warp(z, **filters), filter_logits(z, **filters)
        assert torch.equal(got, want)
    drawn = hf_sampling.sample(z, top_k=3)
    assert bool((filter_logits(z, top_k=3).gather(-1, drawn[:, None]) > -torch.inf).all())
