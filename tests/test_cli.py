"""The command line: env never fails, check tells wrong from right, help exists, bad words are
refused.
"""

from __future__ import annotations

import pytest

from pyllmtune import _env, _selfcheck
from pyllmtune.__main__ import main
from tests import helpers


def test_env_prints_every_floor(capsys):
    assert main(["env"]) == 0
    out = capsys.readouterr().out
    for word in ("torch", "backend cpp", "backend cuda", "backend triton", "PYLLMTUNE_BACKEND"):
        assert word in out


def test_env_survives_a_broken_probe(monkeypatch):
    def broken() -> str:
        raise OSError("no such thing")

    monkeypatch.setattr(_env, "_cpu", broken)
    assert "unknown (OSError: no such thing)" in _env.report()


def test_check_passes_here(capsys):
    assert main(["check"]) == 0
    assert "token_logprobs        reference  cpu   ok" in capsys.readouterr().out


def test_check_catches_a_wrong_kernel(monkeypatch, capsys):
    helpers.need("cpp")
    right = _selfcheck.CHECKS["token_logprobs"]

    def wrong(backend, device, dtype):
        values = right(backend, device, dtype)
        return [value * (1.0001 if backend == "cpp" else 1.0) for value in values]

    monkeypatch.setitem(_selfcheck.CHECKS, "token_logprobs", wrong)
    assert main(["check"]) == 1
    assert "token_logprobs        cpp        cpu   WRONG" in capsys.readouterr().out


@pytest.mark.parametrize(
    "arguments", (["--help"], ["env", "--help"], ["demo", "--help"]), ids=" ".join
)
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0
    assert "usage" in capsys.readouterr().out


@pytest.mark.parametrize("arguments", ([], ["fly"], ["env", "--fast"]), ids=" ".join)
def test_bad_words_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
